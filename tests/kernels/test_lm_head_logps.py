"""Log-probs by chunks of the vocabulary. Expected values by NumPy, in float64."""

from functools import cache, partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_grpo.errors import UserError
from gemma_grpo.kernels.lm_head_logps import cases, lm_head_logps, reference, xla

KEEP = pytest.mark.parametrize("keep_logits", [False, True], ids=["computed again", "kept"])
EACH_SIDE = (0,), (1,), (0, 1)
SIDES = pytest.mark.parametrize("sides", EACH_SIDE, ids=["hidden", "embedding", "both"])


def inputs(case, seed=0):
    """Hidden states, embedding, ids and a weight for each log-prob; logits of order 2."""
    rng = np.random.default_rng(seed)
    X, V, D = case.num_tokens, case.vocab_size, case.embed_dim
    hidden = rng.normal(size=(X, D)).astype(np.float32)
    embedding = (2 * rng.normal(size=(V, D)) / D**0.5).astype(np.float32)
    ids = rng.integers(0, V, X).astype(np.int32)
    ids[0] = V - 1
    return hidden, embedding, ids, rng.normal(size=X).astype(np.float32)


def op(hidden, embedding, ids, **settings):
    """The op, of NumPy's arrays."""
    return lm_head_logps(*map(jnp.asarray, (hidden, embedding, ids)), **settings)


def by_numpy(hidden, embedding, ids, weights, temperature):
    """Results, and gradients of sum(weights * logps): d logp / d logit = onehot - softmax."""
    hidden, embedding = hidden.astype(np.float64), embedding.astype(np.float64)
    logits = hidden @ embedding.T / temperature
    top = logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    logps = logits - logsumexp
    probs = np.exp(logps)
    scaled = (np.eye(len(embedding))[ids] - probs) * weights[:, None] / temperature
    return SimpleNamespace(
        logps=logps[np.arange(len(ids)), ids],
        logsumexp=logsumexp[:, 0],
        entropy=-np.sum(probs * logps, -1, where=probs > 0),
        gradients=(scaled @ embedding, scaled.T @ hidden),
    )


def weighted(form, ids, weights):
    """sum(weights * logps) as a function of hidden states and embedding."""
    return lambda hidden, embedding: jnp.sum(form(hidden, embedding, ids)[0] * weights)


def chunked(chunk_size, temperature=1.0, keep_logits=False):
    """The XLA form with chunks of this many tokens, of NumPy's arrays."""
    settings = xla.Settings(temperature, chunk_size, keep_logits)
    return lambda *arrays: xla.logps(settings, *map(jnp.asarray, arrays))


@cache
def program(chunk_size, temperature=1.0, keep_logits=False):
    """`chunked`, jitted once for all inputs: hidden states, embedding, ids, weights and the rows
    that are wanted -> results; gradients under a frozen embedding, of the hidden states, and under
    a trained one, of both."""
    settings = xla.Settings(temperature, chunk_size, keep_logits)

    @jax.jit
    def results_and_gradients(hidden, embedding, ids, weights, wanted=None):
        form = lambda *sides: xla.logps(settings, *sides, ids, wanted)
        loss = lambda *sides: jnp.sum(form(*sides)[0] * weights)
        frozen, trained = (jax.grad(loss, sides)(hidden, embedding) for sides in ((0,), (0, 1)))
        return form(hidden, embedding), (*frozen, *trained)

    return results_and_gradients


def assert_gradients(gradients, expected):
    """Those of a frozen and of a trained embedding."""
    chex.assert_trees_all_close(
        [np.float64(gradient) for gradient in gradients],
        [expected.gradients[0], *expected.gradients],
        atol=tolerances.LM_HEAD_GRAD,
    )


TEMPERATURES = (0.3, 1.0, 2.5)


@cache
def results_at_each_temperature(case):
    at = lambda *arrays: {t: op(*arrays, temperature=t) for t in TEMPERATURES}
    return jax.jit(at)(*inputs(case)[:3])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_results_are_numpys(case, temperature):
    results = results_at_each_temperature(case)[temperature]
    expected = by_numpy(*inputs(case), temperature)
    for name in ("logps", "logsumexp", "entropy"):
        value = getattr(results, name)
        chex.assert_shape(value, (case.num_tokens,))
        chex.assert_type(value, jnp.float32)
        chex.assert_trees_all_close(
            np.float64(value), getattr(expected, name), atol=tolerances.LM_HEAD_LOGPS
        )


@cache
def gradients_of_each_side(case, temperature):
    """And of both, with the logits computed again and kept, in one program."""
    hidden, embedding, ids, weights = inputs(case)

    @jax.jit
    def gradients(*arrays):
        loss = {
            keep: weighted(partial(op, temperature=temperature, keep_logits=keep), ids, weights)
            for keep in (False, True)
        }
        return {
            (keep, sides): jax.grad(loss[keep], sides)(*arrays)
            for keep in loss
            for sides in EACH_SIDE
        }

    return gradients(hidden, embedding)


@KEEP
@SIDES
@pytest.mark.parametrize("temperature", [0.5, 1.5])
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_gradients_are_numpys_for_each_side_alone_and_for_both(
    case, temperature, sides, keep_logits
):
    gradients = gradients_of_each_side(case, temperature)[keep_logits, sides]
    expected = by_numpy(*inputs(case), temperature).gradients
    for side, gradient in zip(sides, gradients, strict=True):
        chex.assert_trees_all_close(
            np.float64(gradient), expected[side], atol=tolerances.LM_HEAD_GRAD
        )


@KEEP
@pytest.mark.parametrize("chunk_size", [13, 100, 650, 1299, 4096])
def test_nothing_depends_on_where_the_chunks_end(chunk_size, keep_logits):
    hidden, embedding, ids, weights = inputs(cases.ONE_CHUNK)
    ids[1:5] = [0, 99, 100, 650]
    expected = by_numpy(hidden, embedding, ids, weights, 0.7)
    results, gradients = program(chunk_size, 0.7, keep_logits)(hidden, embedding, ids, weights)
    chex.assert_trees_all_close(
        jax.tree.map(np.float64, results),
        (expected.logps, expected.logsumexp, expected.entropy),
        atol=tolerances.LM_HEAD_LOGPS,
    )
    assert_gradients(gradients, expected)


def test_log_probs_alone_carry_a_gradient():
    hidden, embedding, ids, _ = inputs(cases.ONE_CHUNK)
    for sides in [(0,), (1,), (0, 1)]:
        loss = lambda *args: sum(x.sum() for x in op(*args, ids)[1:])
        assert not any(map(np.any, jax.grad(loss, sides)(hidden, embedding)))


def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_form():
    """Mean error against float32 of the same bfloat16 inputs, of values and of both gradients."""
    hidden, embedding, ids, weights = inputs(cases.Case("", 2600, 64, 32))
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, embedding)]

    def plain(hidden, embedding, ids):
        logits = jnp.einsum("xd,vd->xv", hidden, embedding, preferred_element_type=jnp.float32)
        return (jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)[:, 0],)

    def outcome(form, hidden, embedding, sides=(0, 1)):
        loss = weighted(form, ids, weights)
        program = lambda *arrays: (form(*arrays, ids)[0], *jax.grad(loss, sides)(*arrays))
        return [np.float64(x) for x in jax.jit(program)(hidden, embedding)]

    truth = by_numpy(*(np.float32(x) for x in narrow), ids, weights, 1.0)
    truth = [truth.logps, *truth.gradients]
    error = lambda values: [np.abs(x - y).mean() for x, y in zip(values, truth, strict=False)]
    allowed = [2 * e + tolerances.F32 for e in error(outcome(plain, *narrow))]
    trained = error(outcome(chunked(700), *narrow))
    frozen = error(outcome(chunked(700), *narrow, sides=(0,)))
    assert all(e <= most for e, most in zip(trained + frozen, allowed + allowed[:2], strict=True))


def test_an_id_outside_the_vocabulary_has_no_probability_and_no_row_of_its_own():
    hidden, embedding, ids, weights = inputs(cases.ONE_CHUNK)
    outside = ids.copy()
    outside[2], outside[4] = -1, cases.ONE_CHUNK.vocab_size
    for chunk_size in (500, 4096):
        run = partial(program(chunk_size), hidden, embedding)
        (logps, *others), gradients = run(outside, weights)
        (inside, *same), _ = run(ids, weights)
        wrong = outside != ids
        assert (logps[wrong] == -np.inf).all()
        chex.assert_trees_all_equal((logps[~wrong], others), (inside[~wrong], same))
        expected = by_numpy(hidden, embedding, ids, weights, 1.0).gradients[0]
        expected[wrong] -= embedding[ids[wrong]] * weights[wrong, None]
        for gradient in gradients[:2]:  # of the hidden states, frozen and trained
            chex.assert_trees_all_close(
                np.float64(gradient), expected, atol=tolerances.LM_HEAD_GRAD
            )


@pytest.mark.parametrize("first", [0, 600], ids=["first tokens", "later tokens"])
def test_a_logit_of_minus_infinity_is_a_token_of_probability_zero(first):
    """600 tokens' logits overflow, filling chunks or not: the others' distribution is left."""
    hidden, embedding, _, weights = inputs(cases.ONE_CHUNK)
    hidden[:, 0] = 2.0
    masked = embedding.copy()
    masked[first : first + 600, 0] = -3e38
    rest = np.r_[0:first, first + 600 : 1300]
    ids = rest[-7:]
    expected = by_numpy(hidden, embedding[rest], np.arange(693, 700), weights, 1.0)
    for chunk_size in (300, 4096):
        run = partial(program(chunk_size), hidden, masked)
        results, (*of_hidden, of_embedding) = run(ids, weights)
        chex.assert_trees_all_close(
            jax.tree.map(np.float64, results),
            (expected.logps, expected.logsumexp, expected.entropy),
            atol=tolerances.LM_HEAD_LOGPS,
        )
        assert_gradients((*of_hidden, of_embedding[rest]), expected)
        (chosen, *_), _ = run(np.full_like(ids, first), weights)
        assert (chosen == -np.inf).all()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_logit_of_plus_infinity_or_nan_spoils_its_own_row_only(value):
    hidden, embedding, ids, _ = inputs(cases.ONE_CHUNK)
    hidden[:, 0], embedding[:, 0] = 0.0, 1.0
    expected = chunked(400)(hidden, embedding, ids)
    hidden[3, 0] = value
    results = chunked(400)(hidden, embedding, ids)
    others = np.arange(7) != 3
    for spoilt, sound in zip(results, expected, strict=True):
        assert np.isnan(spoilt[3])
        chex.assert_trees_all_equal(spoilt[others], sound[others])


def test_one_reduction_of_all_four_sums_is_the_plain_reduction():
    """The TPU's form, run where the other one is the default."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 300)).astype(np.float32) * 9
    logits[1, 40:90] = -np.inf
    logits[2] = -np.inf
    logits[3, 7] = np.nan
    ids = jnp.asarray([0, 45, 3, 2, 300])
    at_once = xla._reduce_at_once(jnp.asarray(logits), ids)
    plainly, _ = xla._reduce_plainly(jnp.asarray(logits), ids)
    chex.assert_trees_all_close(at_once, plainly, rtol=tolerances.SUM_OF_300)


def test_the_reference_is_numpys():
    hidden, embedding, ids, weights = inputs(cases.ONE_CHUNK)
    expected = by_numpy(hidden, embedding, ids, weights, 0.7)
    arrays = map(jnp.asarray, (hidden, embedding, ids))
    results = reference.lm_head_logps(*arrays, temperature=0.7)
    chex.assert_trees_all_close(
        jax.tree.map(np.float64, results),
        (expected.logps, expected.logsumexp, expected.entropy),
        atol=tolerances.LM_HEAD_LOGPS,
    )


@KEEP
@pytest.mark.parametrize("num, rows", [(0, 224), (224, 224), (225, 256), (288, 288), (289, 300)])
def test_of_rows_that_nobody_wants_hardly_any_are_computed(num, rows, keep_logits):
    """The others, as many as fill the least size that holds the wanted ones (224, 256, 288 or all
    300 rows): all but those stay 0."""
    hidden, embedding, ids, weights = inputs(cases.Case("many rows", 1300, 16, 300))
    wanted = np.random.default_rng(1).permutation(300) < num
    weights = weights * wanted
    expected = by_numpy(hidden, embedding, ids, weights, 0.7)
    run = program(400, 0.7, keep_logits)
    results, gradients = run(hidden, embedding, ids, weights, wanted)
    for value, its in zip(results, vars(expected).values(), strict=False):
        computed = np.asarray(value != 0)
        assert computed.sum() == rows and computed[wanted].all()
        chex.assert_trees_all_close(
            np.float64(value[computed]), its[computed], atol=tolerances.LM_HEAD_LOGPS
        )
    assert_gradients(gradients, expected)


@pytest.mark.parametrize(
    "sides, keep_logits, matmuls",
    [
        ((), False, 1),
        ((), True, 1),
        ((0,), False, 2),
        ((0,), True, 2),
        ((0, 1), False, 4),
        ((0, 1), True, 3),
    ],
)
def test_no_more_matmuls_are_made_than_the_gradient_needs(sides, keep_logits, matmuls):
    hidden, embedding, ids, weights = inputs(cases.ONE_CHUNK)
    loss = weighted(chunked(650, keep_logits=keep_logits), ids, weights)
    program = jax.grad(loss, sides) if sides else loss
    assert str(jax.make_jaxpr(program)(hidden, embedding)).count("dot_general[") == matmuls


@pytest.mark.parametrize("sides", [(0,), (0, 1)], ids=["frozen", "trained"])
def test_memory_is_less_than_a_third_of_what_all_logits_take(sides):
    X, V, D = 256, 65_536, 64
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [((X, D), jnp.float32), ((V, D), jnp.float32), ((X,), jnp.int32)]
    ]

    def peak(form):
        program = lambda hidden, embedding, ids: jax.grad(weighted(form, ids, 1.0), sides)(
            hidden, embedding
        )
        return jax.jit(program).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert peak(lm_head_logps) < peak(reference.lm_head_logps) / 3


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
    ],
)
def test_a_senseless_setting_is_refused_by_name(settings, named):
    hidden, embedding, ids, _ = inputs(cases.ONE_TOKEN)
    with pytest.raises(UserError, match=named):
        op(hidden, embedding, ids, **settings)


@pytest.fixture
def two_shares(monkeypatch):
    """Two sizes of the head, which show what four do in half the compilation."""
    monkeypatch.setattr(xla, "SHARES", (13 / 16, 1))


@pytest.mark.usefixtures("two_shares")
@pytest.mark.parametrize(
    "num_chips, embedding_spec, sides, is_some, keep_logits",
    [
        (1, PartitionSpec(), (0,), False, True),  # of a frozen embedding none are kept
        (1, PartitionSpec(), (0, 1), False, False),
        (1, PartitionSpec(), (0, 1), False, True),
        (1, PartitionSpec(), (0, 1), True, False),
        pytest.param(8, PartitionSpec(None, "data"), (0, 1), False, False, marks=pytest.mark.slow),
    ],
    ids=["frozen", "trained", "kept", "some rows wanted", "FSDP over eight chips"],
)
def test_compiled_for_a_v5e_the_update_takes_at_most_120_mb_beyond_the_logits_that_it_keeps(
    v5e, num_chips, embedding_spec, sides, is_some, keep_logits
):
    """3200 tokens of Gemma 3 1B on each chip, bfloat16; the plain form takes 3.2 GB."""
    mesh, case = Mesh(np.array(v5e[:num_chips]), ("data",)), cases.GEMMA3_1B
    V, D, X = case.vocab_size, case.embed_dim, case.num_tokens * num_chips
    tokens = NamedSharding(mesh, PartitionSpec("data"))
    embedding_sharding = NamedSharding(mesh, embedding_spec)
    shape = jax.ShapeDtypeStruct

    def update(hidden, embedding, ids, weights):
        wanted = (weights != 0) if is_some else None
        form = partial(lm_head_logps, wanted_X=wanted, keep_logits=keep_logits)
        return jax.grad(weighted(form, ids, weights), sides)(hidden, embedding)

    compiled = (
        jax.jit(update, out_shardings=(tokens, embedding_sharding)[: len(sides)])
        .lower(
            shape((X, D), jnp.bfloat16, sharding=tokens),
            shape((V, D), jnp.bfloat16, sharding=embedding_sharding),
            shape((X,), jnp.int32, sharding=tokens),
            shape((X,), jnp.float32, sharding=tokens),
        )
        .compile()
    )
    kept = 4 * case.num_tokens * V if keep_logits and 1 in sides else 0
    assert kept <= compiled.memory_analysis().temp_size_in_bytes <= kept + 120e6
