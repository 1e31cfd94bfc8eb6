"""Attention within a packed row: the interface, which chooses the implementation."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Float

from gemma_grpo.kernels.dispatch import dispatch
from gemma_grpo.kernels.packed_attention import pallas_tpu
from gemma_grpo.kernels.packed_attention.block_masks import BlockMask


def packed_attention(
    q_1LNH: Float[Array, "1 L N H"],
    k_1LKH: Float[Array, "1 L K H"],
    v_1LKH: Float[Array, "1 L K H"],
    block_mask: BlockMask,
    *,
    scale: float,
    fallback: Callable[..., jax.Array],
    implementation: Literal["xla", "pallas"] | None = None,
) -> Float[Array, "1 L N H"]:
    """softmax(scale * q k^T) v of each token of a row over its prompt and its own segment.

    On TPU, forward and backward visit only those pairs of blocks in which a token sees another, and
    no score reaches HBM. At empty places the output is 0 there, without gradient.

    Args:
        q_1LNH, k_1LKH, v_1LKH: the row's L tokens, N query heads and K key heads.
        block_mask: which keys each token sees, of `make_block_mask`.
        fallback: the same, as a function of q, k and v, for other devices.
        implementation: None takes "pallas" on TPU if H is a multiple of a vector's lanes and all
            keys of a head fit in VMEM, else "xla", which is `fallback`.

    Raises:
        UserError: the named kernel cannot run here.
    """
    _, L, N, H = q_1LNH.shape
    heads_each = N // k_1LKH.shape[2]

    def pallas(q, k, v, block_mask):
        return pallas_tpu.attend(q[0], k[0], v[0], block_mask, scale=scale)[None]

    needed = pallas_tpu.vmem_bytes(L, heads_each=heads_each, head_dim=H, dtype=q_1LNH.dtype)
    obstacle = None
    if H % pallas_tpu.LANES:
        obstacle = f"heads of {H} are no multiple of {pallas_tpu.LANES} lanes"
    elif needed > pallas_tpu.vmem_limit():
        obstacle = f"{L} keys do not fit in VMEM"
    return dispatch(
        implementation,
        *(q_1LNH, k_1LKH, v_1LKH, block_mask),
        pallas=pallas,
        xla=lambda q, k, v, _: fallback(q, k, v),
        obstacle=obstacle,
    )
