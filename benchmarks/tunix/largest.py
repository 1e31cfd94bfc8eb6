"""The most sequences that fit one pass of the update on a v5e:2x4, both sides, by the compiler.

python -m benchmarks.tunix.largest [--cases ours-update tunix-update-best]

From the 64 sequences of the cases of `v5e`, which fit, by doubling and then by halves: to 64 with
us, a prompt of eight completions more on every chip, and to 32 with Tunix. All rows are at full
lengths; in packs ours takes any number. Seven compilations of ours, two of Tunix's, minutes each.
"""

import bisect
from collections.abc import Callable
from dataclasses import replace

import tyro

from benchmarks.timing import chosen, print_row
from benchmarks.tunix import v5e

STEPS = {"ours-update": 64, "tunix-update-best": 32}  # sequences from one batch to the next


def main(cases: tuple[str, ...] = tuple(STEPS)) -> None:
    """Look for the largest batch of cases, by name, and print a row for each."""
    compiler = v5e.Compiler()
    for name, step in chosen(cases, STEPS).items():
        case, peaks = v5e.CASES[name], {}

        def fits(sequences: int, case=case, peaks=peaks) -> bool:
            read = compiler.compiled(replace(case, sequences=sequences))
            peaks[sequences] = read.get("peak")
            return read["fits"]

        most = largest(fits, known=case.sequences, step=step)
        about = {"case": name, "side": case.side, "model": v5e.MODEL, "remat": case.remat}
        about |= {"topology": v5e.TOPOLOGY, **v5e.SIZES}
        found = {"sequences": most, "refused": most + step, "peaks": peaks}
        print_row(benchmark="tunix/largest", **about, **found)


def largest(fits: Callable[[int], bool], *, known: int, step: int) -> int:
    """The largest that fits of `known`, which does, and whole steps beyond; all smaller ones are
    taken to fit too. `known` is a step, or some power of two times one."""
    while fits(2 * known):
        known *= 2
    larger = range(known + step, 2 * known, step)
    return known + step * bisect.bisect(larger, False, key=lambda n: not fits(n))


if __name__ == "__main__":
    tyro.cli(main)
