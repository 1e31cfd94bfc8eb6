"""The smallest logit that truncation keeps, found by counting. Knows no layout, device or draw.

What is kept of a row is what reaches a threshold, and how many words reach it, or with what mass,
falls as it rises: the threshold is found by bisection, each step one pass over the words instead of
a sort of them. It halves an interval of the floats themselves, in the order of their bits, so that
it ends at the exact one after 32 steps and usually, at the last word in the interval, after 10.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Truncation(NamedTuple):
    """What to keep of softmax(logits): top-k, then top-p of what that leaves, then min-p."""

    top_k: int = 0  # the k largest, with what ties with the smallest of them; 0 keeps all
    top_p: float = 1.0  # the fewest largest whose mass reaches p, with ties; 1 keeps all
    min_p: float = 0.0  # those of min_p times the largest probability or more; 0 keeps all


class Passes(NamedTuple):
    """Passes over all words, for thresholds [B, 1]: float32 [B, 1] of what reaches them.

    Mass is of exp(logits - the row's largest).
    """

    count: Callable[[jax.Array], jax.Array]
    count_and_mass: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def threshold(
    passes: Passes,
    maxima_BG: Float[Array, "B G"],
    mass_B1: Float[Array, "B 1"],
    num_words: int,
    truncation: Truncation,
) -> Float[Array, "B 1"]:
    """A word is kept where its logit is at least its row's threshold.

    That is at most the smallest kept logit and above the largest one dropped. It is the one in
    min-p, whatever comes before: the largest probability is always kept.

    Args:
        maxima_BG: largest logits of any disjoint groups that hold all words.
        mass_B1: of all words.
        num_words: of the whole vocabulary.
    """
    top_k, top_p, min_p = truncation
    top_B1 = maxima_BG.max(axis=-1, keepdims=True)
    least_B1 = jnp.full_like(top_B1, -jnp.inf)
    words_B1 = jnp.full_like(top_B1, num_words)

    if 0 < top_k < num_words:
        k_B1 = jnp.full_like(top_B1, top_k)
        if top_k <= maxima_BG.shape[-1]:
            # k words reach the k-th largest of the maxima, and hardly more where groups are many.
            least_B1 = _reach(_count_twice(_counting(maxima_BG)), k_B1, least_B1, top_B1, words_B1)
        least_B1 = _reach(_count_twice(passes.count), k_B1, least_B1, top_B1, words_B1)
        if top_p < 1:
            words_B1, mass_B1 = passes.count_and_mass(least_B1)

    if top_p < 1:
        # Words below this one have together less than the mass to lose, were they all of them.
        # The hundredth is for the rounding of sums.
        safe_B1 = top_B1 + jnp.log((1 - top_p) / words_B1 * mass_B1) - 0.01
        least_B1 = jnp.maximum(least_B1, jnp.minimum(safe_B1, top_B1))
        least_B1 = _reach(passes.count_and_mass, top_p * mass_B1, least_B1, top_B1, words_B1)

    if min_p > 0:
        least_B1 = jnp.maximum(least_B1, top_B1 + jnp.log(jnp.float32(min_p)))
    return least_B1


def _reach(
    measure: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    target_B1: jax.Array,
    least_B1: jax.Array,
    most_B1: jax.Array,
    words_B1: jax.Array,
) -> jax.Array:
    """The largest threshold from `least` to `most` that still measures `target`.

    `measure` gives how many words reach a threshold, and the amount to hold against the target;
    `least` measures enough. Any threshold between the same two words will do: a row is settled as
    soon as one word is left in its interval. `words` is a bound of how many reach `least`.
    """

    def unsettled(state):
        low_B1, high_B1, reach_low_B1, reach_past_high_B1 = state
        open_B1 = (low_B1 < high_B1) & (reach_low_B1 - reach_past_high_B1 > 1)
        return jnp.max(open_B1.astype(jnp.int32)) > 0

    def halve(state):
        low_B1, high_B1, reach_low_B1, reach_past_high_B1 = state
        middle_B1 = (low_B1 | high_B1) - ((low_B1 ^ high_B1) >> 1)  # the mean, rounded up
        count_B1, amount_B1 = measure(_unordered(middle_B1))
        enough_B1 = amount_B1 >= target_B1
        return (
            jnp.where(enough_B1, middle_B1, low_B1),
            jnp.where(enough_B1, high_B1, middle_B1 - 1),
            jnp.where(enough_B1, count_B1, reach_low_B1),
            jnp.where(enough_B1, reach_past_high_B1, count_B1),
        )

    start = (_ordered(least_B1), _ordered(most_B1), words_B1, jnp.zeros_like(words_B1))
    return _unordered(jax.lax.while_loop(unsettled, halve, start)[0])


def _counting(values_BX: jax.Array) -> Callable[[jax.Array], jax.Array]:
    return lambda least_B1: jnp.sum(
        jnp.where(values_BX >= least_B1, 1.0, 0.0), axis=-1, keepdims=True
    )


def _count_twice(count: Callable[[jax.Array], jax.Array]):
    def measure(least_B1):
        count_B1 = count(least_B1)
        return count_B1, count_B1

    return measure


def _ordered(floats: Float[Array, "..."]) -> Int[Array, "..."]:
    """Whole numbers in the floats' order: bits of negative ones count backwards."""
    bits = jax.lax.bitcast_convert_type(floats, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unordered(ordered: Int[Array, "..."]) -> Float[Array, "..."]:
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
