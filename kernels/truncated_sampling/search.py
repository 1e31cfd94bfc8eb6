"""The smallest logit that truncation keeps, found by counting. Knows no layout, device or draw.

What is kept of a row is what reaches a threshold, and how many words reach it, or with what mass,
falls as it rises: the threshold is found by bisection, each step one pass over words instead of a
sort of them. It halves an interval of the floats themselves, in the order of their bits, so that it
ends at the exact one after 32 steps, and usually after 10, when one word is left in the interval.

Passes over all words are long. Whoever has a few candidates at hand, among them the largest words,
gives these too: the search runs over them first, and over all words from where that leaves off,
which is the end if the threshold lies where candidates are complete.
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
    """Passes over words, for thresholds [B, 1]: float32 [B, 1] of what reaches them.

    Mass is of exp(logits - the row's largest).
    """

    count: Callable[[jax.Array], jax.Array]
    count_and_mass: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Words(NamedTuple):
    """All words of the vocabulary and some of them, and what is known of all. [B, 1] each."""

    everything: Passes
    candidates: Passes
    incomplete: Float[Array, "B 1"]  # every word above this is among the candidates
    top: Float[Array, "B 1"]  # the largest logit
    mass: Float[Array, "B 1"]  # of everything
    number: int


def threshold(words: Words, truncation: Truncation) -> Float[Array, "B 1"]:
    """A word is kept where its logit is at least its row's threshold.

    That is at most the smallest kept logit, and above the largest one dropped.
    """
    top_k, top_p, min_p = truncation
    top_B1, mass_B1 = words.top, words.mass
    least_B1 = jnp.full_like(top_B1, -jnp.inf)
    reach_B1 = jnp.full_like(top_B1, words.number)

    if 0 < top_k < words.number:

        def count_of(passes, least_B1):
            count_B1 = passes.count(least_B1)
            return count_B1, count_B1

        target_B1 = jnp.full_like(top_B1, top_k)
        least_B1 = _search(words, count_of, target_B1, least_B1, reach_B1)
        if top_p < 1:
            reach_B1, mass_B1 = words.everything.count_and_mass(least_B1)

    if top_p < 1:
        # All of them below this would have less than the mass to lose. The hundredth is for the
        # rounding of sums.
        safe_B1 = top_B1 + jnp.log((1 - top_p) * mass_B1 / reach_B1) - 0.01
        least_B1 = jnp.maximum(least_B1, jnp.minimum(safe_B1, top_B1))
        mass_of = lambda passes, least_B1: passes.count_and_mass(least_B1)
        least_B1 = _search(words, mass_of, top_p * mass_B1, least_B1, reach_B1)

    if min_p > 0:
        least_B1 = jnp.maximum(least_B1, top_B1 + jnp.log(jnp.float32(min_p)))
    return least_B1


def _search(
    words: Words,
    measure: Callable[[Passes, jax.Array], tuple[jax.Array, jax.Array]],
    target_B1: jax.Array,
    least_B1: jax.Array,
    reach_B1: jax.Array,
) -> jax.Array:
    """The largest threshold that still measures `target`; `least` is known to.

    `measure` gives how many of the passes' words reach a threshold, and the amount to hold against
    the target. `reach` is a bound of how many reach `least`.
    """
    of_candidates, of_everything = (
        lambda least_B1, passes=passes: measure(passes, least_B1)
        for passes in (words.candidates, words.everything)
    )
    # What the candidates reach, all words do.
    low_B1 = _bisect(of_candidates, target_B1, least_B1, words.top, reach_B1)
    complete_B1 = _unordered(_ordered(words.incomplete) + 1)
    within_B1 = jnp.minimum(jnp.maximum(low_B1, complete_B1), words.top)
    settled_B1 = of_candidates(within_B1)[1] >= target_B1
    low_B1 = jnp.where(settled_B1, within_B1, low_B1)
    high_B1 = jnp.where(settled_B1, within_B1, words.incomplete)
    return _bisect(of_everything, target_B1, low_B1, high_B1, reach_B1)


def _bisect(
    measure: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    target_B1: jax.Array,
    low_B1: jax.Array,
    high_B1: jax.Array,
    reach_low_B1: jax.Array,
) -> jax.Array:
    """The largest threshold from `low` to `high` that measures the target, or else `low`.

    Any threshold between the same two words will do: a row is settled as soon as no more than one
    word is left in its interval.
    """

    def unsettled(state):
        low_B1, high_B1, reach_low_B1, reach_past_high_B1 = state
        open_B1 = (low_B1 < high_B1) & (reach_low_B1 - reach_past_high_B1 > 1)
        return jnp.max(open_B1.astype(jnp.int32)) > 0

    def halve(state):
        low_B1, high_B1, reach_low_B1, reach_past_high_B1 = state
        middle_B1 = (low_B1 | high_B1) - ((low_B1 ^ high_B1) >> 1)  # the mean, rounded up
        reach_B1, amount_B1 = measure(_unordered(middle_B1))
        enough_B1 = amount_B1 >= target_B1
        return (
            jnp.where(enough_B1, middle_B1, low_B1),
            jnp.where(enough_B1, high_B1, middle_B1 - 1),
            jnp.where(enough_B1, reach_B1, reach_low_B1),
            jnp.where(enough_B1, reach_past_high_B1, reach_B1),
        )

    start = (_ordered(low_B1), _ordered(high_B1), reach_low_B1, jnp.zeros_like(reach_low_B1))
    return _unordered(jax.lax.while_loop(unsettled, halve, start)[0])


def _ordered(floats: Float[Array, "..."]) -> Int[Array, "..."]:
    """Whole numbers in the floats' order: bits of negative ones count backwards."""
    bits = jax.lax.bitcast_convert_type(floats, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unordered(ordered: Int[Array, "..."]) -> Float[Array, "..."]:
    """0 for subnormal floats, which some devices take for 0 and some do not."""
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    bits = jnp.where(bits & 0x7F800000 == 0, 0, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
