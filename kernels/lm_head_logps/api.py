"""Log-probs of given words, as the pipeline calls them. Knows no model, loss or backend."""

import math
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from gemma_grpo.errors import UserError
from gemma_grpo.kernels.lm_head_logps import xla


class TokenLogps(NamedTuple):
    """Of each token, in nats, float32.

    Attributes:
        logps: log-prob of its word; the only one that carries a gradient.
        logsumexp: of its logits, divided by the temperature.
        entropy: of the distribution that its word was drawn from.
    """

    logps: Float[Array, " X"]
    logsumexp: Float[Array, " X"]
    entropy: Float[Array, " X"]


def lm_head_logps(
    hidden_XD: Float[Array, "X D"],
    embedding_VD: Float[Array, "V D"],
    ids_X: Int[Array, " X"],
    *,
    temperature: float = 1.0,
    axis_name: str | None = None,
    implementation: Literal["xla", "pallas"] | None = None,
) -> TokenLogps:
    """Log-prob of `ids` under softmax(hidden @ embedding.T / temperature), logits never whole.

    Memory beyond arguments and results is that of the logits for `xla.WORDS` words and of float32
    hidden states. Gradients go to the hidden states and, if it is differentiated, to the embedding;
    a frozen one costs nothing (`xla` says how).

    A logit of -inf is a word of probability 0. A row with a logit of +inf or NaN, or without a
    finite one, is NaN. An id outside the vocabulary has log-prob -inf.

    Args:
        temperature: of the distribution; the sampler's, so that both are of the same one.
        axis_name: if given, `embedding_VD` is this device's slice of the words along that axis of
            a `shard_map` (equal slices, in order), `ids_X` are of the whole vocabulary, and hidden
            states, ids and results are the same on every device. Differentiate inside the
            `shard_map`, a loss that every device computes alike: the hidden states' gradient is
            then whole on each device, and the embedding's is of its slice.
        implementation: "pallas" does not exist here, since XLA by itself fuses the head with its
            reduction on TPU.

    Raises:
        UserError: for a temperature that is no positive number, or "pallas".
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature={temperature}: log-probs need one above 0 (and finite)")
    if implementation not in (None, "xla"):
        raise UserError(f'implementation="{implementation}": lm_head_logps has "xla" only')
    logps_X, *others = xla.logps(temperature, axis_name, xla.WORDS, hidden_XD, embedding_VD, ids_X)
    return TokenLogps(logps_X, *map(jax.lax.stop_gradient, others))
