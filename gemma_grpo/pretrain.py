"""Makes gemma3-nano, the embedded base model: its tokenizer, its text, its weights, from scratch.

python -m gemma_grpo.pretrain OUT
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gemma_grpo import cli, model
from gemma_grpo.training.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Options(PretrainConfig):
    """Train gemma3-nano and its tokenizer into OUT, a folder as Hugging Face has it."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder for the model, which a run's --model.weights may name. It appears when
    everything is done."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(
        lambda: _pretrain(cli.parse(Options, arguments, command="pretrain", description=__doc__))
    )


def _pretrain(options: Options) -> int:
    cli.files.require_new_folder(options.out)
    model.check_seed(options.seed)
    from gemma_grpo.training import pretraining  # --help does not wait for JAX

    print(json.dumps(pretraining.make_nano(options.out, options)))
    return 0


if __name__ == "__main__":
    cli.start(main)
