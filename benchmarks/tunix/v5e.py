"""Both sides' programs through the TPU compiler: memory, HBM bytes, collectives, compile time.

python -m benchmarks.tunix.v5e [--cases ours-decode tunix-decode-default]

Nothing is run, and nothing here is a time on a TPU; docs/tunix.md says what is compiled. A decode
row counts the body of the loop alone, by the same instrument on both sides; its peak and compile
time are of the whole program. A case takes minutes, Tunix's updates the most. `print_largest` is
the command `largest`.
"""

import bisect
import functools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import tyro

from benchmarks.timing import chosen, print_row
from benchmarks.tunix.sides import SideProcess, start
from benchmarks.tunix.theirs import turns
from gemma_grpo import model, presets
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.planning import hlo, programs, topology

MODEL, TOPOLOGY, CHIPS = "gemma3-1b", "v5e:2x4", 8
RUN, CONFIG = presets.preset(MODEL), model.CONFIGS[MODEL]
S, T = RUN.model.max_prompt_length, RUN.model.max_completion_length
SIZES = {"dtype": RUN.model.dtype, "prompt_length": S, "budget": T}
WHERE = {"topology": TOPOLOGY, "model": MODEL, **SIZES}
OURS = {"decode": "rollout", "logps": "reference", "update": "update"}  # as ours are called


@dataclass(frozen=True)
class Program:
    """A program of one side."""

    side: str
    program: str  # decode (with us the prefill too), Tunix's prefill, logps (no gradient), update
    remat: str  # of ours none, dots or full; of Tunix NONE, BLOCK or DECODER
    sequences: int = 64  # all rows, on all chips
    layout: str = "data"  # of ours
    pack_tokens: int = RUN.grpo.pack_tokens  # of ours; 0 takes all padded rows at once, as Tunix
    fsdp: int = CHIPS  # of Tunix's mesh, as tp
    tp: int = 1
    replicated: bool = False  # Tunix's weights are on all chips


CASES = {
    "ours-decode": Program("ours", "decode", "none", layout="tensor_parallel"),
    "ours-decode-data": Program("ours", "decode", "none"),
    "ours-logps": Program("ours", "logps", "none"),
    "ours-update": Program("ours", "update", "full", pack_tokens=0),
    "ours-update-dots": Program("ours", "update", "dots"),
    "ours-update-packed": Program("ours", "update", "full"),  # as the preset has it
    "ours-update-packed-kept": Program("ours", "update", "none"),
    "tunix-decode-default": Program("tunix", "decode", "NONE", fsdp=2, tp=4),  # its 1B recipe's
    "tunix-decode-best": Program("tunix", "decode", "NONE", replicated=True),
    "tunix-prefill-best": Program("tunix", "prefill", "NONE", replicated=True),
    "tunix-logps-best": Program("tunix", "logps", "NONE"),
    "tunix-update-best": Program("tunix", "update", "DECODER"),
    # A step that adds up gradients of eight at a time keeps their sum beside this.
    "tunix-update-8": Program("tunix", "update", "DECODER", sequences=8),
}
STEPS = {"ours-update": 64, "tunix-update-best": 32}  # of `largest`: sequences from batch to batch


def main(cases: tuple[str, ...] = tuple(CASES)) -> None:
    """Compile cases, by name, one after another, and print a row for each."""
    compiler = Compiler()
    for name, case in chosen(cases, CASES).items():
        about = {"case": name, **WHERE, **asdict(case)}
        print_row(benchmark="tunix/v5e", **about, **compiler.compiled(case))


def print_largest(cases: tuple[str, ...] = tuple(STEPS)) -> None:
    """Look for the largest batch of cases, by name, and print a row for each."""
    compiler = Compiler()
    for name, step in chosen(cases, STEPS).items():
        case, peaks = CASES[name], {}

        def fits(sequences: int, case=case, peaks=peaks) -> bool:
            read = compiler.compiled(replace(case, sequences=sequences))
            peaks[sequences] = read.get("peak")
            return read["fits"]

        most = largest(fits, known=case.sequences, step=step)
        about = {"case": name, "side": case.side, "remat": case.remat, **WHERE}
        found = {"sequences": most, "refused": most + step, "peaks": peaks}
        print_row(benchmark="tunix/largest", **about, **found)


def largest(fits: Callable[[int], bool], *, known: int, step: int) -> int:
    """The largest that fits of `known`, which does, and whole steps beyond; all smaller ones are
    taken to fit too. `known` is a step, or some power of two times one."""
    while fits(2 * known):
        known *= 2
    larger = range(known + step, 2 * known, step)
    return known + step * bisect.bisect(larger, False, key=lambda n: not fits(n))


class Compiler:
    """Compiles and counts programs of either side for `devices`, which are not there."""

    def __init__(self):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
        # Also sets what libtpu wants of the environment, which Tunix's process inherits.
        self.devices, self.folder = topology.devices(TOPOLOGY), tempfile.TemporaryDirectory()

    @functools.cached_property
    def tunix(self) -> SideProcess:
        """Its process, started when it is first needed."""
        return start("tunix", Path(self.folder.name))

    def compiled(self, case: Program) -> dict:
        """What the compiler says of a case."""
        if case.side == "tunix":
            read = self.tunix.call("compile", settings=settings(case))
        else:
            step = programs.of_step(run_of(case), CONFIG, meshes.data_mesh(self.devices))
            (program,) = (each for each in step if each.name == OURS[case.program])
            read = turns.compiled(program.trace())
            read["versions"] = turns.versions("gemma_grpo", "jax", "libtpu")
        text = read.pop("hlo", "")
        if case.program == "decode" and text:
            body = hlo.loop_body(hlo.parse(text))
            read["step_bytes"] = round(body.bytes)
            read["step_collectives"] = sum(body.collectives.values())
        return read

    def flops(self, case: Program) -> int:
        """Matmul FLOPs of a program of Tunix's, its decode loop for one turn."""
        return self.tunix.call("flops", settings=settings(case))["flops"]


def run_of(case: Program) -> RunConfig:
    """The preset with the settings of a case of ours."""
    return RUN.replace(
        {
            "model.rollout_layout": case.layout,
            "model.remat": case.remat,
            "grpo.prompts_per_step": case.sequences // RUN.grpo.num_generations,
            "grpo.pack_tokens": case.pack_tokens,
            # A step has log-probs of its own only with a beta.
            "grpo.loss.beta": 0.04 if case.program == "logps" else 0.0,
        }
    )


def settings(case: Program) -> dict:
    """What Tunix's process is told of a case."""
    return {"topology": TOPOLOGY, "shape": asdict(CONFIG), **SIZES, **asdict(case)}


if __name__ == "__main__":
    tyro.cli(main)
