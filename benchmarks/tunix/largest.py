"""The most sequences that fit one pass of the update on a v5e:2x4, both sides, by the compiler.

python -m benchmarks.tunix.largest [--cases ours-update tunix-update-best]
needs the environment of `python -m benchmarks.tunix.install`

The cases are those of `benchmarks.tunix.v5e`, each with its side's remat and at full lengths; the
compiler says what fits. From the case's own 64 sequences, which fit, by doubling and then by
halves: to 64 with us, a prompt of eight completions more on every chip, and to 32 with Tunix. Five
compilations of ours, two of Tunix's, minutes each.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from benchmarks.tunix import v5e

STEPS = {"ours-update": 64, "tunix-update-best": 32}  # sequences from one batch to the next


def main(cases: tuple[str, ...] = tuple(STEPS), environment: Path | None = None) -> None:
    """Look for each side's largest batch, and print a row for each.

    Args:
        cases: which, by name.
        environment: folder of Tunix's environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in cases:
            case, step, tried = v5e.CASES[name], STEPS[name], {}

            def fits(sequences, name=name, case=case, tried=tried):
                text = Path(folder) / f"{name}.hlo"
                tried[sequences] = v5e.compile_case(
                    replace(case, sequences=sequences), text, environment
                )
                print(name, tried[sequences], file=sys.stderr, flush=True)
                return tried[sequences]["fits"]

            most = largest(fits, known=case.sequences, step=step)
            peaks = {n: row.get("peak") for n, row in tried.items()}
            row = {"benchmark": "tunix/largest", "case": name, "side": case.side}
            row |= {"model": v5e.MODEL, "remat": case.remat, "peaks": peaks}
            row |= {"sequences": most, "refused": most + step}
            print(json.dumps(row), flush=True)


def largest(fits: Callable[[int], bool], *, known: int, step: int) -> int:
    """The largest that fits of `known`, which does, and whole steps beyond; all smaller ones are
    taken to fit too. `known` is a step, or some power of two times one."""
    low, high = known, 2 * known
    while fits(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


if __name__ == "__main__":
    tyro.cli(main)
