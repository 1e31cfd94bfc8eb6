"""Plain XLA: the head's logits, then a draw from them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_grpo.kernels import block_draw, head


def pick(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    noise: block_draw.Noise,
    *,
    temperature: float,
) -> block_draw.Pick:
    """One token per row, with what is needed to merge shards. Logits are divided by `temperature`;
    0 takes the largest, which is then the score."""
    logits_BV = head.logits(hidden_BD, embedding_VD)
    if temperature:
        return block_draw.pick(logits_BV / temperature, noise)
    top_B = logits_BV.max(axis=-1)
    ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return block_draw.Pick(top_B, ids_B, top_B, jax.nn.logsumexp(logits_BV, axis=-1))
