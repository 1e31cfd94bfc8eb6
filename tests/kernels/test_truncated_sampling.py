"""Truncated sampling. Expected values by NumPy in float64, or by hand."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from compiling import OPTIMIZED
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_grpo.errors import UserError
from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.fused_sampling.cases import GEMMA3_1B, GEMMA3_1B_MULTIMODAL
from gemma_grpo.kernels.truncated_sampling import (
    TruncatedDraw,
    cases,
    pallas_tpu,
    reference,
    truncated_sampling,
    xla,
)
from gemma_grpo.kernels.truncated_sampling.search import Truncation

RNG = np.random.default_rng(0)
TRUNCATIONS = {
    "nothing": Truncation(),
    "k >= V": Truncation(top_k=10**6),
    "k = 1": Truncation(top_k=1),
    "p -> 0": Truncation(top_p=1e-12),
    "p -> 1": Truncation(top_p=0.9999),
    "min_p = 1": Truncation(min_p=1.0),
    "k and min_p": Truncation(top_k=20, min_p=0.3),
    "p and min_p": Truncation(top_p=0.5, min_p=0.3),
    **cases.TRUNCATIONS,
}


def kept_by_sorting(logits: np.ndarray, truncation: Truncation) -> np.ndarray:
    """One row's kept tokens, in float64."""
    logits = logits.astype(np.float64)
    kept = np.ones(len(logits), bool)
    if 0 < truncation.top_k < len(logits):
        kept &= logits >= np.sort(logits)[-truncation.top_k]
    if truncation.top_p < 1:
        order = np.argsort(-logits)
        order = order[kept[order]]
        probs = np.exp(logits[order] - logits.max())
        probs /= probs.sum()
        kept &= logits >= logits[order[np.cumsum(probs) - probs < truncation.top_p]].min()
    if truncation.min_p > 0:
        kept &= logits >= logits.max() + np.log(truncation.min_p)
    return kept


def expect_kept(kept: np.ndarray, logits: np.ndarray, truncation: Truncation) -> None:
    """Row by row a sort's, with top_p as it is or off by what float32 sums are. A token at
    -inf has no mass to keep."""
    for of_row, row in zip(kept, logits, strict=True):
        allowed = [
            kept_by_sorting(row, truncation._replace(top_p=truncation.top_p * (1 + off)))
            for off in (0, -tolerances.KEPT_MASS, tolerances.KEPT_MASS)
        ]
        assert any(not ((of_row ^ of_sort) & np.isfinite(row)).any() for of_sort in allowed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def kept_by_search(logits: np.ndarray, truncation: Truncation) -> np.ndarray:
    kept, _ = jax.jit(partial(xla.truncate, truncation=truncation))(jnp.asarray(logits))
    return np.isfinite(np.asarray(kept))


def expect(drawn: TruncatedDraw, logits: np.ndarray, truncation: Truncation) -> None:
    """Ids are of kept tokens, and what is said of them is NumPy's. Logits are tempered, float64."""
    for row, id_ in enumerate(np.asarray(drawn.ids)):
        kept = kept_by_sorting(logits[row].astype(np.float32), truncation)
        assert kept[id_]
        full = log_softmax(logits[row])
        mass = np.exp(full[kept]).sum()
        said = tuple(np.asarray(values[row]) for values in drawn[1:])
        true = full[id_] - np.log(mass), full[id_], mass
        chex.assert_trees_all_close(said, true, atol=tolerances.SAMPLED_LOGP, rtol=0)


def operands(B, V, D, dtype=jnp.float32):
    hidden = jnp.asarray(RNG.normal(size=(B, D)), dtype)
    embedding = jnp.asarray(RNG.normal(size=(V, D)) * 3 / np.sqrt(D), dtype)
    keys = jax.random.split(jax.random.key(B), B)
    logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
    return hidden, embedding, keys, logits


@partial(jax.jit, static_argnames=("temperature", "truncation"))
def in_interpret_mode(hidden, embedding, keys, *, temperature, truncation) -> TruncatedDraw:
    """The kernel as `truncated_sampling` calls it on a TPU."""
    noise = block_draw.noise(keys, len(embedding))
    draw = partial(pallas_tpu.draw_truncated, temperature=temperature, interpret=True)
    ids, logits, kept, every = draw(hidden, embedding, noise, truncation)
    return TruncatedDraw(ids, logits - kept, logits - every, jnp.exp(kept - every))


# What is kept


@pytest.mark.parametrize(
    "name, shape", [*((name, (9, 1300)) for name in TRUNCATIONS), ("top-k, top-p", (4, 3))], ids=str
)
def test_the_kept_set_is_that_of_a_sort(name, shape):
    """In half of the rows tokens tie, and a third of them is at -inf."""
    truncation = TRUNCATIONS[name]
    logits = (RNG.normal(size=shape) * 3).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    logits[::2, 1::3] = -np.inf
    expect_kept(kept_by_search(logits, truncation), logits, truncation)
    by_reference = np.asarray(reference.truncate(jnp.asarray(logits), truncation))
    least = np.where(np.isfinite(by_reference), by_reference, np.inf).min(axis=-1, keepdims=True)
    expect_kept(logits >= least, logits, truncation)


def test_top_k_keeps_what_ties_with_the_kth_and_tells_neighbouring_floats_apart():
    after_two = np.nextafter(np.float32(2), np.float32(3))
    before_two = np.nextafter(np.float32(2), np.float32(1))
    logits = np.array([[1, 3, 2, 2, before_two], [1, 3, 2, after_two, before_two]], np.float32)
    kept = kept_by_search(logits, Truncation(top_k=2))
    np.testing.assert_array_equal(kept, [[False, True, True, True, False], [0, 1, 0, 1, 0]])


def test_zeros_of_both_signs_tie():
    kept = kept_by_search(np.array([[-1.0, 0.0, -0.0, -2.0]], np.float32), Truncation(top_k=1))
    np.testing.assert_array_equal(kept, [[False, True, True, False]])


def test_top_p_keeps_the_token_that_crosses_it_with_its_ties_and_none_after_reaching_it():
    logits = np.log(np.array([[8, 4, 2, 2, 1]], np.float32))
    for top_p, kept_count in [(0.4, 1), (0.75, 4), (0.95, 5)]:
        kept = kept_by_search(logits, Truncation(top_p=top_p))
        np.testing.assert_array_equal(kept, [np.arange(5) < kept_count])


@pytest.mark.parametrize("largest, kept_count", [(0.9499, 1000), (0.9501, 1)])
def test_the_tokens_that_share_what_the_largest_leaves_are_kept_if_it_just_misses_p(
    largest, kept_count
):
    logits = np.full((1, 1000), np.log((1 - largest) / 999), np.float32)
    logits[0, 0] = np.log(largest)
    kept = kept_by_search(logits, Truncation(top_p=0.95))
    np.testing.assert_array_equal(kept, [np.arange(1000) < kept_count])


def test_top_p_is_of_what_top_k_leaves_and_min_p_comes_last():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    # Of 0.5 and 0.3 the first has 0.625; of all, 0.5.
    kept = kept_by_search(logits, Truncation(top_k=2, top_p=0.6))
    np.testing.assert_array_equal(kept, [[True, False, False, False]])
    # Were min-p first, 0.5 of 0.8 would reach 0.6.
    kept = kept_by_search(logits, Truncation(top_p=0.6, min_p=0.55))
    np.testing.assert_array_equal(kept, [[True, True, False, False]])


def test_min_p_is_relative_to_the_largest_probability():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    for min_p, kept_count in [(0.05, 4), (0.5, 2), (0.7, 1)]:
        kept = kept_by_search(logits, Truncation(min_p=min_p))
        np.testing.assert_array_equal(kept, [np.arange(4) < kept_count])


# What is drawn


@pytest.mark.parametrize(
    "name, temperature, dtype",
    [
        ("nothing", 0.6, jnp.float32),
        ("top-k", 1.0, jnp.bfloat16),
        ("top-p", 1.7, jnp.float32),
        ("all", 0.6, jnp.bfloat16),
    ],
    ids=str,
)
def test_what_is_said_of_a_draw_is_true(name, temperature, dtype):
    truncation = TRUNCATIONS[name]
    hidden, embedding, keys, logits = operands(5, 1300, 32, dtype)
    draw = partial(truncated_sampling, temperature=temperature, **truncation._asdict())
    drawn = jax.jit(draw)(hidden, embedding, keys)
    chex.assert_shape(tuple(drawn), (5,))
    chex.assert_type(tuple(drawn), [jnp.int32, *[jnp.float32] * 3])
    expect(drawn, logits / temperature, truncation)


def test_where_nothing_is_cut_off_tokens_are_those_of_fused_sampling():
    hidden, embedding, keys, _ = operands(64, 1300, 16)
    truncated, fused = (
        jax.jit(partial(draw, temperature=0.7))(hidden, embedding, keys)
        for draw in (truncated_sampling, fused_sampling)
    )
    np.testing.assert_array_equal(truncated.ids, fused.ids)
    chex.assert_trees_all_close(truncated.logps, fused.logps, atol=tolerances.SAMPLED_LOGP, rtol=0)
    np.testing.assert_allclose(truncated.kept_mass, 1, atol=tolerances.SAMPLED_LOGP)


def test_a_draw_depends_on_its_own_row_alone():
    hidden, embedding, keys, _ = operands(6, 1300, 16)
    draw = jax.jit(partial(truncated_sampling, temperature=0.7, top_k=40, top_p=0.9))
    every, some = draw(hidden, embedding, keys), draw(hidden[2:4], embedding, keys[2:4])
    np.testing.assert_array_equal(every.ids[2:4], some.ids)


def chi_square(ids: np.ndarray, probs: np.ndarray) -> tuple[float, float]:
    """The statistic over cells of 100 expected draws and more and one for the rest, and the 0.1 %
    point of its distribution (Wilson and Hilferty's, rounded up)."""
    counts, expected = np.bincount(ids, minlength=len(probs)), len(ids) * probs
    assert not counts[probs == 0].any()
    big = expected >= 100
    observed, wanted = counts[big], expected[big]
    if probs[~big].sum() > 0:
        observed = np.append(observed, counts[~big].sum())
        wanted = np.append(wanted, expected[~big].sum())
    cells = len(wanted) - 1
    return ((observed - wanted) ** 2 / wanted).sum(), cells + 3.09 * np.sqrt(2 * cells) + 5


def test_a_million_draws_follow_the_truncated_distribution_and_a_bias_would_show():
    """700 tokens in two blocks. The bias is a temperature off by 2 %."""
    truncation = Truncation(top_k=60, top_p=0.9, min_p=0.01)
    tempered = (np.random.default_rng(3).normal(size=700) * 2).astype(np.float32)
    kept = kept_by_sorting(tempered, truncation)

    def probs(temperature):
        masses = np.where(kept, np.exp(tempered.astype(np.float64) / temperature), 0)
        return masses / masses.sum()

    @partial(jax.jit, compiler_options=OPTIMIZED)
    @jax.vmap  # over keys alone, so that the threshold is searched for once
    def draw(key):
        noise = block_draw.noise(key[None], 700)
        return xla.draw_truncated(jnp.asarray(tempered)[None], noise, truncation)[0][0]

    chunks = jax.random.split(jax.random.key(5), (500, 2048))
    drawn = np.concatenate([np.asarray(draw(keys)) for keys in chunks])
    statistic, limit = chi_square(drawn, probs(1.0))
    assert statistic < limit
    statistic, limit = chi_square(drawn, probs(1.02))
    assert statistic > limit


def test_a_token_at_minus_infinity_is_never_drawn():
    logits = np.full((256, 700), -np.inf, np.float32)
    logits[:, [3, 600]] = 0
    noise = block_draw.noise(jax.random.split(jax.random.key(0), 256), 700)
    draw = jax.jit(partial(xla.draw_truncated, truncation=Truncation(top_k=5, top_p=0.99)))
    assert set(np.asarray(draw(jnp.asarray(logits), noise)[0])) == {3, 600}


@pytest.mark.parametrize("name", ["nothing", "top-k, top-p", "all"])
def test_a_row_that_is_no_distribution_says_nan_and_leaves_the_others_alone(name):
    truncation = TRUNCATIONS[name]
    hidden, embedding, keys, _ = operands(4, 1300, 16)
    draw = jax.jit(partial(truncated_sampling, temperature=1.0, **truncation._asdict()))
    sound = draw(hidden, embedding, keys)
    broken = draw(hidden.at[1, 2].set(jnp.nan).at[2, 2].set(jnp.inf), embedding, keys)
    assert (np.asarray(broken.ids) >= 0).all() and (np.asarray(broken.ids) < 1300).all()
    for was, now in zip(sound, broken, strict=True):
        np.testing.assert_array_equal(now[np.array([0, 3])], was[np.array([0, 3])])
    for said in broken[1:]:
        assert np.isnan(said[1:3]).all()


# The TPU's kernel, in interpret mode


@pytest.mark.parametrize(
    "shape, dtype, name, temperature",
    [
        ((3, 70_000, 8), jnp.bfloat16, "top-k, top-p", 0.7),
        ((9, 1300, 16), jnp.float32, "all", 1.3),
    ],
    ids=str,
)
def test_the_kernel_draws_the_reference_tokens_and_says_the_truth(shape, dtype, name, temperature):
    truncation = TRUNCATIONS[name]
    hidden, embedding, keys, logits = operands(*shape, dtype)
    drawn = in_interpret_mode(
        hidden, embedding, keys, temperature=temperature, truncation=truncation
    )
    tempered = jnp.asarray(logits / temperature, jnp.float32)
    by_reference = jax.jit(
        lambda logits, keys: reference.draw_truncated(
            logits, block_draw.noise(keys, shape[1]), truncation
        )
    )
    ids, *_ = by_reference(tempered, keys)
    np.testing.assert_array_equal(drawn.ids, ids)
    expect(drawn, logits / temperature, truncation)


@pytest.mark.parametrize("truncation", [Truncation(top_k=10), Truncation(top_p=0.8)], ids=str)
def test_the_kernel_is_exact_where_the_largest_tokens_share_a_place_in_their_blocks(truncation):
    """Twelve large logits at place 7, of which the candidates hold eight, and four at other places
    that are smaller than two of those left out. The other row is ordinary."""
    V = 12 * block_draw.BLOCK
    logits = RNG.normal(size=(2, V))
    logits[0, 7 :: block_draw.BLOCK] = np.linspace(5, 7, 12)
    logits[0, 100:104] = 5.2
    embedding = jnp.asarray(logits.T, jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    drawn = in_interpret_mode(jnp.eye(2), embedding, keys, temperature=1.0, truncation=truncation)
    expect(drawn, np.asarray(embedding, np.float64).T, truncation)


# A sharded vocabulary, settings, and the compiler


@pytest.mark.parametrize("name", ["nothing", "top-k, top-p", "all"])
def test_eight_devices_with_their_shards_draw_what_one_draws(name):
    truncation = TRUNCATIONS[name]
    hidden, embedding, keys, _ = operands(5, 8 * block_draw.BLOCK, 16)
    draw = partial(truncated_sampling, temperature=0.8, **truncation._asdict())
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        partial(draw, axis_name="vocab"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("vocab"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    expected, drawn = (jax.jit(f)(hidden, embedding, keys) for f in (draw, sharded))
    np.testing.assert_array_equal(drawn.ids, expected.ids)
    chex.assert_trees_all_close(
        tuple(drawn[1:]), tuple(expected[1:]), atol=tolerances.SAMPLED_LOGP, rtol=0
    )


def test_shards_that_are_not_a_multiple_of_a_block_are_refused():
    hidden, embedding, keys, _ = operands(2, 8 * 64, 16)
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        partial(truncated_sampling, temperature=1.0, axis_name="vocab"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("vocab"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    with pytest.raises(UserError, match="512 tokens in 8 shards"):
        sharded(hidden, embedding, keys)


@pytest.mark.parametrize(
    "setting, named",
    [
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(min_p=-0.1), "min_p"),
        (dict(min_p=1.1), "min_p"),
        (dict(min_p=float("nan")), "min_p"),
        (dict(implementation="triton"), "implementation"),
        (dict(implementation="pallas"), "needs a TPU"),
    ],
    ids=str,
)
def test_a_senseless_setting_is_refused_by_name(setting, named):
    hidden, embedding, keys, _ = operands(1, 16, 16)
    with pytest.raises(UserError, match=named):
        truncated_sampling(hidden, embedding, keys, **{"temperature": 1.0, **setting})


def test_rows_that_do_not_fit_in_vmem_are_refused_to_the_kernel_and_drawn_without(monkeypatch):
    shape = jax.ShapeDtypeStruct
    arguments = shape((512, 64), jnp.bfloat16), shape((262_144, 64), jnp.bfloat16)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 512))
    draw = partial(truncated_sampling, temperature=1.0)
    with pytest.raises(UserError, match="512 rows"):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        jax.eval_shape(partial(draw, implementation="pallas"), *arguments, keys)
    chex.assert_shape(jax.eval_shape(draw, *arguments, keys).ids, (512,))


@pytest.mark.parametrize(
    "case, rows, dtype",
    [
        *((GEMMA3_1B, rows, jnp.bfloat16) for rows in GEMMA3_1B.rows),
        (GEMMA3_1B_MULTIMODAL, 64, jnp.bfloat16),
        (GEMMA3_1B, 64, jnp.float32),
    ],
    ids=str,
)
def test_the_kernel_compiles_for_a_v5e_and_leaves_no_logits_in_its_memory(v5e, case, rows, dtype):
    V, D = case.vocab_size, case.embed_dim
    assert pallas_tpu.vmem_bytes(rows, V, D, jnp.dtype(dtype)) <= pallas_tpu.vmem_limit()
    draw = partial(truncated_sampling, temperature=1.0, top_k=50, top_p=0.95)
    on_chip = NamedSharding(Mesh(np.array(v5e[:1]), ("chip",)), PartitionSpec())
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on_chip)
    compiled = (
        jax.jit(lambda h, e, raw_keys: draw(h, e, jax.random.wrap_key_data(raw_keys)))
        .lower(
            place((rows, D), dtype),
            place((V, D), dtype),
            place((rows, 2), jnp.uint32),
        )
        .compile()
    )
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * V * 4 / 100
