"""Tunix's parameters under our names and in our shapes. Imports nothing of either."""

from collections.abc import Mapping

import numpy as np

# Our name -> Tunix's, of what both keep once and of what Tunix keeps layer by layer.
ONCE = {"embedding": "embedder/input_embedding", "final_norm.scale": "final_norm/scale"}
OF_A_LAYER = {
    "attention.o_proj": "attn/attn_vec_einsum/w",
    "attention.q_norm.scale": "attn/_query_norm/scale",
    "attention.k_norm.scale": "attn/_key_norm/scale",
    "mlp.gate": "mlp/gate_proj/kernel",
    "mlp.up": "mlp/up_proj/kernel",
    "mlp.down": "mlp/down_proj/kernel",
    "pre_attention_norm.scale": "pre_attention_norm/scale",
    "post_attention_norm.scale": "post_attention_norm/scale",
    "pre_mlp_norm.scale": "pre_ffw_norm/scale",
    "post_mlp_norm.scale": "post_ffw_norm/scale",
}


def to_ours(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name ("layers.attention.q_proj") -> array, of Tunix's ("layers/0/attn/q_einsum/w").

    Ours are stacked over layers with the embedding axis first; Tunix has an array for each layer,
    the head axis first, keys and values in one.
    """
    num_layers = len({name.split("/")[1] for name in theirs if name.startswith("layers/")})
    stacked = lambda name: np.stack([theirs[f"layers/{n}/{name}"] for n in range(num_layers)])
    ours = {name: theirs[its] for name, its in ONCE.items()}
    ours |= {f"layers.{name}": stacked(its) for name, its in OF_A_LAYER.items()}
    k, v = np.moveaxis(stacked("attn/kv_einsum/w"), 1, 0)
    for name, heads in {"q": stacked("attn/q_einsum/w"), "k": k, "v": v}.items():
        ours[f"layers.attention.{name}_proj"] = np.ascontiguousarray(heads.swapaxes(1, 2))
    return ours
