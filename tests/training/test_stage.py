"""A step as it is put together, of GRPO and of SFT: what its draws, scores and updates are given,
what it says.

Nothing is sampled here and no model runs: the weights are one number, which each update raises by
one, and a log-prob is that number.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stubs import tiny_runtime

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.generation import collect
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.objective import advantages
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.rewards import GivenRewards, RewardConfig
from gemma_grpo.runtime import Runtime
from gemma_grpo.training import grpo, sft
from gemma_grpo.training.config import OptimizerConfig, SFTConfig
from gemma_grpo.training.draw import Draws, History
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.loop import RunFiles
from gemma_grpo.training.state import TrainState

P, G, T = 2, 2, 3
MASK_BT = np.arange(T) < np.array([3, 1, 2, 3])[:, None]
PROBLEMS = [Problem("one", "1", difficulty="easy"), Problem("two", "2", difficulty="hard")]
RUNTIME = tiny_runtime(max_prompt_length=4, max_completion_length=T)


@dataclass(frozen=True)
class GivenGroups(collect.Sampler):
    """Two groups: one of a right and a wrong completion, one all wrong but paid differently."""

    seen: list = field(default_factory=list)

    def collect(self, params, problems_P, key, weights, extra, trace="arithmetic"):
        self.seen.append((float(params["w"]), jax.random.key_data(key).tolist(), weights))
        stopped = np.array([True, True, False, True])
        rollout = Rollout(np.where(MASK_BT, 5, 0), MASK_BT, np.zeros((P * G, T)), stopped)
        samples = [rewards.Sample(f"{b}", "", "1", "easy", 1, T, (), True) for b in range(P * G)]
        scores = rewards.Scores({"correctness": [1.0, 0.0, 0.0, 0.0]}, [1.0, 0.0, 4.0, 2.0])
        prompts = np.ones((P, 4), np.int32), np.ones((P, 4), bool)
        return collect.Groups(list(problems_P), *prompts, rollout, MASK_BT, samples, scores)


def stage_of(tmp_path, *, reference=None, **settings):
    """A stage, what its sampler was given, and what its updates were."""
    config = grpo.GRPOConfig(prompts_per_step=P, num_generations=G, curriculum="none", **settings)
    updates = []

    def update(state, frozen, packs):
        updates.append((float(state.params["w"]), packs))
        w = state.params["w"]
        metrics = {"loss": w, "logp_gap/mean": w, "logp_gap/rms": w}
        metrics["trainer_logps"] = jnp.where(MASK_BT, -w, 0.0)
        return TrainState({"w": w + 1}, (), state.num_updates + 1), metrics

    trainer = grpo.Trainer(
        optax.identity(),
        advantages.sharded_group_advantages,
        lambda params, frozen, packs: (jnp.full((P * G, T), params["w"]),),
        None,
        update,
    )
    sampler = GivenGroups(lambda: None, RUNTIME.mesh, RUNTIME.tokenizer, "", 4, G)
    stage = grpo.Stage(
        config,
        RewardConfig(),
        RUNTIME,
        Draws(config, {"easy": PROBLEMS}, 0, History(tmp_path)),
        [],
        sampler,
        grpo.make_packing(config, RUNTIME.lengths, 1),
        trainer,
        np.arange(config.num_steps * config.num_iterations, dtype=np.float32),
        reference,
    )
    return stage, sampler.seen, updates


def state_at(w):
    return TrainState({"w": jnp.float32(w)}, (), jnp.int32(0))


def test_all_updates_on_a_rollout_have_the_log_probs_of_before_the_first(tmp_path):
    stage, _, updates = stage_of(
        tmp_path, num_iterations=3, loss=LossConfig(beta=0.1), reference={"w": jnp.float32(7)}
    )
    state, result = stage.step(state_at(10), 1)
    assert float(state.params["w"]) == 13 and [w for w, _ in updates] == [10, 11, 12]
    for _, (pack,) in updates:
        np.testing.assert_array_equal(pack["old_logps"], np.full((P * G, T), 10))
        np.testing.assert_array_equal(pack["ref_logps"], np.full((P * G, T), 7))
        assert "teacher_logps" not in pack
    # The loss is the last update's, the gap to the sampler the first's.
    assert float(result.metrics["loss"]) == 12 and float(result.metrics["logp_gap/mean"]) == 10
    np.testing.assert_array_equal(result.tokens["gaps"], np.full(MASK_BT.sum(), -10))
    # Step 1 takes updates 3, 4 and 5, and the rate of update n is n here.
    assert result.metrics["learning_rate"] == 5


def test_two_updates_on_a_rollout_have_old_log_probs_and_one_has_none(tmp_path):
    for num_iterations in (1, 2):
        stage, _, updates = stage_of(tmp_path, num_iterations=num_iterations)
        stage.step(state_at(10), 0)
        assert len(updates) == num_iterations
        for _, (pack,) in updates:
            assert ("old_logps" in pack) == (num_iterations == 2)
            assert "ref_logps" not in pack


def test_each_step_samples_from_the_newest_weights_with_a_key_of_its_own(tmp_path):
    stage, seen, _ = stage_of(tmp_path)
    state = state_at(10)
    for step in range(3):
        state, _ = stage.step(state, step)
    stage.step(state_at(10), 0)
    assert [w for w, *_ in seen] == [10, 11, 12, 10]
    first, second, third, again = (tuple(key) for _, key, _ in seen)
    assert len({first, second, third}) == 3 and again == first


def test_rewards_have_their_start_weights_in_the_first_step_and_their_end_weights_in_the_last(
    tmp_path,
):
    stage, seen, _ = stage_of(tmp_path, num_steps=3)
    for step in range(3):
        stage.step(state_at(10), step)
    assert [weights.correctness for *_, weights in seen] == pytest.approx([0.4, 0.5, 0.6])


def test_a_step_says_what_its_groups_earned_and_which_were_cut_off(tmp_path):
    stage, _, _ = stage_of(tmp_path, scale="none")
    _, result = stage.step(state_at(10), 0)
    assert {name: result.metrics[name] for name in EXPECTED} == EXPECTED
    rows = [(row["group"], row["reward"], row["advantage"]) for row in result.rollouts]
    assert rows == [(0, 1, 0.5), (0, 0, -0.5), (1, 4, 1), (1, 2, -1)]


# Totals 1 and 0, 4 and 2; the second group is wrong throughout; one of four was cut off.
EXPECTED = {
    "reward/mean": 1.75,
    "reward/std": 0.75,  # 0.5 and 1
    "reward/correctness": 0.25,
    "zero_signal_groups": 0,
    "mixed_groups": 1,
    "all_right_groups": 0.0,
    "all_wrong_groups": 0.5,
    "completion_length/mean": 2.25,
    "truncated": 0.25,
    "share/easy": 0.5,
    "share/hard": 0.5,
}


def rates_of(optimizer, num_updates):
    """By how much each update moves a weight whose gradient is always 1: Adam's step is then the
    rate."""
    params = {"w": jnp.zeros(())}
    state, moved = optimizer.init(params), []
    for _ in range(num_updates):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        moved.append(-float(updates["w"]))
    return moved


LINEAR = OptimizerConfig(learning_rate=0.4, warmup=0.0, decay="linear", final_rate=0.25)


def test_the_rate_falls_over_the_updates_of_all_steps():
    config = grpo.GRPOConfig(num_steps=2, num_iterations=2, optimizer=LINEAR)
    trainer = grpo.make_trainer(
        config, RUNTIME.graphdef, RUNTIME.mesh, dtype="float32", remat="none"
    )
    assert rates_of(trainer.optimizer, 4) == pytest.approx([0.4, 0.3, 0.2, 0.1], rel=1e-5)


def test_a_stage_samples_at_its_temperature_and_goes_on_with_the_share_of_its_rate(
    tmp_path, monkeypatch
):
    begun = []
    monkeypatch.setattr(grpo, "run_guarded", lambda stage, begin, *_, **__: begun.append(begin))
    made, make_sampler = [], collect.make_sampler

    def noted(runtime, **settings):
        made.append(settings)
        return make_sampler(runtime, **settings)

    monkeypatch.setattr(collect, "make_sampler", noted)
    config = grpo.GRPOConfig(
        num_steps=4, prompts_per_step=P, num_generations=G, temperature=0.7, optimizer=LINEAR
    )
    files = RunFiles(tmp_path, None, Interrupt())
    with pytest.raises(AttributeError, match="params"):  # the fake trains nothing
        grpo.train(config, GivenRewards(RewardConfig()), RUNTIME, PROBLEMS, {}, files)
    assert [(each["num_generations"], each["sampling"].temperature) for each in made] == [(G, 0.7)]
    step, _ = begun[0](0.5)
    stage = step.__self__
    np.testing.assert_allclose(stage.learning_rates, [0.2, 0.15, 0.1, 0.05], rtol=1e-5)
    assert rates_of(stage.trainer.optimizer, 4) == pytest.approx([0.2, 0.15, 0.1, 0.05], rel=1e-5)


def sft_stage():
    """SFT's stage over two demonstrations of 3 and of 1 token, and the packs of its updates."""
    config, packs = SFTConfig(num_steps=3, batch_size=2), []

    def update(state, frozen, given):
        packs.append(given)
        return state, {"loss": jnp.float32(0.5), "grad_norm": jnp.float32(2)}

    how = sft.make_packing(config, RUNTIME.lengths, 1)
    rates = np.array([0.1, 0.2, 0.3], np.float32)
    return sft.Stage(config, RUNTIME, [[5], [6]], [[7, 8, 9], [7]], how, rates, update), packs


def test_an_sft_step_says_its_own_learning_rate_and_the_speed_in_tokens_that_are_learnt():
    stage, _ = sft_stage()
    for step, rate in enumerate([0.1, 0.2, 0.3]):
        said = stage.step(state_at(0), step)[1].metrics
        assert said["learning_rate"] == pytest.approx(rate)
        assert said["tokens_per_s"] * said["time/step_s"] == pytest.approx(3 + 1)
        assert (said["loss"], said["grad_norm"]) == (0.5, 2.0)


def test_each_sft_step_drops_other_inputs_of_the_adapters(monkeypatch):
    asked = []
    monkeypatch.setattr(Runtime, "dropout_keys", lambda _, *given: asked.append(given) or {})
    stage, _ = sft_stage()
    for step in range(3):
        stage.step(state_at(0), step)
    assert asked == [(0, 2, 1), (1, 2, 1), (2, 2, 1)]  # step, prompts, completions of each


def test_the_sft_stage_cuts_its_batches_over_all_devices(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(sft, "init_train_state", lambda *_: state_at(0))
    monkeypatch.setattr(
        sft, "run_steps", lambda name, step_fn, state, *_, **__: begun.append(step_fn) or state
    )
    runtime = tiny_runtime(2)
    shown = [replace(problem, completion=problem.answer) for problem in PROBLEMS]
    sft.train(
        SFTConfig(num_steps=3, batch_size=2),
        runtime,
        shown,
        {},
        RunFiles(tmp_path, None, Interrupt()),
    )
    assert begun[0].__self__.packing.num_devices == 2
