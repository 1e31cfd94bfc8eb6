"""Log-probs of given tokens: the interface. There is no kernel: XLA fuses the head with its
reduction, on TPU too."""

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
    """Log-prob of `ids` under softmax(hidden @ embedding.T / temperature), by vocabulary chunks.

    Besides arguments and results, memory holds the logits of `xla.CHUNK_SIZE` tokens of the
    vocabulary and float32 hidden states, unless all logits are kept. Gradients go to the hidden
    states and to the embedding, unless it is frozen, which costs less (see `xla`).

    A logit of -inf is a token of probability 0. A row with a logit of +inf or NaN, or without a
    finite one, is NaN. An id outside the vocabulary has log-prob -inf.

    Args:
        temperature: the sampler's, for log-probs under the distribution sampled from.
        wanted_X: the rows that are needed; None for all. Most of the work for the others is
            skipped; their values mean nothing, and their cotangents must be 0.
        keep_logits: store the logits, X * V floats, for the backward pass of a trained embedding
            instead of computing them again.

    Raises:
        UserError: the temperature is not a positive finite number.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature={temperature}: must be above 0 and finite")
    settings = xla.Settings(temperature, xla.CHUNK_SIZE, keep_logits)
    logps_X, *others = xla.logps(settings, hidden_XD, embedding_VD, ids_X, wanted_X)
    return TokenLogps(logps_X, *map(jax.lax.stop_gradient, others))
