"""The reference for fused sampling, in float32: all logits, then the draw of `block_draw`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.kernels import block_draw


def fused_sampling(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    keys_B: Key[Array, " B"],
    *,
    temperature: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Ids and log-probs as in `FusedDraw`, with the head in float32 at the highest precision."""
    logits_BV = jnp.einsum(
        "bd,vd->bv",
        hidden_BD.astype(jnp.float32),
        embedding_VD.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    if temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        logits_BV = logits_BV / temperature
        ids_B, _ = block_draw.draw(logits_BV, block_draw.noise(keys_B, len(embedding_VD)))
    logps_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return ids_B, jnp.take_along_axis(logps_BV, ids_B[:, None], axis=-1)[:, 0]
