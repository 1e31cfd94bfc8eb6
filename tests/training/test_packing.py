"""Packing: packs are worth what the padded batch is, in every value and gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from fake_batches import PROMPTS, G, P, T
from flax import nnx
from stubs import PAD, TINY, tiny_model

from gemma_grpo import model
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.kernels.lm_head_logps import xla
from gemma_grpo.model import LoRAConfig, Packed
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import grpo, grpo_update, logps, packing, sft, update
from gemma_grpo.training import state as train_state
from gemma_grpo.training.update import UpdateConfig

S = PROMPTS[0].shape[1]
GRAPHDEF, PARAMS = tiny_model(scale=1.5)
SGD = optax.sgd(1.0)
MIXED = np.array([1, 5, 6, 2, 4, 3, 1, 1, 4, 1, 2, 6, 2, 2, 1, 3])
ONE_EACH = np.ones(P * G, int)
FULL = np.full(P * G, T)


@pytest.fixture(autouse=True)
def small_packs(monkeypatch):
    """So that packs of a few tokens come in two sizes too."""
    monkeypatch.setattr(packing, "SMALL_FROM", 4)


def padded(lengths, *, seed=3):
    """A batch off its policy and its reference, random tokens of the given lengths."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < lengths[:, None]
    ids = np.where(mask, rng.integers(8, TINY.vocab_size, mask.shape), PAD).astype(np.int32)
    near = lambda: np.where(mask, rng.normal(-3, 0.5, mask.shape), 0).astype(np.float32)
    batch = grpo_update.make_batch(
        *PROMPTS,
        Rollout(ids, mask, near(), lengths < T),
        rng.normal(size=P * G).astype(np.float32),
        LossConfig(aggregation="sequence_mean", mask_truncated=True),
    )
    return batch | {name: near() for name in ("old_logps", "ref_logps", "teacher_logps")}


def how(tokens, num_devices=1):
    return packing.make_packing(P, G, tokens, (S, T), num_devices)


def packs_of(packs, plan):
    """The used packs, one after another: each its arrays."""
    for of_shape, shape in zip(packs, plan.shapes, strict=True):
        arrays = {name: x for name, x in of_shape.items() if name != "count"}
        for number in range(plan.num_devices * shape.most):
            if number % shape.most < of_shape["count"][0]:
                cut = lambda x, shape=shape: np.array_split(x, plan.num_devices * shape.most)
                yield {name: cut(x)[number] for name, x in arrays.items()}


# --- the packed row ---

PROMPT_VALUES = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
VALUES = np.random.default_rng(1).normal(size=(4, 2, 5)).astype(np.float32)
SLOTS = np.array([1, 2, 8, 9, 14, 5, 12, 14])  # of 2 prompts of 3 and 4 rows of 2; 14 is none
ALL = np.concatenate([PROMPT_VALUES.reshape(6, 5), VALUES.reshape(8, 5)])


def test_a_packed_row_has_the_slots_named_and_zeros_and_unpacking_puts_them_back():
    rows = Packed.of(jnp.asarray(SLOTS), (2, 3), (4, 2))
    row = np.asarray(rows.pack(jnp.asarray(PROMPT_VALUES), jnp.asarray(VALUES)))
    np.testing.assert_array_equal(row[0], np.concatenate([ALL, np.zeros((1, 5))])[SLOTS])
    kept = np.isin(np.arange(14), SLOTS)[:, None] * ALL
    prompts, completions = rows.unpack(jnp.asarray(row))
    np.testing.assert_array_equal(prompts, kept[:6].reshape(2, 3, 5))
    np.testing.assert_array_equal(completions, kept[6:].reshape(4, 2, 5))


def test_the_gradient_of_packing_is_that_of_the_matrix_that_it_multiplies_by():
    rows = Packed.of(jnp.asarray(SLOTS), (2, 3), (4, 2))
    one_hot = (SLOTS[:, None] == np.arange(14)).astype(np.float32)  # [N, Z]
    cotangent = np.random.default_rng(1).normal(size=(1, 8, 5)).astype(np.float32)
    _, back = jax.vjp(rows.pack, jnp.asarray(PROMPT_VALUES), jnp.asarray(VALUES))
    gradients = np.concatenate([x.reshape(-1, 5) for x in back(cotangent)])
    np.testing.assert_allclose(gradients, one_hot.T @ cotangent[0], atol=tolerances.F32)
    _, back = jax.vjp(rows.unpack, jnp.asarray(cotangent))
    gradient = back((jnp.asarray(PROMPT_VALUES), jnp.asarray(VALUES)))[0][0]
    np.testing.assert_allclose(gradient, one_hot @ ALL, atol=tolerances.F32)


def test_a_tokens_predictor_is_the_token_before_it_and_of_the_first_its_prompts_last():
    """By hand, on numbers for hidden states: two prompts of 2 and 1 tokens, two rows each."""
    slots = [1, 2, 6, 7, 8, 14, 5, 10, 12]  # p0: 1 2, rows 6 7 and 8; p1: 5, rows 10 and 12
    rows = Packed.of(jnp.asarray(slots), (2, 3), (4, 2))
    hidden = jnp.asarray(slots, jnp.float32)[None, :, None]
    before = rows.head_slots(rows.predictors(hidden)[..., 0])
    np.testing.assert_array_equal(before, [[2, 6], [2, 0], [5, 0], [5, 0]])
    np.testing.assert_array_equal(rows.are_predicted(), [[0, 0, 1, 1, 1, 0, 0, 1, 1]])


# --- log-probs ---


@functools.partial(jax.jit, static_argnames="lora")
def values_of(params, batch, lora=model.NO_LORA):
    graphdef, _ = model.abstract(TINY, lora)
    return logps.batch_logps(nnx.merge(graphdef, params), batch, temperature=0.8)


def assert_packs_alike(batch, plan, params=PARAMS, lora=model.NO_LORA):
    """Each completion's log-probs and entropies in its pack are those of the padded batch."""
    expected, seen = values_of(params, batch, lora), 0
    numbered = batch | {"number": np.arange(1, P * G + 1)}
    for pack in packs_of(packing.pack(numbered, plan), plan):
        number = pack.pop("number")
        actual = values_of(params, pack, lora)
        for row in np.flatnonzero(number):
            mask = batch["completion_mask"][number[row] - 1]
            for one, other in zip(actual, expected, strict=True):
                np.testing.assert_allclose(
                    one[row][mask], other[number[row] - 1][mask], atol=tolerances.LOGP_GAP
                )
            seen += 1
    assert seen == P * G
    return expected


@pytest.mark.parametrize("tokens", [14, 20, 33, 200])
def test_log_probs_do_not_depend_on_how_packs_are_cut(tokens):
    assert_packs_alike(padded(MIXED), how(tokens))


def test_adapters_drop_the_same_inputs_of_a_token_in_any_pack():
    lora = LoRAConfig(rank=3, alpha=6.0, dropout=0.5)
    _, shapes = model.abstract(TINY, lora)
    rng = np.random.default_rng(6)
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        model.partition(shapes)[0],
    )
    raw = lambda seed, num: np.asarray(
        jax.random.key_data(jax.random.split(jax.random.key(seed), num))
    )
    keys = {"dropout_keys": raw(1, P), "completion_dropout_keys": raw(2, P * G)}
    batch, params = padded(MIXED), model.join(adapter, PARAMS)
    dropped = assert_packs_alike(batch | keys, how(20), params, lora)
    mask = batch["completion_mask"]
    assert np.abs(dropped[0] - values_of(params, batch, lora)[0])[mask].max() > 1e-2


# --- the update ---

LOSS = LossConfig(beta=0.1, tis_cap=2.0, dual_clip=3.0)


def updated(batch, *, tokens=0, num_devices=1, head="one chunk"):
    """The gradient (SGD at rate 1 moves the weights by it) and the metrics."""
    devices = mesh.data_mesh(jax.devices()[:num_devices])
    packs = packing.pack(batch, how(tokens, num_devices))
    state = train_state.init_train_state(PARAMS, SGD, devices)
    moved, metrics = update_program(num_devices, head)(state, {}, mesh.place_rows(devices, packs))
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, moved.params)
    return grads, jax.device_get(metrics)


@functools.cache
def update_program(num_devices, head):
    """One for each head: it is traced with what the kernel's module says when it first runs."""
    return grpo_update.make_update(
        GRAPHDEF, mesh.data_mesh(jax.devices()[:num_devices]), SGD, LOSS,
        UpdateConfig("float32", "none"), temperature=0.8,
    )  # fmt: skip


def head_in_chunks(monkeypatch):
    """A vocabulary of several chunks, and a head that is computed for completions alone."""
    monkeypatch.setattr(xla, "CHUNK_SIZE", 13)
    monkeypatch.setattr(xla, "MULTIPLE", 1)


def assert_updates_alike(actual, expected):
    for one, other in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerances.MODEL_GRAD, rtol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(
            actual[1][name], value, rtol=1e-4, atol=tolerances.MODEL_GRAD, err_msg=name
        )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("tokens, num_devices", [(14, 1), slow(40, 1), (20, 8), (16, 3), (200, 2)])
@pytest.mark.parametrize("lengths", [MIXED, FULL], ids=["mixed", "all at the cap"])
def test_packs_have_the_gradient_and_the_metrics_of_the_padded_batch(lengths, tokens, num_devices):
    """On any number of devices, three of which do not divide eight prompts; groups are split."""
    batch = padded(lengths)
    assert_updates_alike(updated(batch, tokens=tokens, num_devices=num_devices), updated(batch))


@pytest.mark.parametrize(
    "lengths, num_devices",
    [(MIXED, 1), (ONE_EACH, 1), (FULL, 1), (MIXED, 3)],
    ids=["mixed", "one token", "full", "three devices"],
)
def test_packs_do_so_under_a_head_that_is_computed_for_completions_alone(
    lengths, num_devices, monkeypatch
):
    """With a vocabulary of several chunks; a pack of 20 tokens has four sizes of the head, and
    devices may take different ones."""
    batch = padded(lengths)
    expected = updated(batch)
    head_in_chunks(monkeypatch)
    actual = updated(batch, tokens=20, num_devices=num_devices, head="chunks of 13")
    assert_updates_alike(actual, expected)


def test_the_embedding_that_seems_to_change_with_the_pack_is_the_same_for_used_and_unused_ones():
    for of_shape in packing.pack(padded(MIXED), how(20, 3)):
        for slots in of_shape["slots"]:
            actual = jax.jit(update._changing)(PARAMS, {"slots": slots[None]})
            chex.assert_trees_all_equal(actual, PARAMS)


def test_nothing_in_rows_and_slots_without_a_token_reaches_the_gradient():
    batch = padded(MIXED)
    mask = batch["completion_mask"]
    poison = lambda x: np.where(mask, x, np.nan).astype(np.float32)
    dirty = batch | {
        "completion_ids": np.where(mask, batch["completion_ids"], 39).astype(np.int32),
        "sampler_logps": poison(batch["sampler_logps"]),
    }
    actual = updated(dirty, tokens=14)
    chex.assert_tree_all_finite(actual)
    assert_updates_alike(actual, updated(batch, tokens=14))


def test_twenty_steps_of_any_lengths_are_one_program(monkeypatch):
    head_in_chunks(monkeypatch)
    rng, plan = np.random.default_rng(5), how(20)
    counts, sizes = set(), set()
    for step in range(20):
        longest = rng.integers(1, T + 1)
        batch = padded(rng.integers(1, longest + 1, P * G), seed=step)
        counts.add(tuple(int(of_shape["count"][0]) for of_shape in packing.pack(batch, plan)))
        updated(batch, tokens=20, head="chunks of 13")
        sizes.add(update_program(1, "chunks of 13")._cache_size())
    assert len(counts) > 3 and len(sizes) == 1


def test_scores_of_packs_are_those_of_the_padded_batch_on_eight_devices():
    devices, plan = mesh.data_mesh(), how(20, 8)
    score = grpo_update.make_score(GRAPHDEF, devices, temperature=0.8, dtype="float32")
    batch = padded(MIXED) | {"number": np.arange(1, P * G + 1)}
    packs = packing.pack(batch, plan)
    numbers = [of_shape.pop("number") for of_shape in packs]
    scores = score(PARAMS, {}, mesh.place_rows(devices, packs))
    expected, seen = np.asarray(values_of(PARAMS, padded(MIXED))[0]), 0
    for values, number in zip(scores, numbers, strict=True):
        for row in np.flatnonzero(number):
            mask = batch["completion_mask"][number[row] - 1]
            np.testing.assert_allclose(
                values[row][mask], expected[number[row] - 1][mask], atol=tolerances.LOGP_GAP
            )
            seen += 1
    assert seen == P * G


# --- the dealing ---


@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_every_completion_has_one_row_and_every_token_one_place_in_a_pack(num_devices):
    rng = np.random.default_rng(num_devices)
    for tokens in (14, 20, 50, 113, 120, 1000):
        lengths = np.minimum(rng.lognormal(rng.uniform(0, 2), 0.7, P * G).astype(int) + 1, T)
        batch = padded(lengths) | {"number": np.arange(1, P * G + 1)}
        plan, seen = how(tokens, num_devices), []
        for pack in packs_of(packing.pack(batch, plan), plan):
            (p, _), (b, _) = pack["prompt_mask"].shape, pack["completion_mask"].shape
            held = np.concatenate([pack["prompt_mask"].ravel(), pack["completion_mask"].ravel()])
            slots = pack["slots"].ravel()
            assert sorted(slots[slots < held.size]) == np.flatnonzero(held).tolist()
            for row in np.flatnonzero(pack["number"]):
                b_all = pack["number"][row] - 1
                prompt = row // (b // p)
                np.testing.assert_array_equal(pack["prompt_ids"][prompt], PROMPTS[0][b_all // G])
                for name in ("completion_ids", "weights", "advantages"):
                    np.testing.assert_array_equal(pack[name][row], batch[name][b_all])
            seen += pack["number"][pack["number"] > 0].tolist()
        assert sorted(seen) == list(range(1, P * G + 1))


def test_whatever_the_lengths_the_packs_suffice_and_their_shapes_stay():
    """Also where every row is at its cap, for which the number of packs was chosen."""
    rng = np.random.default_rng(7)
    for tokens, num_devices in ((14, 1), (15, 8), (27, 3), (56, 2)):
        plan, shapes = how(tokens, num_devices), set()
        for lengths in (FULL, ONE_EACH, *rng.integers(1, T + 1, (30, P * G))):
            packs = packing.pack(padded(lengths), plan)
            shapes.add(str(jax.tree.map(jnp.shape, packs)))
            for of_shape, shape in zip(packs, plan.shapes, strict=True):
                assert of_shape["count"].tolist() == [of_shape["count"][0]] * num_devices
                assert of_shape["count"][0] <= shape.most
        assert len(shapes) == 1


def test_a_completion_goes_where_most_room_is_left_and_its_prompt_is_already():
    """By hand: two bins of 20, prompts of 5 tokens, two completions each. 9 of the first prompt
    goes to bin 0 (6 left), 8 of the second to bin 1 (7 left), 4 to bin 1 with its prompt (3 left),
    and 3 of the first, which needs no prompt in bin 0, there (3 left)."""
    shape = packing.PackShape(tokens=20, num_prompts=2, rows_each=2, most=2)
    bins_B = packing.deal(np.array([9, 3, 4, 8]), np.array([5, 5]), [shape, shape])
    np.testing.assert_array_equal(bins_B, [0, 0, 1, 1])
    assert packing.deal(np.array([16, 3, 4, 8]), np.array([5, 5]), [shape, shape]) is None
    full = packing.deal(np.array([15, 15]), np.array([5, 5]), [shape, shape])
    np.testing.assert_array_equal(full, [0, 1])


def deal_by_its_rule(tokens_B, prompt_tokens_P, bins):
    """`packing.deal` as its words have it: every bin is looked at for every completion."""
    G = len(tokens_B) // len(prompt_tokens_P)
    members = [[] for _ in bins]
    for b in sorted(range(len(tokens_B)), key=lambda b: -tokens_B[b]):
        best = None
        for n, shape in enumerate(bins):
            prompts = {one // G for one in members[n]}
            used = sum(tokens_B[one] for one in members[n]) + sum(
                prompt_tokens_P[p] for p in prompts
            )
            again = 0 if b // G in prompts else prompt_tokens_P[b // G]
            left = shape.tokens - used - tokens_B[b] - again
            is_free = b // G in prompts or len(prompts) < shape.num_prompts
            if left >= 0 and is_free and (best is None or left - again > best[0]):
                best = left - again, n
        if best is None:
            return None
        members[best[1]].append(b)
    return [next(n for n, each in enumerate(members) if b in each) for b in range(len(tokens_B))]


def test_completions_are_dealt_as_the_rule_says_whatever_their_lengths():
    """Short lengths, so that many bins tie; of two sizes, so that prompts run out before room."""
    rng, dealt = np.random.default_rng(0), 0
    for _ in range(400):
        num_prompts, num_each, room, other_room, most, other_most = (
            int(number) for number in rng.integers([1, 1, 10, 10, 1, 1], [8, 7, 50, 50, 5, 5])
        )
        tokens_B = rng.integers(1, 10, num_prompts * num_each)
        prompt_tokens_P = rng.integers(1, 5, num_prompts)
        bins = [packing.PackShape(room, most, num_each, 9)] * rng.integers(1, 6)
        bins += [packing.PackShape(other_room, other_most, num_each, 9)] * rng.integers(0, 5)
        expected = deal_by_its_rule(tokens_B, prompt_tokens_P, bins)
        actual = packing.deal(tokens_B, prompt_tokens_P, bins)
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert actual.tolist() == expected
            dealt += 1
    assert 100 < dealt < 300


@pytest.mark.parametrize("num_prompts, num_devices, tokens", [(8, 8, 3072), (24, 4, 4096)])
def test_a_step_takes_the_fewest_places_that_the_rule_fills(num_prompts, num_devices, tokens):
    rng = np.random.default_rng(num_prompts)
    plan = packing.make_packing(num_prompts, 8, tokens, (512, 800), num_devices)
    large, small = plan.shapes
    lengths_B = np.minimum(rng.lognormal(np.log(269), 0.58, 8 * num_prompts), 800).astype(int)
    lengths_P = rng.integers(40, 121, num_prompts)
    packs = packing.pack(
        {
            "prompt_ids": np.zeros((num_prompts, 1), int),
            "prompt_mask": np.arange(512) >= 512 - lengths_P[:, None],
            "completion_ids": np.zeros((len(lengths_B), 1), int),
            "completion_mask": np.arange(800) < lengths_B[:, None],
        },
        plan,
    )
    places = lambda counts: counts[0] * large.tokens + counts[1] * small.tokens
    fewer = sorted(
        ((n, m) for n in range(large.most + 1) for m in range(small.most + 1)), key=places
    )
    taken = tuple(int(each["count"][0]) for each in packs)
    for counts in fewer[: fewer.index(taken) + 1]:
        bins = [large] * counts[0] * num_devices + [small] * counts[1] * num_devices
        dealt = deal_by_its_rule(lengths_B, lengths_P, bins)
        assert (dealt is not None) == (counts == taken)


def test_a_large_batch_is_dealt_a_few_times_and_fills_its_places(monkeypatch):
    """A step of 1,024 prompts on eight devices may take thousands of numbers of packs."""
    calls, deal = [], packing.deal
    monkeypatch.setattr(packing, "deal", lambda *given: calls.append(1) or deal(*given))
    rng, num = np.random.default_rng(0), 1024
    lengths_B = np.minimum(rng.lognormal(np.log(269), 0.58, 8 * num), 800).astype(int)
    lengths_P = rng.integers(40, 121, num)
    plan = packing.make_packing(num, 8, 3072, (512, 800), 8)
    counts, bins_B = packing._deal_step(lengths_B, lengths_P, plan)
    sizes = np.repeat([3072, 768], np.array(counts) * 8)
    assert len(calls) <= 30 and len(np.unique(bins_B)) == len(sizes)
    used = np.bincount(bins_B, lengths_B)
    for pair in np.unique(bins_B * num + np.arange(8 * num) // 8):
        used[pair // num] += lengths_P[pair % num]
    assert (used <= sizes).all()
    assert sizes.sum() <= 1.15 * (lengths_B.sum() + lengths_P.sum())


def test_where_no_deal_finds_room_a_pack_holds_completions_of_one_prompt_alone(monkeypatch):
    """Two completions of 4 tokens fit behind a prompt of 4 into 12 places: 3 are two packs."""
    monkeypatch.setattr(packing, "deal", lambda *_: None)
    full = np.ones((6, 4), bool)
    batch = {
        "prompt_ids": np.zeros((2, 4), np.int32),
        "prompt_mask": full[:2],
        "completion_ids": np.arange(1, 7)[:, None] * full,
        "completion_mask": full,
    }
    (packs,) = packing.pack(batch, packing.make_packing(2, 3, 12, (4, 4), 1))
    rows = packs["completion_ids"][:, 0].reshape(4, -1)
    assert [sorted(set(row) - {0}) for row in rows.tolist()] == [[1, 2], [3], [4, 5], [6]]


def test_few_places_stay_empty_on_the_lengths_of_the_benchmarks():
    """Eight devices, the shared trace and prompts of 64 tokens: at most a quarter more places than
    tokens. Padding to the fullest group took 1.6 times as many."""
    from benchmarks import lengths

    plan = packing.make_packing(8, 8, 3072, (512, 800), 8)
    mask_PS = np.arange(512) >= 512 - 64
    batch = {
        "prompt_ids": np.zeros((8, 512), np.int32),
        "prompt_mask": np.tile(mask_PS, (8, 1)),
        "completion_ids": np.zeros((64, 800), np.int32),
        "completion_mask": np.arange(800) < np.array(lengths.LENGTHS)[:, None],
    }
    packs = packing.pack(batch, plan)
    places = sum(
        8 * int(of_shape["count"][0]) * shape.tokens
        for of_shape, shape in zip(packs, plan.shapes, strict=True)
    )
    tokens = batch["prompt_mask"].sum() + batch["completion_mask"].sum()
    assert tokens <= places <= 1.25 * tokens


def test_a_batch_of_sft_is_packed_likewise():
    completions = [list(range(8, 8 + n)) for n in (1, 6, 2, 3)]
    batch = sft.make_batch(
        [[2, 9, 9], [2], [2, 9], [2, 8]], completions,
        max_prompt_length=4, max_completion_length=6, pad_id=PAD,
    )  # fmt: skip
    plan = packing.make_packing(4, 1, 12, (4, 6), 2)
    packs = packing.pack(batch, plan)
    counts = [int(of_shape["count"][0]) for of_shape in packs]
    places = sum(n * shape.tokens for n, shape in zip(counts, plan.shapes, strict=True))
    assert places == 12  # 7 + 5 tokens on one device, 4 + 4 on the other
    assert sum(of_shape["completion_mask"].sum() for of_shape in packs) == 12


@pytest.mark.parametrize("config", [grpo.GRPOConfig, sft.SFTConfig])
def test_senseless_packs_are_refused_by_name(config):
    with pytest.raises(UserError, match="pack_tokens=-1"):
        config(pack_tokens=-1)
    with pytest.raises(UserError, match="8 prompts.*multiple of 3, or set pack_tokens"):
        how(0, 3)


def test_a_pack_has_room_for_the_longest_prompt_and_completion_whatever_is_asked():
    assert [how(tokens).shapes[0].tokens for tokens in (1, 13, 14, 15)] == [S + T, S + T, S + T, 15]
    assert how(1) == how(S + T)
