"""Hugging Face folders of Gemma 3: config.json, safetensors in one file or many, tokenizer.model.

Text-only folders (`Gemma3ForCausalLM`) and multimodal ones (`Gemma3ForConditionalGeneration`, 4B
and up), whose text part is read. Kaggle's "transformers" folders are the same.
"""

import json
import re
from pathlib import Path
from typing import Any

from gemma_grpo.errors import UserError
from gemma_grpo.records import files
from gemma_grpo.weights import tensor_file
from gemma_grpo.weights.hf_config import config_from_hf
from gemma_grpo.weights.source import Source, StoredTensor
from gemma_grpo.weights.tensor_file import Slot

# A multimodal checkpoint's names of the text model: as on the Hub, and as transformers saves since
# 4.52. What follows is the name in a text-only checkpoint.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
SETTINGS = ("config.json", "*.index.json", "tokenizer.model")  # what is read beside tensors
TENSORS = ("*.safetensors",)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_ADAPTER = "a LoRA adapter; merge it into its base model first (peft: merge_and_unload)"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_folder(path: Path, file: Path | None = None) -> Source:
    """Open a folder; only headers are read.

    Args:
        path: with config.json.
        file: the safetensors file in it that the user named; of several that are one model, any.
            None takes what transformers takes: model.safetensors before an index.

    Raises:
        UserError: no Gemma 3, quantised, incomplete, or in a form that we do not read; says which
            and the fix.
    """
    files.require_sums(path, SETTINGS)
    settings = _read_json(path / "config.json")
    text = _text_settings(settings, path)
    slots = _slots(path, file)
    ignored: tuple[str, ...] = ()
    if text is not settings:
        ours = {name: _text_name(name) for name in slots}
        ignored = tuple(name for name, mine in ours.items() if mine is None)
        slots = {mine: slots[name] for name, mine in ours.items() if mine is not None}
    for name, slot in slots.items():
        if slot.dtype not in tensor_file.FLOATS:
            what = "float64" if slot.dtype == "F64" else "a quantised model"
            raise UserError(
                f"weights {path}: {name} is stored as {slot.dtype}, {what}; fetch the one in "
                f"{', '.join(tensor_file.FLOATS)}"
            )
    _drop_tied_head(slots, path)
    layers = text.get("num_hidden_layers")
    if isinstance(layers, int | float) and not layers <= len(slots):
        raise UserError(
            f"{path / 'config.json'}: num_hidden_layers={layers}, but there are {len(slots)} "
            "tensors; an unfinished download, or its configuration is another model's"
        )
    tokenizer = path / "tokenizer.model"
    return Source(
        path=path,
        config=config_from_hf(text, where=path / "config.json"),
        tensors={name: StoredTensor(slot.shape, slot.read) for name, slot in slots.items()},
        tokenizer=tokenizer if tokenizer.is_file() else None,
        ignored=ignored,
        multimodal=text is not settings,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"weights {path.parent}: no {path.name} in this folder; fetch it too")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return content


def _text_settings(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The text model's part of a config.json. Raises UserError if it is no plain Gemma 3."""
    kind = settings.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        raise UserError(
            f"weights {path}: model_type {kind!r} is not Gemma 3 (gemma3 or gemma3_text); name a "
            "folder of google/gemma-3-*"
        )
    text = settings if kind == "gemma3_text" else settings.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"weights {path}: config.json of a multimodal model without text_config")
    quantised = settings.get("quantization_config") or text.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"weights {path}: quantised ({method}); fetch the model in bfloat16, or a .gguf file"
        )
    return text


def _slots(path: Path, file: Path | None) -> dict[str, Slot]:
    """Every tensor of the folder, or of the file, by its name there."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if file is None and whole.is_file():
        file = whole
    if file is not None and not _SHARD.search(file.stem):
        slots = tensor_file.slots(file)
    elif index.is_file() and _is_of_this_folder(index):
        slots = _indexed(index)
    else:
        slots = _of_all_files(path)
    if any(".lora_" in name for name in slots):
        raise UserError(f"weights {file or path}: {_ADAPTER}")
    return slots


def _is_of_this_folder(index: Path) -> bool:
    """Whether a file that it names is there, or no other file is."""
    there = {file.name for file in index.parent.glob("*.safetensors")}
    return not there or not there.isdisjoint(_weight_map(index).values())


def _of_all_files(path: Path) -> dict[str, Slot]:
    """The tensors of all files of a folder but adapters'."""
    files = sorted(path.glob("*.safetensors"))
    adapters = [file for file in files if file.name.startswith("adapter")]
    files = [file for file in files if file not in adapters]
    if not files:
        raise UserError(f"weights {path}: {_what_is_there_instead(path, adapters)}")
    slots: dict[str, Slot] = {}
    for file in files:
        for name, slot in tensor_file.slots(file).items():
            if name in slots:
                raise UserError(
                    f"weights {path}: {name} is both in {slots[name].path.name} and in "
                    f"{file.name}; keep one of the two models"
                )
            slots[name] = slot
    return slots


def _indexed(index: Path) -> dict[str, Slot]:
    """The tensors that an index names, each in its file."""
    placed = _weight_map(index)
    files = {name: index.parent / name for name in sorted(set(placed.values()))}
    absent = [name for name, file in files.items() if not file.is_file()]
    if absent:
        raise UserError(
            f"weights {index.parent}: {absent[0]} is not there ({len(absent)} of {len(files)} "
            "files missing); fetch the rest of the download"
        )
    found = {name: tensor_file.slots(file) for name, file in files.items()}
    for tensor, name in placed.items():
        if tensor not in found[name]:
            raise UserError(f"{index}: says that {tensor} is in {name}, which has none; fetch both")
    return {tensor: found[name][tensor] for tensor, name in placed.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises UserError unless all are names of files in the folder."""
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index}: no weight_map; fetch it again")
    for tensor, name in placed.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UserError(
                f"{index}: places {tensor} in {name!r}, which names no file of its folder; fetch "
                "it again"
            )
    return placed


def _what_is_there_instead(path: Path, adapters: list[Path]) -> str:
    if adapters:
        return f"only {_ADAPTER}"
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return "only pickled PyTorch weights, which are not read; fetch the *.safetensors files"
    if ggufs := sorted(path.glob("*.gguf")):
        return f"no *.safetensors in it; name the file {ggufs[0].name} itself"
    return "no *.safetensors in it; fetch them too"


def _text_name(name: str) -> str | None:
    """A multimodal checkpoint's name as a text-only one has it; None for the rest."""
    for prefix, ours in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return None


def _drop_tied_head(slots: dict[str, Slot], path: Path) -> None:
    """Takes away an LM head that repeats the embedding. Raises UserError for another one."""
    head = slots.pop(_HEAD, None)
    if head is not None and not (_EMBEDDING in slots and head.same_values(slots[_EMBEDDING])):
        raise UserError(
            f"weights {path}: {_HEAD} differs from {_EMBEDDING}; Gemma 3 ties the two, and an "
            "untied head is not implemented"
        )
