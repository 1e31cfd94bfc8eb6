"""Attention of packed completions, as the model calls it. Knows which form runs where, no maths."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Float

from gemma_grpo.kernels.dispatch import dispatch
from gemma_grpo.kernels.packed_attention import pallas_tpu
from gemma_grpo.kernels.packed_attention.sights import Sight


def packed_attention(
    q_RLNH: Float[Array, "R L N H"],
    k_RLKH: Float[Array, "R L K H"],
    v_RLKH: Float[Array, "R L K H"],
    prompt_k_PSKH: Float[Array, "P S K H"],
    prompt_v_PSKH: Float[Array, "P S K H"],
    sight: Sight,
    *,
    scale: float,
    elsewhere: Callable[..., jax.Array],
    implementation: Literal["xla", "pallas"] | None = None,
) -> Float[Array, "R L N H"]:
    """softmax(scale * q k^T) v of each completion's tokens over its prompt and itself.

    On TPU the work follows the tokens that exist and the window, in pairs of blocks, forward and
    backward, and no score reaches HBM. A query that is no token gives 0 there and passes no
    gradient on.

    Args:
        q_RLNH: of R*L places one behind the other, as `sight` was made for: one packed row, or
            whole padded rows.
        prompt_k_PSKH: left-padded; a group's completions share them.
        sight: which keys each place sees.
        elsewhere: the same as a function of q, k and v, as it is best on other devices.
        implementation: None takes "pallas" on TPU where H is whole lanes and all keys of a head fit
            in VMEM, else "xla", which is `elsewhere`.

    Raises:
        UserError: the kernel asked for cannot run here.
    """
    R, L, N, H = q_RLNH.shape
    P, S, K, _ = prompt_k_PSKH.shape

    def pallas(q, k, v, prompt_k, prompt_v, sight):
        flat = [x.reshape(R * L, *x.shape[2:]) for x in (q, k, v)]
        mixed = pallas_tpu.attend(*flat, prompt_k, prompt_v, sight, scale=scale)
        return mixed.reshape(q.shape)

    needed = pallas_tpu.vmem_bytes(R * L, P * S, heads_each=N // K, head_dim=H, dtype=q_RLNH.dtype)
    obstacle = None
    if H % pallas_tpu.LANES:
        obstacle = f"heads of {H} are not whole lanes of {pallas_tpu.LANES}"
    elif needed > pallas_tpu.VMEM_LIMIT:
        obstacle = f"{P * S + R * L} keys do not fit in VMEM"
    return dispatch(
        implementation,
        *(q_RLNH, k_RLKH, v_RLKH, prompt_k_PSKH, prompt_v_PSKH, sight),
        pallas=pallas,
        xla=lambda q, k, v, *_: elsewhere(q, k, v),
        obstacle=obstacle,
    )
