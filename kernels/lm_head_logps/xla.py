"""Log-probs of given words by chunks of the vocabulary, for every backend. Knows no model or loss.

Over each chunk the head's product is made anew and reduced to four numbers a token (`Sums`). They
merge, whatever the order: words within a chunk, chunks, and devices, all by `merge`.

Gradient: d logp / d logit = (onehot - softmax) / temperature. How often a product of tokens, words
and D is made:

    nothing to be differentiated    1    logits
    frozen embedding                2    logits; softmax @ embedding, in the forward pass
    trained embedding               4    logits; again in the backward pass, then one for each side

Making a frozen embedding's product in the forward pass saves making logits twice. A trained one
must see them twice in any case (its product needs the finished softmax or the cotangent), and there
the forward pass is left alone, which fuses best.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of a chunk, whatever the number of tokens: under jit that is of all devices together. The chunk's
# logits take a few times the memory of the hidden states. On v5e those of 3200 tokens (50 MiB) stay
# in VMEM, and a larger chunk wins 2 %; on CPU a smaller one wins 10 %.
WORDS = 4096
LOWEST = float(jnp.finfo(jnp.float32).min)


class Sums(NamedTuple):
    """What a set of words comes to, for each token: floats of one shape.

    Attributes:
        top: the largest logit, and at least `LOWEST`, so that differences stay numbers.
        mass: sum of exp(logit - top).
        weighted: sum of exp(logit - top) * logit.
        chosen: the logit of the token's own word; -inf while it is not among the words.
    """

    top: jax.Array
    mass: jax.Array
    weighted: jax.Array
    chosen: jax.Array


NO_WORDS = Sums(top=LOWEST, mass=0.0, weighted=0.0, chosen=-jnp.inf)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums of two sets of words taken together."""
    top = jnp.maximum(a.top, b.top)
    a_scale, b_scale = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Sums(
        top,
        a.mass * a_scale + b.mass * b_scale,
        a.weighted * a_scale + b.weighted * b_scale,
        jnp.maximum(a.chosen, b.chosen),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def logps(temperature, axis_name, words, hidden_XD, embedding_VD, ids_X):
    """Log-prob, logsumexp and entropy, [X] each; `api.lm_head_logps` says what they are.

    `words` is the number of words in a chunk.
    """
    ids_X = _ids_here(ids_X, embedding_VD, axis_name)

    def add(sums, start, chunk_WD):
        logits_XW = _logits(hidden_XD, chunk_WD, temperature)
        return merge(sums, _reduce(logits_XW, ids_X - start))

    sums = _over_chunks(add, _no_words(ids_X), embedding_VD, words)
    return _finish(_merge_devices(sums, axis_name))


def _forward(temperature, axis_name, words, hidden_XD, embedding_VD, ids_X):
    embedding_is_trained = embedding_VD.perturbed
    hidden_XD, embedding_VD, ids_X = hidden_XD.value, embedding_VD.value, ids_X.value
    if embedding_is_trained:
        results = logps(temperature, axis_name, words, hidden_XD, embedding_VD, ids_X)
        return results, (None, (hidden_XD, embedding_VD, ids_X, results[1]))
    ids_X = _ids_here(ids_X, embedding_VD, axis_name)

    def add(carry, start, chunk_WD):
        sums, expected_XD = carry
        part, weights_XW = _reduce_plainly(_logits(hidden_XD, chunk_WD, temperature), ids_X - start)
        part_XD = _product("xw,wd->xd", weights_XW.astype(chunk_WD.dtype), chunk_WD)
        merged = merge(sums, part)
        kept_X, new_X = jnp.exp(sums.top - merged.top), jnp.exp(part.top - merged.top)
        return merged, expected_XD * kept_X[:, None] + part_XD * new_X[:, None]

    zeros_XD = jnp.zeros(hidden_XD.shape, jnp.float32)
    here, expected_XD = _over_chunks(add, (_no_words(ids_X), zeros_XD), embedding_VD, words)
    sums = _merge_devices(here, axis_name)
    expected_XD *= (jnp.exp(here.top - sums.top) / sums.mass)[:, None]
    own_XD = embedding_VD.at[ids_X].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    towards_XD = (own_XD - expected_XD) / temperature
    if axis_name is not None:
        towards_XD = jax.lax.psum(towards_XD, axis_name)
    return _finish(sums), (towards_XD.astype(hidden_XD.dtype), None)


def _backward(temperature, axis_name, words, kept, cotangents):
    towards_XD, again = kept
    cotangent_X = cotangents[0]  # the other results carry no gradient
    if again is None:
        return (cotangent_X[:, None] * towards_XD).astype(towards_XD.dtype), None, None
    hidden_XD, embedding_VD, ids_X, logsumexp_X = again
    ids_X = _ids_here(ids_X, embedding_VD, axis_name)

    def add(carry, start, chunk_WD):
        hidden_cotangent_XD, embedding_cotangent_VD = carry
        logits_XW = _logits(hidden_XD, chunk_WD, temperature)
        residual_XW = _is_own(logits_XW, ids_X - start) - jnp.exp(logits_XW - logsumexp_X[:, None])
        residual_XW = (residual_XW * (cotangent_X / temperature)[:, None]).astype(chunk_WD.dtype)
        rows_WD = _product("xw,xd->wd", residual_XW, hidden_XD).astype(chunk_WD.dtype)
        return (
            hidden_cotangent_XD + _product("xw,wd->xd", residual_XW, chunk_WD),
            jax.lax.dynamic_update_slice_in_dim(embedding_cotangent_VD, rows_WD, start, axis=0),
        )

    # Every row is written, once: zeros would cost a pass over HBM.
    blank_VD = jax.lax.empty(embedding_VD.shape, embedding_VD.dtype)
    zeros_XD = jnp.zeros(hidden_XD.shape, jnp.float32)
    hidden_cotangent_XD, embedding_cotangent_VD = _over_chunks(
        add, (zeros_XD, blank_VD), embedding_VD, words
    )
    if axis_name is not None:
        hidden_cotangent_XD = jax.lax.psum(hidden_cotangent_XD, axis_name)
    return hidden_cotangent_XD.astype(hidden_XD.dtype), embedding_cotangent_VD, None


logps.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_chunks(add, carry, embedding_VD, words):
    """Folds `add(carry, first word, rows of the embedding)` over all words; the last chunk may be
    short. Slices one array in a loop, where a scan over a reshaped one would copy it."""
    num_words = embedding_VD.shape[0]
    words = min(words, num_words)

    def chunk(carry, start, size):
        rows_WD = jax.lax.dynamic_slice_in_dim(embedding_VD, start, size, axis=0)
        return add(carry, start, rows_WD)

    carry = jax.lax.fori_loop(
        0, num_words // words, lambda i, carry: chunk(carry, i * words, words), carry
    )
    rest = num_words % words
    return chunk(carry, num_words - rest, rest) if rest else carry


def _logits(hidden_XD, chunk_WD, temperature):
    return _product("xd,wd->xw", hidden_XD, chunk_WD) / temperature


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _reduce(logits_XW: jax.Array, ids_X: jax.Array) -> Sums:
    """The sums of these words; ids count from the first of them."""
    return jax.lax.platform_dependent(
        logits_XW, ids_X, tpu=_reduce_at_once, default=lambda *a: _reduce_plainly(*a)[0]
    )


def _reduce_at_once(logits_XW, ids_X):
    """One reduction of all four, which the TPU's compiler fuses into the product: no logits."""
    finite_XW = (logits_XW != -jnp.inf).astype(jnp.float32)
    top_XW = jnp.maximum(logits_XW, LOWEST)
    chosen_XW = jnp.where(_is_own(logits_XW, ids_X), logits_XW, -jnp.inf)
    each_word = Sums(top_XW, finite_XW, top_XW * finite_XW, chosen_XW)
    none = jax.tree.map(jnp.float32, NO_WORDS)
    return jax.lax.reduce(each_word, none, merge, dimensions=(1,))


def _reduce_plainly(logits_XW, ids_X):
    """The sums, and exp(logit - top) of every word."""
    top_X = jnp.maximum(logits_XW.max(axis=1), LOWEST)
    weights_XW = jnp.exp(logits_XW - top_X[:, None])
    chosen_X = jnp.where(_is_own(logits_XW, ids_X), logits_XW, -jnp.inf).max(axis=1)
    weighted_X = jnp.sum(weights_XW * jnp.maximum(logits_XW, LOWEST), axis=1)
    return Sums(top_X, weights_XW.sum(axis=1), weighted_X, chosen_X), weights_XW


def _finish(sums):
    logsumexp_X = sums.top + jnp.log(sums.mass)
    return sums.chosen - logsumexp_X, logsumexp_X, logsumexp_X - sums.weighted / sums.mass


def _merge_devices(sums, axis_name):
    """One small collective: four numbers a token from each device."""
    if axis_name is None:
        return sums
    return jax.lax.reduce(
        Sums(*jnp.moveaxis(jax.lax.all_gather(jnp.stack(sums), axis_name), 1, 0)),
        jax.tree.map(jnp.float32, NO_WORDS),
        merge,
        dimensions=(0,),
    )


def _no_words(ids_X):
    return jax.tree.map(lambda value: jnp.full(ids_X.shape, value, jnp.float32), NO_WORDS)


def _ids_here(ids_X, embedding_VD, axis_name):
    """Ids counted from the first word of this device's slice; those of others fall outside."""
    if axis_name is None:
        return ids_X
    return ids_X - jax.lax.axis_index(axis_name) * embedding_VD.shape[0]


def _is_own(logits_XW, ids_X):
    return jax.lax.broadcasted_iota(ids_X.dtype, logits_XW.shape, 1) == ids_X[:, None]
