"""The update and dynamic sampling: what gets gradient, what adds up, which groups are kept."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from fake_batches import ADVANTAGES, PROMPTS, STOP, G, P, T, batch_of, fake_rollout, packs_of
from flax import nnx
from stubs import PAD, host, tiny_model, tiny_prompts

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.generation import collect
from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import grpo, grpo_update, logps, resample, sft
from gemma_grpo.training import state as train_state
from gemma_grpo.training.update import UpdateConfig

GRAPHDEF, PARAMS = tiny_model(scale=1.5)
SGD = optax.sgd(1.0)


@jax.jit
def exact_logps(params, rollout):
    prompt_ids, prompt_mask = tiny_prompts(P)
    batch = {
        "prompt_ids": jnp.asarray(prompt_ids),
        "prompt_mask": jnp.asarray(prompt_mask),
        "completion_ids": jnp.asarray(rollout.completion_ids),
        "completion_mask": jnp.asarray(rollout.completion_mask),
    }
    return logps.batch_logps(nnx.merge(GRAPHDEF, params), batch)[0]


def on(num_devices=1):
    return mesh.data_mesh(jax.devices()[:num_devices])


@functools.cache
def update_program(num_devices=1, loss=LossConfig()):  # noqa: B008 (frozen)
    return grpo_update.make_update(
        GRAPHDEF,
        on(num_devices),
        SGD,
        loss,
        UpdateConfig("float32", "none", P * G),  # with the trainer's log-probs
        temperature=1.0,
    )


def gradient(batch, *, tokens=0, num_devices=1, **loss):
    """With SGD at rate 1 the gradient is what the weights moved by."""
    state = train_state.init_train_state(PARAMS, SGD, on(num_devices))
    packs = packs_of(batch, tokens=tokens, num_devices=num_devices)
    moved, metrics = update_program(num_devices, **loss)(state, {}, packs)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, moved.params), metrics


def assert_trees_close(a, b, atol):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)  # the next one is blind to dtypes
    chex.assert_trees_all_close(a, b, atol=atol, rtol=0)


def test_on_policy_the_gradient_is_reinforce_with_the_stop_token_in_it():
    rollout = fake_rollout()
    batch = batch_of(rollout)
    actual, _ = gradient(batch)

    def reinforce(params):
        values = exact_logps(params, rollout)
        counted = jnp.where(rollout.completion_mask, values, 0.0)
        return -(counted * ADVANTAGES[:, None]).sum() / rollout.completion_mask.sum()

    assert_trees_close(actual, host(jax.jit(jax.grad(reinforce))(PARAMS)), tolerances.MODEL_GRAD)


def test_nothing_in_the_padding_reaches_loss_or_gradient():
    rollout = fake_rollout()
    batch = batch_of(rollout)
    poison = lambda x: np.where(rollout.completion_mask, x, np.nan).astype(np.float32)
    garbage = np.where(rollout.completion_mask, rollout.completion_ids, 39).astype(np.int32)
    poisoned = batch | {"completion_ids": garbage, "sampler_logps": poison(batch["sampler_logps"])}
    clean, dirty = gradient(batch), gradient(poisoned)
    chex.assert_tree_all_finite(dirty)
    assert_trees_close(clean, dirty, tolerances.MODEL_GRAD)


def test_an_update_is_compiled_once_for_all_steps_of_one_shape():
    sizes = set()
    for seed in (3, 4):
        gradient(batch_of(fake_rollout(seed)))
        sizes.add(update_program(1)._cache_size())
    assert len(sizes) == 1


def test_the_stop_token_gets_gradient():
    rollout = fake_rollout()
    before_stop = rollout.completion_mask & (rollout.completion_ids != STOP)
    with_stop = gradient(batch_of(rollout))[0]
    weights = batch_of(rollout)["weights"]
    without = gradient(batch_of(rollout) | {"weights": weights * before_stop})[0]
    assert np.abs(with_stop["embedding"][STOP] - without["embedding"][STOP]).max() > 1e-3


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("tokens", [16, 60])
def test_the_gradient_does_not_depend_on_the_size_of_packs(tokens, aggregation):
    batch = batch_of(fake_rollout(), aggregation=aggregation)
    (one, metrics_one), (many, metrics_many) = gradient(batch), gradient(batch, tokens=tokens)
    assert_trees_close(one, many, tolerances.MODEL_GRAD)
    for name, value in metrics_one.items():
        np.testing.assert_allclose(metrics_many[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_gradient_does_not_depend_on_the_number_of_devices():
    batch = batch_of(fake_rollout())
    assert_trees_close(gradient(batch)[0], gradient(batch, num_devices=8)[0], tolerances.MODEL_GRAD)


def test_truncated_completions_can_be_left_out_of_the_loss():
    rollout = fake_rollout()
    batch = batch_of(rollout, mask_truncated=True)
    assert (batch["loss_mask"].any(axis=1) == rollout.stopped).all()
    assert batch["weights"][~rollout.stopped].sum() == 0
    np.testing.assert_allclose(batch["weights"].sum(), 1.0, rtol=1e-6)


def test_more_padding_before_prompts_and_behind_completions_does_not_change_the_gradient():
    rollout = fake_rollout()
    prompts = [np.pad(array, ((0, 0), (9, 0))) for array in tiny_prompts(P)]
    wide = lambda x: np.pad(x, ((0, 0), (0, 4)))
    padded = rollout._replace(
        **{name: wide(getattr(rollout, name)) for name in rollout._fields if name != "stopped"}
    )
    expected = gradient(batch_of(rollout))[0]
    batch = batch_of(padded, prompts=prompts)
    for tokens in (0, 40):
        assert_trees_close(gradient(batch, tokens=tokens)[0], expected, tolerances.MODEL_GRAD)


def test_at_a_rate_of_1e_6_every_weight_with_a_gradient_moves():
    optimizer = optax.adam(1e-6)
    state = train_state.init_train_state(
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS), optimizer, on()
    )
    grads = jax.tree.map(jnp.ones_like, state.params)
    moved = jax.jit(lambda *given: train_state.apply_gradients(*given, optimizer))(state, grads)
    for old, new in zip(jax.tree.leaves(state.params), jax.tree.leaves(moved.params), strict=True):
        assert new.dtype == jnp.float32
        # A weight of 8 or more has a float32 neighbour farther than 1e-6 / 2 away.
        assert (np.asarray(old) != np.asarray(new))[np.abs(np.asarray(old)) < 8].all()


def test_the_reported_gap_is_the_mean_and_root_mean_square_over_completion_tokens():
    rollout = fake_rollout()
    batch = batch_of(rollout)
    exact = exact_logps(PARAMS, rollout)
    off = np.where(np.arange(T) % 2, 0.3, -0.1).astype(np.float32)[None]
    _, metrics = gradient(batch | {"sampler_logps": np.asarray(exact) + off})
    gaps = np.broadcast_to(np.abs(off), (P * G, T))[rollout.completion_mask]
    np.testing.assert_allclose(metrics["logp_gap/mean"], gaps.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["logp_gap/rms"], np.sqrt((gaps**2).mean()), rtol=1e-4)


@pytest.mark.parametrize("tokens, num_devices", [(0, 1), (16, 1), (60, 1), (60, 8)])
def test_the_trainers_log_probs_come_back_in_the_order_of_the_completions(tokens, num_devices):
    rollout = fake_rollout()
    _, metrics = gradient(batch_of(rollout), tokens=tokens, num_devices=num_devices)
    exact_BT = np.where(rollout.completion_mask, exact_logps(PARAMS, rollout), 0.0)
    np.testing.assert_allclose(metrics["trainer_logps"], exact_BT, atol=tolerances.MODEL_GRAD)


def test_old_and_trained_log_probs_are_of_the_distribution_that_was_sampled_from():
    config = RolloutConfig(G, T, (STOP,), PAD, SamplingConfig(temperature=0.6))
    rollout = host(make_rollout(GRAPHDEF, on(), config)(PARAMS, *PROMPTS, jax.random.key(0)))
    packs = packs_of(batch_of(rollout))
    settings = UpdateConfig("float32", "none", P * G)
    score = grpo_update.make_score(GRAPHDEF, on(), temperature=0.6, dtype="float32")
    update = grpo_update.make_update(GRAPHDEF, on(), SGD, LossConfig(), settings, temperature=0.6)
    old = np.where(rollout.completion_mask, score(PARAMS, {}, packs)[0], 0.0)
    _, metrics = update(train_state.init_train_state(PARAMS, SGD, on()), {}, packs)
    for values in (old, metrics["trainer_logps"]):
        np.testing.assert_allclose(values, rollout.sampler_logps, atol=tolerances.LOGP_GAP)


def test_completions_left_out_of_the_loss_are_measured_all_the_same():
    rollout = fake_rollout()
    assert 0 < rollout.stopped.sum() < P * G
    _, every = gradient(batch_of(rollout))
    _, without = gradient(batch_of(rollout, mask_truncated=True))
    for name in ("entropy", "logp_gap/mean", "logp_gap/rms"):
        np.testing.assert_allclose(without[name], every[name], rtol=1e-6)


def test_dr_grpo_divides_by_the_budget_however_short_the_completions():
    rollout = fake_rollout()
    mask = rollout.completion_mask & (np.arange(T) < T - 2)
    batch = batch_of(rollout._replace(completion_mask=mask), aggregation="constant")
    np.testing.assert_allclose(batch["weights"], mask / (P * G * T), rtol=1e-6)


def test_a_toy_reward_rises_within_a_few_steps():
    """The reward is the share of one token, at chance 1 in 40 to begin with."""
    roll = make_rollout(GRAPHDEF, on(), RolloutConfig(G * 4, T, stop_ids=(), pad_id=PAD))
    optimizer = optax.adam(1e-2)
    update = grpo_update.make_update(
        GRAPHDEF, on(), optimizer, LossConfig(), UpdateConfig("float32", "none"), temperature=1.0
    )
    state = train_state.init_train_state(PARAMS, optimizer, on())
    shares = []
    for step in range(20):
        key = jax.random.fold_in(jax.random.key(0), step)
        drawn = host(roll(state.params, *tiny_prompts(P), key))
        reward = (drawn.completion_ids == 33).mean(axis=1)
        centred = reward.reshape(P, -1) - reward.reshape(P, -1).mean(axis=1, keepdims=True)
        batch = grpo_update.make_batch(
            *tiny_prompts(P),
            drawn,
            centred.reshape(-1).astype(np.float32),
            LossConfig(),
        )
        state, _ = update(state, {}, (batch,))
        shares.append(reward.mean())
    assert np.mean(shares[:3]) < 0.2 < 0.8 < np.mean(shares[-3:])


def test_sft_counts_completion_tokens_alike_and_prompt_tokens_not_at_all():
    prompts = [[2, 9, 9], [2, 9]]
    completions = [[10, 11, STOP], [12, STOP]]
    batch = sft.make_batch(
        prompts, completions, max_prompt_length=4, max_completion_length=5, pad_id=PAD,
    )  # fmt: skip
    np.testing.assert_array_equal(batch["prompt_ids"], [[0, 2, 9, 9], [0, 0, 2, 9]])
    np.testing.assert_array_equal(
        batch["completion_ids"], [[10, 11, STOP, 0, 0], [12, STOP, 0, 0, 0]]
    )
    expected = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]) / 5
    np.testing.assert_allclose(batch["weights"], expected, rtol=1e-6)


# --- dynamic sampling, with groups made by hand -----------------------------------------------


def groups_of(correct_PG, mark):
    """Groups whose correctness is given; `mark` tells which draw they came from."""
    P, G = np.shape(correct_PG)
    B = P * G
    ids = np.full((B, 2), mark, np.int32) + 100 * np.arange(B, dtype=np.int32)[:, None]
    return collect.Groups(
        problems=[Problem(f"{mark}-{p}", "1") for p in range(P)],
        prompt_ids=np.full((P, 3), mark),
        prompt_mask=np.ones((P, 3), bool),
        rollout=Rollout(ids, np.ones((B, 2), bool), np.zeros((B, 2)), np.ones(B, bool)),
        characters=ids,
        samples=[rewards.Sample(f"{mark}-{b}", "", "1", "easy", 1, 2, (), True) for b in range(B)],
        scores=rewards.Scores(
            {"correctness": np.ravel(correct_PG).astype(float).tolist()},
            [float(mark)] * B,
            seconds=2.0**mark,
        ),
    )


def collect_from(draws, resample_rounds):
    keys = []

    def collect_one(problems, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return groups_of(draws[len(keys) - 1], len(keys) - 1)

    groups, rounds = resample.collect_mixed(
        collect_one, lambda sampling_round: [], jax.random.key(0), resample_rounds=resample_rounds
    )
    assert len(set(keys)) == len(keys)  # every round draws with a key of its own
    assert groups.scores.seconds == 2 ** len(keys) - 1  # 1 + 2 + 4 + ...: they follow each other
    return groups, rounds


ALL_RIGHT, ALL_WRONG, MIXED = [1, 1], [0, 0], [0, 1]


def test_groups_all_right_or_all_wrong_are_replaced_by_mixed_ones_of_a_later_draw():
    draws = [[ALL_RIGHT, MIXED, ALL_WRONG], [ALL_WRONG, MIXED, MIXED]]
    groups, rounds = collect_from(draws, resample_rounds=3)
    assert [problem.prompt for problem in groups.problems] == ["1-1", "0-1", "1-2"]
    rows = [sample.prompt for sample in groups.samples]
    assert rows == ["1-2", "1-3", "0-2", "0-3", "1-4", "1-5"]
    np.testing.assert_array_equal(
        groups.rollout.completion_ids[:, 0], [201, 301, 200, 300, 401, 501]
    )
    np.testing.assert_array_equal(groups.prompt_ids[:, 0], [1, 0, 1])
    np.testing.assert_array_equal(groups.characters, groups.rollout.completion_ids)
    assert groups.scores.totals == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert rounds == 1


def test_resampling_stops_at_its_bound_and_keeps_what_is_left():
    groups, rounds = collect_from([[ALL_RIGHT, MIXED]] + [[ALL_WRONG, ALL_WRONG]] * 2, 2)
    assert [problem.prompt for problem in groups.problems] == ["0-0", "0-1"]
    assert rounds == 2


def test_processes_score_at_the_same_time():
    parts = [groups_of([MIXED], mark) for mark in (3, 2)]
    assert collect.joined(parts).scores.seconds == 8


def test_without_rounds_nothing_is_resampled():
    groups, rounds = collect_from([[ALL_RIGHT, ALL_WRONG]], 0)
    assert rounds == 0 and not resample.mixed_groups(groups).any()


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(num_generations=1), "num-generations"),
        (dict(temperature=0.0), "temperature"),
        (dict(pack_tokens=-1), "pack_tokens=-1"),
        (dict(resample_rounds=-1), "resample_rounds"),
        (dict(resample_rounds=2, loss=LossConfig(policy_weight=0.0)), "teach nothing"),
        (dict(loss=LossConfig(level="sequence")), "aggregation"),
        (dict(loss=LossConfig(beta=0.1, kl_estimator="k1")), "k1"),
    ],
)
def test_a_senseless_setting_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        grpo.GRPOConfig(**change)
