"""The forward pass of training: prompts, each run once, and their completions as one row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gemma_grpo.kernels import packed_attention
from gemma_grpo.model import attention
from gemma_grpo.model.packed import Rows, positions
from gemma_grpo.model.stack import (
    Gather,
    Remat,
    layer_block,
    rope_tables,
    scan_layers,
    score_scale,
    select_rope,
    token_keys,
)
from gemma_grpo.model.transformer import Attend, Gemma3

# Without the kernel: the fewest queries of a block, and the most blocks of a row.
QUERIES, BLOCKS = 256, 8


def forward_groups(
    model: Gemma3,
    tokens: tuple[Int[Array, "P S"], Bool[Array, "P S"], Int[Array, "B T"], Bool[Array, "B T"]],
    rows: Rows,
    *,
    remat: Remat = "none",
    gather: Gather | None = None,
    dropout_keys: tuple[Key[Array, " P"], Key[Array, " B"]] | None = None,
) -> Float[Array, "1 N D"]:
    """Run prompts and their completions, every prompt once.

    All tokens go through the layers as one row; only attention tells sequences apart. So a layer's
    weights are gathered and read once, and compiled for one shape.

    Args:
        tokens: ids and mask of prompts, left-padded; ids and mask of completions, right-padded and
            group-major.
        rows: the slots that are computed: all, or those that hold tokens.
        remat: what of a block the backward pass computes again instead of storing it.
        gather: gathers a layer's parameters when the scan reaches it, and again in the backward
            pass under remat; None where they are replicated.
        dropout_keys: a key for each prompt and each completion, for adapters with dropout; None
            drops nothing.

    Returns:
        Hidden states after the final norm, equal to those of whole sequences, packed by `rows`.
    """
    prompt_ids_PS, prompt_mask_PS, completion_ids_BT, completion_mask_BT = tokens
    (P, _), (B, T) = rows.prompts, rows.completions
    prompt_length_B1 = jnp.repeat(prompt_mask_PS.sum(axis=1), B // P)[:, None]
    completion_positions_BT = prompt_length_B1 + jnp.arange(T)[None]
    positions_1N = rows.pack(positions(prompt_mask_PS), completion_positions_BT)
    keys_1N = None
    if dropout_keys is not None:
        row_PS, row_BT = (jnp.indices(shape)[0] for shape in (rows.prompts, rows.completions))
        keys_1N = token_keys(
            jnp.concatenate(dropout_keys), rows.pack(row_PS, P + row_BT), positions_1N
        )
    masks = [
        _masks(rows, prompt_mask_PS, completion_mask_BT, window)
        for window in (model.config.sliding_window, None)
    ]

    def layer(x_1ND, scanned):
        block, is_global, layer_keys_1N = layer_block(model, scanned, keys_1N)
        mask = jax.tree.map(lambda local, full: jnp.where(is_global, full, local), *masks)
        attend = _attend(rows, mask, score_scale(model.config))
        x_1ND, _ = block(x_1ND, select_rope(ropes, is_global), attend, layer_keys_1N)
        return x_1ND, None

    ropes = rope_tables(model.config, positions_1N)
    x_1ND = model.embed(rows.pack(prompt_ids_PS, completion_ids_BT))
    x_1ND, _ = scan_layers(model, layer, x_1ND, remat=remat, gather=gather)
    return model.final_norm(x_1ND)


def _masks(
    rows: Rows, prompt_mask_PS: jax.Array, completion_mask_BT: jax.Array, window: int | None
) -> tuple:
    """The masks of a layer with this window: the kernel's block mask, and those of prompts over
    themselves, of completions over their prompts and of completions over themselves."""
    (_, S), (_, T) = rows.prompts, rows.completions
    of_prompts_1TS = attention.prompt_window_mask(S, jnp.arange(T), window=window)
    segments = rows.segments(prompt_mask_PS, completion_mask_BT)
    return (
        packed_attention.make_block_mask(segments, window=window),
        attention.causal_mask(S, window=window) & prompt_mask_PS[:, None, :],
        of_prompts_1TS & prompt_mask_PS[:, None, :],
        attention.causal_mask(T, window=window) & completion_mask_BT[:, None, :],
    )


def _attend(rows: Rows, masks: tuple, scale: float) -> Attend:
    """Attention within the row, with the masks of `_masks`: by the kernel, or without it a block of
    queries at a time or on the padded arrays, whichever scores fewer pairs."""
    block_mask, prompt_mask, of_prompts_mask, own_mask = masks
    (P, S), (B, T) = rows.prompts, rows.completions
    padded_pairs = P * S**2 + B * T * (S + T)

    def padded(*qkv_1N):
        (q_PS, q_BT), (k_PS, k_BT), (v_PS, v_BT) = map(rows.unpack, qkv_1N)
        of_prompts = attention.attend(q_PS, k_PS, v_PS, prompt_mask, scale=scale)
        of_completions = attention.attend_with_prompt(
            q_BT, k_PS, v_PS, of_prompts_mask, [(k_BT, v_BT, own_mask)], scale=scale
        )
        return rows.pack(of_prompts, of_completions)

    def by_blocks(q_1N, k_1N, v_1N):
        blocks = _query_blocks(q_1N.shape[1])
        if sum((each.stop - each.start) * each.stop for each in blocks) > padded_pairs:
            return padded(q_1N, k_1N, v_1N)
        mixed = []  # no query sees a key after the end of its block
        for queries in blocks:
            k, v = k_1N[:, : queries.stop], v_1N[:, : queries.stop]
            mask = packed_attention.dense_mask(block_mask, queries)
            mixed.append(attention.attend(q_1N[:, queries], k, v, mask, scale=scale))
        return jnp.concatenate(mixed, axis=1)

    return lambda *qkv_1N: packed_attention.packed_attention(
        *qkv_1N, block_mask, scale=scale, fallback=by_blocks
    )


def _query_blocks(length: int) -> list[slice]:
    """The places of a row, cut into blocks of queries."""
    size = max(QUERIES, -(-length // BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
