"""The tied language-model head: hidden states to float32 logits."""

from functools import partial

import jax
from jaxtyping import Array, Float

from gemma_grpo.kernels.matmul import einsum


def logits(
    hidden: Float[Array, "... D"], embedding_VD: Float[Array, "V D"]
) -> Float[Array, "... V"]:
    """hidden @ embedding.T, accumulated and returned in float32.

    On CPU the embedding is the left operand of the matmul: XLA repacks a right one at every decode
    step, which takes a third more time. The barrier keeps XLA from swapping them back.
    """
    flat_RD = hidden.reshape(-1, hidden.shape[-1])
    logits_RV = jax.lax.platform_dependent(
        flat_RD,
        embedding_VD,
        cpu=lambda h, e: jax.lax.optimization_barrier(einsum("vd,rd->vr", e, h)).T,
        default=partial(einsum, "rd,vd->rv"),
    )
    return logits_RV.reshape(*hidden.shape[:-1], -1)
