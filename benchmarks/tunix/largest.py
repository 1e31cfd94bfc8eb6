"""The most sequences that fit one pass of the update on a v5e:2x4, both sides, by the compiler.

python -m benchmarks.tunix.largest [--cases ours-update tunix-update-best]
needs the environment of `python -m benchmarks.tunix.install`

From the 64 sequences of the cases of `v5e`, which fit, by doubling and then by halves: to 64 with
us, a prompt of eight completions more on every chip, and to 32 with Tunix. All rows are at full
lengths; in packs ours takes any number. Seven compilations of ours, two of Tunix's, minutes each.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from benchmarks.timing import print_row
from benchmarks.tunix.cases import COMPILED, MODEL, SEARCHED
from benchmarks.tunix.v5e import Compiler


def main(cases: tuple[str, ...] = tuple(SEARCHED)) -> None:
    """Look for each side's largest batch, and print a row for each.

    Args:
        cases: which, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        for name in cases:
            case, step, peaks = COMPILED[name], SEARCHED[name], {}

            def fits(sequences: int, case=case, peaks=peaks) -> bool:
                read = compiler.compiled(replace(case, sequences=sequences))
                peaks[sequences] = read.get("peak")
                print(sequences, read, file=sys.stderr, flush=True)
                return read["fits"]

            most = largest(fits, known=case.sequences, step=step)
            about = {"case": name, "side": case.side, "model": MODEL, "remat": case.remat}
            found = {"sequences": most, "refused": most + step, "peaks": peaks}
            print_row(benchmark="tunix/largest", **about, **found)


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
