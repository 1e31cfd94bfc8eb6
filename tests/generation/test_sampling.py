"""Drawing one token by the settings; the kernels have tests of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from gemma_grpo.errors import UserError
from gemma_grpo.generation import sampling

RNG = np.random.default_rng(0)
KEYS_6 = jax.random.split(jax.random.key(0), 6)


def sample(logits, keys, **settings):
    """A draw from these logits: hidden states under the identity for an embedding."""
    config = sampling.SamplingConfig(**settings)
    return sampling.sample(jnp.asarray(logits), jnp.eye(logits.shape[-1]), keys, config)


def numpy_log_softmax(x):
    x = x.astype(np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def test_temperature_zero_takes_the_largest_and_reports_its_full_log_prob():
    logits = RNG.normal(size=(6, 11)).astype(np.float32) * 3
    ids, logps = sample(logits, KEYS_6, temperature=0.0, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    expected = numpy_log_softmax(logits)[np.arange(6), logits.argmax(-1)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32, rtol=tolerances.F32)


def test_top_k_of_one_is_greedy_whatever_the_temperature():
    logits = RNG.normal(size=(6, 11)).astype(np.float32)
    ids, logps = sample(logits, KEYS_6, temperature=5.0, top_k=1)
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    np.testing.assert_allclose(logps, 0.0, atol=tolerances.F32)


def test_log_probs_are_of_the_tempered_distribution():
    logits = RNG.normal(size=(6, 11)).astype(np.float32)
    ids, logps = sample(logits, KEYS_6, temperature=0.7)
    expected = numpy_log_softmax(logits / 0.7)[np.arange(6), np.asarray(ids)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32, rtol=tolerances.F32)


def test_a_truncated_draw_has_its_renormalised_log_prob():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 6))
    ids, logps = sample(logits, KEYS_6, temperature=1.0, top_k=2)
    expected = np.log(np.array([0.5, 0.3]) / 0.8)[np.asarray(ids)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32)


def test_min_p_keeps_what_has_its_share_of_the_likeliest_and_renormalises():
    """0.5 and 0.3 reach 0.4 x 0.5, and 0.15 does not."""
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 200))
    keys = jax.random.split(jax.random.key(1), 200)
    ids, logps = sample(logits, keys, temperature=1.0, min_p=0.4)
    assert set(np.asarray(ids).tolist()) == {0, 1}
    expected = np.log(np.array([0.5, 0.3]) / 0.8)[np.asarray(ids)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32)


def test_top_p_keeps_the_fewest_that_reach_it_of_the_tempered_distribution():
    """At temperature 2 the probabilities are 0.5, 0.3, 0.15, 0.05: two of them reach 0.7."""
    logits = 2 * jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 200))
    keys = jax.random.split(jax.random.key(1), 200)
    ids, logps = sample(logits, keys, temperature=2.0, top_p=0.7)
    assert set(np.asarray(ids).tolist()) == {0, 1}
    expected = np.log(np.array([0.5, 0.3]) / 0.8)[np.asarray(ids)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32)


def test_draws_follow_the_distribution():
    """Chi-square over 20 000 draws: 3 degrees of freedom, 16.27 is the 0.1 % point."""
    probs = np.array([0.5, 0.25, 0.2, 0.05])
    keys = jax.random.split(jax.random.key(7), 20_000)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)) * 2.0, (20_000, 4))
    ids, _ = sample(logits, keys, temperature=2.0)
    counts = np.bincount(np.asarray(ids), minlength=4)
    assert ((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum() < 16.27


@pytest.mark.parametrize(
    "setting, named",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=1.0, top_k=-1), "top_k"),
        (dict(temperature=1.0, top_p=0.0), "top_p"),
        (dict(temperature=1.0, top_p=1.5), "top_p"),
        (dict(temperature=1.0, min_p=-0.1), "min_p"),
        (dict(temperature=0.0, min_p=1.1), "min_p"),
    ],
)
def test_a_senseless_setting_is_refused_by_name(setting, named):
    with pytest.raises(UserError, match=named):
        sampling.SamplingConfig(**setting)
