"""Log-probs of given tokens: the interface. XLA alone: it fuses the head with its reduction, on TPU
too."""

import math
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from gemma_grpo.errors import UserError
from gemma_grpo.kernels.lm_head_logps import xla


class TokenLogps(NamedTuple):
    """One value for each token, in nats, float32.

    Attributes:
        logps: log-prob of the given token; the only one that carries a gradient.
        logsumexp: of the logits, divided by the temperature.
        entropy: of the distribution that the token is drawn from.
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
    wanted_X: Bool[Array, " X"] | None = None,
    keep_logits: bool = False,
) -> TokenLogps:
    """Log-prob of `ids` under softmax(hidden @ embedding.T / temperature), by chunks.

    Memory beyond arguments and results is that of the logits for `xla.CHUNK_SIZE` tokens of the
    vocabulary and of float32 hidden states, unless all logits are kept. Gradients go to the hidden
    states and, if it is differentiated, to the embedding; a frozen one costs less (see `xla`).

    A logit of -inf is a token of probability 0. A row with a logit of +inf or NaN, or without a
    finite one, is NaN. An id outside the vocabulary has log-prob -inf.

    Args:
        temperature: of the distribution; the sampler's, for log-probs of what was sampled from.
        wanted_X: the rows that are asked for; None for all. Most of the others' work is not done.
            Their values mean nothing, and their cotangents must be 0.
        keep_logits: the backward pass of a trained embedding reads the logits, X * V floats, and
            does not compute them again.

    Raises:
        UserError: the temperature is not a positive finite number.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature={temperature}: must be above 0 and finite")
    settings = xla.Settings(temperature, xla.CHUNK_SIZE, keep_logits)
    logps_X, *others = xla.logps(settings, hidden_XD, embedding_VD, ids_X, wanted_X)
    return TokenLogps(logps_X, *map(jax.lax.stop_gradient, others))
