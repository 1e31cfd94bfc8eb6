"""Small Gemma 3 models with drawn weights, norms included."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles.gemma3_recipe import draw_weights

from gemma_grpo import model as gemma3

_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def make_config(settings: dict[str, Any]) -> gemma3.Gemma3Config:
    """Our configuration of a recipe's settings."""
    fields = {k: v for k, v in settings.items() if k not in ("seed", "lengths")}
    return gemma3.Gemma3Config(**fields)


def make_params(settings: dict[str, Any]) -> gemma3.Params:
    """The recipe's weights in our tree: layers stacked in front, a projection [in..., out...]."""
    weights = draw_weights(settings)
    D, H = settings["embed_dim"], settings["head_dim"]

    def stacked(name: str) -> np.ndarray:
        every = [f"model.layers.{i}.{name}.weight" for i in range(settings["num_layers"])]
        return np.stack([weights[each] for each in every])

    def into_heads(name: str) -> np.ndarray:  # In: [layer, heads * H, D]  Out: [layer, D, heads, H]
        return stacked(name).reshape(settings["num_layers"], -1, H, D).transpose(0, 3, 1, 2)

    out_of_heads = stacked("self_attn.o_proj").reshape(settings["num_layers"], D, -1, H)
    attention = {
        "q_proj": into_heads("self_attn.q_proj"),
        "k_proj": into_heads("self_attn.k_proj"),
        "v_proj": into_heads("self_attn.v_proj"),
        "o_proj": out_of_heads.transpose(0, 2, 3, 1),  # In: [layer, D, N, H]
        "q_norm": {"scale": stacked("self_attn.q_norm")},
        "k_norm": {"scale": stacked("self_attn.k_norm")},
    }
    mlp = {name: stacked(f"mlp.{name}_proj").swapaxes(1, 2) for name in ("gate", "up", "down")}
    norms = {ours: {"scale": stacked(theirs)} for ours, theirs in _NORMS.items()}
    tree = {
        "embedding": weights["model.embed_tokens.weight"],
        "layers": {"attention": attention, "mlp": mlp} | norms,
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    return jax.tree.map(jnp.asarray, tree)


def build(config: gemma3.Gemma3Config, params: gemma3.Params) -> gemma3.Gemma3:
    """The module with these parameters."""
    graphdef, _ = gemma3.abstract(config)
    return nnx.merge(graphdef, params)
