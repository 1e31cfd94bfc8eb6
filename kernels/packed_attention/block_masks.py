"""Which keys each token of a packed row sees: as bounds, and as the pairs of blocks to compute.

The row is a sequence of segments: prompts, and completions that each continue a prompt of the row.
A token sees one range of places in its prompt and one in its own segment, which ends with itself.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Size of a block. On the shared trace 512 computes a third more; 128 saves less than its extra grid
# steps cost.
QUERIES, KEYS = 256, 256


class Segments(NamedTuple):
    """The segment of each place in a row.

    Attributes:
        is_token: False where the row is empty. Such a place sees nothing and is not seen.
        position: of the token in its sequence, counted from the prompt's first token.
        own_start: place of the first token of its segment. A segment's tokens are adjacent.
        prompt_start, prompt_end: the half-open range of its prompt; empty for the prompt's own
            tokens.
    """

    is_token: Bool[Array, " N"]
    position: Int[Array, " N"]
    own_start: Int[Array, " N"]
    prompt_start: Int[Array, " N"]
    prompt_end: Int[Array, " N"]


class BlockMask(NamedTuple):
    """The kernel's mask; E has room for all pairs of blocks.

    Attributes:
        bounds: for each token, the half-open range of places it sees in its prompt (0) and in its
            own segment (1). Padded to whole blocks.
        query_blocks, key_blocks: the pairs, sorted by query block; -1 after the last.
        count: the number of pairs.
    """

    bounds: Int[Array, "2 2 _N"]
    query_blocks: Int[Array, " E"]
    key_blocks: Int[Array, " E"]
    count: Int[Array, ""]


def blocks(length: int, size: int) -> int:
    """How many blocks of `size` hold `length`."""
    return -(-length // size)


def make_block_mask(segments: Segments, *, window: int | None) -> BlockMask:
    """The mask with which a token sees itself and those before it in its segment and its prompt, or
    with a window those less than `window` away."""
    (N,) = segments.is_token.shape
    query_blocks, key_blocks = blocks(N, QUERIES), blocks(N, KEYS)
    reach = jnp.iinfo(jnp.int32).max // 2 if window is None else window
    place_N = jnp.arange(N)
    # Token n of a prompt has position n: the first that is near enough has position - reach + 1.
    nearest_N = segments.prompt_start + jnp.maximum(segments.position - reach + 1, 0)
    prompt = jnp.minimum(nearest_N, segments.prompt_end), segments.prompt_end
    own = jnp.maximum(segments.own_start, place_N - reach + 1), place_N + 1
    bounds = jnp.where(segments.is_token, jnp.array([prompt, own]), 0).astype(jnp.int32)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, query_blocks * QUERIES - N)))

    low, high = jnp.swapaxes(bounds, 0, 1).reshape(2, 2, query_blocks, QUERIES, 1)
    start = (jnp.arange(key_blocks) * KEYS)[None, None, None]
    is_seen = (low < high) & (low < start + KEYS) & (high > start)
    is_pair = is_seen.any(axis=(0, 2))
    # The kernel must visit every block of queries: it writes zeros to one that sees nothing.
    is_pair = is_pair.at[:, 0].set(is_pair[:, 0] | ~is_pair.any(axis=1))
    most = query_blocks * key_blocks + 1
    by_query, by_key = jnp.nonzero(is_pair, size=most, fill_value=-1)
    return BlockMask(
        bounds,
        by_query.astype(jnp.int32),
        by_key.astype(jnp.int32),
        is_pair.sum(dtype=jnp.int32),
    )


def dense_mask(block_mask: BlockMask, queries: slice) -> Bool[Array, "1 Q C"]:
    """Which of the C places before `queries.stop` these queries see; they see no later one."""
    (prompt_low, prompt_high), (low, high) = block_mask.bounds[:, :, queries, None]
    place_1C = jnp.arange(queries.stop)[None]
    in_prompt = (prompt_low <= place_1C) & (place_1C < prompt_high)
    return (in_prompt | (low <= place_1C) & (place_1C < high))[None]
