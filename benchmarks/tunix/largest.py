"""The most sequences that fit one pass of the update on a v5e:2x4, both sides, by the compiler.

python -m benchmarks.tunix.largest [--cases ours-update tunix-update-best]

From the 64 sequences of the cases of `v5e`, which fit, by doubling and then by halves: to 64 with
us, a prompt of eight completions more on every chip, and to 32 with Tunix. All rows are at full
lengths; in packs ours takes any number. Seven compilations of ours, two of Tunix's, minutes each.
"""

import tyro

from benchmarks.tunix import v5e

if __name__ == "__main__":
    tyro.cli(v5e.print_largest)
