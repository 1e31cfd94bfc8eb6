"""The export command: writes a run's model as a Hugging Face folder, or its adapters for PEFT.

    python -m gemma_grpo.export RUN OUT
    python -m gemma_grpo.export RUN OUT --adapter

transformers and vLLM load the folder as it is, and llama.cpp's converter turns it into a GGUF file.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gemma_grpo import cli


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: cli.parse(_export, arguments, command="export", description=__doc__))


def _export(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    stage: Literal["sft", "grpo"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    adapter: bool = False,
) -> int:
    """Write a trained model for others to load.

    Args:
        run: a run directory.
        out: a new folder for the model.
        stage: the stage to export; by default the last finished one.
        dtype: dtype of the files. float32 keeps every bit of what was trained.
        adapter: write only the LoRA adapters, in PEFT's format, instead of a full model.
    """
    from gemma_grpo import api  # --help does not wait for JAX

    cli.require_one_process("export")
    print(api.load(run).export(out, stage=stage or "", dtype=dtype, adapter=adapter))
    return 0


if __name__ == "__main__":
    cli.start(main)
