"""The reference for attention within a packed row: one dense mask over all pairs, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gemma_grpo.kernels.packed_attention.block_masks import Segments


def seen_pairs(segments: Segments, *, window: int | None) -> Bool[Array, "N N"]:
    """Which places (columns) each place (row) sees."""
    place = jnp.arange(len(segments.is_token))
    query, key = place[:, None], place[None]
    column = lambda x_N: x_N[:, None]
    is_own = (key >= column(segments.own_start)) & (key <= query)
    is_prompt = (key >= column(segments.prompt_start)) & (key < column(segments.prompt_end))
    seen = (is_own | is_prompt) & column(segments.is_token) & segments.is_token[None]
    if window is not None:
        seen &= column(segments.position) - segments.position[None] < window
    return seen


def packed_attention(
    q_XNH: Float[Array, "X N H"],
    k_XKH: Float[Array, "X K H"],
    v_XKH: Float[Array, "X K H"],
    segments: Segments,
    *,
    window: int | None,
    scale: float,
) -> Float[Array, "X N H"]:
    """As `api.packed_attention` with the block mask of these segments, in float32."""
    X, N, H = q_XNH.shape
    K = k_XKH.shape[1]
    seen_XX = seen_pairs(segments, window=window)
    f32 = lambda x: x.astype(jnp.float32)
    q_XKRH = f32(q_XNH).reshape(X, K, N // K, H)
    scores = jnp.einsum("xkrh,ckh->krxc", q_XKRH, f32(k_XKH), precision="highest") * scale
    scores = jnp.where(seen_XX, scores, -1e30)
    weights = jnp.where(seen_XX, jax.nn.softmax(scores, axis=-1), 0.0)
    mixed = jnp.einsum("krxc,ckh->xkrh", weights, f32(v_XKH), precision="highest")
    return mixed.reshape(X, N, H)
