"""A model written as a Hugging Face folder, which transformers reads as `Gemma3ForCausalLM`.

    config.json, generation_config.json
    model.safetensors       or model-00001-of-0000N.safetensors with model.safetensors.index.json
    tokenizer.model, tokenizer_config.json with the chat template
    SHA256SUMS              of what this package reads of them; compared when it does

The template is written here from the turns that `Tokenizer.encode_prompt` makes: Gemma 3 knows the
roles user and model, and no system turn.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_grpo.model import Gemma3Config
from gemma_grpo.records import files
from gemma_grpo.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from gemma_grpo.weights import hf_folder, tensor_file
from gemma_grpo.weights.hf_config import config_to_hf
from gemma_grpo.weights.names import their_shapes

# The most that one file holds, if no single tensor holds more; as transformers' save_pretrained.
SHARD_BYTES = 5_000_000_000

CHAT_TEMPLATE = f"""\
{{{{- bos_token -}}}}
{{%- for message in messages -%}}
{{%- if message.role not in ('user', 'assistant') -%}}
{{{{- raise_exception('the roles are user and assistant; put instructions into a user turn') -}}}}
{{%- endif -%}}
{{{{- '{START_OF_TURN}' + ('model' if message.role == 'assistant' else 'user') + '\\n' -}}}}
{{%- if message.content is string -%}}
{{{{- message.content | trim -}}}}
{{%- else -%}}
{{%- for part in message.content -%}}
{{%- if part.type != 'text' -%}}
{{{{- raise_exception('a part of a message is no text: this is a text model') -}}}}
{{%- endif -%}}
{{{{- part.text | trim -}}}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- '{END_OF_TURN}\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{START_OF_TURN}model\\n' -}}}}{{%- endif -%}}
"""


def write_folder(
    out: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    config: Gemma3Config,
    *,
    dtype: np.dtype,
    tokenizer: Tokenizer | None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the folder; it appears complete or not at all.

    Args:
        out: its path; nothing may be there, or an empty directory.
        tensors: all of the model's, such as `hf_tensors` gives; taken one by one.
        config: the model's sizes.
        dtype: stored in: float32, float16 or bfloat16.
        tokenizer: the model's own; None writes none, and no token ids.
        texts: further files by name, such as README.md.

    Raises:
        UserError: something is at `out` already, or the disk is full or cannot be written.
    """
    files.require_new_folder(out)
    with files.atomic_write(out) as folder:
        folder.mkdir()
        _write_tensors(folder, tensors, their_shapes(config), np.dtype(dtype))
        settings = config_to_hf(config, dtype)
        if tokenizer is not None:
            settings |= _write_tokenizer(folder, tokenizer)
        _write_json(folder / "config.json", settings)
        # Of what is read again here; others' readers and the user may change the rest.
        read = [*hf_folder.SETTINGS, *hf_folder.TENSORS]
        files.write_sums(folder, (path.name for each in read for path in folder.glob(each)))
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def _write_tensors(
    folder: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
) -> None:
    """One safetensors file, or as many as needed and their index."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shapes[name]
        room -= size
    if len(shards) == 1:
        tensor_file.write(folder / "model.safetensors", shapes, tensors, dtype)
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensor_file.write(folder / file, shard, tensors, dtype)
        placed |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's files and generation_config.json; returns the ids for config.json."""
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    marks = {
        tokenizer.pad_id: "<pad>",
        tokenizer.stop_ids[0]: "<eos>",
        tokenizer.bos_id: "<bos>",
        tokenizer.start_of_turn_id: START_OF_TURN,
        tokenizer.stop_ids[1]: END_OF_TURN,
    }
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": [START_OF_TURN, END_OF_TURN],
        # llama.cpp's converter looks here, and takes marks it is not told of for plain text: the
        # model would neither read a turn's beginning nor stop at its end.
        "added_tokens_decoder": {str(i): _special(text) for i, text in sorted(marks.items())},
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    stops = {"eos_token_id": list(tokenizer.stop_ids)}
    _write_json(folder / "generation_config.json", ids | stops)
    return ids | {"eos_token_id": tokenizer.stop_ids[0]}  # llama.cpp's converter wants one


def _special(text: str) -> dict[str, Any]:
    """A special token as transformers describes it."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, "special": True} | flags


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
