"""Draws from a truncated distribution: the interface, which chooses the implementation."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.kernels import block_draw, head
from gemma_grpo.kernels.dispatch import dispatch
from gemma_grpo.kernels.truncated_sampling import pallas_tpu, xla
from gemma_grpo.kernels.truncated_sampling.search import Truncation
from gemma_grpo.kernels.truncation import check_truncation


class TruncatedDraw(NamedTuple):
    """Tokens drawn, and how likely they were. float32, except for the ids, which are int32."""

    ids: Int[Array, " B"]
    logps: Float[Array, " B"]  # as drawn from: tempered, truncated, renormalised
    full_logps: Float[Array, " B"]  # under the tempered distribution of all tokens
    kept_mass: Float[Array, " B"]  # of the kept tokens, under that distribution


def truncated_sampling(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    keys_B: Key[Array, " B"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> TruncatedDraw:
    """Draw one token for each row from softmax(hidden embedding^T / temperature), truncated.

    Truncations apply in the order top_k, top_p, min_p, each to the tokens that the last one kept.

    Args:
        hidden_BD: after the final norm, in the embedding's dtype.
        embedding_VD: the tied embedding; the matmul accumulates in float32.
        keys_B: one key per row; a draw depends on its own row alone. If nothing is cut off, the
            draw is that of `fused_sampling`.
        temperature: 1e-6 or more; for greedy decoding call `fused_sampling`.
        top_k: keep the k most likely tokens, and ties with the last of them; 0 keeps all, and so
            does a k of V or more.
        top_p: keep the fewest most likely tokens whose mass reaches p: the token that crosses p
            stays, with its ties. 1 keeps all; near 0 only the likeliest. Masses are float32 sums,
            so the cut is exact to about 1e-6 of p.
        min_p: keep tokens at least min_p times as likely as the likeliest (arXiv 2407.01082); 0
            keeps all, 1 the likeliest and its ties.
        axis_name: inside `shard_map`, the axis that the vocabulary is sharded over, in order;
            `embedding_VD` is then this device's shard, and every device gets the same result.
        implementation: None takes "pallas" on TPU if the vocabulary is not sharded and all logits
            fit in VMEM, else "xla".

    A token with a logit of -inf is never drawn. A row with a logit of NaN or +inf, or with none
    that is finite, is no distribution: its id is in range, its log-probs and kept mass are NaN.

    Raises:
        UserError: a setting is out of range, a shard is not a multiple of `block_draw.BLOCK`
            tokens, or the named implementation cannot run here.
    """
    check_truncation(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    B, (V, D) = len(hidden_BD), embedding_VD.shape
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    settings = dict(truncation=Truncation(top_k, top_p, min_p), temperature=temperature)
    drawn = dispatch(
        implementation,
        *(hidden_BD, embedding_VD, block_draw.shard_noise(keys_B, V, axis_name)),
        pallas=partial(pallas_tpu.draw_truncated, **settings),
        xla=partial(_head_and_draw, **settings, axis_name=axis_name if shards > 1 else None),
        obstacle=_obstacle(B, V, D, embedding_VD.dtype, shards),
    )
    ids_B, logits_B, kept_logsumexps_B, logsumexps_B = drawn
    return TruncatedDraw(
        # For a row that is no distribution the token drawn may be in the padding.
        ids=jnp.minimum(ids_B, shards * V - 1),
        logps=logits_B - kept_logsumexps_B,
        full_logps=logits_B - logsumexps_B,
        kept_mass=jnp.exp(kept_logsumexps_B - logsumexps_B),
    )


def _obstacle(B: int, V: int, D: int, dtype: jnp.dtype, shards: int) -> str | None:
    """Why the TPU kernel cannot run; None if it can."""
    if shards > 1:
        return "the vocabulary is sharded"
    if pallas_tpu.vmem_bytes(B, V, D, dtype) > pallas_tpu.vmem_limit():
        return f"{B} rows do not fit in VMEM"
    return None


def _head_and_draw(hidden_BD, embedding_VD, noise, *, truncation, temperature, axis_name):
    logits_BV = head.logits(hidden_BD, embedding_VD) / temperature
    return xla.draw_truncated(logits_BV, noise, truncation, axis_name=axis_name)
