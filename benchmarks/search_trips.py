"""How many passes `truncated_sampling`'s search takes on given logits.

Its loops end depending on data, which a compiler does not have: here they are run and counted.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gemma_grpo.kernels.block_draw import BLOCK
from gemma_grpo.kernels.truncated_sampling.pallas_tpu import LAYERS
from gemma_grpo.kernels.truncated_sampling.search import Passes, Truncation, Vocabulary, threshold


def search_trips(logits_BV: Float[np.ndarray, "B V"], truncation: Truncation) -> list[int]:
    """Trips of the kernel's search loops in order: top-k's over candidates, then over all tokens,
    and top-p's likewise; of the parts that `truncation` has. V is a multiple of the block."""
    B, V = logits_BV.shape
    made = Counter()
    layers = np.sort(logits_BV.reshape(B, V // BLOCK, BLOCK), axis=1)[:, -LAYERS:]
    top_B1 = logits_BV.max(axis=-1, keepdims=True)

    def passes(name: str, logits_BX: np.ndarray) -> Passes:
        masses_BX = np.exp(logits_BX - top_B1)

        def count(least_B1):
            made[name, "count"] += 1
            return _total(logits_BX >= np.asarray(least_B1))

        def count_and_mass(least_B1):
            made[name, "mass"] += 1
            reaches_BX = logits_BX >= np.asarray(least_B1)
            return _total(reaches_BX), _total(np.where(reaches_BX, masses_BX, 0))

        return Passes(count, count_and_mass)

    vocabulary = Vocabulary(
        everything=passes("all", logits_BV),
        candidates=passes("candidates", layers.reshape(B, -1)),
        incomplete=jnp.asarray(layers[:, 0].max(axis=-1, keepdims=True)),
        top=jnp.asarray(top_B1),
        mass=_total(np.exp(logits_BV - top_B1)),
        size=V,
    )
    with jax.disable_jit():  # loops run in Python, a call a pass
        threshold(vocabulary, truncation)
    by_count, by_mass = 0 < truncation.top_k < V, truncation.top_p < 1
    trips = []
    if by_count:
        # Between its two loops a search measures the candidates once more.
        trips += [made["candidates", "count"] - 1, made["all", "count"]]
    if by_mass:
        # What top-k has left is measured once.
        trips += [made["candidates", "mass"] - 1, made["all", "mass"] - by_count]
    return trips


def _total(values_BX: np.ndarray) -> jax.Array:
    return jnp.asarray(values_BX.sum(axis=-1, keepdims=True), jnp.float32)
