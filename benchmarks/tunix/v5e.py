"""Both sides' programs through the TPU compiler: memory, HBM bytes, collectives, compile time.

python -m benchmarks.tunix.v5e [--cases ours-decode tunix-decode-default]
needs the environment of `python -m benchmarks.tunix.install`

Gemma 3 1B, bfloat16, 512 + 800 tokens, for a v5e:2x4 that is not there: 64 sequences, 8 a chip, all
weights trained, beta 0. Nothing is run, and nothing here is a time on a TPU. Ours are the programs
that training jits (`gemma_grpo.planning.programs`); theirs are `_train_step`,
`compute_per_token_logps` and `_decode_fn` of the release, donated as it donates, its activations
placed as on a TPU.

A decode row counts the body of the loop alone (`gemma_grpo/planning/hlo.py`), the same instrument
on both sides; its peak and compile time are of the whole program, which with us is prefill and
loop in one; `floor` is what a step must read at the least, the weights that lie on a chip and its
cache, less `on_chip`, what the compiler keeps in on-chip memory from step to step.
Ours keeps float32 master weights and moments, Tunix bfloat16 ones: that is 0.75 GB a chip against
us in the update. The packed update is of the trace of `benchmarks.lengths`. A case takes minutes,
Tunix's updates the most; a row is printed when it is done.
"""

import dataclasses
import importlib.metadata
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import tyro

from benchmarks import packing
from benchmarks.tunix import install
from benchmarks.tunix.sides import start_theirs
from gemma_grpo import model, presets
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.planning import hlo, programs, topology

TOPOLOGY, MODEL = "v5e:2x4", "gemma3-1b"
OURS = {"decode": "rollout", "logps": "reference", "update": "update"}  # as ours are called
THEIRS = {"prefill": "prefill", "decode": "decode", "logps": "logps", "update": "train"}


@dataclass(frozen=True)
class Case:
    """A side and a program; the layout of our rollout, and whether our update is packed; and
    Tunix's settings (`replicated`: weights on all chips, rows sharded)."""

    side: str
    program: str
    sequences: int = 64
    layout: str = "data"
    packed: bool = False
    fsdp: int = 8
    tp: int = 1
    remat: str = "none"
    replicated: bool = False


CASES = {
    "ours-decode": Case("ours", "decode", layout="tensor_parallel"),
    "ours-decode-data": Case("ours", "decode"),
    "ours-logps": Case("ours", "logps"),
    "ours-update": Case("ours", "update", remat="full"),  # as the preset has it
    "ours-update-dots": Case("ours", "update", packed=True, remat="dots"),
    "ours-update-packed": Case("ours", "update", packed=True, remat="full"),
    "ours-update-packed-kept": Case("ours", "update", packed=True),
    "tunix-decode-default": Case("tunix", "decode", fsdp=2, tp=4),  # its 1B recipe's mesh
    "tunix-decode-best": Case("tunix", "decode", replicated=True),
    "tunix-prefill-best": Case("tunix", "prefill", replicated=True),
    "tunix-logps-best": Case("tunix", "logps"),
    "tunix-update-best": Case("tunix", "update", remat="DECODER"),
    "tunix-update-default": Case("tunix", "update", sequences=32, fsdp=2, tp=4, remat="DECODER"),
}


def main(
    cases: tuple[str, ...] = tuple(CASES), environment: Path | None = None, keep: Path | None = None
) -> None:
    """Compile the cases, one after another, and print a row for each.

    Args:
        cases: which, by name.
        environment: folder of Tunix's environment.
        keep: folder to leave the compiled programs' HLO in.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        for name in cases:
            row = {"benchmark": "tunix/v5e", "case": name}
            row |= compile_case(CASES[name], folder / f"{name}.hlo", environment)
            print(json.dumps(row), flush=True)


def compile_case(case: Case, text: Path, environment: Path | None) -> dict:
    """A case with its figures; its HLO, if it fits, goes to `text`."""
    jax.config.update("jax_platforms", "cpu")
    if case.side == "ours":
        read = compile_ours(case, text)
    else:
        read = compile_theirs(case, text, environment or install.default_folder())
    if case.program == "decode" and read["fits"]:
        read |= decode_figures(text.read_text())
        read["floor"] = floor(case)
    shapes = {"model": MODEL, "dtype": "bfloat16", "prompt_length": _S, "budget": _T}
    return {"topology": TOPOLOGY} | shapes | dataclasses.asdict(case) | read


_RUN = presets.preset(MODEL)
_S, _T = _RUN.model.max_prompt_length, _RUN.model.max_completion_length


def compile_ours(case: Case, text: Path) -> dict:
    """The figures of our program; its HLO goes to `text`."""
    stage = _RUN.grpo
    beta = 0.04 if case.program == "logps" else 0.0  # a step has log-probs of its own only then
    stage = replace(
        stage,
        prompts_per_step=case.sequences // stage.num_generations,
        loss=replace(stage.loss, beta=beta),
    )
    mesh = meshes.data_mesh(topology.devices(TOPOLOGY))
    settings = replace(_RUN.model, rollout_layout=case.layout, remat=case.remat)
    run, config = replace(_RUN, grpo=stage, model=settings), model.CONFIGS[MODEL]
    if case.packed:
        program = packing.update_on(
            packing.packed_trace(run, num_devices=mesh.size), run, config, mesh
        )
    else:
        made = {one.name: one for one in programs.of_step(run, config, mesh)}
        program = made[OURS[case.program]]
    lowered = program.trace().lower()
    versions = {name: importlib.metadata.version(name) for name in ("gemma_grpo", "jax", "libtpu")}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "why": " ".join(str(error).split())[:300], "versions": versions}
    memory = executable.memory_analysis()
    read = {
        "fits": True,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "compile_wall": time.perf_counter() - wall,
        "compile_cpu": time.process_time() - cpu,
        "versions": versions,
    }
    text.write_text(executable.as_text())
    return read


def compile_theirs(case: Case, text: Path, environment: Path) -> dict:
    """The figures of Tunix's program; its HLO goes to `text`."""
    side = start_theirs(environment, folder=text.parent, script="programs.py")
    read = side.call(
        "compile",
        program=THEIRS[case.program],
        hlo=str(text.absolute()),
        shape=dataclasses.asdict(model.CONFIGS[MODEL]),
        dtype="bfloat16",
        remat=case.remat.upper(),
        sequences=case.sequences,
        prompt_length=_S,
        budget=_T,
        fsdp=case.fsdp,
        tp=case.tp,
        replicated=case.replicated,
        topology=TOPOLOGY,
    )
    side.close()
    return read


def decode_figures(text: str) -> dict:
    """What a turn of the decode loop moves, of any rollout's HLO."""
    module = hlo.parse(text)
    body = hlo.loop_body(module)
    return {
        "step_bytes": round(body.bytes),
        "on_chip": round(hlo.carried_on_chip(module)),
        "step_collectives": sum(body.collectives.values()),
        "step_collectives_by_kind": body.collectives,
    }


def floor(case: Case) -> int:
    """Bytes of a chip's weights and of its rows' keys and values, each read once in a step.

    Tensor parallelism spreads all of Tunix's weights, the tensor_parallel layout our MLPs and
    embedding. The cache counts in full for Tunix, whose loop reads all slots of it on every chip
    that holds it; ours has the prompt's part once for each group, and rings for local layers.
    """
    config, chips = model.CONFIGS[MODEL], 8
    _, shapes = model.abstract(config)
    whole = 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    sliced = 2 * sum(
        leaf.size for leaf in jax.tree.leaves([shapes["embedding"], shapes["layers"]["mlp"]])
    )
    a_slot, layers = 2 * 2 * config.num_kv_heads * config.head_dim, config.num_layers
    if case.side == "tunix":
        return round(whole / case.tp + a_slot * layers * case.sequences / case.fsdp * (_S + _T))
    weights = whole - sliced + sliced / chips if case.layout == "tensor_parallel" else whole
    ring = min(_T, config.sliding_window)
    own = sum(_T if is_global else ring for is_global in config.is_global)
    rows = case.sequences / chips
    return round(weights + a_slot * rows * (layers * _S / _RUN.grpo.num_generations + own))


if __name__ == "__main__":
    tyro.cli(main)
