"""Truncation and draw for logits at hand, in plain XLA, sharded or not. Knows no head or kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.truncated_sampling.search import Passes, Truncation, Words, threshold


def truncation_thresholds(
    logits_BV: Float[Array, "B V"], truncation: Truncation, *, axis_name: str | None = None
) -> Float[Array, " B"]:
    """A word is kept where its logit is at least its row's threshold. No sort: see `search.py`.

    Logits are float32 and tempered. With `axis_name` they are this device's equal slice of the
    words, and the thresholds are the whole vocabulary's.
    """
    blocked_BNW = _in_blocks(logits_BV)
    least_B1, _, _ = _threshold(blocked_BNW, logits_BV.shape[-1], truncation, axis_name)
    return least_B1[:, 0]


def draw_truncated(
    logits_BV: Float[Array, "B V"],
    block_noise: Float[Array, "B blocks"],
    word_noise: Float[Array, "B 2"],
    truncation: Truncation,
    *,
    axis_name: str | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Words drawn from the kept ones, their logits, the logsumexps of the kept ones and of all.

    Args:
        logits_BV: float32, tempered. With `axis_name` this device's slice, in whole blocks.
        block_noise: of the same words; with `word_noise`, of `block_draw.noise`.
    """
    blocked_BNW = _in_blocks(logits_BV)
    least_B1, top_B1, mass_B1 = _threshold(blocked_BNW, logits_BV.shape[-1], truncation, axis_name)
    kept_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    picked = block_draw.pick(kept_BV, block_noise, word_noise)
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * logits_BV.shape[-1]
        picked = block_draw.merge(picked._replace(ids=first + picked.ids), axis_name)
    return picked.ids, picked.logits, picked.logsumexps, (top_B1 + jnp.log(mass_B1))[:, 0]


def _in_blocks(logits_BV: jax.Array) -> jax.Array:
    """[B, blocks, words of a block], the last filled up with -inf."""
    B, V = logits_BV.shape
    padding = block_draw.num_blocks(V) * block_draw.BLOCK - V
    padded = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return padded.reshape(B, -1, block_draw.BLOCK)


def _threshold(
    blocked_BNW: jax.Array, num_words: int, truncation: Truncation, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thresholds, largest logits and masses of all words, [B, 1] each."""
    maxima_BN = blocked_BNW.max(axis=-1)
    if axis_name is not None:
        maxima_BN = jax.lax.all_gather(maxima_BN, axis_name, axis=1, tiled=True)
    top_B1 = maxima_BN.max(axis=-1, keepdims=True)

    def passes(blocked, axis_name=None):
        def total(values):
            # Over the blocks first: a CPU adds neighbours one by one, but rows of them at once.
            total_B1 = values.sum(axis=1).sum(axis=-1, keepdims=True)
            return total_B1 if axis_name is None else jax.lax.psum(total_B1, axis_name)

        def count(least_B1):
            return total(jnp.where(blocked >= least_B1[:, :, None], 1.0, 0.0))

        def count_and_mass(least_B1):
            masses = jnp.exp(blocked - top_B1[:, :, None])
            mass_B1 = total(jnp.where(blocked >= least_B1[:, :, None], masses, 0.0))
            return count(least_B1), mass_B1

        return Passes(count, count_and_mass)

    everything = passes(blocked_BNW, axis_name)
    _, mass_B1 = everything.count_and_mass(jnp.full_like(top_B1, -jnp.inf))
    if axis_name is not None:
        num_words *= jax.lax.axis_size(axis_name)
    candidates = passes(maxima_BN[:, None])
    words = Words(everything, candidates, top_B1, top_B1, mass_B1, num_words)
    return threshold(words, truncation), top_B1, mass_B1
