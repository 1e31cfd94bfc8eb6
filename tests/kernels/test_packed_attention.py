"""Attention within a packed row. Expected values by NumPy, a dense mask in float64."""

import re
from functools import cache, partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from stubs import TINY, tiny_model, tiny_prompts

from gemma_grpo import model as gemma3
from gemma_grpo.errors import UserError
from gemma_grpo.kernels import packed_attention as op
from gemma_grpo.kernels.packed_attention import block_masks, cases, pallas_tpu, reference
from gemma_grpo.model import Gemma3Config, Packed, Rows, attention, groups

SCALE = 0.3
SIDES = ("q", "k", "v")


def row_of(*groups, empty=0, padded_to=None):
    """A row of groups, each a prompt's length and its completions' lengths, prompt first; and
    places that hold no token behind them, or behind each segment up to `padded_to` places."""
    tokens = []  # of each place: None, or group, segment (0 for the prompt), index in the segment
    for number, (prompt, *completions) in enumerate(groups):
        for segment, length in enumerate((prompt, *completions)):
            tokens += [(number, segment, index) for index in range(length)]
            tokens += [None] * (max(padded_to - length, 0) if padded_to else 0)
    return SimpleNamespace(tokens=tokens + [None] * empty, prompts=[group[0] for group in groups])


ROWS = {
    "many groups, empty places": row_of((6, 3, 7), (1, 1, 10), (4, 5, 6), empty=5),
    "an empty prompt, and a block of empty places": row_of((0, 4), (3, 4), empty=12),
    "padded segments": row_of((4, 3, 0), (2, 8, 2), padded_to=8),
}
ONE_GROUP = row_of((6, 5, 9, 1))
WINDOWS = [3, 9, None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_masks, "QUERIES", 8)
    monkeypatch.setattr(block_masks, "KEYS", 4)


def inputs(row, *, N=4, K=2, H=8, dtype=jnp.float32, seed=0):
    """q, k, v and the cotangent."""
    rng = np.random.default_rng(seed)
    X = len(row.tokens)
    shapes = [(X, N, H), (X, K, H), (X, K, H), (X, N, H)]
    *operands, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return operands, weights


def segments_of(row):
    """Place by place, from what the fields are said to hold."""
    first = {}
    for place, token in enumerate(row.tokens):
        if token is not None:
            first.setdefault(token[:2], place)
    fields = []
    for token in row.tokens:
        if token is None:
            fields.append((False, 0, 0, 0, 0))
            continue
        group, segment, index = token
        prompt = row.prompts[group]
        start = first.get((group, 0), 0)
        before = (start, start + prompt) if segment else (0, 0)
        fields.append((True, index + (prompt if segment else 0), first[group, segment], *before))
    return op.Segments(*map(jnp.asarray, zip(*fields, strict=True)))


@partial(jax.jit, static_argnums=1)
def make_block_mask(segments, window):
    return op.make_block_mask(segments, window=window)


def block_mask_of(row, window):
    return make_block_mask(segments_of(row), window)


def mask_of(row, window):
    """[X, X], pair by pair: the tokens of one's prompt and one's own before, less than `window`
    away."""
    X = len(row.tokens)
    seen = np.zeros((X, X), bool)
    for x, query in enumerate(row.tokens):
        for y, key in enumerate(row.tokens):
            if query is None or key is None or query[0] != key[0] or key[1] not in (0, query[1]):
                continue
            position = lambda token: token[2] + (row.prompts[token[0]] if token[1] else 0)
            seen[x, y] = 0 <= position(query) - position(key) < (window or np.inf)
    return seen


def by_numpy(row, window, operands, weights):
    """The result, and the gradients of sum(weights * result): those of a softmax."""
    q, keys, values = (np.asarray(x, np.float64) for x in operands)
    weights = np.asarray(weights, np.float64)
    (_, N, _), K = q.shape, keys.shape[1]
    seen = mask_of(row, window)
    mixed, dq = np.zeros_like(q), np.zeros_like(q)
    dkeys, dvalues = np.zeros_like(keys), np.zeros_like(values)
    for n in range(N):
        kv = n // (N // K)
        exponentials = np.where(seen, np.exp(SCALE * q[:, n] @ keys[:, kv].T), 0)
        probs = exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-300)
        mixed[:, n] = probs @ values[:, kv]
        towards = weights[:, n] @ values[:, kv].T
        dscores = SCALE * probs * (towards - (probs * towards).sum(-1, keepdims=True))
        dq[:, n] = dscores @ keys[:, kv]
        dkeys[:, kv] += dscores.T @ q[:, n]
        dvalues[:, kv] += probs.T @ weights[:, n]
    return mixed, (dq, dkeys, dvalues)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(form, operands, weights, *others):
    mixed, back = jax.vjp(lambda *operands: form(*operands, *others), *operands)
    return mixed, back(weights.astype(mixed.dtype))


def kernel(*operands):
    return pallas_tpu.attend(*operands, scale=SCALE, interpret=True)


def assert_alike(actual, expected, tolerance=tolerances.KERNEL_ATTENTION):
    for name, one, other in zip(
        ("result", *SIDES), (actual[0], *actual[1]), (expected[0], *expected[1]), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ROWS)
def test_the_kernel_is_a_softmax_over_the_tree_in_its_result_and_all_gradients(name, window):
    row = ROWS[name]
    operands, weights = inputs(row)
    actual = value_and_gradients(kernel, operands, weights, block_mask_of(row, window))
    assert_alike(actual, by_numpy(row, window, operands, weights))


@pytest.mark.parametrize("heads", [(2, 1), (3, 3)], ids=["one key head", "a key head each"])
def test_it_is_that_for_any_grouping_of_heads(heads):
    row = ONE_GROUP
    operands, weights = inputs(row, N=heads[0], K=heads[1])
    actual = value_and_gradients(kernel, operands, weights, block_mask_of(row, 4))
    assert_alike(actual, by_numpy(row, 4, operands, weights))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_reference_is_it_too(window):
    row = ROWS["many groups, empty places"]
    operands, weights = inputs(row)
    form = lambda *operands: reference.packed_attention(
        *operands, segments_of(row), window=window, scale=SCALE
    )
    actual = value_and_gradients(form, operands, weights)
    assert_alike(actual, by_numpy(row, window, operands, weights))


def dense_form(row, window):
    """Plain attention in the operands' dtype under the mask of all pairs."""
    seen = jnp.asarray(mask_of(row, window))[None]

    def form(q, k, v):
        mixed = attention.attend(q[None], k[None], v[None], seen, scale=SCALE)[0]
        return jnp.where(seen[0].any(axis=1)[:, None, None], mixed, 0)

    return form


def test_in_bfloat16_it_errs_no_more_than_half_again_as_far_as_plain_attention():
    """The root of the mean square error, over the result and all gradients."""
    row = ONE_GROUP
    operands, weights = inputs(row, dtype=jnp.bfloat16)
    flat = lambda mixed, gradients: np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in (mixed, *gradients)]
    )
    expected = flat(*by_numpy(row, None, operands, weights))
    forms = {"kernel": (kernel, block_mask_of(row, None)), "plain": (dense_form(row, None),)}
    errors = {}
    for name, (form, *others) in forms.items():
        mixed, gradients = value_and_gradients(form, operands, weights, *others)
        chex.assert_type([mixed, *gradients], jnp.bfloat16)
        errors[name] = np.sqrt(np.mean((flat(mixed, gradients) - expected) ** 2))
    assert 0 < errors["kernel"] <= 1.5 * errors["plain"], errors


def test_places_without_a_token_give_nothing_and_take_no_gradient():
    row = ROWS["an empty prompt, and a block of empty places"]
    operands, _ = inputs(row)
    is_token = np.array([token is not None for token in row.tokens])
    weights = jnp.where(is_token[:, None, None], 0.0, jnp.ones_like(operands[0]))
    mixed, gradients = value_and_gradients(kernel, operands, weights, block_mask_of(row, None))
    assert not np.asarray(mixed)[~is_token].any()
    for name, gradient in zip(SIDES, gradients, strict=True):
        assert not np.asarray(gradient).any(), name


# --- the pairs of blocks ---


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ROWS)
def test_the_pairs_are_those_that_hold_a_seen_key_and_one_for_blocks_that_see_none(name, window):
    row = ROWS[name]
    mask, seen = block_mask_of(row, window), mask_of(row, window)
    expected = {(x // 8, y // 4) for x, y in zip(*np.nonzero(seen), strict=True)}
    blind = set(range(block_masks.blocks(len(seen), 8))) - {query for query, _ in expected}
    expected |= {(query, 0) for query in blind}
    count = int(mask.count)
    pairs = np.stack([mask.query_blocks, mask.key_blocks], axis=1)
    assert sorted(expected) == [tuple(pair) for pair in pairs[:count].tolist()]
    assert (pairs[count:] == -1).all() and len(pairs) > count


def test_the_work_follows_the_tokens_and_the_window():
    """A prompt of 8 and completions of 16 tokens, blocks of 8 by 4, by hand. The prompt is one
    block of queries that sees its 2 blocks of keys. A completion is two: without a window the first
    sees the prompt's 2 and 2 of its own, the second 2 and 4; with one of 4 tokens each sees its own
    2 and what reaches back 3: a block of the prompt, or of its own."""
    for completions in (1, 2, 4):
        row = row_of((8, *[16] * completions))
        assert int(block_mask_of(row, None).count) == 2 + completions * (2 + 2 + 2 + 4)
        first = 3  # the block of the prompt that a window of 4 reaches is its last
        assert int(block_mask_of(row, 4).count) == 2 + completions * (2 + 1 + first)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_models_rows_tell_the_kernel_where_each_place_belongs(is_packed):
    """Of two groups of two in padded arrays, as the loops above have it."""
    row = row_of((2, 3, 1), (3, 1, 2))
    prompt_mask = np.arange(4) >= 4 - np.array([[2], [3]])
    completion_mask = np.arange(3) < np.array([[3], [1], [1], [2]])
    shapes = prompt_mask.shape, completion_mask.shape
    if is_packed:
        slot = lambda group, segment, index: (
            group * 4 + 4 - row.prompts[group] + index
            if segment == 0
            else 8 + (group * 2 + segment - 1) * 3 + index
        )
        rows = Packed.of(jnp.array([slot(*token) for token in row.tokens] + [20]), *shapes)
        expected = segments_of(SimpleNamespace(tokens=[*row.tokens, None], prompts=row.prompts))
    else:
        rows = Rows(*shapes)
        tokens = [(p, 0, s - 4 + row.prompts[p]) for p in range(2) for s in range(4)]
        tokens = [token if token[2] >= 0 else None for token in tokens]
        for b in range(4):
            held = int(completion_mask[b].sum())
            tokens += [(b // 2, b % 2 + 1, t) if t < held else None for t in range(3)]
        expected = segments_of(SimpleNamespace(tokens=tokens, prompts=row.prompts))
    actual = rows.segments(jnp.asarray(prompt_mask), jnp.asarray(completion_mask))
    is_token = np.asarray(expected.is_token)
    np.testing.assert_array_equal(actual.is_token, is_token)
    for name in ("position", "own_start"):
        np.testing.assert_array_equal(
            np.asarray(getattr(actual, name))[is_token],
            np.asarray(getattr(expected, name))[is_token],
            err_msg=name,
        )
    length = lambda segments: np.asarray(segments.prompt_end - segments.prompt_start)
    np.testing.assert_array_equal(length(actual)[is_token], length(expected)[is_token])
    after = is_token & (length(expected) > 0)
    np.testing.assert_array_equal(actual.prompt_start[after], expected.prompt_start[after])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ROWS)
def test_the_dense_mask_of_a_block_of_queries_is_its_rows_of_the_whole_mask(name, window):
    row = ROWS[name]
    expected = mask_of(row, window)
    for start, stop in ((0, 3), (3, 11), (11, len(row.tokens))):
        actual = op.dense_mask(block_mask_of(row, window), slice(start, stop))
        np.testing.assert_array_equal(actual, expected[None, start:stop, :stop])
        assert not expected[start:stop, stop:].any()


# --- in the model ---


def run_model(*, is_packed=False, is_whole=False, T=9):
    """Hidden states of the completions' tokens, and the parameters' gradient of their weighted sum,
    of two groups of three in a tiny model with local and global layers: in groups, or as whole
    sequences. Completions are of 9 tokens at most, in rows of T."""
    graphdef, params = tiny_model()
    lengths, empty = np.array([6, 2, 9, 1, 4, 9]), 5
    rng = np.random.default_rng(5)
    drawn = rng.integers(8, TINY.vocab_size, (len(lengths), 9)).astype(np.int32)
    weights = rng.normal(size=(*drawn.shape, TINY.embed_dim))
    ids, weights = (np.pad(x, [(0, 0), (0, T - 9), (0, 0)][: x.ndim]) for x in (drawn, weights))
    ids, mask = jnp.asarray(ids), np.arange(T) < lengths[:, None]
    weights = np.where(mask[..., None], weights, 0)
    prompt_ids, prompt_mask = tiny_prompts(2)
    held = np.concatenate([prompt_mask.ravel(), mask.ravel()])
    slots = np.concatenate([np.flatnonzero(held), np.full(empty, held.size)])
    shapes = prompt_mask.shape, mask.shape
    rows = Packed.of(jnp.asarray(slots), *shapes) if is_packed else Rows(*shapes)
    prompt_ids, prompt_mask = map(jnp.asarray, (prompt_ids, prompt_mask))

    def weighted(params):
        model = nnx.merge(graphdef, params)
        if is_whole:
            sequences = [
                jnp.concatenate([jnp.repeat(of_prompts, 3, axis=0), jnp.asarray(own)], axis=1)
                for of_prompts, own in ((prompt_ids, ids), (prompt_mask, mask))
            ]
            hidden = gemma3.forward(model, *sequences)[0][:, -T:]
            return jnp.sum(hidden * weights), hidden
        batch = prompt_ids, prompt_mask, ids, jnp.asarray(mask)
        hidden = gemma3.forward_groups(model, batch, rows, remat="full")
        hidden = rows.unpack(hidden)[1]
        return jnp.sum(hidden * weights), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    return np.asarray(hidden)[mask], gradients


@cache
def run_on_whole_sequences():
    """In rows of 9: how long rows are changes nothing."""
    return run_model(is_whole=True)


def assert_runs_alike(actual, expected):
    """Two results of `run_model`."""
    np.testing.assert_allclose(actual[0], expected[0], atol=tolerances.HIDDEN_F32)
    for one, other in zip(*(jax.tree.leaves(each[1]) for each in (actual, expected)), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=scale * tolerances.HIDDEN_GRAD_F32)


PACKED_OR_PADDED = pytest.mark.parametrize(
    "is_packed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["packed", "padded"]
)


@PACKED_OR_PADDED
def test_a_model_by_the_kernel_is_what_it_is_on_whole_sequences(is_packed, monkeypatch):
    def by_kernel(q, k, v, block_mask, *, scale, fallback):
        return pallas_tpu.attend(q[0], k[0], v[0], block_mask, scale=scale, interpret=True)[None]

    expected = run_on_whole_sequences()
    monkeypatch.setattr(groups.packed_attention, "packed_attention", by_kernel)
    assert_runs_alike(run_model(is_packed=is_packed), expected)


def call(*, H=8, implementation=None):
    """The op on ones, whose fallback gives the values back."""
    row = row_of((4, 4))
    (q, k, v), _ = inputs(row, N=1, K=1, H=H)
    return op.packed_attention(
        *(q[None], k[None], v[None], block_mask_of(row, None)),
        scale=SCALE,
        fallback=lambda q, k, v: v,
        implementation=implementation,
    ), v[None]


@pytest.mark.parametrize(
    "T, queries, other",
    [
        *((40, queries, (attention, "attend_with_prompt")) for queries in (8, 32, 256)),
        (9, 8, (op, "dense_mask")),
    ],
    ids=["blocks of 8", "blocks of 32", "one block", "padded rows"],
)
def test_a_model_without_the_kernel_takes_the_fewer_pairs_and_is_what_it_is_on_whole_sequences(
    T, queries, other, monkeypatch
):
    expected = run_on_whole_sequences()
    monkeypatch.setattr(groups, "QUERIES", queries)
    monkeypatch.setattr(*other, None)  # what the other form calls
    assert_runs_alike(run_model(is_packed=True, T=T), expected)


def test_other_devices_take_the_fallback():
    for implementation in (None, "xla"):
        for H in (8, 128):
            mixed, v = call(H=H, implementation=implementation)
            np.testing.assert_array_equal(mixed, v)


def test_the_kernel_is_refused_by_name_where_there_is_no_tpu():
    with pytest.raises(UserError, match="implementation.*TPU"):
        call(H=128, implementation="pallas")


@pytest.mark.parametrize(
    "case", [cases.GEMMA3_270M, cases.GEMMA3_1B, cases.GEMMA3_1B_LARGE, cases.GEMMA3_4B]
)
def test_the_shapes_of_gemma_fit_in_vmem(case, monkeypatch):
    monkeypatch.undo()
    assert needed(case) < pallas_tpu.vmem_limit() / 2


def needed(case):
    return pallas_tpu.vmem_bytes(
        case.num_tokens,
        heads_each=case.num_heads // case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=jnp.dtype(jnp.bfloat16),
    )


# --- compiled for a TPU ---


@pytest.mark.parametrize(
    "case, num_chips, dtype",
    [
        (cases.GEMMA3_1B, 8, jnp.bfloat16),
        (cases.GEMMA3_1B, 1, jnp.float32),
        pytest.param(cases.GEMMA3_1B, 1, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(cases.GEMMA3_1B_LARGE, 1, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(cases.GEMMA3_4B, 1, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_for_v5e_as_two_kernels_and_no_score_is_kept(
    v5e, case, num_chips, dtype, monkeypatch
):
    """Forward and backward of one layer, a prompt on each chip: what is alive beside arguments and
    results is a few times the queries; the scores of 8 rows of 800 take 134 MB in float32."""
    monkeypatch.undo()  # blocks of their real size
    mesh = Mesh(np.array(v5e[:num_chips]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    N, K, H, X = *case[1:4], case.num_tokens
    described = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(
        (num_chips * shape[0], *shape[1:]), dtype, sharding=rows
    )

    def loss(q, k, v, *segments):
        block_mask = op.make_block_mask(op.Segments(*segments), window=case.window)
        mixed = op.packed_attention(
            *(q, k, v, block_mask), scale=H**-0.5, fallback=lambda q, k, v: q
        )
        return mixed.astype(jnp.float32).sum()

    gradients = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 2)),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    compiled = (
        jax.jit(gradients)
        .lower(
            *(described(1, X, N, H), described(1, X, K, H), described(1, X, K, H)),
            described(X, dtype=jnp.bool_),
            *[described(X, dtype=jnp.int32)] * 4,
        )
        .compile()
    )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * X * N * H * 2


@PACKED_OR_PADDED
def test_compiled_for_v5e_a_model_attends_by_the_kernels_in_both_passes(
    v5e, is_packed, monkeypatch
):
    """A call each of forward and backward in the scans over layers, and one forward again under
    remat, which the packed one has. Without it too no score is kept for the backward pass."""
    monkeypatch.undo()
    config = Gemma3Config(
        vocab_size=512,
        num_layers=4,
        embed_dim=128,
        hidden_dim=128,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        sliding_window=64,
        query_pre_attn_scalar=128.0,
        pattern=2,
    )
    on_chip = NamedSharding(Mesh(np.array(v5e[:1]), ("chip",)), PartitionSpec())
    described = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on_chip)
    graphdef, shapes = gemma3.abstract(config)
    B, T, S = 4, 200, 96

    def loss(params, ids, mask, prompt_ids, prompt_mask, slots):
        model = nnx.merge(graphdef, params)
        shapes = (2, S), (B, T)
        rows = Packed.of(slots, *shapes) if is_packed else Rows(*shapes)
        batch = prompt_ids, prompt_mask, ids, mask
        remat = "full" if is_packed else "none"
        hidden = gemma3.forward_groups(model, batch, rows, remat=remat)
        return hidden.astype(jnp.float32).sum()

    text = (
        jax.jit(jax.grad(loss))
        .lower(
            jax.tree.map(lambda leaf: described(leaf.shape, jnp.bfloat16), shapes),
            *(described((B, T), jnp.int32), described((B, T), jnp.bool_)),
            *(described((2, S), jnp.int32), described((2, S), jnp.bool_)),
            described((500,), jnp.int32),
        )
        .compile()
        .as_text()
    )
    kernels = re.findall(r"%(\S+) = .*custom_call_target=\"tpu_custom_call\"", text)
    assert len(kernels) == 2 + is_packed and all("packed_attention" in name for name in kernels), (
        kernels
    )
    assert sum("gradient" in name for name in kernels) == 1
    assert not re.search(rf"f32\[(\d+,)*{T},({T}|{S})\]", text)  # no scores
