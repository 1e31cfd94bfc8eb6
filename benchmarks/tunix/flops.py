"""Matmul FLOPs of one GRPO step, both sides, counted in the programs as traced.

python -m benchmarks.tunix.flops [--cases "full lengths"]
needs the environment of `python -m benchmarks.tunix.install`

A row for each case, side and part: the rollout (prefill and decode loop), the update, and their
sum. Sums over all chips, ours as written for TPUs; docs/tunix.md says how loops are counted.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import tyro

from benchmarks import lengths, packing
from benchmarks.timing import print_row
from benchmarks.tunix.cases import COUNTED, MODEL, Program, Step, T
from benchmarks.tunix.sides import SIDES
from benchmarks.tunix.v5e import SIZES, Compiler, run_of
from gemma_grpo import model
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.model import Gemma3Config
from gemma_grpo.planning import batches, fit, programs
from gemma_grpo.planning.traced import matmul_flops

SEQUENCES = len(lengths.LENGTHS)


def main(cases: tuple[str, ...] = tuple(COUNTED)) -> None:
    """Count, and print.

    Args:
        cases: which, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        ask = functools.cache(compiler.flops)
        count = {
            "ours": lambda step: count_ours(step, model.CONFIGS[MODEL], compiler.devices),
            "tunix": lambda step: count_theirs(step, ask),
        }
        for name, side in itertools.product(cases, SIDES):
            parts = count[side](COUNTED[name])
            about = {"model": MODEL, "case": name, "side": side, "sequences": SEQUENCES}
            about |= SIZES | asdict(COUNTED[name])
            for part, flops in (parts | {"step": sum(parts.values())}).items():
                print_row(benchmark="tunix/flops", part=part, flops=flops, **about)


def lengths_of(step: Step) -> tuple[int, ...]:
    """Tokens of each completion, groups one after another."""
    return (T,) * SEQUENCES if step.full else lengths.scaled(T)


def longest(each: tuple[int, ...], loops: int) -> list[int]:
    """The longest of each loop's completions, neighbours in one loop."""
    rows = len(each) // loops
    return [max(each[loop * rows : (loop + 1) * rows]) for loop in range(loops)]


def count_ours(step: Step, config: Gemma3Config, devices: Sequence[jax.Device]) -> dict[str, int]:
    """FLOPs of our rollout and update on all chips."""
    case = Program("ours", "update", step.remat, SEQUENCES, step.layout)
    run, mesh = run_of(case), meshes.data_mesh(devices[: step.chips])
    rollout, update = (each.trace() for each in programs.of_step(run, config, mesh))
    turns = longest(lengths_of(step), step.chips)
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


def count_theirs(step: Step, ask: Callable[[Program], int]) -> dict[str, int]:
    """FLOPs of Tunix's rollout and update, whatever the chips. `ask` counts a program, a decode
    loop for one turn."""
    each, loops = lengths_of(step), lengths.PROMPTS // step.tunix_prompts
    prefill, turn = (
        ask(Program("tunix", program, "NONE", len(each) // loops))
        for program in ("prefill", "decode")
    )
    return {
        "rollout": sum(prefill + decode_turns(most) * turn for most in longest(each, loops)),
        "update": ask(Program("tunix", "update", step.tunix_remat, len(each))),
    }


def decode_turns(most: int) -> int:
    """Turns of Tunix's decode loop: its prefill draws the first token, and a loop that runs into
    the budget draws one that nobody sees."""
    return most - 1 if most < T else most


if __name__ == "__main__":
    tyro.cli(main)
