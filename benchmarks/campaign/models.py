"""A small model to abuse: layers of the embedded one, as a Hugging Face folder."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors.numpy

from gemma_grpo.weights.assets import NANO


def cut_nano(folder: Path, layers: Sequence[int] = (5,)) -> Path:
    """A Hugging Face folder with these layers of the embedded model, its tokenizer included: quick
    to compile. The last layer is a global one, as layer 5 is; the others slide."""
    tensors = {}
    for name, tensor in safetensors.numpy.load_file(NANO / "model.safetensors").items():
        before, of_layers, rest = name.partition(".layers.")
        number, _, weight = rest.partition(".")
        if not of_layers:
            tensors[name] = tensor
        elif int(number) in layers:
            tensors[f"{before}.layers.{layers.index(int(number))}.{weight}"] = tensor
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    settings = json.loads((NANO / "config.json").read_text())
    cut = {"num_hidden_layers": len(layers), "sliding_window_pattern": len(layers)}
    cut["layer_types"] = ["sliding_attention"] * (len(layers) - 1) + ["full_attention"]
    (folder / "config.json").write_text(json.dumps(settings | cut))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    return folder
