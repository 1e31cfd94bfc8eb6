"""The smallest logit that truncation keeps, found by bisection instead of a sort.

A token is kept if its logit is at least the row's threshold. The number of such tokens, and their
mass, fall as the threshold rises, so it is found by bisection, one pass over the logits per step.
Bisecting floats by their bits finds the exact threshold in at most 32 steps, and usually in 10,
when one token is left in the interval.

A pass over the full vocabulary is long. So the caller also gives a few candidates, among them the
largest logits: the search runs over these first, then over all tokens from where that ended. If the
candidates cover the threshold, it ends there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Truncation(NamedTuple):
    """What to keep of softmax(logits): top-k, then top-p of what that leaves, then min-p."""

    top_k: int = 0  # the k most likely, and ties with the last of them; 0 keeps all
    top_p: float = 1.0  # the fewest most likely whose mass reaches p, and ties; 1 keeps all
    min_p: float = 0.0  # those at least min_p times as likely as the likeliest; 0 keeps all


class Passes(NamedTuple):
    """Passes over tokens: from thresholds [B, 1] to the count, or count and mass, of the tokens at
    or above them.

    All are float32 [B, 1]. Mass is the sum of exp(logit - the row's largest logit).
    """

    count: Callable[[jax.Array], jax.Array]
    count_and_mass: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Vocabulary(NamedTuple):
    """Passes over all tokens and over the candidates, and figures of all tokens."""

    everything: Passes
    candidates: Passes
    incomplete: Float[Array, "B 1"]  # every token with a logit above this is a candidate
    top: Float[Array, "B 1"]  # the largest logit
    mass: Float[Array, "B 1"]  # of all tokens
    size: int


def threshold(vocabulary: Vocabulary, truncation: Truncation) -> Float[Array, "B 1"]:
    """A token is kept if its logit is at least its row's threshold.

    The threshold is at most the smallest kept logit and above the largest dropped one.
    """
    top_k, top_p, min_p = truncation
    top_B1, mass_B1 = vocabulary.top, vocabulary.mass
    least_B1 = jnp.full_like(top_B1, -jnp.inf)
    reach_B1 = jnp.full_like(top_B1, vocabulary.size)

    if 0 < top_k < vocabulary.size:

        def count_of(passes, least_B1):
            count_B1 = passes.count(least_B1)
            return count_B1, count_B1

        target_B1 = jnp.full_like(top_B1, top_k)
        least_B1 = _search(vocabulary, count_of, target_B1, least_B1, reach_B1)
        if top_p < 1:
            reach_B1, mass_B1 = vocabulary.everything.count_and_mass(least_B1)

    if top_p < 1:
        # A lower bound: all tokens below it together have less mass than top-p drops. The 0.01
        # allows for the rounding of sums.
        safe_B1 = top_B1 + jnp.log((1 - top_p) * mass_B1 / reach_B1) - 0.01
        least_B1 = jnp.maximum(least_B1, jnp.minimum(safe_B1, top_B1))
        mass_of = lambda passes, least_B1: passes.count_and_mass(least_B1)
        least_B1 = _search(vocabulary, mass_of, top_p * mass_B1, least_B1, reach_B1)

    if min_p > 0:
        least_B1 = jnp.maximum(least_B1, top_B1 + jnp.log(jnp.float32(min_p)))
    return least_B1


def _search(
    vocabulary: Vocabulary,
    measure: Callable[[Passes, jax.Array], tuple[jax.Array, jax.Array]],
    target_B1: jax.Array,
    least_B1: jax.Array,
    reach_B1: jax.Array,
) -> jax.Array:
    """The largest threshold whose measured amount is at least `target`; that of `least` must be.

    `measure` returns how many tokens reach a threshold, and the amount to compare with the target.
    `reach` is an upper bound of how many reach `least`.
    """
    of_candidates, of_everything = (
        lambda least_B1, passes=passes: measure(passes, least_B1)
        for passes in (vocabulary.candidates, vocabulary.everything)
    )
    # A target that the candidates reach is reached by all tokens.
    low_B1 = _bisect(of_candidates, target_B1, least_B1, vocabulary.top, reach_B1)
    complete_B1 = _unordered(_ordered(vocabulary.incomplete) + 1)
    within_B1 = jnp.minimum(jnp.maximum(low_B1, complete_B1), vocabulary.top)
    settled_B1 = of_candidates(within_B1)[1] >= target_B1
    low_B1 = jnp.where(settled_B1, within_B1, low_B1)
    high_B1 = jnp.where(settled_B1, within_B1, vocabulary.incomplete)
    return _bisect(of_everything, target_B1, low_B1, high_B1, reach_B1)


def _bisect(
    measure: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    target_B1: jax.Array,
    low_B1: jax.Array,
    high_B1: jax.Array,
    reach_low_B1: jax.Array,
) -> jax.Array:
    """The largest threshold in [low, high] whose amount is at least the target, or else `low`.

    All thresholds between two neighbouring logits are equivalent: a row is settled once at most one
    token is left in its interval.
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
    """Integers in the floats' order: the bits of negative floats count backwards."""
    bits = jax.lax.bitcast_convert_type(floats, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unordered(ordered: Int[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `_ordered`; subnormal floats become 0, as some devices treat them."""
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    bits = jnp.where(bits & 0x7F800000 == 0, 0, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
