"""Packing: a packed batch has the values and gradients of the padded one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from flax import nnx
from stubs import PAD, TINY, tiny_model, tiny_prompts

from gemma_grpo import model
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.model import LoRAConfig, Packed
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import grpo, grpo_update, logps, packing, sft
from gemma_grpo.training import state as train_state
from gemma_grpo.training.update import UpdateConfig, split_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

P, G, T = 8, 2, 6
GRAPHDEF, PARAMS = tiny_model(scale=1.5)
SGD = optax.sgd(1.0)
# Groups of 2 to 8 tokens: two thirds of the padded 12 hold every one of them.
MIXED = np.array([1, 5, 6, 2, 4, 3, 1, 1, 4, 1, 2, 6, 2, 2, 1, 3])
ONE_EACH = np.ones(P * G, int)
ONE_AT_THE_CAP = np.where(np.arange(P * G) == 3, T, 1)


def padded(lengths, *, seed=3):
    """A batch off its policy and its reference, random tokens of the given lengths."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < lengths[:, None]
    ids = np.where(mask, rng.integers(8, TINY.vocab_size, mask.shape), PAD).astype(np.int32)
    near = lambda: np.where(mask, rng.normal(-3, 0.5, mask.shape), 0).astype(np.float32)
    batch = grpo_update.make_batch(
        *tiny_prompts(P),
        Rollout(ids, mask, near(), lengths < T),
        rng.normal(size=P * G).astype(np.float32),
        LossConfig(aggregation="sequence_mean", mask_truncated=True),
        grpo_update.Buckets(8, T),
    )
    return batch | {"old_logps": near(), "ref_logps": near()}


def packed(batch, *, num_devices=1, passes=1, sizes=3):
    out = packing.pack(batch, num_devices=num_devices, passes=passes, sizes=sizes)
    assert "slots" in out
    return out


# --- the packed row ---

SLOTS = np.array([7, 0, 4, 12, 11, 12])  # of 3 rows of 4; 12 is beyond the last
VALUES = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def test_a_packed_row_has_the_slots_named_and_zeros_and_unpacking_puts_them_back():
    rows = Packed.of(jnp.asarray(SLOTS), (3, 4))
    row = np.asarray(rows.pack(jnp.asarray(VALUES)))
    flat = VALUES.reshape(12, 5)
    np.testing.assert_array_equal(row[0], [*flat[[7, 0, 4]], 0 * flat[0], flat[11], 0 * flat[0]])
    kept = np.isin(np.arange(12), SLOTS).reshape(3, 4, 1)
    np.testing.assert_array_equal(rows.unpack(jnp.asarray(row)), VALUES * kept)


def test_the_gradient_of_packing_is_that_of_the_matrix_that_it_multiplies_by():
    rows = Packed.of(jnp.asarray(SLOTS), (3, 4))
    one_hot = (SLOTS[:, None] == np.arange(12)).astype(np.float32)  # [X, Z]
    cotangent = np.random.default_rng(1).normal(size=(1, 6, 5)).astype(np.float32)
    _, back = jax.vjp(rows.pack, jnp.asarray(VALUES))
    np.testing.assert_allclose(
        back(cotangent)[0].reshape(12, 5), one_hot.T @ cotangent[0], atol=tolerances.F32
    )
    _, back = jax.vjp(rows.unpack, jnp.asarray(cotangent))
    np.testing.assert_allclose(
        back(VALUES)[0][0], one_hot @ VALUES.reshape(12, 5), atol=tolerances.F32
    )


# --- log-probs ---


@functools.partial(jax.jit, static_argnames="lora")
def values_of(params, batch, lora=model.NO_LORA):
    graphdef, _ = model.abstract(TINY, lora)
    return logps.batch_logps(nnx.merge(graphdef, params), batch, temperature=0.8)


def assert_values_alike(actual, expected, mask):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one[mask], other[mask], atol=tolerances.LOGP_GAP)


def test_every_slot_full_or_not_gives_the_log_probs_of_the_padded_form():
    batch = padded(np.full(P * G, T))
    order = np.arange(P * G * T)
    slots = np.concatenate([order, np.full(P, order.size)]).reshape(P, -1).astype(np.int32)
    mask = batch["completion_mask"]
    assert mask.all()
    assert_values_alike(values_of(PARAMS, batch | {"slots": slots}), values_of(PARAMS, batch), mask)


def test_a_rows_log_probs_do_not_depend_on_what_it_is_packed_with():
    one, other = padded(MIXED, seed=3), padded(MIXED[::-1].copy(), seed=4)
    kept = np.arange(P * G) == 4  # 4 tokens, at another place of the row in each batch
    for name in ("completion_ids", "completion_mask"):
        other[name] = np.where(kept[:, None], one[name], other[name])
    first, second = (values_of(PARAMS, packed(batch)) for batch in (one, other))
    mask = one["completion_mask"] & kept[:, None]
    assert mask.sum() == 4
    assert_values_alike(first, second, mask)


def test_adapters_drop_the_same_inputs_of_a_token_packed_or_padded():
    lora = LoRAConfig(rank=3, alpha=6.0, dropout=0.5)
    _, shapes = model.abstract(TINY, lora)
    rng = np.random.default_rng(6)
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        model.partition(shapes)[0],
    )
    params = model.join(adapter, PARAMS)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), P)))
    batch = padded(MIXED)
    dropped = values_of(params, batch | {"dropout_keys": keys}, lora)
    mask = batch["completion_mask"]
    assert_values_alike(
        values_of(params, packed(batch | {"dropout_keys": keys}), lora), dropped, mask
    )
    assert np.abs(dropped[0] - values_of(params, batch, lora)[0])[mask].max() > 1e-2


# --- the update ---

LOSS = LossConfig(beta=0.1, tis_cap=2.0, dual_clip=3.0)


def updated(batch, *, num_devices=1, passes=1):
    """The gradient (SGD at rate 1 moves the weights by it) and the metrics."""
    devices = mesh.data_mesh(jax.devices()[:num_devices])
    update = update_program(num_devices, passes)
    state = train_state.init_train_state(PARAMS, SGD, devices)
    moved, metrics = update(state, {}, mesh.place_rows(devices, batch))
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, moved.params)
    return grads, jax.device_get(metrics)


@functools.cache
def update_program(num_devices, passes):
    return grpo_update.make_update(
        GRAPHDEF, mesh.data_mesh(jax.devices()[:num_devices]), SGD, LOSS,
        UpdateConfig("float32", "none", passes), temperature=0.8,
    )  # fmt: skip


def assert_updates_alike(actual, expected):
    for one, other in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerances.MODEL_GRAD, rtol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(
            actual[1][name], value, rtol=1e-4, atol=tolerances.MODEL_GRAD, err_msg=name
        )


@pytest.mark.parametrize("lengths", [ONE_EACH, ONE_AT_THE_CAP], ids=["one token each", "one cap"])
def test_a_packed_update_has_the_gradient_and_the_metrics_of_the_padded_one(lengths):
    batch = padded(lengths)
    assert_updates_alike(updated(packed(batch)), updated(batch))


@pytest.mark.parametrize("num_devices, passes", [(8, 1), (2, 2)])
def test_it_has_them_on_any_number_of_devices_and_in_any_number_of_passes(num_devices, passes):
    batch = padded(MIXED)
    where = dict(num_devices=num_devices, passes=passes)
    assert_updates_alike(updated(packed(batch, **where), **where), updated(batch))


def test_scores_of_a_packed_batch_are_those_of_the_padded_one_on_eight_devices():
    score = grpo_update.make_score(GRAPHDEF, mesh.data_mesh(), temperature=0.8, dtype="float32")
    placed = lambda arrays: mesh.place_rows(mesh.data_mesh(), arrays)
    dealt = packed(padded(MIXED), num_devices=8)
    actual = np.asarray(score(PARAMS, {}, placed(dealt)))
    expected = np.asarray(values_of(PARAMS, {k: v for k, v in dealt.items() if k != "slots"})[0])
    mask = dealt["completion_mask"]
    assert_values_alike([actual], [expected], mask)


# --- the batch ---


@pytest.mark.parametrize("num_devices, passes", [(1, 1), (8, 1), (2, 2), (1, 4)])
def test_every_token_of_every_pack_has_one_slot_and_every_row_stays_with_its_prompt(
    num_devices, passes
):
    batch = padded(MIXED) | {"number": np.arange(P * G)}
    batch["prompt_number"] = np.arange(P)
    dealt = packed(batch, num_devices=num_devices, passes=passes)
    seen = []
    for device in range(num_devices):
        share = {k: jnp.split(v, num_devices)[device] for k, v in dealt.items()}
        parts = split_batch(share, num_prompts=P // num_devices, passes=passes)
        for j in range(passes):
            part = {k: np.asarray(v[j]) for k, v in parts.items()}
            slots = np.sort(part["slots"].reshape(-1))
            tokens = np.flatnonzero(part["completion_mask"])
            np.testing.assert_array_equal(slots[: len(tokens)], tokens)
            assert (slots[len(tokens) :] == part["completion_mask"].size).all()
            np.testing.assert_array_equal(part["number"] // G, np.repeat(part["prompt_number"], G))
            seen += part["number"].tolist()
    assert sorted(seen) == list(range(P * G))
    order = dealt["number"]
    for name in batch.keys() - {"prompt_ids", "prompt_mask", "prompt_number"}:
        np.testing.assert_array_equal(dealt[name], batch[name][order])
    np.testing.assert_array_equal(dealt["prompt_ids"], batch["prompt_ids"][order[::G] // G])


def test_a_batch_comes_in_few_sizes_the_largest_of_which_is_the_padded_one():
    rng, seen = np.random.default_rng(7), set()
    for _ in range(300):
        lengths = np.minimum(rng.lognormal(rng.uniform(0, 2), 0.6, P * G).astype(int) + 1, T)
        out = packing.pack(padded(lengths), num_devices=1, passes=1, sizes=4)
        X = out["slots"].shape[1] if "slots" in out else G * T
        assert (X - 3) * P < lengths.sum() <= X * P
        seen.add(X)
    assert seen == {3, 6, 9, 12}
    full = padded(np.full(P * G, T))
    assert packing.pack(full, num_devices=8, passes=1, sizes=4) is full
    assert packing.pack(padded(ONE_EACH), num_devices=1, passes=1, sizes=1).keys() == full.keys()


def test_prompts_are_dealt_out_so_that_packs_are_about_equally_full():
    """By hand: 9 to pack 0, 8 to 1, 7 to 1 (8 < 9), which is full; 1 to 0."""
    order = packing.deal(np.array([1, 9, 8, 7]), np.array([0, 1, 0, 1]))
    np.testing.assert_array_equal(order, [0, 2, 1, 3])
    rng = np.random.default_rng(8)
    tokens = rng.integers(500, 4000, 64)
    pack_P = np.arange(64) % 8
    order = packing.deal(tokens, pack_P)
    assert sorted(order) == list(range(64))
    load = np.bincount(pack_P, weights=tokens[order])
    assert load.max() < 1.03 * load.mean() < np.bincount(pack_P, weights=tokens).max()


def test_a_batch_of_sft_is_packed_likewise():
    completions = [list(range(8, 8 + n)) for n in (1, 6, 2, 3)]
    batch = sft.make_batch(
        [[2, 9, 9], [2], [2, 9], [2, 8]], completions,
        max_prompt_length=4, max_completion_length=6, length_bucket=6, pad_id=PAD,
    )  # fmt: skip
    dealt = packed(batch, num_devices=2, sizes=6)
    np.testing.assert_array_equal(dealt["completion_mask"].sum(axis=1), [1, 6, 2, 3])
    np.testing.assert_array_equal(
        dealt["slots"], [[0, 6, 7, 8], [9, 10, 11, 12], [0, 1, 6, 7], [8, 12, 12, 12]]
    )


@pytest.mark.parametrize("config", [grpo.GRPOConfig, sft.SFTConfig])
def test_no_size_at_all_is_refused_by_name(config):
    with pytest.raises(UserError, match="packed_sizes=0"):
        config(packed_sizes=0)
