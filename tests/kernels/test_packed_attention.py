"""Laws of attention of packed completions. Expected values by NumPy, a dense mask in float64."""

import re
from functools import partial
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
from gemma_grpo.kernels.packed_attention import cases, pallas_tpu, reference, sights
from gemma_grpo.model import Gemma3Config, Packed, Rows, attention, transformer

SCALE = 0.3
SIDES = ("q", "k", "v", "prompt k", "prompt v")


def pack(lengths, prompt_lengths, *, S, empty=0, padded_to=None):
    """Rows of the given lengths one behind the other, and places that hold no token behind them;
    or each in its own `padded_to` places."""
    lengths = np.asarray(lengths)
    T = padded_to or int(max(lengths))
    slots_BT = np.broadcast_to(np.arange(T), (len(lengths), T))
    rows_BT = np.broadcast_to(np.arange(len(lengths))[:, None], slots_BT.shape)
    mask_BT = slots_BT < lengths[:, None]
    kept = mask_BT | (padded_to is not None)
    fill = lambda x, value: np.concatenate([x[kept], np.full(empty, value)])
    return SimpleNamespace(
        rows=fill(rows_BT, 0),
        slots=fill(slots_BT, 0),
        is_token=fill(mask_BT, False).astype(bool),
        prompt_lengths=np.asarray(prompt_lengths),
        num_rows=len(lengths),
        S=S,
        T=T,
    )


PACKS = {
    "many groups, left-padded prompts, empty places": pack(
        [3, 7, 1, 10, 5, 6], [6, 1, 4], S=6, empty=5
    ),
    "an empty prompt, and a block of empty places": pack([4, 4], [0, 3], S=3, empty=12),
    "padded rows": pack([3, 0, 8, 2], [4, 2], S=4, padded_to=8),
}
ONE_GROUP = pack([5, 9, 1], [6], S=6)
WINDOWS = [3, 9, None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, compile_quickly):
    monkeypatch.setattr(sights, "QUERIES", 8)
    monkeypatch.setattr(sights, "KEYS", 4)


def inputs(packed, *, N=4, K=2, H=8, dtype=jnp.float32, seed=0):
    """q, k, v, the prompts' k and v, and the cotangent."""
    rng = np.random.default_rng(seed)
    X, P, S = len(packed.rows), len(packed.prompt_lengths), packed.S
    shapes = [(X, N, H), (X, K, H), (X, K, H), (P, S, K, H), (P, S, K, H), (X, N, H)]
    *operands, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return operands, weights


def sight_of(packed, window):
    return op.sight(
        *map(jnp.asarray, (packed.rows, packed.slots, packed.is_token, packed.prompt_lengths)),
        num_rows=packed.num_rows,
        num_prompt_slots=packed.S,
        window=window,
    )


def mask_of(packed, window):
    """[X, P*S + X], pair by pair from the words of the law."""
    P, S, X = len(packed.prompt_lengths), packed.S, len(packed.rows)
    seen = np.zeros((X, P * S + X), bool)
    for x in np.flatnonzero(packed.is_token):
        row, slot = packed.rows[x], packed.slots[x]
        prompt = row // (packed.num_rows // P)
        length = packed.prompt_lengths[prompt]
        for n in range(length):  # token n of the prompt is at position n; x is at length + slot
            if window is None or length + slot - n < window:
                seen[x, prompt * S + S - length + n] = True
        for y in np.flatnonzero(packed.is_token & (packed.rows == row)):
            if 0 <= slot - packed.slots[y] < (window or np.inf):
                seen[x, P * S + y] = True
    return seen


def by_numpy(packed, window, operands, weights):
    """The result, and the gradients of sum(weights * result): those of a softmax."""
    q, k, v, prompt_k, prompt_v = (np.asarray(x, np.float64) for x in operands)
    weights = np.asarray(weights, np.float64)
    (_, N, H), K = q.shape, k.shape[1]
    P, S = prompt_k.shape[:2]
    keys, values = (
        np.concatenate([prompts.reshape(-1, K, H), own])
        for prompts, own in ((prompt_k, k), (prompt_v, v))
    )
    seen = mask_of(packed, window)
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
    back = lambda x: (x[P * S :], x[: P * S].reshape(P, S, K, H))
    (dk, dprompt_k), (dv, dprompt_v) = back(dkeys), back(dvalues)
    return mixed, (dq, dk, dv, dprompt_k, dprompt_v)


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
@pytest.mark.parametrize("name", PACKS)
def test_the_kernel_is_a_softmax_over_the_tree_in_its_result_and_all_five_gradients(name, window):
    packed = PACKS[name]
    operands, weights = inputs(packed)
    actual = value_and_gradients(kernel, operands, weights, sight_of(packed, window))
    assert_alike(actual, by_numpy(packed, window, operands, weights))


@pytest.mark.parametrize("heads", [(2, 1), (3, 3)], ids=["one key head", "a key head each"])
def test_it_is_that_for_any_grouping_of_heads(heads):
    packed = ONE_GROUP
    operands, weights = inputs(packed, N=heads[0], K=heads[1])
    actual = value_and_gradients(kernel, operands, weights, sight_of(packed, 4))
    assert_alike(actual, by_numpy(packed, 4, operands, weights))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_reference_is_it_too(window):
    packed = PACKS["many groups, left-padded prompts, empty places"]
    operands, weights = inputs(packed)
    who = [packed.rows, packed.slots, packed.is_token, packed.prompt_lengths]
    form = lambda *operands: reference.packed_attention(
        *operands, *map(jnp.asarray, who), num_rows=packed.num_rows, window=window, scale=SCALE
    )
    actual = value_and_gradients(form, operands, weights)
    assert_alike(actual, by_numpy(packed, window, operands, weights))


def unpacked_form(packed, window):
    """The model's own form of other devices, around which the tokens are unpacked."""
    B, T, S = packed.num_rows, packed.T, packed.S
    tokens = np.where(packed.is_token, packed.rows * T + packed.slots, B * T)
    rows = Packed.of(jnp.asarray(tokens), (B, T))
    mask_BT = np.isin(np.arange(B * T), tokens).reshape(B, T)
    prompt_mask = np.arange(S) >= S - packed.prompt_lengths[:, None]
    own = attention.causal_mask(T, window=window) & mask_BT[:, None]
    of_prompt = attention.prompt_window_mask(S, jnp.arange(T), window=window) & prompt_mask[:, None]

    def form(q, k, v, prompt_k, prompt_v):
        padded = lambda q, k, v: attention.attend_with_prompt(
            q, prompt_k, prompt_v, of_prompt, [(k, v, own)], scale=SCALE
        )
        return rows.between(padded)(q[None], k[None], v[None])[0]

    return form


@pytest.mark.parametrize("window", WINDOWS)
def test_it_is_what_other_devices_make_of_the_unpacked_rows(window):
    packed = PACKS["many groups, left-padded prompts, empty places"]
    operands, weights = inputs(packed)
    actual = value_and_gradients(kernel, operands, weights, sight_of(packed, window))
    assert_alike(actual, value_and_gradients(unpacked_form(packed, window), operands, weights))


def test_in_bfloat16_it_errs_no_more_than_half_again_as_far_as_the_unpacked_form():
    """The root of the mean square error, over the result and all gradients."""
    packed = ONE_GROUP
    operands, weights = inputs(packed, dtype=jnp.bfloat16)
    flat = lambda mixed, gradients: np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in (mixed, *gradients)]
    )
    expected = flat(*by_numpy(packed, None, operands, weights))
    forms = {"kernel": (kernel, sight_of(packed, None)), "unpacked": (unpacked_form(packed, None),)}
    errors = {}
    for name, (form, *others) in forms.items():
        mixed, gradients = value_and_gradients(form, operands, weights, *others)
        chex.assert_type([mixed, *gradients], jnp.bfloat16)
        errors[name] = np.sqrt(np.mean((flat(mixed, gradients) - expected) ** 2))
    assert 0 < errors["kernel"] <= 1.5 * errors["unpacked"], errors


def test_places_without_a_token_give_nothing_and_take_no_gradient():
    packed = PACKS["an empty prompt, and a block of empty places"]
    operands, _ = inputs(packed)
    weights = jnp.where(packed.is_token[:, None, None], 0.0, jnp.ones_like(operands[0]))
    mixed, gradients = value_and_gradients(kernel, operands, weights, sight_of(packed, None))
    assert not np.asarray(mixed)[~packed.is_token].any()
    for name, gradient in zip(SIDES, gradients, strict=True):
        assert not np.asarray(gradient).any(), name


# --- the pairs of blocks ---


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PACKS)
def test_the_pairs_are_those_that_hold_a_seen_key_and_one_for_blocks_that_see_none(name, window):
    packed = PACKS[name]
    sight, seen = sight_of(packed, window), mask_of(packed, window)
    prompts = len(packed.prompt_lengths) * packed.S
    of_key = np.arange(seen.shape[1])
    of_key = np.where(
        of_key < prompts, of_key // 4, sights.blocks(prompts, 4) + (of_key - prompts) // 4
    )
    expected = {(x // 8, of_key[c]) for x, c in zip(*np.nonzero(seen), strict=True)}
    blind = set(range(sights.blocks(len(seen), 8))) - {query for query, _ in expected}
    expected |= {(query, 0) for query in blind}
    count = int(sight.count)
    pairs = np.stack([sight.query_blocks, sight.key_blocks], axis=1)
    assert sorted(expected) == [tuple(pair) for pair in pairs[:count].tolist()]
    assert (pairs[count:] == -1).all() and len(pairs) > count


def test_the_work_follows_the_tokens_and_the_window():
    """Rows of 16 tokens behind prompts of 8, blocks of 8 by 4, by hand: two blocks of queries a
    row. Without a window the first sees the prompt's 2 blocks and 2 of its own, the second 2 and 4;
    with one of 4 tokens each sees its own 2 and what reaches back 3: a block of the prompt, or of
    its own. Half as many rows, half as many pairs."""
    for rows in (1, 2, 4):
        packed = pack([16] * rows, [8], S=8)
        assert int(sight_of(packed, None).count) == rows * (2 + 2 + 2 + 4)
        assert int(sight_of(packed, 4).count) == rows * (2 + 1 + 2 + 1)


# --- in the model ---


def run_model(*, is_packed=False, is_whole=False):
    """Hidden states of the completions' tokens, and the parameters' gradient of their weighted sum,
    of two groups of three in a tiny model with local and global layers: in groups, or as whole
    sequences."""
    graphdef, params = tiny_model()
    lengths, T, empty = np.array([6, 2, 9, 1, 4, 9]), 9, 5
    rng = np.random.default_rng(5)
    ids = jnp.asarray(rng.integers(8, TINY.vocab_size, (len(lengths), T)), jnp.int32)
    mask = np.arange(T) < lengths[:, None]
    weights = np.where(mask[..., None], rng.normal(size=(*mask.shape, TINY.embed_dim)), 0)
    slots = np.concatenate([np.flatnonzero(mask), np.full(empty, mask.size)])
    rows = Packed.of(jnp.asarray(slots), mask.shape) if is_packed else Rows(mask.shape)
    prompt_ids, prompt_mask = map(jnp.asarray, tiny_prompts(2))

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
        _, hidden = gemma3.forward_groups(model, *batch, remat="full", rows=rows)
        hidden = rows.unpack(hidden)
        return jnp.sum(hidden * weights), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    return np.asarray(hidden)[mask], gradients


PACKED_OR_PADDED = pytest.mark.parametrize(
    "is_packed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["packed", "padded"]
)


@PACKED_OR_PADDED
def test_a_model_by_the_kernel_is_what_it_is_on_whole_sequences(is_packed, monkeypatch):
    expected, expected_gradients = run_model(is_whole=True)

    def by_kernel(q, k, v, *others, scale, elsewhere):
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        mixed = pallas_tpu.attend(*flat, *others, scale=scale, interpret=True)
        return mixed.reshape(q.shape)

    monkeypatch.setattr(transformer.packed_attention, "packed_attention", by_kernel)
    hidden, gradients = run_model(is_packed=is_packed)
    np.testing.assert_allclose(hidden, expected, atol=tolerances.HIDDEN_F32)
    for one, other in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=scale * tolerances.HIDDEN_GRAD_F32)


def call(*, H=8, length=8, prompts=1, implementation=None):
    """The op on ones, whose form of other devices gives the values back."""
    packed = pack([length], [4] * prompts, S=4)
    (q, k, v, *of_prompts), _ = inputs(packed, N=1, K=1, H=H)
    return op.packed_attention(
        *(q[None], k[None], v[None], *of_prompts, sight_of(packed, None)),
        scale=SCALE,
        elsewhere=lambda q, k, v: v,
        implementation=implementation,
    ), v[None]


def test_other_devices_take_their_own_form():
    for implementation in (None, "xla"):
        for H in (8, 128):
            mixed, v = call(H=H, implementation=implementation)
            np.testing.assert_array_equal(mixed, v)


def test_the_kernel_is_refused_by_name_where_there_is_no_tpu():
    with pytest.raises(UserError, match="implementation.*TPU"):
        call(H=128, implementation="pallas")


@pytest.mark.parametrize(
    "case", [cases.GEMMA3_270M, cases.GEMMA3_1B, cases.GEMMA3_1B_FULL, cases.GEMMA3_4B]
)
def test_the_shapes_of_gemma_fit_in_vmem(case, monkeypatch):
    monkeypatch.undo()
    assert needed(case) < pallas_tpu.VMEM_LIMIT / 2


def needed(case):
    return pallas_tpu.vmem_bytes(
        case.num_tokens,
        case.num_prompt_slots,
        heads_each=case.num_heads // case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=jnp.dtype(jnp.bfloat16),
    )


# --- compiled for a TPU ---


@pytest.mark.parametrize(
    "case, num_chips",
    [
        (cases.GEMMA3_1B, 8),
        pytest.param(cases.GEMMA3_1B, 1, marks=pytest.mark.slow),
        pytest.param(cases.GEMMA3_1B_FULL, 1, marks=pytest.mark.slow),
        pytest.param(cases.GEMMA3_4B, 1, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_for_v5e_as_two_kernels_and_no_score_is_kept(v5e, case, num_chips, monkeypatch):
    """Forward and backward of one layer, a prompt on each chip: what is alive beside arguments and
    results is a few times the queries; the scores of 8 rows of 800 take 134 MB in float32."""
    monkeypatch.undo()  # blocks of their real size
    mesh = Mesh(np.array(v5e[:num_chips]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    N, K, H, S, X = case[1:4] + case[5:]
    described = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        (num_chips * shape[0], *shape[1:]), dtype, sharding=rows
    )

    def loss(q, k, v, prompt_k, prompt_v, rows, slots, is_token, lengths):
        sight = op.sight(
            *(rows[0], slots[0], is_token[0], lengths),
            num_rows=8,
            num_prompt_slots=S,
            window=case.window,
        )
        mixed = op.packed_attention(
            *(q, k, v, prompt_k, prompt_v, sight), scale=H**-0.5, elsewhere=lambda q, k, v: q
        )
        return mixed.astype(jnp.float32).sum()

    gradients = jax.shard_map(
        jax.grad(loss, argnums=tuple(range(5))),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    compiled = (
        jax.jit(gradients)
        .lower(
            *(described(1, X, N, H), described(1, X, K, H), described(1, X, K, H)),
            *(described(1, S, K, H), described(1, S, K, H)),
            *(described(1, X, dtype=jnp.int32), described(1, X, dtype=jnp.int32)),
            *(described(1, X, dtype=jnp.bool_), described(1, dtype=jnp.int32)),
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
        rows = Packed.of(slots, (B, T)) if is_packed else Rows((B, T))
        batch = prompt_ids, prompt_mask, ids, mask
        remat = "full" if is_packed else "none"
        _, hidden = gemma3.forward_groups(model, *batch, remat=remat, rows=rows)
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
