"""Truncation and draw from given logits in plain XLA, sharded or not."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.truncated_sampling.search import Passes, Truncation, Vocabulary, threshold


def truncate(
    logits_BV: Float[Array, "B V"], truncation: Truncation, *, axis_name: str | None = None
) -> tuple[Float[Array, "B V"], Float[Array, " B"]]:
    """Logits, at -inf where the token is not kept, and the logsumexps of all. No sort: `search.py`.

    Args:
        logits_BV: float32, tempered; with `axis_name`, those of this device's vocabulary shard. The
            threshold and the logsumexps are over all shards.
    """
    blocked_BNW = _in_blocks(logits_BV)
    least_B1, top_B1, mass_B1 = _threshold(blocked_BNW, logits_BV.shape[-1], truncation, axis_name)
    kept_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return kept_BV, (top_B1 + jnp.log(mass_B1))[:, 0]


def draw_truncated(
    logits_BV: Float[Array, "B V"],
    noise: block_draw.Noise,
    truncation: Truncation,
    *,
    axis_name: str | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Tokens drawn from those kept, their logits, the logsumexps of the kept ones and of all.

    Args:
        logits_BV: as in `truncate`; a shard is a multiple of `block_draw.BLOCK` tokens.
        noise: of `block_draw.shard_noise`.
    """
    kept_BV, logsumexp_B = truncate(logits_BV, truncation, axis_name=axis_name)
    picked = block_draw.pick(kept_BV, noise)
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * logits_BV.shape[-1]
        picked = block_draw.merge(picked._replace(ids=first + picked.ids), axis_name)
    return picked.ids, picked.logits, picked.logsumexps, logsumexp_B


def _in_blocks(logits_BV: jax.Array) -> jax.Array:
    """[B, blocks, tokens of a block], the last block padded with -inf."""
    B, V = logits_BV.shape
    padding = block_draw.num_blocks(V) * block_draw.BLOCK - V
    padded = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return padded.reshape(B, -1, block_draw.BLOCK)


def _threshold(
    blocked_BNW: jax.Array, shard_size: int, truncation: Truncation, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thresholds, largest logits and masses over the full vocabulary, [B, 1] each."""
    maxima_BN = blocked_BNW.max(axis=-1)
    if axis_name is not None:
        maxima_BN = jax.lax.all_gather(maxima_BN, axis_name, axis=1, tiled=True)
    top_B1 = maxima_BN.max(axis=-1, keepdims=True)

    def passes(blocked, axis_name=None):
        def total(values):
            # Over the blocks first: a CPU sums along the last axis one by one, others vectorised.
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
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    candidates = passes(maxima_BN[:, None])
    vocabulary = Vocabulary(everything, candidates, top_B1, top_B1, mass_B1, shards * shard_size)
    return threshold(vocabulary, truncation), top_B1, mass_B1
