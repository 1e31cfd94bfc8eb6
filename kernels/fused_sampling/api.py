"""Draws one token per row from hidden states: the interface, which chooses the implementation."""

from functools import partial
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.errors import UserError
from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.dispatch import dispatch
from gemma_grpo.kernels.fused_sampling import pallas_tpu, xla


class FusedDraw(NamedTuple):
    """One token per row, and its log-prob under the distribution it was drawn from."""

    ids: Int[Array, " B"]  # int32
    logps: Float[Array, " B"]  # float32


def fused_sampling(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    keys_B: Key[Array, " B"],
    *,
    temperature: float,
    axis_name: str | None = None,
    implementation: Literal["xla", "pallas"] | None = None,
) -> FusedDraw:
    """Draw one token per row from softmax(hidden @ embedding.T / temperature).

    On TPU the kernel reads the embedding once and writes no logits to HBM. The draw is that of
    `kernels/block_draw.py`. A row's token depends on its hidden state and key alone, up to
    rounding: not on the batch, the shards or the implementation.

    Args:
        hidden_BD: after the final norm, in the embedding's dtype.
        embedding_VD: the tied embedding; the matmul accumulates in float32.
        keys_B: typed threefry keys, one per row.
        temperature: divides the logits. 0 is greedy: the first of the largest logits, with its
            log-prob at temperature 1.
        axis_name: inside `shard_map`, the axis that the vocabulary is sharded over; `embedding_VD`
            is then this device's shard, and every device gets the same result.
        implementation: None takes "pallas" on TPU if it fits in VMEM, else "xla".

    A NaN or +inf among a row's logits gives a log-prob of NaN.

    Raises:
        UserError: the temperature is out of range, a shard is not a multiple of `block_draw.BLOCK`
            tokens, or the named implementation cannot run here.
    """
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise UserError(
            f"temperature={temperature}: must be 0 (greedy), or 1e-6 or more and finite"
        )
    B, (V, D) = len(hidden_BD), embedding_VD.shape
    fits = pallas_tpu.vmem_bytes(B, V, D, embedding_VD.dtype) <= pallas_tpu.VMEM_LIMIT
    picked = dispatch(
        implementation,
        hidden_BD,
        embedding_VD,
        block_draw.shard_noise(keys_B, V, axis_name),
        pallas=partial(pallas_tpu.pick, temperature=temperature),
        xla=partial(xla.pick, temperature=temperature),
        obstacle=None if fits else f"{B} rows do not fit in VMEM",
    )
    if axis_name is not None:
        picked = picked._replace(ids=picked.ids + jax.lax.axis_index(axis_name) * V)
        picked = block_draw.merge(picked, axis_name)
    return FusedDraw(picked.ids, picked.logits - picked.logsumexps)
