"""Both sides' programs through the TPU compiler: memory, HBM bytes, collectives, compile time.

python -m benchmarks.tunix.v5e [--cases ours-decode tunix-decode-default]
needs the environment of `python -m benchmarks.tunix.install` for Tunix's cases

Nothing is run, and nothing here is a time on a TPU; docs/tunix.md says what is compiled. A decode
row counts the body of the loop alone, by the same instrument on both sides; its peak and compile
time are of the whole program. A case takes minutes, Tunix's updates the most.
"""

import functools
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import jax
import tyro

from benchmarks.timing import print_row
from benchmarks.tunix.cases import COMPILED, MODEL, RUN, TOPOLOGY, Program, S, T
from benchmarks.tunix.sides import SideProcess, start_tunix
from benchmarks.tunix.theirs import turns
from gemma_grpo import model
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.planning import hlo, programs, topology

OURS = {"decode": "rollout", "logps": "reference", "update": "update"}  # as ours are called
SIZES = {"dtype": RUN.model.dtype, "prompt_length": S, "budget": T}


def main(cases: tuple[str, ...] = tuple(COMPILED)) -> None:
    """Compile the cases, one after another, and print a row for each.

    Args:
        cases: which, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        for name in cases:
            about = {"case": name, "topology": TOPOLOGY, "model": MODEL, **SIZES}
            about |= asdict(COMPILED[name])
            print_row(benchmark="tunix/v5e", **about, **compiler.compiled(COMPILED[name]))


class Compiler:
    """Compiles and counts programs of either side for `devices`, which are not there."""

    def __init__(self, folder: Path):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
        # Also sets what libtpu wants of the environment, which Tunix's process inherits.
        self.devices, self.folder = topology.devices(TOPOLOGY), folder

    @functools.cached_property
    def tunix(self) -> SideProcess:
        """Its process, started when it is first needed."""
        return start_tunix("programs.py", folder=self.folder)

    def compiled(self, case: Program) -> dict:
        """What the compiler says of a case."""
        text = self.folder / "program.hlo"
        if case.side == "tunix":
            read = self.tunix.call("compile", hlo=str(text), settings=settings(case))
        else:
            mesh = meshes.data_mesh(self.devices)
            (program,) = (
                each
                for each in programs.of_step(run_of(case), model.CONFIGS[MODEL], mesh)
                if each.name == OURS[case.program]
            )
            read = turns.compiled(program.trace(), str(text))
            read["versions"] = turns.versions("gemma_grpo", "jax", "libtpu")
        if case.program == "decode" and read["fits"]:
            body = hlo.loop_body(hlo.parse(text.read_text()))
            read["step_bytes"] = round(body.bytes)
            read["step_collectives"] = sum(body.collectives.values())
        return read

    def flops(self, case: Program) -> int:
        """Matmul FLOPs of a program of Tunix's, its decode loop for one turn."""
        return self.tunix.call("flops", settings=settings(case))["flops"]


def run_of(case: Program) -> RunConfig:
    """The preset with the settings of a case of ours."""
    beta = 0.04 if case.program == "logps" else 0.0  # a step has log-probs of its own only then
    stage = replace(
        RUN.grpo,
        prompts_per_step=case.sequences // RUN.grpo.num_generations,
        pack_tokens=case.pack_tokens,
        loss=replace(RUN.grpo.loss, beta=beta),
    )
    layout = replace(RUN.model, rollout_layout=case.layout, remat=case.remat)
    return replace(RUN, grpo=stage, model=layout)


def settings(case: Program) -> dict:
    """What Tunix's process is told of a case."""
    its = ("program", "sequences", "remat", "fsdp", "tp", "replicated")
    about = {"topology": TOPOLOGY, "shape": asdict(model.CONFIGS[MODEL]), **SIZES}
    return about | {name: getattr(case, name) for name in its}


if __name__ == "__main__":
    tyro.cli(main)
