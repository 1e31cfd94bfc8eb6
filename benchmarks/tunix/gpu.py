"""One GRPO step on a GPU, ours against Tunix's: `cpu`, which says what is measured.

python -m benchmarks.tunix.gpu [--rounds 5]
needs the extra [cuda], and the environment of `python -m benchmarks.tunix.install --cuda`

One side at a time is on the GPU, which it has to itself; compiled programs are kept between turns.
"""

from typing import Annotated

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
)


def main(
    options: Annotated[cpu.Options, tyro.conf.arg(name="")] = SIZES, platform: str = "cuda"
) -> None:
    """Take both sides through whole GRPO steps in turn.

    Args:
        platform: of JAX; cpu is to try this without a GPU, at small sizes.
    """
    cpu.run(options, platform=platform)


if __name__ == "__main__":
    tyro.cli(main)
