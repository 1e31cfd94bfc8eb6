"""One GRPO step on a GPU, ours against Tunix's: `whole_step`, which says what is measured.

python -m benchmarks.tunix.gpu [--rounds 5]
needs the extra [cuda], and the environment of `python -m benchmarks.tunix.install --cuda`

Gemma 3 1B in bfloat16, 8 prompts x 8, 512 + 800 tokens, random weights. One side at a time is on
the GPU, which it has to itself; the compiled programs are kept between its turns. Ours holds
float32 master weights and moments, Tunix bfloat16 ones.
"""

from typing import Annotated

import tyro

from benchmarks.tunix import whole_step

SIZES = whole_step.Options(
    model="gemma3-1b",
    dtype="bfloat16",
    rows=64,
    prompt_length=512,
    budget=800,
    pack_tokens=3072,
    apart=True,
)


def main(
    options: Annotated[whole_step.Options, tyro.conf.arg(name="")] = SIZES, platform: str = "cuda"
) -> None:
    """Take both sides through whole GRPO steps in turn.

    Args:
        platform: of JAX; cpu is to try this without a GPU, at small sizes.
    """
    whole_step.run(options, platform=platform)


if __name__ == "__main__":
    tyro.cli(main)
