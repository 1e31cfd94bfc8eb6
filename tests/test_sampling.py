"""Laws of drawing one token. Expected values by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from gemma_grpo import sampling
from gemma_grpo.errors import UserError

RNG = np.random.default_rng(0)
KEYS_6 = jax.random.split(jax.random.key(0), 6)


def numpy_log_softmax(x):
    x = x.astype(np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def test_temperature_zero_takes_the_largest_and_reports_its_full_log_prob():
    logits = RNG.normal(size=(6, 11)).astype(np.float32) * 3
    ids, logps = sampling.sample(jnp.asarray(logits), KEYS_6, temperature=0.0, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    expected = numpy_log_softmax(logits)[np.arange(6), logits.argmax(-1)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32, rtol=tolerances.F32)


def test_top_k_of_one_is_greedy_whatever_the_temperature():
    logits = RNG.normal(size=(6, 11)).astype(np.float32)
    ids, logps = sampling.sample(jnp.asarray(logits), KEYS_6, temperature=5.0, top_k=1, top_p=1.0)
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    np.testing.assert_allclose(logps, 0.0, atol=tolerances.F32)


def test_log_probs_are_of_the_tempered_distribution():
    logits = RNG.normal(size=(6, 11)).astype(np.float32)
    ids, logps = sampling.sample(jnp.asarray(logits), KEYS_6, temperature=0.7, top_k=0, top_p=1.0)
    expected = numpy_log_softmax(logits / 0.7)[np.arange(6), np.asarray(ids)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32, rtol=tolerances.F32)


@pytest.mark.parametrize("top_k, top_p", [(3, 1.0), (0, 0.6), (4, 0.6), (0, 1e-9), (99, 1.0)])
def test_the_kept_set_is_that_of_a_sort(top_k, top_p):
    logits = RNG.normal(size=(6, 11)).astype(np.float32) * 2
    kept = np.isfinite(sampling.truncate(jnp.asarray(logits), top_k=top_k, top_p=top_p))
    for row in range(6):
        order = np.argsort(-logits[row])
        if top_k:
            order = order[:top_k]
        probs = np.exp(numpy_log_softmax(logits[row][order]))
        before = np.cumsum(probs) - probs
        np.testing.assert_array_equal(np.flatnonzero(kept[row]), np.sort(order[before < top_p]))


def test_what_ties_with_the_kth_largest_is_kept():
    logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = np.isfinite(sampling.truncate(logits, top_k=2, top_p=1.0))
    np.testing.assert_array_equal(kept, [[False, True, True, True, False]])


def test_a_truncated_draw_has_its_renormalised_log_prob():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 6))
    ids, logps = sampling.sample(logits, KEYS_6, temperature=1.0, top_k=2, top_p=1.0)
    expected = np.log(np.array([0.5, 0.3]) / 0.8)[np.asarray(ids)]
    np.testing.assert_allclose(logps, expected, atol=tolerances.F32)


def test_draws_follow_the_distribution():
    """Chi-square over 20 000 draws: 3 degrees of freedom, 16.27 is the 0.1 % point."""
    probs = np.array([0.5, 0.25, 0.2, 0.05])
    keys = jax.random.split(jax.random.key(7), 20_000)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)) * 2.0, (20_000, 4))
    ids, _ = sampling.sample(logits, keys, temperature=2.0, top_k=0, top_p=1.0)
    counts = np.bincount(np.asarray(ids), minlength=4)
    assert ((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum() < 16.27


@pytest.mark.parametrize(
    "setting, named",
    [
        (dict(temperature=-1.0, top_k=0, top_p=1.0), "temperature"),
        (dict(temperature=float("nan"), top_k=0, top_p=1.0), "temperature"),
        (dict(temperature=1.0, top_k=-1, top_p=1.0), "top_k"),
        (dict(temperature=1.0, top_k=0, top_p=0.0), "top_p"),
        (dict(temperature=1.0, top_k=0, top_p=1.5), "top_p"),
    ],
)
def test_a_senseless_setting_is_refused_by_name(setting, named):
    with pytest.raises(UserError, match=named):
        sampling.check_sampling(**setting)


def test_draws_follow_the_distribution_across_blocks_and_never_take_a_word_cut_off():
    """1000 words in blocks of 32, the likeliest in different blocks, a whole block at -inf: the
    cells of 100 expected draws and more, and one for the rest, by chi-square's 0.1 % point."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=1000).astype(np.float32) * 2
    logits[rng.choice(1000, 300, replace=False)] = -np.inf
    logits[64:96] = logits[990:] = -np.inf
    keys = jax.random.split(jax.random.key(11), 40_000)
    draw = jax.jit(jax.vmap(lambda key: sampling.draw(jnp.asarray(logits)[None], key[None])[0][0]))
    counts = np.bincount(np.asarray(draw(keys)), minlength=1000)
    probs = np.exp(numpy_log_softmax(logits))
    assert len(counts) == 1000 and not counts[probs == 0].any()
    big = 40_000 * probs >= 100
    observed = np.append(counts[big], counts[~big].sum())
    expected = 40_000 * np.append(probs[big], probs[~big].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    cells = big.sum()
    assert statistic < cells + 3.09 * np.sqrt(2 * cells) + 5  # Wilson-Hilferty's, rounded up


def test_a_uniform_number_next_to_one_still_gives_a_word_that_has_mass():
    masses = jnp.asarray([[0.25, 0.5, 0.25, 0.0]])
    almost_one = jnp.nextafter(jnp.ones(1), 0.0)
    assert int(sampling._inverse_cdf(masses, almost_one)[0]) == 2
    assert int(sampling._inverse_cdf(masses, jnp.ones(1))[0]) == 2
    assert int(sampling._inverse_cdf(jnp.asarray([[0.0, 0.5, 0.5]]), jnp.zeros(1))[0]) == 1
