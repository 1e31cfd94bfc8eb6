"""Logits to the next token and its log-prob, row by row. Knows no model, cache or loop.

Plain jax: truncation sorts the vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.errors import UserError


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError where a sampling setting has no meaning."""
    if not temperature >= 0:
        raise UserError(f"temperature={temperature}: must be 0 (greedy) or more")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (off)")


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token for each row with that row's key.

    Args:
        logits_BV: float32.
        keys_B: one key a row; a draw depends on its own row alone.
        temperature: divides the logits; 0 takes the largest, with its log-prob at temperature 1.
        top_k: keep the k largest, and whatever ties with the smallest of them; 0 keeps all.
        top_p: then keep the smallest set of largest ones whose mass reaches p; 1 keeps all.

    Returns:
        Ids, and their log-probs under the distribution drawn from: tempered and, where tokens were
        cut off, renormalised over the kept ones. Greedy log-probs are of the full distribution.
    """
    if temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1)
        return ids_B, _pick(logits_BV, ids_B) - jax.nn.logsumexp(logits_BV, axis=-1)
    return draw(truncate(logits_BV / temperature, top_k=top_k, top_p=top_p), keys_B)


def draw(
    logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token a row from softmax(logits), and its log-prob: the inverse of the cumulative sum.

    The words stand in about sqrt(V) blocks. One uniform number picks the block by its mass, another
    the word within it, so that two random numbers a row do where Gumbel noise takes V: at Gemma's
    262 144 words, making those costs more than the head.
    """
    B, V = logits_BV.shape
    width = 1 << (V.bit_length() // 2)
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -V % width)), constant_values=-jnp.inf)
    top_B = logits_BV.max(axis=-1)
    masses_BNW = jnp.exp(padded_BV - top_B[:, None]).reshape(B, -1, width)
    masses_BN = masses_BNW.sum(axis=-1)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _inverse_cdf(masses_BN, uniform_B2[:, 0])
    masses_BW = jnp.take_along_axis(masses_BNW, block_B[:, None, None], axis=1)[:, 0]
    ids_B = block_B * width + _inverse_cdf(masses_BW, uniform_B2[:, 1])
    return ids_B, _pick(logits_BV, ids_B) - (top_B + jnp.log(masses_BN.sum(axis=-1)))


def _inverse_cdf(masses_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index at which the cumulative mass exceeds that share of the total; its mass is
    never 0."""
    cumulative_BN = jnp.cumsum(masses_BN, axis=-1)
    total_B = cumulative_BN[:, -1]
    # Rounding may give the whole total, which nothing exceeds.
    target_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, 0.0))
    return jnp.sum(cumulative_BN <= target_B[:, None], axis=-1)


def truncate(logits_BV: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Logits with the tokens outside top-k, and then outside top-p of what is left, at -inf."""
    V = logits_BV.shape[-1]
    if 0 < top_k < V:
        kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while the mass of those before it is short of p: the first always does.
        kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def _pick(logits_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0]
