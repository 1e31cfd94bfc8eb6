"""Draws one token per row from softmax(logits), with few random numbers.

The vocabulary is divided into blocks of `BLOCK` consecutive tokens. A block is drawn by its mass
with Gumbel-max (Gumbel 1954; Maddison et al., arXiv 1411.0030), then a token within it by inverse
CDF:

    block = argmax_b( logsumexp(logits of b) + gumbel[b] )
    token = first t of the block at which the cumulative mass exceeds uniform * the block's mass

This takes V / BLOCK + 2 random numbers per row instead of V (514 for 262 144), so that noise costs
little next to the head on any device. A draw is one pass over the blocks, in any order, and shards
of the vocabulary merge by maximum. A block's score depends on that block alone: a draw depends on
its row's logits and key, not on tile, batch or shard.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.errors import UserError

BLOCK = 512  # tokens; fixed, since a draw depends on it
GROUP = 32  # tokens; the inverse CDF picks a group of a block, then a token of the group

LOWEST = float(jnp.finfo(jnp.float32).min)


class Noise(NamedTuple):
    """The random numbers of each row's draw, float32."""

    gumbel: Float[Array, "B blocks"]  # standard Gumbel, one per block
    uniform: Float[Array, "B 2"]  # in [0, 1): picks the group of a block, and the token of a group


class Pick(NamedTuple):
    """The result of a pass over some of the tokens, for each row. `merge` combines them."""

    scores: Float[Array, " B"]  # of the best block, its noise included
    ids: Int[Array, " B"]  # int32: the token drawn if that block wins
    logits: Float[Array, " B"]  # of that token
    logsumexps: Float[Array, " B"]  # over all tokens of the pass


def num_blocks(vocab_size: int) -> int:
    """Blocks in a vocabulary of `vocab_size` tokens; the last may be short."""
    return -(-vocab_size // BLOCK)


def noise(keys_B: Key[Array, " B"], vocab_size: int) -> Noise:
    """The noise of each row's draw from a vocabulary of `vocab_size` tokens."""
    size = 2 + num_blocks(vocab_size)
    bits = jax.vmap(lambda key: jax.random.bits(key, (size,), jnp.uint32))(keys_B)
    uniform = (bits[:, :2] >> 9).astype(jnp.float32) * 2.0**-23
    # All 32 bits, with the finest resolution near 0, where blocks of little mass win.
    tail = (bits[:, 2:].astype(jnp.float32) + 0.5) * 2.0**-32
    gumbel = -jnp.log(-jnp.log1p(-jnp.minimum(tail, 1 - 2.0**-24)))
    return Noise(gumbel, uniform)


def shard_noise(keys_B: Key[Array, " B"], shard_size: int, axis_name: str | None) -> Noise:
    """`noise` for this device's shard of the vocabulary.

    Args:
        shard_size: tokens of the shard.
        axis_name: inside `shard_map`, the axis that the vocabulary is sharded over, in equal shards
            and in order; None if `shard_size` is the full vocabulary.

    Raises:
        UserError: a shard is not a multiple of `BLOCK` tokens.
    """
    if axis_name is None:
        return noise(keys_B, shard_size)
    shards = jax.lax.axis_size(axis_name)
    if shards > 1 and shard_size % BLOCK:
        raise UserError(
            f"vocabulary of {shards * shard_size} tokens in {shards} shards: a shard must be a "
            f"multiple of {BLOCK} tokens; shard over fewer devices or not at all"
        )
    gumbel, uniform = noise(keys_B, shards * shard_size)
    blocks = num_blocks(shard_size)
    start = jax.lax.axis_index(axis_name) * blocks
    return Noise(jax.lax.dynamic_slice_in_dim(gumbel, start, blocks, axis=1), uniform)


def draw(
    logits_BV: Float[Array, "B V"], noise: Noise
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Tokens drawn from softmax(logits), and each row's logsumexp. -inf is never drawn.

    Every row needs one finite logit. With a NaN or +inf in a row, its logsumexp minus any of its
    logits is NaN or infinite, and its token is arbitrary.
    """
    picked = pick(logits_BV, noise)
    return picked.ids, picked.logsumexps


def pick(logits_BV: Float[Array, "B V"], noise: Noise) -> Pick:
    """`draw`, with what `merge` needs to combine it with draws from other vocabulary shards."""
    B, V = logits_BV.shape
    # Tokens first: rows are then adjacent in vector registers, and reductions need no shuffles.
    logits_VB = jnp.pad(logits_BV.T, ((0, -V % BLOCK), (0, 0)), constant_values=-jnp.inf)
    if V <= BLOCK:
        ids_B, logits_B, logsumexps_B = pick_token(logits_VB, noise.uniform)
        return Pick(logsumexps_B + noise.gumbel[:, 0], ids_B, logits_B, logsumexps_B)
    blocked = logits_VB.reshape(-1, BLOCK, B)
    tops = jnp.maximum(blocked.max(axis=1), LOWEST)
    logsumexps = tops + jnp.log(jnp.exp(blocked - tops[:, None]).sum(axis=1))
    scores = logsumexps + noise.gumbel.T
    block_B = jnp.argmax(scores, axis=0).astype(jnp.int32)
    token_B, logits_B, _ = pick_token(_at(blocked, block_B), noise.uniform)
    return Pick(
        scores=_at(scores, block_B),
        ids=block_B * BLOCK + token_B,
        logits=logits_B,
        logsumexps=jax.nn.logsumexp(logsumexps, axis=0),
    )


def pick_token(
    block: Float[Array, "block B"], uniform_B2: Float[Array, "B 2"]
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Draws from each row's block of logits (tokens first).

    Returns:
        The token's index within the block (int32), its logit, and the block's logsumexp.
    """
    top_B = jnp.maximum(block.max(axis=0), LOWEST)
    masses = jnp.exp(block - top_B[None]).reshape(-1, GROUP, len(top_B))
    group_masses = masses.sum(axis=1)
    group_B = _inverse_cdf(group_masses, uniform_B2[:, 0])
    token_B = group_B * GROUP + _inverse_cdf(_at(masses, group_B), uniform_B2[:, 1])
    return token_B, _at(block, token_B), top_B + jnp.log(group_masses.sum(axis=0))


def merge(picked: Pick, axis_name: str) -> Pick:
    """The pick over the full vocabulary from each device's pick over its shard; ids are global."""
    # One array for one collective instead of four. Integers: a compiler may turn a small gather
    # into a sum, which need not preserve the bits of a float.
    bits = jnp.stack([jax.lax.bitcast_convert_type(field, jnp.int32) for field in picked])
    fields = zip(picked, jax.lax.all_gather(bits, axis_name, axis=1), strict=True)
    gathered = Pick(*(jax.lax.bitcast_convert_type(all_, own.dtype) for own, all_ in fields))
    device_B = jnp.argmax(gathered.scores, axis=0)
    best = jax.tree.map(lambda of_devices: _at(of_devices, device_B), gathered)
    return best._replace(logsumexps=jax.nn.logsumexp(gathered.logsumexps, axis=0))


def _inverse_cdf(masses: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index [B] at which the cumulative mass exceeds uniform * the total.

    The mass there is never 0: `uniform` is at most 1 - 2^-23, so uniform * total is below the total
    even after rounding.
    """
    cumulative = jnp.where(masses > 0, jnp.cumsum(masses, axis=0), 0.0)
    exceeds = cumulative > (uniform_B * cumulative.max(axis=0))[None]
    index = jax.lax.broadcasted_iota(jnp.int32, masses.shape, 0)
    first_B = jnp.where(exceeds, index, len(masses)).min(axis=0)
    return first_B % len(masses)  # in range for NaN too, which exceeds nothing


def _at(values: jax.Array, index_B: jax.Array) -> jax.Array:
    """values[index_B[b], ..., b]."""
    index = index_B.reshape((1,) * (values.ndim - 1) + (-1,))
    return jnp.take_along_axis(values, index, axis=0)[0]
