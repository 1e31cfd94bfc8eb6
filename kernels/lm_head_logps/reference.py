"""The reference for log-probs of given tokens, from all logits at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lm_head_logps(
    hidden_XD: Float[Array, "X D"],
    embedding_VD: Float[Array, "V D"],
    ids_X: Int[Array, " X"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Array, " X"], Float[Array, " X"], Float[Array, " X"]]:
    """Log-prob of `ids`, logsumexp and entropy, from all logits in float32.

    All three can be differentiated; of the op's results only the first. Logits must be finite and
    ids within the vocabulary.
    """
    hidden_XD, embedding_VD = hidden_XD.astype(jnp.float32), embedding_VD.astype(jnp.float32)
    logits_XV = jnp.einsum("xd,vd->xv", hidden_XD, embedding_VD, precision="highest") / temperature
    logps_XV = jax.nn.log_softmax(logits_XV, axis=-1)
    logps_X = jnp.take_along_axis(logps_XV, ids_X[:, None], axis=-1)[:, 0]
    entropy_X = -jnp.sum(jnp.exp(logps_XV) * logps_XV, axis=-1)
    return logps_X, jax.nn.logsumexp(logits_XV, axis=-1), entropy_X
