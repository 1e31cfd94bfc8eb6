"""The forward pass over whole sequences: hidden states, and keys and values for decoding."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_grpo.model import attention
from gemma_grpo.model.layout import REPLICATED, Layout
from gemma_grpo.model.stack import layer_block, rope_tables, scan_layers, score_scale, select_rope
from gemma_grpo.model.transformer import Gemma3

# Keys and values of every layer, [layer, row, slot, K, H] each.
KV = tuple[Float[Array, "layers P S K H"], Float[Array, "layers P S K H"]]


def forward(
    model: Gemma3,
    ids_RL: Int[Array, "R L"],
    mask_BL: Bool[Array, "B L"],
    *,
    layout: Layout = REPLICATED,
) -> tuple[Float[Array, "B L D"], KV]:
    """Run whole sequences. Padding may be on either side; its hidden states mean nothing.

    Args:
        ids_RL: tokens of all R rows (see `Layout`); all else is for the B own rows.
        mask_BL: True on tokens, False on padding. The tokens of a row are adjacent.
        layout: of the weights.

    Returns:
        Hidden states after the final norm, and every layer's keys and values.
    """
    config = model.config
    positions_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1) - 1, 0)
    masks = [
        attention.causal_mask(mask_BL.shape[1], window=window) & mask_BL[:, None, :]
        for window in (config.sliding_window, None)
    ]

    def layer(x_BLD, scanned):
        block, is_global, _ = layer_block(model, scanned, None)
        mask_BLL = jnp.where(is_global, masks[1], masks[0])
        attend = lambda q, k, v: attention.attend(q, k, v, mask_BLL, scale=score_scale(config))
        return block(x_BLD, select_rope(ropes, is_global), attend, layout=layout)

    ropes = rope_tables(config, positions_BL)
    x_BLD, kv = scan_layers(model, layer, model.embed(ids_RL, layout), remat="none", gather=None)
    return model.final_norm(x_BLD), kv
