"""Hugging Face's config.json of a Gemma 3 text model, to our sizes and back.

What a file leaves unsaid is the default of transformers' `Gemma3TextConfig`: Google's own files of
the multimodal models name no head count. What we do not implement is refused by name. The layouts
before transformers 5 (`rope_theta`, `rope_local_base_freq`, `rope_scaling`) and since
(`rope_parameters`) are both read, and both written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_grpo.errors import UserError, one_line
from gemma_grpo.model import Gemma3Config

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_TOO_LARGE = 2**31  # for any size, and for what else is a number here
_KV_HEADS = "num_key_value_heads"
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
    fields = _Fields(text, where)
    num_layers = fields.integer("num_hidden_layers", 26)
    num_heads, num_kv_heads = fields.integer("num_attention_heads", 8), fields.integer(_KV_HEADS, 4)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads={num_heads} must be a multiple of "
            f"{_KV_HEADS}={num_kv_heads}"
        )
    near, far = _ropes(fields)
    return Gemma3Config(
        vocab_size=fields.integer("vocab_size", 262_208),
        num_layers=num_layers,
        embed_dim=fields.integer("hidden_size", 2304),
        hidden_dim=fields.integer("intermediate_size", 9216),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", 256),
        sliding_window=fields.integer("sliding_window", 4096),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", 256.0),
        pattern=_pattern(fields, num_layers),
        rope_base_local=near.number("rope_theta"),
        rope_base_global=far.number("rope_theta"),
        rope_scale_global=far.number("factor"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
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


@dataclass(frozen=True)
class _Fields:
    """A JSON object's fields by type; each method raises UserError by file and field."""

    values: Mapping[str, Any]
    where: Path

    def number(self, field: str, default: float | None = None) -> float:
        value = self.values.get(field, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < _TOO_LARGE:
            shown = one_line(repr(value), 40)
            raise UserError(f"{self.where}: {field}={shown} must be a number above 0, below 2**31")
        return float(value)

    def integer(self, field: str, default: int | None = None) -> int:
        number = self.number(field, None if default is None else float(default))
        if number != int(number):
            raise UserError(f"{self.where}: {field}={number!r} must be a whole number")
        return int(number)

    def inner(self, field: str) -> Mapping[str, Any]:
        """An object within; an empty one where it is null or not there."""
        value = self.values.get(field)
        if not isinstance(value, dict | None):
            raise UserError(f"{self.where}: {field}={value!r} must be a JSON object")
        return value or {}


def _pattern(fields: _Fields, num_layers: int) -> int:
    """Every which layer is global: as stated, or as the list of layer kinds shows."""
    kinds = fields.values.get("layer_types")
    if not isinstance(kinds, list | None):
        raise UserError(f"{fields.where}: layer_types={kinds!r} must be a list")
    for stated in ("sliding_window_pattern", "_sliding_window_pattern"):
        if fields.values.get(stated) is not None:
            pattern = fields.integer(stated)
            break
    else:
        pattern = 6 if kinds is None else [*kinds, _GLOBAL].index(_GLOBAL) + 1
    expected = [_LOCAL if (i + 1) % pattern else _GLOBAL for i in range(num_layers)]
    if kinds not in (None, expected):
        raise UserError(
            f"{fields.where}: layer_types is not every {pattern}th of {num_layers} layers "
            f"{_GLOBAL} and the others {_LOCAL}; other mixtures are not implemented"
        )
    return pattern


def _ropes(fields: _Fields) -> tuple[_Fields, _Fields]:
    """`rope_theta` and `factor` of local and of global layers."""
    given = _Fields(fields.inner("rope_parameters"), fields.where)
    if not given.values.keys() <= {_LOCAL, _GLOBAL}:
        raise UserError(
            f"{fields.where}: rope_parameters must have {_GLOBAL} and {_LOCAL}, not "
            f"{sorted(given.values)}"
        )
    near = {"rope_theta": fields.values.get("rope_local_base_freq", 1e4), **given.inner(_LOCAL)}
    far = {"rope_theta": fields.values.get("rope_theta", 1e6), **given.inner(_GLOBAL)}
    far |= fields.inner("rope_scaling")
    for rope, kind, types in ((near, _LOCAL, ["default"]), (far, _GLOBAL, ["default", "linear"])):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in types:
            raise UserError(
                f"{fields.where}: RoPE of type {rope_type!r} in {kind} layers is not implemented, "
                f"only {' and '.join(types)}"
            )
        if rope_type == "default":
            rope["factor"] = 1.0
    return _Fields(near, fields.where), _Fields(far, fields.where)
