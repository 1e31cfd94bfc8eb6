"""One word a row from softmax(logits), with few random numbers. Knows no head and no truncation.

Words stand in blocks of `BLOCK` neighbours. A block is drawn by its mass with Gumbel-max (Gumbel
1954; Maddison et al., arXiv 1411.0030), then a word within it by the inverse of its cumulative sum:

    block = argmax_b( logsumexp(logits of b) + gumbel[b] )
    word  = first w of the block at which the cumulative mass exceeds uniform * the block's mass

V / BLOCK + 2 random numbers a row do where V are usual (514 for 262 144), so that noise costs
nothing beside the head on any device. One pass over the blocks in any order draws, and pieces of
the vocabulary merge by their maximum. A block's score is made of the block alone: a draw depends on
its row's logits and key, not on tile, batch or shard.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.errors import UserError

BLOCK = 512  # words; fixed, since a draw depends on it
GROUP = 32  # words; a block's cumulative sum is taken over its groups, then within one of them

LOWEST = float(jnp.finfo(jnp.float32).min)


class Pick(NamedTuple):
    """What a pass over some of the words leaves of each row. Picks merge: see `merge`."""

    scores: Float[Array, " B"]  # of the best block, its noise included
    ids: Int[Array, " B"]  # int32: the word drawn if that block wins
    logits: Float[Array, " B"]  # of that word
    logsumexps: Float[Array, " B"]  # over all words passed


def num_blocks(num_words: int) -> int:
    """Blocks of a vocabulary of `num_words`; the last may be short."""
    return -(-num_words // BLOCK)


def noise(
    keys_B: Key[Array, " B"], num_words: int
) -> tuple[Float[Array, "B blocks"], Float[Array, "B 2"]]:
    """Block noise (standard Gumbel) and word noise (uniform in [0, 1)) of each row, float32.

    `num_words` is of the whole vocabulary. A device with a slice of it takes its columns of the
    block noise.
    """
    size = 2 + num_blocks(num_words)
    bits = jax.vmap(lambda key: jax.random.bits(key, (size,), jnp.uint32))(keys_B)
    uniform = (bits[:, :2] >> 9).astype(jnp.float32) * 2.0**-23
    # All 32 bits, and finest near 0, where a block of little mass wins.
    tail = (bits[:, 2:].astype(jnp.float32) + 0.5) * 2.0**-32
    gumbel = -jnp.log(-jnp.log1p(-jnp.minimum(tail, 1 - 2.0**-24)))
    return gumbel, uniform


def noise_here(
    keys_B: Key[Array, " B"], num_words: int, axis_name: str | None
) -> tuple[Float[Array, "B blocks"], Float[Array, "B 2"]]:
    """`noise` for this device's `num_words` words: all of them, or inside `shard_map` its equal
    slice along `axis_name`. Raises UserError if a slice is no whole number of blocks."""
    if axis_name is None:
        return noise(keys_B, num_words)
    shards = jax.lax.axis_size(axis_name)
    if shards > 1 and num_words % BLOCK:
        raise UserError(
            f"vocabulary of {shards * num_words} words in {shards} slices: a slice must be a "
            f"multiple of {BLOCK} words; shard over fewer devices or not at all"
        )
    block_noise, word_noise = noise(keys_B, shards * num_words)
    mine = num_blocks(num_words)
    start = jax.lax.axis_index(axis_name) * mine
    return jax.lax.dynamic_slice_in_dim(block_noise, start, mine, axis=1), word_noise


def draw(
    logits_BV: Float[Array, "B V"],
    block_noise: Float[Array, "B blocks"],
    word_noise: Float[Array, "B 2"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Words drawn from softmax(logits), and each row's logsumexp. -inf is never drawn.

    Every row needs one finite logit. With a NaN or +inf in a row, its logsumexp less any of its
    logits is NaN or infinite, and its word is any.
    """
    picked = pick(logits_BV, block_noise, word_noise)
    return picked.ids, picked.logsumexps


def pick(
    logits_BV: Float[Array, "B V"],
    block_noise: Float[Array, "B blocks"],
    word_noise: Float[Array, "B 2"],
) -> Pick:
    """`draw`, and what it takes to merge it with draws from other words of the same rows."""
    B, V = logits_BV.shape
    # Words first: rows then lie side by side in vector registers, and reductions need no shuffles.
    logits_VB = jnp.pad(logits_BV.T, ((0, -V % BLOCK), (0, 0)), constant_values=-jnp.inf)
    if V <= BLOCK:
        ids_B, logits_B, logsumexps_B = pick_word(logits_VB, word_noise)
        return Pick(logsumexps_B + block_noise[:, 0], ids_B, logits_B, logsumexps_B)
    blocked = logits_VB.reshape(-1, BLOCK, B)
    tops = jnp.maximum(blocked.max(axis=1), LOWEST)
    logsumexps = tops + jnp.log(jnp.exp(blocked - tops[:, None]).sum(axis=1))
    scores = logsumexps + block_noise.T
    block_B = jnp.argmax(scores, axis=0).astype(jnp.int32)
    word_B, logits_B, _ = pick_word(_of(blocked, block_B), word_noise)
    return Pick(
        scores=_of(scores, block_B),
        ids=block_B * BLOCK + word_B,
        logits=logits_B,
        logsumexps=jax.nn.logsumexp(logsumexps, axis=0),
    )


def pick_word(
    block: Float[Array, "block B"], word_noise: Float[Array, "B 2"]
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Of each row's block of logits (words first): a word, int32 within the block, its logit, and
    the block's logsumexp."""
    top_B = jnp.maximum(block.max(axis=0), LOWEST)
    masses = jnp.exp(block - top_B[None]).reshape(-1, GROUP, len(top_B))
    group_masses = masses.sum(axis=1)
    group_B = _inverse_cdf(group_masses, word_noise[:, 0])
    word_B = group_B * GROUP + _inverse_cdf(_of(masses, group_B), word_noise[:, 1])
    return word_B, _of(block, word_B), top_B + jnp.log(group_masses.sum(axis=0))


def merge(picked: Pick, axis_name: str) -> Pick:
    """The pick over all words, from each device's over its own; ids are of the whole vocabulary."""
    # As one array: each of its fields would be a collective of its own. Of integers: a compiler may
    # make a sum of a small gather, which the bits of a float need not survive.
    bits = jnp.stack([jax.lax.bitcast_convert_type(field, jnp.int32) for field in picked])
    fields = zip(picked, jax.lax.all_gather(bits, axis_name, axis=1), strict=True)
    everyone = Pick(*(jax.lax.bitcast_convert_type(all_, one.dtype) for one, all_ in fields))
    device_B = jnp.argmax(everyone.scores, axis=0)
    best = jax.tree.map(lambda of_devices: _of(of_devices, device_B), everyone)
    return best._replace(logsumexps=jax.nn.logsumexp(everyone.logsumexps, axis=0))


def _inverse_cdf(masses: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index [B] at which the cumulative mass exceeds that share of the total. Its mass is
    never 0, however the sums were rounded: a uniform of at most 1 - 2^-23 is less than the whole
    after rounding too."""
    cumulative = jnp.where(masses > 0, jnp.cumsum(masses, axis=0), 0.0)
    exceeds = cumulative > (uniform_B * cumulative.max(axis=0))[None]
    index = jax.lax.broadcasted_iota(jnp.int32, masses.shape, 0)
    first_B = jnp.where(exceeds, index, len(masses)).min(axis=0)
    return first_B % len(masses)  # NaN exceeds nothing


def _of(values: jax.Array, index_B: jax.Array) -> jax.Array:
    """values[index_B[b], ..., b]."""
    index = index_B.reshape((1,) * (values.ndim - 1) + (-1,))
    return jnp.take_along_axis(values, index, axis=0)[0]
