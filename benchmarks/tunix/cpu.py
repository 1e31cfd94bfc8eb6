"""One GRPO step on CPU, ours against Tunix's: `whole_step`, which says what is measured.

python -m benchmarks.tunix.cpu [--model gemma3-nano | gemma3-270m] [--rounds 3]
needs the environment of `python -m benchmarks.tunix.install`

For the 270M, of which there is no room for two in 24 GB:
--model gemma3-270m --pack-tokens 2048 --remat dots --apart
"""

from typing import Annotated

import tyro

from benchmarks.tunix import whole_step


def main(options: Annotated[whole_step.Options, tyro.conf.arg(name="")]) -> None:
    """Take both sides through whole GRPO steps in turn."""
    whole_step.run(options, platform="cpu")


if __name__ == "__main__":
    tyro.cli(main)
