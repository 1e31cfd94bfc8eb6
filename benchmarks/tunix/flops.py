"""Matmul FLOPs of one GRPO step, both sides, counted in the programs as traced.

python -m benchmarks.tunix.flops [--cases "full lengths"]

A row for each case, side and part: the rollout (prefill and decode loop), the update, and their
sum. Sums over all chips, ours as written for TPUs; docs/tunix.md says how loops are counted.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np
import tyro

from benchmarks import lengths, packing
from benchmarks.timing import chosen, print_row
from benchmarks.tunix.v5e import CHIPS, CONFIG, MODEL, SIZES, Compiler, Program, T, run_of
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.model import Gemma3Config
from gemma_grpo.planning import batches, fit, programs
from gemma_grpo.planning.traced import matmul_flops

B = len(lengths.LENGTHS)  # sequences


@dataclass(frozen=True)
class Step:
    """A GRPO step of each side, whose lengths are those of `benchmarks.lengths`."""

    full: bool = False  # every completion takes its whole budget instead
    short_prompts: bool = False  # as long as GSM8K's; else prompts take their whole budget
    chips: int = CHIPS  # of ours, as are layout and remat
    layout: str = "data"
    remat: str = "none"
    tunix_remat: str = "NONE"  # or DECODER
    tunix_prompts: int = lengths.PROMPTS  # that a rollout of Tunix's takes at a time


SHORT, TP = {"short_prompts": True}, {"layout": "tensor_parallel"}
REMAT = {"remat": "dots", "tunix_remat": "DECODER"}  # recomputes least of what fits
CASES = {
    "full lengths": Step(full=True, chips=1),
    "on one chip": Step(chips=1),
    "on 8 chips": Step(),
    "on 8 chips, tensor_parallel": Step(**TP),
    "on 8 chips, Tunix a prompt a rollout": Step(tunix_prompts=1),
    "on 8 chips, remat": Step(**REMAT),
    "on 8 chips, tensor_parallel, remat": Step(**TP, **REMAT),
    "on 8 chips, short prompts": Step(**SHORT),
    "on 8 chips, short prompts, tensor_parallel": Step(**SHORT, **TP),
    "on 8 chips, short prompts, remat": Step(**SHORT, **REMAT),
    "on 8 chips, short prompts, tensor_parallel, remat": Step(**SHORT, **TP, **REMAT),
    "on 8 chips, short prompts, as preset": Step(**SHORT, **TP, **REMAT | {"remat": "full"}),
}


def main(cases: tuple[str, ...] = tuple(CASES)) -> None:
    """Count cases, by name, and print."""
    compiler = Compiler()
    ask = functools.cache(compiler.flops)
    for name, step in chosen(cases, CASES).items():
        ours = count_ours(step, CONFIG, compiler.devices)
        for side, parts in {"ours": ours, "tunix": count_theirs(step, ask)}.items():
            about = {"model": MODEL, "case": name, "side": side, "sequences": B, **SIZES}
            for part, flops in (parts | {"step": sum(parts.values())}).items():
                print_row(benchmark="tunix/flops", part=part, flops=flops, **about, **asdict(step))


def longest(step: Step, loops: int) -> list[int]:
    """Tokens of each loop's longest completion, neighbours in one loop."""
    lengths_B = [T] * B if step.full else lengths.scaled(T)
    return np.reshape(lengths_B, (loops, -1)).max(axis=1).tolist()


def count_ours(step: Step, config: Gemma3Config, devices: Sequence[jax.Device]) -> dict[str, int]:
    """FLOPs of our rollout and update on all chips."""
    own = Program("ours", "update", step.remat, B, step.layout)
    run, (rollout, update) = run_of(own), _traced(own, config, tuple(devices[: step.chips]))
    turns = longest(step, step.chips)
    if step.layout == "tensor_parallel":  # all chips take part in every row
        turns = [max(turns)] * step.chips
    if step.full:
        packs = batches.packs(run, "grpo", step.chips)
    else:
        prompts = lengths.PROMPT_LENGTHS if step.short_prompts else ()
        packs = packing.packed_trace(run, num_devices=step.chips, prompt_lengths=prompts)
    count = functools.partial(matmul_flops, platform="tpu")
    return {
        "rollout": sum(count(rollout, turns=chip) for chip in turns),
        "update": step.chips * count(update, **fit.pack_loops(packs, config, step.chips)),
    }


@functools.cache
def _traced(
    own: Program, config: Gemma3Config, devices: tuple[jax.Device, ...]
) -> list[jax.stages.Traced]:
    """Our rollout and update, whatever the lengths."""
    mesh = meshes.data_mesh(devices)
    return [each.trace() for each in programs.of_step(run_of(own), config, mesh)]


def count_theirs(step: Step, ask: Callable[[Program], int]) -> dict[str, int]:
    """FLOPs of Tunix's rollout and update, whatever the chips. `ask` counts a program, a decode
    loop for one turn."""
    loops = lengths.PROMPTS // step.tunix_prompts
    prefill = ask(Program("tunix", "prefill", "NONE", B // loops))
    turn = ask(Program("tunix", "decode", "NONE", B // loops))
    # The prefill draws the first token; a loop that runs into the budget draws one nobody sees.
    turns = [most - (most < T) for most in longest(step, loops)]
    return {
        "rollout": loops * prefill + sum(turns) * turn,
        "update": ask(Program("tunix", "update", step.tunix_remat, B)),
    }


if __name__ == "__main__":
    tyro.cli(main)
