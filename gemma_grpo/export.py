"""The export command: a run's model as a Hugging Face folder, or its adapters as PEFT reads them.

    python -m gemma_grpo.export RUN OUT
    python -m gemma_grpo.export RUN OUT --adapter

transformers and vLLM load the folder as it is, and llama.cpp's converter makes a GGUF file of it.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from gemma_grpo import cli, model, weights
from gemma_grpo.errors import UserError
from gemma_grpo.records import model_card
from gemma_grpo.runtime import load_model


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: cli.parse(_export, arguments, command="export", description=__doc__))


def _export(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    stage: Literal["", "sft", "grpo"] = "",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    adapter: bool = False,
) -> int:
    """Write a trained model for others to load.

    Args:
        run: a run directory.
        out: the folder to make.
        stage: whose model; the run's last finished one if unsaid.
        dtype: stored in. float32 keeps every bit of what was trained.
        adapter: write the LoRA adapters alone, in PEFT's format, instead of a full model.
    """
    cli.require_new_folder(out)
    config, trained = cli.trained(str(run))
    if trained is None:
        raise UserError(f"{run}: not a run directory (it has no config.yaml)")
    if stage:
        trained = trained.with_name(f"{stage}.safetensors")
    lora = config.model.lora
    if adapter and not lora.rank:
        raise UserError(f"{run} trained all weights and has no adapters; export without --adapter")
    # In float32 whatever it was trained over: adapters are merged before anything is rounded.
    settings = replace(config.model, dtype="float32", rollout_layout="data")
    runtime, params = load_model(settings, seed=config.seed, trained=trained)
    base = settings.weights
    source = weights.open_source(base)
    if adapter:
        weights.write_adapter(out, params, lora, base=source)
        if not (source.path / "config.json").is_file():
            print(
                f"warning: PEFT cannot load {source.path}: give it the same model's Hugging Face "
                "folder as base",
                file=sys.stderr,
            )
    else:
        if lora.rank:
            params = model.merge_adapter(params, runtime.frozen, scale=lora.alpha / lora.rank)
        sizes = source.config
        card = model_card.model_card(
            run, trained.stem, base=Path(base).name, of_gemma=base != weights.NANO
        )
        weights.write_folder(
            out,
            weights.hf_tensors(params, sizes),
            sizes,
            dtype=np.dtype(dtype),
            tokenizer=runtime.tokenizer,
            texts={"README.md": card},
        )
    print(out)
    return 0


if __name__ == "__main__":
    cli.start(main)
