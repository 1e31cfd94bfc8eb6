"""Which keys each packed token sees: as bounds, and as the pairs of blocks that hold any of them.
Knows no product and no layer.

The keys stand in one row: the prompts' slots, p*S + s, filled up to whole blocks, and behind them
the packed tokens. The tokens of a completion stand together, so that a token sees one run of slots
in its prompt and one run of packed tokens, which ends with itself.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Of a block. On the shared trace 512 computes a third more; 128 saves less than its steps cost.
QUERIES, KEYS = 256, 256


class Sight(NamedTuple):
    """What the kernel goes by; E has room for all pairs of blocks.

    Attributes:
        bounds: of each token, its prompt's (0) and its own completion's (1) keys in the row of
            keys: the first it sees, and the one behind the last. Filled up to whole blocks.
        query_blocks, key_blocks: the pairs, by query blocks; -1 behind the last.
        count: how many there are.
    """

    bounds: Int[Array, "2 2 _X"]
    query_blocks: Int[Array, " E"]
    key_blocks: Int[Array, " E"]
    count: Int[Array, ""]


def blocks(length: int, size: int) -> int:
    """Blocks of `size` that hold `length`."""
    return -(-length // size)


def sight(
    rows_X: Int[Array, " X"],
    slots_X: Int[Array, " X"],
    is_token_X: Bool[Array, " X"],
    prompt_lengths_P: Int[Array, " P"],
    *,
    num_rows: int,
    num_prompt_slots: int,
    window: int | None,
) -> Sight:
    """What tokens see through a window: those before them in their completion and its prompt that
    are less than `window` away, themselves included; all of them without one.

    Args:
        rows_X: completion that each token belongs to, group-major.
        slots_X: its slot there. Slots of a completion stand side by side, from 0 on.
        is_token_X: whether it is one; others see nothing and are not seen by any token.
        prompt_lengths_P: tokens of each prompt, which stand in the last of its S slots.
        num_rows: B, a multiple of P.
        num_prompt_slots: S.
    """
    (X,), (P,), S = rows_X.shape, prompt_lengths_P.shape, num_prompt_slots
    query_blocks, prompt_blocks = blocks(X, QUERIES), blocks(P * S, KEYS)
    key_blocks = prompt_blocks + blocks(X, KEYS)
    prompt_X = jnp.minimum(rows_X // (num_rows // P), P - 1)
    reach = jnp.iinfo(jnp.int32).max // 2 if window is None else window
    # Of slot t the distance to prompt slot s is S + t - s.
    first_X = jnp.maximum(S - prompt_lengths_P[prompt_X], S + slots_X - reach + 1)
    prompts = prompt_X * S + first_X, (prompt_X + 1) * S
    places_X = prompt_blocks * KEYS + jnp.arange(X)
    own = places_X - jnp.minimum(slots_X, reach - 1), places_X + 1
    bounds = jnp.where(is_token_X, jnp.array([prompts, own]), 0).astype(jnp.int32)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, query_blocks * QUERIES - X)))

    low, high = jnp.swapaxes(bounds, 0, 1).reshape(2, 2, query_blocks, QUERIES, 1)
    start = (jnp.arange(key_blocks) * KEYS)[None, None, None]
    is_seen = (low < high) & (low < start + KEYS) & (high > start)
    is_pair = is_seen.any(axis=(0, 2))
    # The kernel must come by every block of queries, and writes zeros where it sees none.
    is_pair = is_pair.at[:, 0].set(is_pair[:, 0] | ~is_pair.any(axis=1))
    most = query_blocks * key_blocks + 1
    pairs = jnp.nonzero(is_pair, size=most, fill_value=-1)
    return Sight(bounds, *(each.astype(jnp.int32) for each in pairs), is_pair.sum(dtype=jnp.int32))
