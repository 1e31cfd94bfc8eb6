"""What the pipeline calls to draw from a truncated distribution. Knows no model or loop."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.errors import UserError
from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.truncated_sampling import pallas_tpu, xla
from gemma_grpo.kernels.truncated_sampling.search import Truncation


class Drawn(NamedTuple):
    """Words drawn, and how likely they were."""

    ids_B: Int[Array, " B"]
    logps_B: Float[Array, " B"]  # under what was drawn from: tempered, truncated, renormalised
    full_logps_B: Float[Array, " B"]  # under the tempered distribution of all words
    kept_mass_B: Float[Array, " B"]  # of the kept words, under the latter


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
) -> Drawn:
    """Draw one word for each row from softmax(hidden embedding^T / temperature), truncated.

    Truncations apply in the order of the arguments, each to what the one before has left:

    Args:
        keys_B: one key a row; a draw depends on its own row alone. Where nothing is cut off, it is
            the word that `fused_sampling` draws.
        temperature: above 0. The largest word is `fused_sampling`'s at temperature 0.
        top_k: keep the k largest, and whatever ties with the smallest of them; 0, or as many as
            there are words, keeps all.
        top_p: keep the fewest largest ones whose mass reaches p: the word that crosses p stays, and
            so does what ties with it. 1 keeps all; towards 0 the largest alone.
        min_p: keep what has min_p times the largest probability or more (arXiv 2407.01082); 0
            keeps all, 1 the largest and its ties.
        axis_name: inside `jax.shard_map`: the axis along which the embedding is split, this
            device's being its equal slice of the words, in order, in whole blocks of
            `block_draw.BLOCK`. Draws are the same as unsplit, on every device.
        implementation: "xla", "pallas" (a TPU, unsplit, rows whose logits fit in VMEM), or None
            for the best there is.

    A word with a logit of -inf is never drawn. A row with a logit of NaN or +inf, or with none that
    is finite, is no distribution: its id is in range, its log-probs and kept mass are NaN.

    Raises:
        UserError: a setting without meaning, or an implementation that cannot do this.
    """
    check_truncation(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if implementation not in (None, "xla", "pallas"):
        raise UserError(f"implementation={implementation!r}: must be None, 'xla' or 'pallas'")
    B, D = hidden_BD.shape
    V = embedding_VD.shape[0]
    if axis_name is not None and V % block_draw.BLOCK:
        raise UserError(
            f"axis_name={axis_name!r}: a device's {V} words must be a multiple of"
            f" {block_draw.BLOCK}; use fewer devices or pad the embedding"
        )
    truncation = Truncation(top_k, top_p, min_p)
    fits = pallas_tpu.fits(B, V, D, embedding_VD.dtype.itemsize)
    if implementation == "pallas" and (axis_name is not None or not fits):
        reason = "is not for split embeddings" if axis_name else f"has no VMEM for {B} x {V} logits"
        raise UserError(f"implementation='pallas': {reason}; use None or 'xla'")

    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    block_noise, word_noise = block_draw.noise(keys_B, V * devices)
    operands = (hidden_BD, embedding_VD, block_noise, word_noise)
    by_xla = partial(_by_xla, truncation=truncation, temperature=temperature, axis_name=axis_name)
    by_pallas = partial(pallas_tpu.sample_truncated, truncation=truncation, temperature=temperature)
    if implementation == "pallas":
        return Drawn(*by_pallas(*operands))
    if implementation == "xla" or axis_name is not None or not fits:
        return Drawn(*by_xla(*operands))
    return Drawn(*jax.lax.platform_dependent(*operands, tpu=by_pallas, default=by_xla))


def check_truncation(*, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises UserError where a setting has no meaning."""
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be above 0; 0 is fused_sampling's")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (off)")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p={min_p}: must be at least 0 (off) and at most 1")


def _by_xla(
    hidden_BD, embedding_VD, block_noise, word_noise, *, truncation, temperature, axis_name
):
    logits_BV = _logits(hidden_BD, embedding_VD) / temperature
    return xla.draw_truncated(logits_BV, block_noise, word_noise, truncation, axis_name=axis_name)


def _logits(hidden_BD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    return jnp.einsum("bd,vd->bv", hidden_BD, embedding_VD, preferred_element_type=jnp.float32)
