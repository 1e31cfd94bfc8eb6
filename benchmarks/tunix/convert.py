"""Our parameters under Tunix's names and in its shapes, and back."""

from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from gemma_grpo.model import Params

# Tunix's name -> our path, for what both keep once and for what Tunix keeps layer by layer.
ONCE = {
    "embedder/input_embedding": "embedding",
    "final_norm/scale": "final_norm/scale",
}
OF_A_LAYER = {
    "attn/attn_vec_einsum/w": "layers/attention/o_proj",
    "attn/_query_norm/scale": "layers/attention/q_norm/scale",
    "attn/_key_norm/scale": "layers/attention/k_norm/scale",
    "mlp/gate_proj/kernel": "layers/mlp/gate",
    "mlp/up_proj/kernel": "layers/mlp/up",
    "mlp/down_proj/kernel": "layers/mlp/down",
    "pre_attention_norm/scale": "layers/pre_attention_norm/scale",
    "post_attention_norm/scale": "layers/post_attention_norm/scale",
    "pre_ffw_norm/scale": "layers/pre_mlp_norm/scale",
    "post_ffw_norm/scale": "layers/post_mlp_norm/scale",
}
Q, KV, OURS = "attn/q_einsum/w", "attn/kv_einsum/w", "layers/attention/{}_proj"


def to_tunix(params: Params) -> dict[str, np.ndarray]:
    """Name ("layers/0/attn/q_einsum/w") -> array, for tunix.models.gemma3.

    Ours are stacked over layers with the embedding axis first; Tunix has an array for each layer,
    the head axis first, keys and values in one.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    ours = {path: np.asarray(leaf) for path, leaf in flat.items()}
    q, k, v = (ours[OURS.format(name)].swapaxes(1, 2) for name in "qkv")
    stacked = {name: ours[path] for name, path in OF_A_LAYER.items()}
    stacked |= {Q: q, KV: np.stack([k, v], axis=1)}
    return {name: ours[path] for name, path in ONCE.items()} | {
        f"layers/{layer}/{name}": array
        for name, leaf in stacked.items()
        for layer, array in enumerate(leaf)
    }


def from_tunix(arrays: Mapping[str, np.ndarray]) -> Params:
    """The inverse of `to_tunix`."""
    num_layers = len({name.split("/")[1] for name in arrays if name.startswith("layers/")})
    stacked = lambda name: np.stack([arrays[f"layers/{n}/{name}"] for n in range(num_layers)])
    q, kv = stacked(Q), stacked(KV)
    ours = {path: arrays[name] for name, path in ONCE.items()}
    ours |= {path: stacked(name) for name, path in OF_A_LAYER.items()}
    for name, heads in (("q", q), ("k", kv[:, 0]), ("v", kv[:, 1])):
        ours[OURS.format(name)] = heads.swapaxes(1, 2)
    return traverse_util.unflatten_dict(ours, sep="/")
