"""Laws of drawing a word block by block. Expected values by NumPy in float64 and by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec

from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.block_draw import BLOCK

V = 2 * BLOCK + 77  # three blocks, the last short
noise_of = jax.jit(block_draw.noise, static_argnums=1)
draw = jax.jit(block_draw.draw)
ALMOST_ONE = 1 - 2.0**-23  # the largest word noise


def numpy_logsumexp(x):
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def numpy_draw(logits_BV, block_noise, word_noise):
    """The docstring's two lines in float64; a block's word by its groups, as documented."""
    ids = []
    for row, gumbel, (first, second) in zip(logits_BV, block_noise, word_noise, strict=True):
        ends = range(BLOCK, len(row) + BLOCK, BLOCK)
        blocks = [row[end - BLOCK : end].astype(np.float64) for end in ends]
        block = np.argmax([numpy_logsumexp(b) + g for b, g in zip(blocks, gumbel, strict=True)])
        masses = np.exp(blocks[block] - blocks[block].max())
        starts = np.arange(0, len(masses), block_draw.GROUP)
        group_masses = np.add.reduceat(masses, starts)
        group = np.argmax(np.cumsum(group_masses) > first * group_masses.sum())
        inside = masses[starts[group] : starts[group] + block_draw.GROUP]
        word = np.argmax(np.cumsum(inside) > second * inside.sum())
        ids.append(block * BLOCK + starts[group] + word)
    return np.array(ids)


def chi_square_is_likely(counts, probs):
    """Pearson's statistic under chi-square's 0.1 % point (Wilson and Hilferty, 1931), over the
    cells of 100 expected draws and more, and one for the rest."""
    expected = counts.sum() * probs
    cell_of_word = np.where(expected >= 100, np.arange(len(probs)), len(probs))
    observed, expected = np.bincount(cell_of_word, counts), np.bincount(cell_of_word, expected)
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + 3.09 * np.sqrt(spread)) ** 3


def count_draws(logits_V, *, block_scale=1.0, word_scale=1.0):
    """How often each word comes in 2^20 draws. The scales plant a bias."""

    def of_key(key):
        block_noise, word_noise = block_draw.noise(key[None], len(logits_V))
        return block_draw.draw(logits_V[None], block_scale * block_noise, word_scale * word_noise)

    ids, _ = jax.jit(jax.vmap(of_key))(jax.random.split(jax.random.key(3), 2**20))
    return np.bincount(np.asarray(ids)[:, 0], minlength=len(logits_V))


def some_logits(block):
    """Three blocks, the last short: some words likely, some rare, a fifth impossible, and the
    blocks' edges likely."""
    rng = np.random.default_rng(1)
    num_words = 2 * block + block // 7
    logits = rng.normal(size=num_words).astype(np.float32) * 2
    logits[rng.choice(num_words, num_words // 5, replace=False)] = -np.inf
    logits[[0, block - 1, block, 2 * block - 1, 2 * block, num_words - 1]] = 2.0
    return logits


@pytest.fixture
def small_blocks(monkeypatch):
    """An eighth of the words a block, so that a million draws take seconds."""
    monkeypatch.setattr(block_draw, "BLOCK", BLOCK // 8)
    monkeypatch.setattr(block_draw, "GROUP", block_draw.GROUP // 4)
    return BLOCK // 8


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_million_draws_follow_the_distribution_and_none_is_of_minus_infinity(
    small_blocks, temperature
):
    logits = some_logits(small_blocks) / np.float32(temperature)
    counts = count_draws(jnp.asarray(logits))
    exact = logits.astype(np.float64)
    probs = np.exp(exact - numpy_logsumexp(exact))
    assert len(counts) == len(probs) and not counts[np.isinf(logits)].any()
    assert chi_square_is_likely(counts, probs)


@pytest.mark.parametrize("bias", [dict(block_scale=0.95), dict(word_scale=0.99)])
def test_the_chi_square_catches_a_planted_bias(small_blocks, bias):
    logits = some_logits(small_blocks)
    exact = logits.astype(np.float64)
    probs = np.exp(exact - numpy_logsumexp(exact))
    assert not chi_square_is_likely(count_draws(jnp.asarray(logits), **bias), probs)


@pytest.mark.parametrize("num_words", [1, BLOCK, BLOCK + 1, V])
def test_word_and_logsumexp_are_those_of_float64(compile_quickly, num_words):
    rng = np.random.default_rng(num_words)
    logits = rng.normal(size=(40, num_words)).astype(np.float32) * 3
    noise = noise_of(jax.random.split(jax.random.key(num_words), 40), num_words)
    ids, logsumexps = draw(jnp.asarray(logits), *noise)
    np.testing.assert_array_equal(ids, numpy_draw(logits, *map(np.asarray, noise)))
    expected = numpy_logsumexp(logits.astype(np.float64)).astype(np.float32)
    chex.assert_trees_all_close(logsumexps, expected, rtol=tolerances.F32, atol=tolerances.F32)


@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
def test_the_only_possible_word_is_drawn_whatever_the_noise(uniform):
    """A row for each edge of a block; every sum is of one mass and zeros."""
    words = np.array([0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, V - 1])
    rows = np.arange(len(words))
    logits = jnp.full((len(words), V), -jnp.inf).at[rows, words].set(-7.0)
    block_noise = jnp.full((len(words), 3), 20.0).at[rows, words // BLOCK].set(-3.0)
    ids, logsumexps = draw(logits, block_noise, jnp.full((len(words), 2), uniform))
    np.testing.assert_array_equal(ids, words)
    np.testing.assert_array_equal(logsumexps, -7.0)


def test_the_ends_of_the_uniform_numbers_give_the_ends_of_a_block():
    logits = jnp.zeros((1, BLOCK)).at[0, :3].set(-jnp.inf).at[0, -2:].set(-jnp.inf)
    ends = [
        int(draw(logits, jnp.zeros((1, 1)), jnp.full((1, 2), uniform))[0][0])
        for uniform in (0.0, ALMOST_ONE)
    ]
    assert ends == [3, BLOCK - 3]


def test_logits_far_below_zero_are_drawn_as_near_it():
    logits = some_logits(BLOCK)[None]
    noise = noise_of(jax.random.split(jax.random.key(5), 1), logits.shape[1])
    ids, logsumexps = draw(jnp.asarray(logits), *noise)
    shifted_ids, shifted = draw(jnp.asarray(logits) - 4096.0, *noise)
    np.testing.assert_array_equal(ids, shifted_ids)
    chex.assert_trees_all_close(shifted + 4096.0, logsumexps, rtol=4096.0 * tolerances.F32)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("num_words", [300, V])
def test_nan_and_infinity_leave_no_finite_log_prob_and_a_word_of_the_vocabulary(poison, num_words):
    logits = jnp.zeros((1, num_words)).at[0, -1].set(poison)
    noise = noise_of(jax.random.split(jax.random.key(0), 1), num_words)
    picked = block_draw.pick(logits, *noise)
    assert 0 <= int(picked.ids[0]) < num_words
    assert not np.isfinite(picked.logits - picked.logsumexps)[0]


def test_noise_is_standard_gumbel_and_uniform_and_of_its_rows_key_alone():
    keys = jax.random.split(jax.random.key(8), 500)
    gumbel, uniform = noise_of(keys, 512 * BLOCK)
    chex.assert_shape((gumbel, uniform), [(500, 512), (500, 2)])
    deviation = (np.pi**2 / 6 / gumbel.size) ** 0.5
    assert abs(np.asarray(gumbel, np.float64).mean() - np.euler_gamma) < 4 * deviation
    # Its cumulative distribution, exp(-exp(-x)), at the middle and in both tails.
    for x in (-1.5, 0.0, 3.0, 8.0):
        probability = np.exp(-np.exp(-x))
        deviation = (probability * (1 - probability) / gumbel.size) ** 0.5
        assert abs(np.mean(np.asarray(gumbel) <= x) - probability) < 4 * deviation
    assert abs(np.asarray(uniform, np.float64).mean() - 0.5) < 4 * (1 / 12 / uniform.size) ** 0.5
    alone = noise_of(keys[7:8], 512 * BLOCK)
    chex.assert_trees_all_equal(alone, (gumbel[7:8], uniform[7:8]))


@pytest.mark.parametrize("word, gumbel, uniform", [(0, 22.87, 0.0), (2**32 - 1, -2.81, ALMOST_ONE)])
def test_noise_is_finite_at_the_ends_of_its_random_words(monkeypatch, word, gumbel, uniform):
    """By hand: -log(-log1p(-2^-33)) = 33 log 2 and -log(24 log 2)."""
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, word, dtype))
    block_noise, word_noise = block_draw.noise(jax.random.split(jax.random.key(0), 1), BLOCK)
    assert float(block_noise[0, 0]) == pytest.approx(gumbel, abs=0.01)
    np.testing.assert_array_equal(word_noise, np.full((1, 2), uniform, np.float32))


def test_slices_of_the_words_merge_to_the_pick_over_all_of_them():
    num_words = 8 * BLOCK
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(64, num_words)), jnp.float32) * 2
    noise = noise_of(jax.random.split(jax.random.key(4), 64), num_words)

    def of_slice(logits_BV, block_noise, word_noise):
        picked = block_draw.pick(logits_BV, block_noise, word_noise)
        picked = picked._replace(ids=picked.ids + jax.lax.axis_index("words") * BLOCK)
        return block_draw.merge(picked, "words")

    by_words, everywhere = PartitionSpec(None, "words"), PartitionSpec()
    merged = jax.shard_map(
        of_slice,
        mesh=jax.make_mesh((8,), ("words",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(by_words, by_words, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    whole = jax.jit(block_draw.pick)(logits, *noise)
    sliced = jax.jit(merged)(logits, *noise)
    np.testing.assert_array_equal(sliced.ids, whole.ids)
    chex.assert_trees_all_close(sliced, whole, rtol=tolerances.F32, atol=tolerances.F32)
    assert len(set(np.asarray(whole.ids) // BLOCK)) == 8  # every slice won somewhere
