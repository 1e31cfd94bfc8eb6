"""One GRPO step on a GPU, ours against Tunix's: `cpu`, which says what is measured.

python -m benchmarks.tunix.gpu [--rounds 5]
needs the extra [cuda], and the environment of `python -m benchmarks.tunix.install --cuda`

One side at a time is on the GPU, which it has to itself; compiled programs are kept between turns.
Without a GPU, --platform cpu tries it at small sizes.
"""

import tyro

from benchmarks.tunix import cpu

SIZES = cpu.Options(
    model="gemma3-1b",
    dtype="bfloat16",
    rows=64,
    prompt_length=512,
    budget=800,
    pack_tokens=3072,
    apart=True,
    platform="cuda",
)

if __name__ == "__main__":
    cpu.main(tyro.cli(cpu.Options, default=SIZES))
