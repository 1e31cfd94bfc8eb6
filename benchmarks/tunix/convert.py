"""Our parameters under Tunix's names and in its shapes, and back."""

from collections.abc import Mapping

import numpy as np

from gemma_grpo.model import Params

# Tunix's name -> our path, for what both keep once and for what Tunix keeps layer by layer.
ONCE = {
    "embedder/input_embedding": "embedding",
    "final_norm/scale": "final_norm/scale",
}
OF_A_LAYER = {
    "attn/attn_vec_einsum/w": "attention/o_proj",
    "attn/_query_norm/scale": "attention/q_norm/scale",
    "attn/_key_norm/scale": "attention/k_norm/scale",
    "mlp/gate_proj/kernel": "mlp/gate",
    "mlp/up_proj/kernel": "mlp/up",
    "mlp/down_proj/kernel": "mlp/down",
    "pre_attention_norm/scale": "pre_attention_norm/scale",
    "post_attention_norm/scale": "post_attention_norm/scale",
    "pre_ffw_norm/scale": "pre_mlp_norm/scale",
    "post_ffw_norm/scale": "post_mlp_norm/scale",
}
Q, KV = "attn/q_einsum/w", "attn/kv_einsum/w"


def to_tunix(params: Params) -> dict[str, np.ndarray]:
    """Name ("layers/0/attn/q_einsum/w") -> array, for tunix.models.gemma3.

    Ours are stacked over layers with the embedding axis first; Tunix has an array for each layer,
    the head axis first, keys and values in one.
    """
    layers = params["layers"]
    q, k, v = (_heads_and_embedding(layers["attention"][f"{name}_proj"]) for name in "qkv")
    stacked = {name: _get(layers, path) for name, path in OF_A_LAYER.items()}
    stacked |= {Q: q, KV: np.stack([k, v], axis=1)}
    return {name: np.asarray(_get(params, path)) for name, path in ONCE.items()} | {
        f"layers/{layer}/{name}": array
        for name, leaf in stacked.items()
        for layer, array in enumerate(np.asarray(leaf))
    }


def from_tunix(arrays: Mapping[str, np.ndarray]) -> Params:
    """The inverse of `to_tunix`."""
    num_layers = len({name.split("/")[1] for name in arrays if name.startswith("layers/")})
    stacked = lambda name: np.stack([arrays[f"layers/{i}/{name}"] for i in range(num_layers)])
    kv = stacked(KV)
    params: Params = {}
    for name, path in ONCE.items():
        _set(params, path, arrays[name])
    for name, path in OF_A_LAYER.items():
        _set(params, f"layers/{path}", stacked(name))
    for name, heads in (("q", stacked(Q)), ("k", kv[:, 0]), ("v", kv[:, 1])):
        _set(params, f"layers/attention/{name}_proj", _heads_and_embedding(heads))
    return params


def _heads_and_embedding(leaf: np.ndarray) -> np.ndarray:
    """[layers D N H] <-> [layers N D H]."""
    return np.swapaxes(np.asarray(leaf), 1, 2)


def _get(tree: Params, path: str) -> np.ndarray:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _set(tree: Params, path: str, leaf: np.ndarray) -> None:
    *folders, last = path.split("/")
    for key in folders:
        tree = tree.setdefault(key, {})
    tree[last] = leaf
