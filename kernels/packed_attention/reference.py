"""Attention of packed completions, plainly: the law that the fast forms are held to.

Knows no block or bound: one dense mask over all pairs, in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_attention(
    q_XNH: Float[Array, "X N H"],
    k_XKH: Float[Array, "X K H"],
    v_XKH: Float[Array, "X K H"],
    prompt_k_PSKH: Float[Array, "P S K H"],
    prompt_v_PSKH: Float[Array, "P S K H"],
    rows_X: Int[Array, " X"],
    slots_X: Int[Array, " X"],
    is_token_X: Bool[Array, " X"],
    prompt_lengths_P: Int[Array, " P"],
    *,
    num_rows: int,
    window: int | None,
    scale: float,
) -> Float[Array, "X N H"]:
    """As `api.packed_attention` with `sight` of the same arguments, in float32."""
    (X, N, H), (P, S, K, _) = q_XNH.shape, prompt_k_PSKH.shape
    f32 = lambda *pieces: jnp.concatenate([x.astype(jnp.float32).reshape(-1, K, H) for x in pieces])
    k_CKH, v_CKH = f32(prompt_k_PSKH, k_XKH), f32(prompt_v_PSKH, v_XKH)
    # Each key's group, completion (-1 for a prompt's) and position, counted from the prompt's end.
    slot_PS = jnp.arange(S)[None]
    is_real_PS = slot_PS >= S - prompt_lengths_P[:, None]
    group_X = rows_X // (num_rows // P)
    group_C = jnp.concatenate([jnp.repeat(jnp.arange(P), S), group_X])
    row_C = jnp.concatenate([jnp.full(P * S, -1), rows_X])
    position_C = jnp.concatenate([jnp.tile(jnp.arange(S) - S, P), slots_X])
    is_real_C = jnp.concatenate([is_real_PS.reshape(-1), is_token_X])
    distance_XC = slots_X[:, None] - position_C[None]
    is_own_XC = (row_C[None] == rows_X[:, None]) | (row_C[None] == -1)
    seen_XC = is_own_XC & (group_C[None] == group_X[:, None]) & (distance_XC >= 0)
    seen_XC &= is_real_C[None] & is_token_X[:, None]
    if window is not None:
        seen_XC &= distance_XC < window
    q_XKRH = q_XNH.astype(jnp.float32).reshape(X, K, N // K, H)
    scores = jnp.einsum("xkrh,ckh->krxc", q_XKRH, k_CKH, precision="highest") * scale
    scores = jnp.where(seen_XC, scores, -1e30)
    weights = jnp.where(seen_XC, jax.nn.softmax(scores, axis=-1), 0.0)
    mixed = jnp.einsum("krxc,ckh->xkrh", weights, v_CKH, precision="highest")
    return mixed.reshape(X, N, H)
