"""LoRA adapters written as the PEFT library reads them.

    adapter_config.json, adapter_model.safetensors, README.md
    SHA256SUMS              of the first two; `sha256sum -c` reads it

PEFT keeps a torch layer's layout: lora_A is [rank, in], lora_B [out, rank]. It finds a layer by its
module's name in the class that transformers makes of the base: of a multimodal one, the text model
is a module within, and the vision tower has modules of the same last names.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from gemma_grpo.model import CONFIGS, LoRAConfig, Params
from gemma_grpo.model.lora import SUFFIX
from gemma_grpo.records import files
from gemma_grpo.weights.names import TABLE, by_path
from gemma_grpo.weights.source import Source

_PREFIX = "base_model.model."  # PEFT's wrapper around the model, in every name
_TEXT, _MULTIMODAL = "model.", "model.language_model."  # the text model, since transformers 4.52
# Google's models at Hugging Face, as folders are called that hold them: the 270M alone has no -pt.
_GOOGLES = re.compile(r"gemma-3-(?:(270m)(?:-it)?|(1b|4b|12b|27b)-(?:it|pt))")


def hub_name(base: Source) -> str:
    """The name at Hugging Face of a folder in its format; "" where that is not known.

    It is in the folder's path: Hugging Face's cache has models--OWNER--NAME in it, Kaggle's and
    most downloads Google's name, such as gemma-3-1b-it, which counts if the model has that size.
    """
    if not (base.path / "config.json").is_file():
        return ""
    for part in reversed(base.path.absolute().parts):
        if cached := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return "/".join(cached.groups())
        if named := _GOOGLES.fullmatch(part):
            known = CONFIGS[f"gemma3-{named[1] or named[2]}"]
            same = (known.num_layers, known.embed_dim) == (
                base.config.num_layers,
                base.config.embed_dim,
            )
            return f"google/{part}" if same else ""
    return ""


def write_adapter(
    out: Path,
    adapter: Params,
    lora: LoRAConfig,
    *,
    base: Source,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the folder; it appears complete or not at all.

    Args:
        out: its path; nothing may be there, or an empty directory.
        adapter: the adapters' tree, of `model.partition`.
        lora: their settings.
        base: what they were trained over. Its `hub_name`, or else its path, is what PEFT loads when
            it is given no base, and its class decides their names.
        texts: further files by name, such as README.md.

    Raises:
        UserError: something is at `out` already, or the disk is full or cannot be written.
    """
    files.require_new_folder(out)
    tensors = dict(peft_tensors(adapter, multimodal=base.multimodal))
    names = sorted({name.split(".")[-3] for name in tensors})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_name(base) or str(base.path.absolute()),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        # A list matches the ends of names, in a vision tower too; a pattern, full names.
        "target_modules": rf".*\blanguage_model\..*\.({'|'.join(names)})"
        if base.multimodal
        else names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with files.atomic_write(out) as folder:
        folder.mkdir()
        safetensors.numpy.save_file(
            tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        (folder / "adapter_config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
        files.write_sums(folder, ("adapter_config.json", "adapter_model.safetensors"))
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def peft_tensors(adapter: Params, *, multimodal: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The adapters' factors by PEFT's names, in PEFT's layout."""
    text = _MULTIMODAL if multimodal else _TEXT
    leaves = by_path(adapter)
    for entry in TABLE:
        if f"{entry.ours}{SUFFIX}.a" not in leaves:
            continue
        factors = [jax.device_get(leaves[f"{entry.ours}{SUFFIX}.{side}"]) for side in "ab"]
        for layer, name in enumerate(entry.their_names(len(factors[0]))):
            module = _PREFIX + text + name.removeprefix("model.").removesuffix(".weight")
            for side, factor in zip(("lora_A", "lora_B"), factors, strict=True):
                yield f"{module}.{side}.weight", np.ascontiguousarray(factor[layer].T)
