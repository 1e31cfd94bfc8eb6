"""The reference for truncated sampling: by a sort, in plain float32 JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.truncated_sampling.search import Truncation


def truncate(logits_BV: Float[Array, "B V"], truncation: Truncation) -> Float[Array, "B V"]:
    """Tempered logits, at -inf where the token is not kept."""
    top_k, top_p, min_p = truncation
    V = logits_BV.shape[-1]
    if 0 < top_k < V:
        kth_B1 = jnp.sort(logits_BV, axis=-1)[:, V - top_k, None]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while the mass of those before it is below p: the first always does.
        kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if min_p > 0:
        least_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(min_p))
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def draw_truncated(
    logits_BV: Float[Array, "B V"],
    noise: block_draw.Noise,
    truncation: Truncation,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Ids, log-probs under the kept distribution and under the full one, kept masses."""
    kept_BV = truncate(logits_BV, truncation)
    ids_B, _ = block_draw.draw(kept_BV, noise)
    pick = lambda values_BV: jnp.take_along_axis(values_BV, ids_B[:, None], axis=-1)[:, 0]
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    return (
        ids_B,
        pick(jax.nn.log_softmax(kept_BV, axis=-1)),
        pick(jax.nn.log_softmax(logits_BV, axis=-1)),
        jnp.sum(jnp.where(jnp.isfinite(kept_BV), probs_BV, 0.0), axis=-1),
    )
