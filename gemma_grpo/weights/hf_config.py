"""Hugging Face's config.json of a Gemma 3 text model, to our sizes and back. Knows no tensors.

What a file leaves unsaid is the default of transformers' `Gemma3TextConfig`: Google's own files of
the multimodal models name no head count. What we do not implement is refused by name. The layouts
before transformers 5 (`rope_theta`, `rope_local_base_freq`, `rope_scaling`) and since
(`rope_parameters`) are both read, and both written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.model import Gemma3Config

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_ONLY = {  # settings of which we implement one value, which is also the default
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def config_from_hf(text: Mapping[str, Any], *, where: Path) -> Gemma3Config:
    """The sizes that a text model's configuration states.

    Args:
        text: the `gemma3_text` configuration, which in a multimodal file is its `text_config`.
        where: the file, to name in an error.

    Raises:
        UserError: a field is no number, or asks for what we do not implement.
    """
    for field, only in _ONLY.items():
        if text.get(field, only) != only:
            raise UserError(
                f"{where}: {field}={text[field]!r} is not implemented, only {only!r}; "
                "Google's Gemma 3 models have no other"
            )

    def number(field: str, default: float, kind: type = int) -> Any:
        return _number(text, field, default, kind, where)

    num_layers = number("num_hidden_layers", 26)
    near, far = _ropes(text, where)
    return Gemma3Config(
        vocab_size=number("vocab_size", 262_208),
        num_layers=num_layers,
        embed_dim=number("hidden_size", 2304),
        hidden_dim=number("intermediate_size", 9216),
        num_heads=number("num_attention_heads", 8),
        num_kv_heads=number("num_key_value_heads", 4),
        head_dim=number("head_dim", 256),
        sliding_window=number("sliding_window", 4096),
        query_pre_attn_scalar=number("query_pre_attn_scalar", 256, float),
        pattern=_pattern(text, num_layers, where),
        rope_base_local=near["rope_theta"],
        rope_base_global=far["rope_theta"],
        rope_scale_global=far["factor"],
        norm_eps=number("rms_norm_eps", 1e-6, float),
    )


def config_to_hf(config: Gemma3Config, dtype: np.dtype) -> dict[str, Any]:
    """A config.json that transformers reads as `Gemma3ForCausalLM`, before version 5 and since."""
    scalar, scale = config.query_pre_attn_scalar, config.rope_scale_global
    linear = {"rope_type": "linear", "factor": scale}
    scaling = linear if scale != 1.0 else {"rope_type": "default"}
    kinds = [_GLOBAL if is_global else _LOCAL for is_global in config.is_global]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": config.pattern,
        "layer_types": kinds,
        # transformers takes no fraction of a whole number here
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "rope_theta": config.rope_base_global,
        "rope_local_base_freq": config.rope_base_local,
        "rope_scaling": linear if scale != 1.0 else None,
        "rope_parameters": {
            _GLOBAL: {**scaling, "rope_theta": config.rope_base_global},
            _LOCAL: {"rope_type": "default", "rope_theta": config.rope_base_local},
        },
        "rms_norm_eps": config.norm_eps,
        # What the models were trained for: 128K tokens where positions are scaled, else 32K.
        "max_position_embeddings": 131_072 if scale != 1.0 else 32_768,
        "tie_word_embeddings": True,
        "dtype": np.dtype(dtype).name,
        "torch_dtype": np.dtype(dtype).name,  # its name before transformers 4.56
        **_ONLY,
    }


def _number(text: Mapping, field: str, default: float, kind: type, where: Path) -> Any:
    value = text.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"{where}: {field}={value!r} must be a number above 0")
    if kind is int and value != int(value):
        raise UserError(f"{where}: {field}={value!r} must be a whole number")
    return kind(value)


def _pattern(text: Mapping[str, Any], num_layers: int, where: Path) -> int:
    """Every which layer is global: as stated, or as the list of layer kinds shows."""
    stated = text.get("sliding_window_pattern", text.get("_sliding_window_pattern"))
    kinds = text.get("layer_types")
    if stated is None and kinds is not None:
        stated = (list(kinds) + [_GLOBAL]).index(_GLOBAL) + 1
    pattern = _number(
        {"sliding_window_pattern": stated or 6}, "sliding_window_pattern", 6, int, where
    )
    expected = [_LOCAL if (i + 1) % pattern else _GLOBAL for i in range(num_layers)]
    if kinds is not None and list(kinds) != expected:
        raise UserError(
            f"{where}: layer_types is not every {pattern}th of {num_layers} layers "
            f"{_GLOBAL} and the others {_LOCAL}; other mixtures are not implemented"
        )
    return pattern


def _ropes(text: Mapping[str, Any], where: Path) -> tuple[dict, dict]:
    """Base and scale of RoPE in local and in global layers."""
    given = text.get("rope_parameters") or {}
    if not given.keys() <= {_LOCAL, _GLOBAL}:
        raise UserError(
            f"{where}: rope_parameters must have {_GLOBAL} and {_LOCAL}, not {sorted(given)}"
        )
    near = {"rope_theta": text.get("rope_local_base_freq", 1e4)} | (given.get(_LOCAL) or {})
    far = {"rope_theta": text.get("rope_theta", 1e6)} | (given.get(_GLOBAL) or {})
    far |= text.get("rope_scaling") or {}
    return _rope(near, _LOCAL, ("default",), where), _rope(
        far, _GLOBAL, ("default", "linear"), where
    )


def _rope(rope: dict[str, Any], kind: str, allowed: tuple[str, ...], where: Path) -> dict:
    name = rope.get("rope_type", rope.get("type", "default"))
    if name not in allowed:
        raise UserError(
            f"{where}: RoPE of type {name!r} in {kind} layers is not implemented, only "
            f"{' and '.join(allowed)}"
        )
    factor = _number(rope, "factor", 1.0, float, where) if name == "linear" else 1.0
    return {"rope_theta": _number(rope, "rope_theta", 1.0, float, where), "factor": factor}
