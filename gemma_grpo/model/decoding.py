"""Decoding: one more token of each row, with a key-value cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gemma_grpo.model import attention
from gemma_grpo.model.config import Gemma3Config
from gemma_grpo.model.layout import REPLICATED, Layout
from gemma_grpo.model.sequences import KV
from gemma_grpo.model.stack import rope_tables, score_scale
from gemma_grpo.model.transformer import Block, Gemma3

# One (keys, values) pair per layer, [row, slot, K, H] each, with as many slots as the layer needs.
Cache = list[tuple[Float[Array, "B _C K H"], Float[Array, "B _C K H"]]]


def unstack_layers(model: Gemma3) -> list[Block]:
    """A list of the blocks, for `decode`. Copies the weights: call it outside the decode loop."""
    graphdef, stacked = nnx.split(model.layers)
    block = lambda i: nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], stacked))
    return [block(i) for i in range(model.config.num_layers)]


def empty_cache(config: Gemma3Config, *, num_rows: int, num_slots: int, dtype: jnp.dtype) -> Cache:
    """Zeroed keys and values for the `num_slots` completion slots of `num_rows` rows.

    A global layer has C = num_slots. A local one has a ring buffer of at most its window, in which
    completion slot t is at t % C: tokens that leave the window are overwritten.
    """

    def empty(is_global: bool) -> jax.Array:
        C = num_slots if is_global else min(num_slots, config.sliding_window)
        return jnp.zeros((num_rows, C, config.num_kv_heads, config.head_dim), dtype)

    return [(empty(is_global), empty(is_global)) for is_global in config.is_global]


def decode(
    model: Gemma3,
    blocks: list[Block],
    ids_R: Int[Array, " R"],
    slot: Int[Array, ""],
    cache: Cache,
    prompt_kv: KV,
    prompt_mask_PS: Bool[Array, "P S"],
    layout: Layout = REPLICATED,
) -> tuple[Float[Array, "B D"], Cache]:
    """Run one token of each row, at completion slot `slot`, and write its keys and values there.

    Args:
        model: for the embedding and the final norm.
        blocks: `unstack_layers(model)`.
        ids_R: the token at `slot`, for all R rows (see `Layout`); all else is for the B own rows.
            Rows that have ended may hold anything.
        slot: the completion slot, the same in all rows: all prompts end at the same slot.
        cache: of `empty_cache`, with the slots below `slot` written.
        prompt_kv: from `forward` over the left-padded prompts.
        prompt_mask_PS: True on prompt tokens.
        layout: of the weights.

    Returns:
        Hidden states after the final norm, and the cache with slot `slot` filled.
    """
    config = model.config
    B, P = len(cache[0][0]), len(prompt_mask_PS)
    positions_B1 = jnp.repeat(prompt_mask_PS.sum(axis=1), B // P)[:, None] + slot
    ropes = rope_tables(config, positions_B1)
    masks = _Masks(slot, prompt_mask_PS)
    x_B1D = model.embed(ids_R[:, None], layout)
    tokens = []
    for i, (block, is_global) in enumerate(zip(blocks, config.is_global, strict=True)):
        window = None if is_global else config.sliding_window
        prompt = prompt_kv[0][i], prompt_kv[1][i], masks.of_prompt(window)
        older = *cache[i], masks.of_cache(cache[i][0].shape[1], window)

        def attend(q, k, v, prompt=prompt, older=older):
            own = [older, (k, v, jnp.ones((1, 1, 1), bool))]
            return attention.attend_with_prompt(q, *prompt, own, scale=score_scale(config))

        x_B1D, new = block(x_B1D, ropes[is_global], attend, layout=layout)
        tokens.append(new)
    # The barrier makes the compiler write after all reads: a cache updated before, or while the TPU
    # has it on chip, would be written back whole.
    x_B1D, tokens = jax.lax.optimization_barrier((x_B1D, tokens))
    # XLA drops the barrier on CPU, and would copy every cache: there the index depends on x.
    zero = jax.lax.platform_dependent(
        x_B1D[0, 0, 0],
        cpu=lambda x: (x < -jnp.inf).astype(slot.dtype),  # always 0, but XLA does not see that
        default=lambda _: jnp.zeros_like(slot),
    )

    def write(old: jax.Array, token: jax.Array) -> jax.Array:
        at = slot % old.shape[1] + zero
        return jax.lax.dynamic_update_slice_in_dim(old, token.astype(old.dtype), at, axis=1)

    cache = jax.tree.map(write, cache, tokens)
    return model.final_norm(x_B1D)[:, 0], cache


class _Masks(NamedTuple):
    """What the token at `slot` sees in a window."""

    slot: Int[Array, ""]
    prompt_mask: Bool[Array, "P S"]

    def of_prompt(self, window: int | None) -> Bool[Array, "P 1 S"]:
        """The slots of its prompt."""
        S = self.prompt_mask.shape[1]
        near = attention.prompt_window_mask(S, self.slot[None], window=window)
        return near & self.prompt_mask[:, None, :]

    def of_cache(self, C: int, window: int | None) -> Bool[Array, "1 1 C"]:
        """The earlier tokens of its completion, in a cache of C slots."""
        age_C = (self.slot - 1 - jnp.arange(C)) % C + 1  # of each slot's token; 1 is the newest
        return ((age_C <= self.slot) & (age_C < (window or C + 1)))[None, None]
