"""Token log-probs: values and gradients against NumPy in float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from gemma_grpo.training import logps

B, T, D, V, TEMPERATURE = 3, 5, 8, 37, 0.7
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
EMBEDDING = RNG.normal(size=(V, D)).astype(np.float32)
IDS = RNG.integers(0, V, (B, T))
WEIGHTS = RNG.normal(size=(B, T)).astype(np.float32)


def numpy_logps():
    logits = HIDDEN.astype(np.float64) @ EMBEDDING.T.astype(np.float64) / TEMPERATURE
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def weighted_sum(hidden, embedding):
    """A scalar of the log-probs, and the entropies beside it."""

    class Parameter:
        def __getitem__(self, _):
            return embedding

    model = SimpleNamespace(embedding=Parameter())
    values, entropy = logps.token_logps.__wrapped__(
        model, hidden, jnp.asarray(IDS), temperature=TEMPERATURE
    )
    return jnp.sum(values * WEIGHTS), (values, entropy)


def test_log_probs_and_entropies_are_numpys():
    _, (values, entropy) = weighted_sum(jnp.asarray(HIDDEN), jnp.asarray(EMBEDDING))
    expected = numpy_logps()
    chosen = np.take_along_axis(expected, IDS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(values, chosen, atol=tolerances.LOGP_GAP)
    np.testing.assert_allclose(
        entropy, -(np.exp(expected) * expected).sum(-1), atol=tolerances.LOGP_GAP
    )


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)], ids=["hidden", "embedding", "both"])
def test_gradients_are_numpys_for_each_side_alone_and_for_both(trained):
    """d logp / d logit = onehot - softmax; the logits are hidden . embedding / temperature."""
    residual = np.eye(V)[IDS] - np.exp(numpy_logps())
    scaled = residual * WEIGHTS[..., None] / TEMPERATURE
    expected = (
        scaled @ EMBEDDING.astype(np.float64),
        np.einsum("btv,btd->vd", scaled, HIDDEN.astype(np.float64)),
    )
    gradients = jax.grad(lambda h, e: weighted_sum(h, e)[0], trained)(
        jnp.asarray(HIDDEN), jnp.asarray(EMBEDDING)
    )
    for side, gradient in zip(trained, gradients, strict=True):
        np.testing.assert_allclose(gradient, expected[side], atol=tolerances.HIDDEN_GRAD_F32)


def test_the_entropy_carries_no_gradient():
    gradient = jax.grad(lambda h: weighted_sum(h, jnp.asarray(EMBEDDING))[1][1].sum())(
        jnp.asarray(HIDDEN)
    )
    assert not np.any(gradient)
