"""Log-probs of given tokens by chunks of the vocabulary, for every backend.

Each chunk's logits are computed and reduced to four numbers a row (`Sums`), which `merge` combines
in any order.

Gradient: d logp / d logit = (onehot - softmax) / temperature. Matmuls of size X V D, all told:

    nothing differentiated    1    logits
    frozen embedding          2    logits; softmax @ embedding, in the forward pass
    trained embedding         4    logits; again in the backward pass, then one for each gradient

With a frozen embedding, softmax @ embedding in the forward pass saves computing the logits twice. A
trained one needs them twice in any case (its gradient takes the finished softmax and the
cotangent), and its forward pass is kept plain, since that fuses best.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Tokens of the vocabulary in a chunk. A chunk's logits take a few times the memory of the hidden
# states. On v5e those of 3200 rows (50 MiB) stay in VMEM, and a larger chunk gains 2 %; on CPU a
# smaller one gains 10 %. It does not depend on X: under jit that is of all devices together.
CHUNK_SIZE = 4096
LOWEST = float(jnp.finfo(jnp.float32).min)


class Sums(NamedTuple):
    """The reduction of some tokens' logits, for each row: floats of one shape.

    Attributes:
        top: the largest logit, and at least `LOWEST`, so that differences are never NaN.
        mass: sum of exp(logit - top).
        weighted: sum of exp(logit - top) * logit.
        chosen: the logit of the given token; -inf while it is not among those reduced.
    """

    top: jax.Array | float
    mass: jax.Array | float
    weighted: jax.Array | float
    chosen: jax.Array | float


EMPTY = Sums(top=LOWEST, mass=0.0, weighted=0.0, chosen=-jnp.inf)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums of two disjoint sets of tokens taken together."""
    top = jnp.maximum(a.top, b.top)
    a_scale, b_scale = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Sums(
        top,
        a.mass * a_scale + b.mass * b_scale,
        a.weighted * a_scale + b.weighted * b_scale,
        jnp.maximum(a.chosen, b.chosen),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def logps(temperature, chunk_size, hidden_XD, embedding_VD, ids_X):
    """Log-prob, logsumexp and entropy, [X] each; `api.lm_head_logps` says what they are.

    `chunk_size` is in tokens of the vocabulary.
    """

    def add(sums, start, chunk_WD):
        logits_XW = _logits(hidden_XD, chunk_WD, temperature)
        return merge(sums, _reduce(logits_XW, ids_X - start))

    return _finish(_over_chunks(add, _empty(ids_X), embedding_VD, chunk_size))


def _forward(temperature, chunk_size, hidden_XD, embedding_VD, ids_X):
    embedding_is_trained = embedding_VD.perturbed
    hidden_XD, embedding_VD, ids_X = hidden_XD.value, embedding_VD.value, ids_X.value
    if embedding_is_trained:
        results = logps(temperature, chunk_size, hidden_XD, embedding_VD, ids_X)
        return results, (None, (hidden_XD, embedding_VD, ids_X, results[1]))

    def add(carry, start, chunk_WD):
        sums, expected_XD = carry
        part, weights_XW = _reduce_plainly(_logits(hidden_XD, chunk_WD, temperature), ids_X - start)
        part_XD = _matmul("xw,wd->xd", weights_XW.astype(chunk_WD.dtype), chunk_WD)
        merged = merge(sums, part)
        kept_X, new_X = jnp.exp(sums.top - merged.top), jnp.exp(part.top - merged.top)
        return merged, expected_XD * kept_X[:, None] + part_XD * new_X[:, None]

    zeros_XD = jnp.zeros(hidden_XD.shape, jnp.float32)
    sums, expected_XD = _over_chunks(add, (_empty(ids_X), zeros_XD), embedding_VD, chunk_size)
    expected_XD *= (1 / sums.mass)[:, None]
    own_XD = embedding_VD.at[ids_X].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    towards_XD = (own_XD - expected_XD) / temperature
    return _finish(sums), (towards_XD.astype(hidden_XD.dtype), None)


def _backward(temperature, chunk_size, kept, cotangents):
    towards_XD, again = kept
    cotangent_X = cotangents[0]  # the other results carry no gradient
    if again is None:
        return (cotangent_X[:, None] * towards_XD).astype(towards_XD.dtype), None, None
    hidden_XD, embedding_VD, ids_X, logsumexp_X = again

    def add(carry, start, chunk_WD):
        hidden_cotangent_XD, embedding_cotangent_VD = carry
        logits_XW = _logits(hidden_XD, chunk_WD, temperature)
        residual_XW = _is_own(logits_XW, ids_X - start) - jnp.exp(logits_XW - logsumexp_X[:, None])
        residual_XW = (residual_XW * (cotangent_X / temperature)[:, None]).astype(chunk_WD.dtype)
        rows_WD = _matmul("xw,xd->wd", residual_XW, hidden_XD).astype(chunk_WD.dtype)
        return (
            hidden_cotangent_XD + _matmul("xw,wd->xd", residual_XW, chunk_WD),
            jax.lax.dynamic_update_slice_in_dim(embedding_cotangent_VD, rows_WD, start, axis=0),
        )

    # Every row is written, once: zeros would cost a pass over HBM.
    blank_VD = jax.lax.empty(embedding_VD.shape, embedding_VD.dtype)
    zeros_XD = jnp.zeros(hidden_XD.shape, jnp.float32)
    hidden_cotangent_XD, embedding_cotangent_VD = _over_chunks(
        add, (zeros_XD, blank_VD), embedding_VD, chunk_size
    )
    return hidden_cotangent_XD.astype(hidden_XD.dtype), embedding_cotangent_VD, None


logps.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_chunks(add, carry, embedding_VD, chunk_size):
    """Folds `add(carry, first token, rows of the embedding)` over the vocabulary; the last chunk
    may be short. A loop that slices one array: a scan over a reshaped one would copy it."""
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
    return _matmul("xd,wd->xw", hidden_XD, chunk_WD) / temperature


_matmul = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _reduce(logits_XW: jax.Array, ids_X: jax.Array) -> Sums:
    """The sums of a chunk; ids count from its first token."""
    return jax.lax.platform_dependent(
        logits_XW, ids_X, tpu=_reduce_at_once, default=lambda *a: _reduce_plainly(*a)[0]
    )


def _reduce_at_once(logits_XW, ids_X):
    """One reduction of all four, fused into the matmul by the TPU's compiler: no logits stored."""
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
    logsumexp_X = sums.top + jnp.log(sums.mass)
    return sums.chosen - logsumexp_X, logsumexp_X, logsumexp_X - sums.weighted / sums.mass


def _empty(ids_X):
    return jax.tree.map(lambda value: jnp.full(ids_X.shape, value, jnp.float32), EMPTY)


def _is_own(logits_XW, ids_X):
    return jax.lax.broadcasted_iota(ids_X.dtype, logits_XW.shape, 1) == ids_X[:, None]
