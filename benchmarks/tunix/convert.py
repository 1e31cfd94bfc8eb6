"""Our parameters under Tunix's names and in its shapes, and back. Knows no file and no Tunix."""

from collections.abc import Mapping

import numpy as np

from gemma_grpo.model import Params


def to_tunix(params: Params) -> dict[str, np.ndarray]:
    """Name ("layers/0/attn/q_einsum/w") -> array, for tunix.models.gemma3.

    Ours are stacked over layers with the embedding axis first; theirs lie layer by layer with the
    head axis first, keys and values in one array.
    """
    layers = params["layers"]
    attention, mlp = layers["attention"], layers["mlp"]
    head_first = lambda leaf: np.swapaxes(
        np.asarray(leaf), 1, 2
    )  # [layers D N H] -> [layers N D H]
    stacked = {
        "attn/q_einsum/w": head_first(attention["q_proj"]),
        "attn/kv_einsum/w": np.stack(
            [head_first(attention["k_proj"]), head_first(attention["v_proj"])], axis=1
        ),
        "attn/attn_vec_einsum/w": attention["o_proj"],
        "attn/_query_norm/scale": attention["q_norm"]["scale"],
        "attn/_key_norm/scale": attention["k_norm"]["scale"],
        "mlp/gate_proj/kernel": mlp["gate"],
        "mlp/up_proj/kernel": mlp["up"],
        "mlp/down_proj/kernel": mlp["down"],
        "pre_attention_norm/scale": layers["pre_attention_norm"]["scale"],
        "post_attention_norm/scale": layers["post_attention_norm"]["scale"],
        "pre_ffw_norm/scale": layers["pre_mlp_norm"]["scale"],
        "post_ffw_norm/scale": layers["post_mlp_norm"]["scale"],
    }
    whole = {
        "embedder/input_embedding": np.asarray(params["embedding"]),
        "final_norm/scale": np.asarray(params["final_norm"]["scale"]),
    }
    return whole | {
        f"layers/{layer}/{name}": np.asarray(leaf)[layer]
        for name, leaf in stacked.items()
        for layer in range(len(mlp["gate"]))
    }


def from_tunix(arrays: Mapping[str, np.ndarray]) -> Params:
    """The inverse of `to_tunix`."""
    num_layers = len({name.split("/")[1] for name in arrays if name.startswith("layers/")})
    stacked = lambda name: np.stack([arrays[f"layers/{i}/{name}"] for i in range(num_layers)])
    head_inside = lambda leaf: np.swapaxes(leaf, 1, 2)  # [layers N D H] -> [layers D N H]
    kv = stacked("attn/kv_einsum/w")
    return {
        "embedding": arrays["embedder/input_embedding"],
        "final_norm": {"scale": arrays["final_norm/scale"]},
        "layers": {
            "attention": {
                "q_proj": head_inside(stacked("attn/q_einsum/w")),
                "k_proj": head_inside(kv[:, 0]),
                "v_proj": head_inside(kv[:, 1]),
                "o_proj": stacked("attn/attn_vec_einsum/w"),
                "q_norm": {"scale": stacked("attn/_query_norm/scale")},
                "k_norm": {"scale": stacked("attn/_key_norm/scale")},
            },
            "mlp": {name: stacked(f"mlp/{name}_proj/kernel") for name in ("gate", "up", "down")},
            "pre_attention_norm": {"scale": stacked("pre_attention_norm/scale")},
            "post_attention_norm": {"scale": stacked("post_attention_norm/scale")},
            "pre_mlp_norm": {"scale": stacked("pre_ffw_norm/scale")},
            "post_mlp_norm": {"scale": stacked("post_ffw_norm/scale")},
        },
    }
