"""GGUF files of Gemma 3, opened as a `Source`. Knows no parameter tree of ours and no cache.

GGUF has its own names, adds one to every norm's gain, and leaves some of the architecture unsaid:
the local RoPE base, the local:global pattern and the query scale are known by the model's sizes.

Sources: llama.cpp's `convert_hf_to_gguf.py` (class Gemma3Model) and `gguf-py/gguf/constants.py`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.weights.gguf_header import Header, read_header
from gemma_grpo.weights.source import Source, StoredTensor

ARCHITECTURE = "gemma3"

# What GGUF states of a config, under the architecture's name.
STATED = {
    "num_layers": "block_count",
    "embed_dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rope_base_global": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}

OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
HEAD = "output.weight"

ROWS_AT_ONCE = 4096  # dequantising keeps a second copy of what it is given


def open_gguf(path: Path) -> Source:
    """Open a GGUF file of a Gemma 3 text model.

    Tensors are dequantised to float32 at each read, norms with one subtracted. The file has no
    SentencePiece model, only its tables; `sentencepiece_model.rebuild` makes one from them.

    Raises:
        UserError: the `gguf` package is missing; the file is missing, damaged or cut short; it is
            another architecture or size; a tensor is missing, left over, misshapen or of a type
            that cannot be dequantised.
    """
    header = read_header(path)
    config = known_config(header)
    return Source(path, config, _tensors(header, config), tokenizer=None)


def known_config(header: Header) -> Gemma3Config:
    """The Gemma 3 whose sizes the file states.

    Raises:
        UserError: another architecture; a size is unstated, or differs from every known model's.
    """
    architecture = header.fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(
            f"weights {header.path}: architecture {architecture!r}; only {ARCHITECTURE} can be read"
        )
    keys = {field: f"{ARCHITECTURE}.{name}" for field, name in STATED.items()}
    unstated = [key for key in keys.values() if key not in header.fields]
    if unstated:
        raise UserError(f"weights {header.path}: the metadata lacks {', '.join(unstated)}")
    stated = {field: header.fields[key] for field, key in keys.items()}
    differences = {
        name: [field for field in STATED if not _same(stated[field], getattr(config, field))]
        for name, config in CONFIGS.items()
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        told = ", ".join(
            f"{keys[field]} is {stated[field]}, not {getattr(CONFIGS[nearest], field)}"
            for field in differences[nearest]
        )
        raise UserError(
            f"weights {header.path}: no known size ({', '.join(CONFIGS)}); the nearest is "
            f"{nearest}, but {told}"
        )
    return CONFIGS[nearest]


def _same(stated: Any, known: float) -> bool:
    """Equal as float32, in which GGUF keeps what is no integer."""
    return isinstance(stated, int | float) and np.float32(stated) == np.float32(known)


def names_and_shapes(config: Gemma3Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each tensor by GGUF's name: Hugging Face's name and the shape, [out, in]."""
    D, F, H = config.embed_dim, config.hidden_dim, config.head_dim
    queries, keys = config.num_heads * H, config.num_kv_heads * H
    projections = {"attn_q": (queries, D), "attn_k": (keys, D), "attn_v": (keys, D)}
    projections |= {"attn_output": (D, queries), "attn_q_norm": (H,), "attn_k_norm": (H,)}
    projections |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
    table = {
        "token_embd.weight": (f"{OUTER_NAMES['token_embd']}.weight", (config.vocab_size, D)),
        "output_norm.weight": (f"{OUTER_NAMES['output_norm']}.weight", (D,)),
    }
    for layer in range(config.num_layers):
        for ours, theirs in BLOCK_NAMES.items():
            table[f"blk.{layer}.{ours}.weight"] = (
                f"model.layers.{layer}.{theirs}.weight",
                projections.get(ours, (D,)),
            )
    return table


def _tensors(header: Header, config: Gemma3Config) -> dict[str, StoredTensor]:
    """Every tensor of the table, after all of them were looked over; none is read."""
    table = names_and_shapes(config)
    found = header.tensors.keys() - {HEAD}
    if table.keys() != found:
        missing, extra = sorted(table.keys() - found), sorted(found - table.keys())
        raise UserError(f"weights {header.path}: missing {missing}, left over {extra}")
    for name, (_, shape) in table.items():
        if header.tensors[name].shape != shape:
            raise UserError(
                f"weights {header.path}: {name} has shape {header.tensors[name].shape}, "
                f"expected {shape}"
            )
    readers = {name: _reader(header, name) for name in header.tensors}
    if HEAD in readers and not np.array_equal(readers[HEAD](), readers["token_embd.weight"]()):
        raise UserError(
            f"weights {header.path}: {HEAD} differs from token_embd.weight; Gemma 3's head is its "
            "embedding: convert the model without a head of its own"
        )
    return {hf_name: StoredTensor(shape, readers[name]) for name, (hf_name, shape) in table.items()}


def _reader(header: Header, name: str) -> Callable[[], np.ndarray]:
    """What reads one tensor, after its type and its place in the file were checked."""
    gguf, info = _import_gguf(), header.tensors[name]
    try:
        kind = gguf.GGMLQuantizationType(info.type_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"weights {header.path}: {name} is of ggml type {info.type_id}, which the gguf package "
            "cannot dequantise; use a file with Q4_K, Q5_0, Q6_K, Q8_0, BF16 or F32"
        ) from error
    if info.shape[-1] % block:
        raise UserError(
            f"weights {header.path}: {name} has rows of {info.shape[-1]}, no multiple of "
            f"{kind.name}'s block of {block}"
        )
    rows, row_bytes = math.prod(info.shape[:-1]), info.shape[-1] // block * block_bytes
    if info.offset + rows * row_bytes > header.size:
        raise UserError(
            f"weights {header.path}: ends within {name}, at {header.size} bytes; fetch it again"
        )

    def read() -> np.ndarray:
        stored = np.memmap(header.path, np.uint8, "r", info.offset, (rows, row_bytes))
        values = np.empty((rows, info.shape[-1]), np.float32)
        for start in range(0, rows, ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            values[some] = gguf.dequantize(np.asarray(stored[some]), kind)
        if name.endswith("norm.weight"):
            values -= 1
        return values.reshape(info.shape)

    return read


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "GGUF files need the gguf package: pip install 'gemma_grpo[gemma3-270m]'"
        ) from error
    return gguf
