"""Drawing a token block by block. Expected values by NumPy in float64 and by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from compiling import OPTIMIZED
from jax.sharding import PartitionSpec

from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.block_draw import BLOCK

V = 2 * BLOCK + 77  # three blocks, the last short
noise_of = jax.jit(block_draw.noise, static_argnums=1)
draw = jax.jit(block_draw.draw)
ALMOST_ONE = 1 - 2.0**-23  # the largest uniform noise


def numpy_logsumexp(x):
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def numpy_draw(logits_BV, noise):
    """The docstring's two lines in float64; a block's token by its groups, as documented."""
    ids = []
    for row, gumbel, (first, second) in zip(logits_BV, *map(np.asarray, noise), strict=True):
        ends = range(BLOCK, len(row) + BLOCK, BLOCK)
        blocks = [row[end - BLOCK : end].astype(np.float64) for end in ends]
        block = np.argmax([numpy_logsumexp(b) + g for b, g in zip(blocks, gumbel, strict=True)])
        masses = np.exp(blocks[block] - blocks[block].max())
        starts = np.arange(0, len(masses), block_draw.GROUP)
        group_masses = np.add.reduceat(masses, starts)
        group = np.argmax(np.cumsum(group_masses) > first * group_masses.sum())
        inside = masses[starts[group] : starts[group] + block_draw.GROUP]
        token = np.argmax(np.cumsum(inside) > second * inside.sum())
        ids.append(block * BLOCK + starts[group] + token)
    return np.array(ids)


def chi_square_is_likely(counts, probs):
    """Pearson's statistic under chi-square's 0.1 % point (Wilson and Hilferty, 1931), over the
    cells of 100 expected draws and more, and one for the rest."""
    expected = counts.sum() * probs
    cell_of_token = np.where(expected >= 100, np.arange(len(probs)), len(probs))
    observed, expected = np.bincount(cell_of_token, counts), np.bincount(cell_of_token, expected)
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    variance = 2 / (9 * freedom)
    return statistic < freedom * (1 - variance + 3.09 * np.sqrt(variance)) ** 3


def count_draws(logits_V, *, gumbel_scale=1.0, uniform_scale=1.0):
    """How often each token comes in 2^20 draws. The scales inject a bias."""

    def of_key(key):
        gumbel, uniform = block_draw.noise(key[None], len(logits_V))
        noise = block_draw.Noise(gumbel_scale * gumbel, uniform_scale * uniform)
        return block_draw.draw(logits_V[None], noise)

    draw_all = jax.jit(jax.vmap(of_key), compiler_options=OPTIMIZED)
    ids, _ = draw_all(jax.random.split(jax.random.key(3), 2**20))
    return np.bincount(np.asarray(ids)[:, 0], minlength=len(logits_V))


def some_logits(block):
    """Three blocks, the last short: some tokens likely, some rare, a fifth impossible, and the
    blocks' edges likely."""
    rng = np.random.default_rng(1)
    vocab_size = 2 * block + block // 7
    logits = rng.normal(size=vocab_size).astype(np.float32) * 2
    logits[rng.choice(vocab_size, vocab_size // 5, replace=False)] = -np.inf
    logits[[0, block - 1, block, 2 * block - 1, 2 * block, vocab_size - 1]] = 2.0
    return logits


@pytest.fixture
def small_blocks(monkeypatch):
    """An eighth of the tokens a block, so that a million draws take seconds."""
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


@pytest.mark.parametrize("bias", [dict(gumbel_scale=0.95), dict(uniform_scale=0.99)])
def test_the_chi_square_catches_an_injected_bias(small_blocks, bias):
    logits = some_logits(small_blocks)
    exact = logits.astype(np.float64)
    probs = np.exp(exact - numpy_logsumexp(exact))
    assert not chi_square_is_likely(count_draws(jnp.asarray(logits), **bias), probs)


@pytest.mark.parametrize("vocab_size", [1, BLOCK, BLOCK + 1, V])
def test_token_and_logsumexp_are_those_of_float64(vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(size=(40, vocab_size)).astype(np.float32) * 3
    noise = noise_of(jax.random.split(jax.random.key(vocab_size), 40), vocab_size)
    ids, logsumexps = draw(jnp.asarray(logits), noise)
    np.testing.assert_array_equal(ids, numpy_draw(logits, noise))
    expected = numpy_logsumexp(logits.astype(np.float64)).astype(np.float32)
    chex.assert_trees_all_close(logsumexps, expected, rtol=tolerances.F32, atol=tolerances.F32)


@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
def test_the_only_possible_token_is_drawn_whatever_the_noise(uniform):
    """A row for each edge of a block; every sum is of one mass and zeros."""
    tokens = np.array([0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, V - 1])
    rows = np.arange(len(tokens))
    logits = jnp.full((len(tokens), V), -jnp.inf).at[rows, tokens].set(-7.0)
    gumbel = jnp.full((len(tokens), 3), 20.0).at[rows, tokens // BLOCK].set(-3.0)
    noise = block_draw.Noise(gumbel, jnp.full((len(tokens), 2), uniform))
    ids, logsumexps = draw(logits, noise)
    np.testing.assert_array_equal(ids, tokens)
    np.testing.assert_array_equal(logsumexps, -7.0)


def test_the_ends_of_the_uniform_numbers_give_the_ends_of_a_block():
    logits = jnp.zeros((1, BLOCK)).at[0, :3].set(-jnp.inf).at[0, -2:].set(-jnp.inf)
    ends = [
        int(draw(logits, block_draw.Noise(jnp.zeros((1, 1)), jnp.full((1, 2), uniform)))[0][0])
        for uniform in (0.0, ALMOST_ONE)
    ]
    assert ends == [3, BLOCK - 3]


def test_logits_far_below_zero_are_drawn_as_near_it():
    logits = some_logits(BLOCK)[None]
    noise = noise_of(jax.random.split(jax.random.key(5), 1), logits.shape[1])
    ids, logsumexps = draw(jnp.asarray(logits), noise)
    shifted_ids, shifted = draw(jnp.asarray(logits) - 4096.0, noise)
    np.testing.assert_array_equal(ids, shifted_ids)
    chex.assert_trees_all_close(shifted + 4096.0, logsumexps, rtol=4096.0 * tolerances.F32)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("vocab_size", [300, V])
def test_nan_and_infinity_leave_no_finite_log_prob_and_a_token_of_the_vocabulary(
    poison, vocab_size
):
    logits = jnp.zeros((1, vocab_size)).at[0, -1].set(poison)
    noise = noise_of(jax.random.split(jax.random.key(0), 1), vocab_size)
    picked = block_draw.pick(logits, noise)
    assert 0 <= int(picked.ids[0]) < vocab_size
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
    chex.assert_trees_all_equal(tuple(alone), (gumbel[7:8], uniform[7:8]))


@pytest.mark.parametrize("bits, gumbel, uniform", [(0, 22.87, 0.0), (2**32 - 1, -2.81, ALMOST_ONE)])
def test_noise_is_finite_at_the_ends_of_its_random_bits(monkeypatch, bits, gumbel, uniform):
    """By hand: -log(-log1p(-2^-33)) = 33 log 2 and -log(24 log 2)."""
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, bits, dtype))
    noise = block_draw.noise(jax.random.split(jax.random.key(0), 1), BLOCK)
    assert float(noise.gumbel[0, 0]) == pytest.approx(gumbel, abs=0.01)
    np.testing.assert_array_equal(noise.uniform, np.full((1, 2), uniform, np.float32))


def test_shards_of_the_vocabulary_merge_to_the_pick_over_all_of_it():
    vocab_size = 8 * BLOCK
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(64, vocab_size)), jnp.float32) * 2
    noise = noise_of(jax.random.split(jax.random.key(4), 64), vocab_size)

    def of_shard(logits_BV, noise):
        picked = block_draw.pick(logits_BV, noise)
        picked = picked._replace(ids=picked.ids + jax.lax.axis_index("vocab") * BLOCK)
        return block_draw.merge(picked, "vocab")

    sharded, replicated = PartitionSpec(None, "vocab"), PartitionSpec()
    merged = jax.shard_map(
        of_shard,
        mesh=jax.make_mesh((8,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(sharded, block_draw.Noise(sharded, replicated)),
        out_specs=replicated,
        check_vma=False,
    )
    full = jax.jit(block_draw.pick)(logits, noise)
    found = jax.jit(merged)(logits, noise)
    np.testing.assert_array_equal(found.ids, full.ids)
    chex.assert_trees_all_close(found, full, rtol=tolerances.F32, atol=tolerances.F32)
    assert len(set(np.asarray(full.ids) // BLOCK)) == 8  # every shard won somewhere
