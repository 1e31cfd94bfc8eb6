"""The odd little Gemma 3 models whose logits are pinned: settings, inputs, the draw of weights.

NumPy only: `make_transformers_logits.py` reads it beside torch, the tests beside jax. Names and
layouts are those of a transformers state dict, where a projection is [out, in].

The draw: one `default_rng(seed)` per model; the state dict's names in sorted order, the tied head
left out; each array standard normal in float64, times 1/sqrt(columns) for a matrix (the embedding
too) and 0.3 for a norm, as float32. Norm gains are so well away from 1.
"""

import zlib
from typing import Any

import numpy as np

NORM_SCALE = 0.3

# Each departs from the shipped models somewhere: heads * head_dim is never the embedding's width,
# the query scalar never the head's. `lengths` are tokens per row, left-padded to the longest.
CASES: dict[str, dict[str, Any]] = {
    "mqa_window_5_in_23_layers_7_of_6": {  # one layer after the first global one
        "seed": 11,
        "lengths": [23, 23],
        "vocab_size": 61,
        "num_layers": 7,
        "pattern": 6,
        "embed_dim": 20,
        "hidden_dim": 34,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 6,
        "sliding_window": 5,
        "query_pre_attn_scalar": 9.0,
    },
    "gqa_2_window_4_in_19_layers_8_of_6": {
        "seed": 12,
        "lengths": [19, 19],
        "vocab_size": 53,
        "num_layers": 8,
        "pattern": 6,
        "embed_dim": 12,
        "hidden_dim": 40,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 5.0,
    },
    "mha_4_all_local_layers_3_of_6": {  # the pattern ends before any global layer
        "seed": 13,
        "lengths": [17, 17],
        "vocab_size": 47,
        "num_layers": 3,
        "pattern": 6,
        "embed_dim": 28,
        "hidden_dim": 18,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 10,
        "sliding_window": 6,
        "query_pre_attn_scalar": 14.0,
    },
    "left_padding_window_4_layers_5_of_3": {
        "seed": 14,
        "lengths": [18, 1, 11, 5],
        "vocab_size": 43,
        "num_layers": 5,
        "pattern": 3,
        "embed_dim": 24,
        "hidden_dim": 30,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 4,
        "sliding_window": 4,
        "query_pre_attn_scalar": 7.0,
    },
    "window_one_short_of_13_layers_4_of_2": {  # only the last token misses the first one
        "seed": 15,
        "lengths": [13, 8],
        "vocab_size": 37,
        "num_layers": 4,
        "pattern": 2,
        "embed_dim": 18,
        "hidden_dim": 22,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 12,
        "sliding_window": 12,
        "query_pre_attn_scalar": 3.0,
        "rope_base_local": 50.0,
        "rope_base_global": 700.0,
        "norm_eps": 0.02,
    },
    "global_rope_scaled_by_8_window_6_in_29_layers_7_of_3": {  # as from 4B up
        "seed": 16,
        "lengths": [29, 10],
        "vocab_size": 41,
        "num_layers": 7,
        "pattern": 3,
        "embed_dim": 16,
        "hidden_dim": 26,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 14,
        "sliding_window": 6,
        "query_pre_attn_scalar": 11.0,
        "rope_scale_global": 8.0,
    },
}


def shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each array of the state dict, by its name there."""
    D, F, H = settings["embed_dim"], settings["hidden_dim"], settings["head_dim"]
    queries, keys = settings["num_heads"] * H, settings["num_kv_heads"] * H
    in_layer = {
        "self_attn.q_proj": (queries, D),
        "self_attn.k_proj": (keys, D),
        "self_attn.v_proj": (keys, D),
        "self_attn.o_proj": (D, queries),
        "self_attn.q_norm": (H,),
        "self_attn.k_norm": (H,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "pre_feedforward_layernorm": (D,),
        "post_feedforward_layernorm": (D,),
    }
    ends = {
        "model.embed_tokens.weight": (settings["vocab_size"], D),
        "model.norm.weight": (D,),
    }
    return ends | {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(settings["num_layers"])
        for name, shape in in_layer.items()
    }


def draw_weights(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights by their names in the state dict, float32."""
    generator = np.random.default_rng(settings["seed"])
    weights = {}
    for name, shape in sorted(shapes(settings).items()):
        scale = NORM_SCALE if len(shape) == 1 else shape[-1] ** -0.5
        weights[name] = (generator.standard_normal(shape) * scale).astype(np.float32)
    return weights


def checksum(weights: dict[str, np.ndarray]) -> int:
    """CRC-32 of all weights in sorted order: tells a drifting draw from a wrong model."""
    return zlib.crc32(b"".join(weights[name].tobytes() for name in sorted(weights)))


def draw_inputs(settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded ids, and the mask that is True on tokens. The padding holds ids of any value."""
    lengths_B = np.array(settings["lengths"])
    slots = lengths_B.max()
    generator = np.random.default_rng(settings["seed"] + 1000)
    ids_BL = generator.integers(0, settings["vocab_size"], (len(lengths_B), slots))
    return ids_BL, np.arange(slots)[None] >= slots - lengths_B[:, None]
