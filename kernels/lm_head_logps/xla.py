"""Log-probs of given tokens by chunks of the vocabulary, for every backend.

Each chunk's logits are computed and reduced to four numbers per row (`Sums`), which `merge`
combines in any order.

Gradient: d logp / d logit = (onehot - softmax) / temperature. Matmuls of size X V D in total:

    nothing differentiated    1    logits
    frozen embedding          2    logits; softmax @ embedding, in the forward pass
    trained embedding         4    logits; again in the backward pass, then one for each gradient
    the same, logits kept     3    logits; one for each gradient

With a frozen embedding, softmax @ embedding in the forward pass saves computing the logits twice. A
trained one needs the logits twice, or stored (X V floats): its gradient takes the finished softmax
and the cotangent. Its forward pass computes nothing else, since that fuses best.

If only some rows are wanted, X is the smallest of a few sizes that holds them: one branch per size,
of which one runs. For a vocabulary of one chunk there is only the size of all rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_grpo.kernels.matmul import einsum

# Tokens of the vocabulary per chunk. A chunk's logits take a few times the memory of the hidden
# states. On v5e those of 3200 rows (50 MiB) stay in VMEM, and a larger chunk gains 2 %; on CPU a
# smaller one gains 10 %. It does not depend on X, which under jit counts all devices' rows.
CHUNK_SIZE = 4096
LOWEST = float(jnp.finfo(jnp.float32).min)
# Sizes of X: shares of all rows, rounded up to whole tiles. Completions fill two thirds of a small
# pack, four fifths of a step's packs on eight chips, and nine tenths in large batches (LOG.md).
SHARES, MULTIPLE = (11 / 16, 13 / 16, 29 / 32, 1), 32


class Sums(NamedTuple):
    """The reduction of some tokens' logits, for each row: floats of the same shape.

    Attributes:
        top: the largest logit, and at least `LOWEST`, so that differences are never NaN.
        mass: sum of exp(logit - top).
        weighted: sum of exp(logit - top) * logit.
        chosen: the logit of the given token; -inf if it is not among these tokens.
    """

    top: jax.Array | float
    mass: jax.Array | float
    weighted: jax.Array | float
    chosen: jax.Array | float


class Settings(NamedTuple):
    """`chunk_size` is in tokens of the vocabulary; `keep_logits` is for the backward pass."""

    temperature: float
    chunk_size: int
    keep_logits: bool


EMPTY = Sums(top=LOWEST, mass=0.0, weighted=0.0, chosen=-jnp.inf)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over the union of two disjoint sets of tokens."""
    top = jnp.maximum(a.top, b.top)
    a_scale, b_scale = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Sums(
        top,
        a.mass * a_scale + b.mass * b_scale,
        a.weighted * a_scale + b.weighted * b_scale,
        jnp.maximum(a.chosen, b.chosen),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def logps(settings, hidden_XD, embedding_VD, ids_X, wanted_X=None):
    """Log-prob, logsumexp and entropy, [X] each; see `api.lm_head_logps`."""
    settings = settings._replace(keep_logits=False)  # nothing is differentiated
    return _results(settings, hidden_XD, embedding_VD, ids_X, wanted_X)[0]


def _results(settings, hidden_XD, embedding_VD, ids_X, wanted_X):
    """The results and, if kept, the logits of the computed rows, in their order and first."""
    X, V = len(ids_X), len(embedding_VD)

    def of_some(take):
        hidden_YD, ids_Y = take(hidden_XD), take(ids_X)

        def add(carry, start, chunk_WD):
            sums, kept_XV = carry
            logits_YW = _logits(hidden_YD, chunk_WD, settings.temperature)
            if settings.keep_logits:
                kept_XV = jax.lax.dynamic_update_slice(kept_XV, logits_YW, (0, start))
            return merge(sums, _reduce(logits_YW, ids_Y - start)), kept_XV

        blank_XV = jax.lax.empty((X, V), jnp.float32) if settings.keep_logits else None
        carry = _empty(ids_Y), blank_XV
        sums, kept_XV = _over_chunks(add, carry, embedding_VD, settings.chunk_size)
        return _finish(sums), kept_XV

    return _of_wanted(wanted_X, sizes_of(X, V, settings.chunk_size), of_some)


def _forward(settings, hidden_XD, embedding_VD, ids_X, wanted_X):
    embedding_is_trained = embedding_VD.perturbed
    hidden_XD, embedding_VD, ids_X = hidden_XD.value, embedding_VD.value, ids_X.value
    wanted_X = None if wanted_X is None else wanted_X.value
    if embedding_is_trained:
        results, kept_XV = _results(settings, hidden_XD, embedding_VD, ids_X, wanted_X)
        return results, (None, (hidden_XD, embedding_VD, ids_X, results[1], wanted_X, kept_XV))

    def of_some(take):
        hidden_YD, ids_Y = take(hidden_XD), take(ids_X)

        def add(carry, start, chunk_WD):
            sums, expected_YD = carry
            logits_YW = _logits(hidden_YD, chunk_WD, settings.temperature)
            part, weights_YW = _reduce_plainly(logits_YW, ids_Y - start)
            part_YD = einsum("yw,wd->yd", weights_YW.astype(chunk_WD.dtype), chunk_WD)
            merged = merge(sums, part)
            kept_Y, new_Y = jnp.exp(sums.top - merged.top), jnp.exp(part.top - merged.top)
            return merged, expected_YD * kept_Y[:, None] + part_YD * new_Y[:, None]

        zeros_YD = jnp.zeros(hidden_YD.shape, jnp.float32)
        sums, expected_YD = _over_chunks(
            add, (_empty(ids_Y), zeros_YD), embedding_VD, settings.chunk_size
        )
        expected_YD *= (1 / sums.mass)[:, None]
        own_YD = embedding_VD.at[ids_Y].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        towards_YD = (own_YD - expected_YD) / settings.temperature
        return (_finish(sums), towards_YD.astype(hidden_XD.dtype)), None

    sizes = sizes_of(len(ids_X), len(embedding_VD), settings.chunk_size)
    (results, towards_XD), _ = _of_wanted(wanted_X, sizes, of_some)
    return results, (towards_XD, None)


def _backward(settings, kept, cotangents):
    towards_XD, again = kept
    cotangent_X = cotangents[0]  # the other results carry no gradient
    if again is None:
        return (cotangent_X[:, None] * towards_XD).astype(towards_XD.dtype), None, None, None
    hidden_XD, embedding_VD, ids_X, logsumexp_X, wanted_X, kept_XV = again

    def of_some(take):
        hidden_YD, ids_Y = take(hidden_XD), take(ids_X)
        logsumexp_Y, cotangent_Y = take(logsumexp_X), take(cotangent_X)

        def add(carry, start, chunk_WD):
            hidden_cotangent_YD, embedding_cotangent_VD = carry
            if settings.keep_logits:
                shape = len(ids_Y), len(chunk_WD)
                logits_YW = jax.lax.dynamic_slice(kept_XV, (0, start), shape)
            else:
                logits_YW = _logits(hidden_YD, chunk_WD, settings.temperature)
            softmax_YW = jnp.exp(logits_YW - logsumexp_Y[:, None])
            residual_YW = _is_own(logits_YW, ids_Y - start) - softmax_YW
            residual_YW = residual_YW * (cotangent_Y / settings.temperature)[:, None]
            residual_YW = residual_YW.astype(chunk_WD.dtype)
            rows_WD = einsum("yw,yd->wd", residual_YW, hidden_YD).astype(chunk_WD.dtype)
            return (
                hidden_cotangent_YD + einsum("yw,wd->yd", residual_YW, chunk_WD),
                jax.lax.dynamic_update_slice_in_dim(embedding_cotangent_VD, rows_WD, start, axis=0),
            )

        # Every row is written once, so it need not be zeroed, which would cost a pass over HBM.
        blank_VD = jax.lax.empty(embedding_VD.shape, embedding_VD.dtype)
        zeros_YD = jnp.zeros(hidden_YD.shape, jnp.float32)
        hidden_cotangent_YD, embedding_cotangent_VD = _over_chunks(
            add, (zeros_YD, blank_VD), embedding_VD, settings.chunk_size
        )
        return hidden_cotangent_YD.astype(hidden_XD.dtype), embedding_cotangent_VD

    sizes = sizes_of(len(ids_X), len(embedding_VD), settings.chunk_size)
    return *_of_wanted(wanted_X, sizes, of_some), None, None


logps.defvjp(_forward, _backward, symbolic_zeros=True)


def sizes_of(num_rows: int, vocab_size: int, chunk_size: int = CHUNK_SIZE) -> list[int]:
    """The numbers of rows that are compiled for, ascending; the last is `num_rows`."""
    if vocab_size <= chunk_size:
        return [num_rows]
    rounded = lambda share: math.ceil(num_rows * share / MULTIPLE) * MULTIPLE
    return sorted({min(num_rows, rounded(share)) for share in SHARES})


def _of_wanted(
    wanted_X: jax.Array | None, sizes: list[int], of_some: Callable[[Callable], tuple[Any, Any]]
) -> tuple[Any, Any]:
    """`of_some(take)`, where `take` selects the Y rows of an array to compute: all X, or the wanted
    ones first, filled up to the smallest size that holds them. `of_some` returns arrays of Y rows,
    which are put back in their places among zeros, and arrays without such rows."""
    if wanted_X is None or len(sizes) == 1:
        return of_some(lambda x_X: x_X)
    num = wanted_X.sum()
    place_X = jnp.where(wanted_X, jnp.cumsum(wanted_X), num + jnp.cumsum(~wanted_X)) - 1
    order_X = jnp.zeros_like(place_X).at[place_X].set(jnp.arange(len(place_X)))

    def of_first(size):
        put = lambda x_Y: jnp.take(x_Y, place_X, axis=0, mode="fill", fill_value=0)
        of_rows, others = of_some(lambda x_X: x_X[order_X[:size]])
        return jax.tree.map(put, of_rows), others

    which = jnp.searchsorted(jnp.array(sizes), num)
    return jax.lax.switch(which, [partial(of_first, size) for size in sizes])


def _over_chunks(add, carry, embedding_VD, chunk_size):
    """Folds `add(carry, first token, rows of the embedding)` over the chunks; the last may be
    short. Slices of one array: a scan over a reshaped one would copy it."""
    vocab_size = embedding_VD.shape[0]
    chunk_size = min(chunk_size, vocab_size)

    def chunk(carry, start, size):
        rows_WD = jax.lax.dynamic_slice_in_dim(embedding_VD, start, size, axis=0)
        return add(carry, start, rows_WD)

    carry = jax.lax.fori_loop(
        0,
        vocab_size // chunk_size,
        lambda i, carry: chunk(carry, i * chunk_size, chunk_size),
        carry,
    )
    rest = vocab_size % chunk_size
    return chunk(carry, vocab_size - rest, rest) if rest else carry


def _logits(hidden_XD, chunk_WD, temperature):
    """A chunk's logits, [X, W], divided by the temperature."""
    return einsum("xd,wd->xw", hidden_XD, chunk_WD) / temperature


def _reduce(logits_XW: jax.Array, ids_X: jax.Array) -> Sums:
    """The sums of a chunk; ids count from its first token."""
    return jax.lax.platform_dependent(
        logits_XW, ids_X, tpu=_reduce_at_once, default=lambda *a: _reduce_plainly(*a)[0]
    )


def _reduce_at_once(logits_XW, ids_X):
    """One reduction of all four, which TPU's compiler fuses into the matmul: no logits stored."""
    finite_XW = (logits_XW != -jnp.inf).astype(jnp.float32)
    top_XW = jnp.maximum(logits_XW, LOWEST)
    chosen_XW = jnp.where(_is_own(logits_XW, ids_X), logits_XW, -jnp.inf)
    each = Sums(top_XW, finite_XW, top_XW * finite_XW, chosen_XW)
    none = jax.tree.map(jnp.float32, EMPTY)
    return jax.lax.reduce(each, none, merge, dimensions=(1,))


def _reduce_plainly(logits_XW, ids_X):
    """The sums, and exp(logit - top) of every token."""
    top_X = jnp.maximum(logits_XW.max(axis=1), LOWEST)
    weights_XW = jnp.exp(logits_XW - top_X[:, None])
    chosen_X = jnp.where(_is_own(logits_XW, ids_X), logits_XW, -jnp.inf).max(axis=1)
    weighted_X = jnp.sum(weights_XW * jnp.maximum(logits_XW, LOWEST), axis=1)
    return Sums(top_X, weights_XW.sum(axis=1), weighted_X, chosen_X), weights_XW


def _finish(sums):
    """Log-probs, logsumexps and entropies."""
    logsumexp_X = sums.top + jnp.log(sums.mass)
    return sums.chosen - logsumexp_X, logsumexp_X, logsumexp_X - sums.weighted / sums.mass


def _empty(ids_X):
    return jax.tree.map(lambda value: jnp.full(ids_X.shape, value, jnp.float32), EMPTY)


def _is_own(logits_XW, ids_X):
    """Whether each logit is that of its row's given token, [X, W]."""
    return jax.lax.broadcasted_iota(ids_X.dtype, logits_XW.shape, 1) == ids_X[:, None]
