"""Stage two, GRPO: sample, score, compare within the group, update.

Group Relative Policy Optimization, Shao et al., arXiv 2402.03300, section 4. With the default
config it departs from the paper in these points:

1. The loss averages over all tokens of the batch (DAPO), not over completions first.
2. The ratio is clipped asymmetrically (DAPO's clip-higher).
3. beta is 0, so no reference model is loaded; with beta > 0 the KL's gradient is the unbiased one.
4. With one update per rollout the ratio is exactly 1 and no old log-probs are computed.

With a teacher the same steps distil: the reverse KL to it is added to the loss or replaces it.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from gemma_grpo import rewards
from gemma_grpo.data import batches
from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation import collect
from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.model import Params, Remat, in_dtype
from gemma_grpo.objective import advantages
from gemma_grpo.rewards import GivenRewards, RewardConfig
from gemma_grpo.rewards.rubric import JudgedReward
from gemma_grpo.runtime import Runtime
from gemma_grpo.training import extra_rewards, grpo_update, packing, resample
from gemma_grpo.training.config import GRPOConfig
from gemma_grpo.training.draw import Draws, History
from gemma_grpo.training.loop import RunFiles, StepResult
from gemma_grpo.training.rollback import StepFn, run_guarded
from gemma_grpo.training.state import (
    TrainState,
    init_train_state,
    learning_rates,
    make_optimizer,
)
from gemma_grpo.training.update import Packs, UpdateConfig

Score = Callable[[Params, Params, Packs], tuple[jax.Array, ...]]  # see `grpo_update.make_score`


@dataclass(frozen=True)
class Trainer:
    """The stage's programs besides the rollout: see `objective.advantages` and `grpo_update`.
    `score_teacher` is None without a teacher."""

    optimizer: optax.GradientTransformation
    advantages: Callable[..., jax.Array]
    score: Score
    score_teacher: Score | None
    update: Callable[[TrainState, Params, Packs], tuple[TrainState, dict]]


def make_packing(config: GRPOConfig, lengths: tuple[int, int], devices: int) -> packing.Packing:
    """How the stage's batches are cut; see `packing.make_packing`."""
    P, G = config.prompts_per_step, config.num_generations
    return packing.make_packing(P, G, config.pack_tokens, lengths, devices)


@functools.lru_cache(maxsize=8)  # as `make_rollout`
def make_trainer(
    config: GRPOConfig,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    *,
    dtype: str,
    remat: Remat,
    teacher: nnx.GraphDef | None = None,
) -> Trainer:
    """The stage's programs, jitted and not yet compiled: for training and for planning."""
    optimizer = make_optimizer(config.optimizer, config.num_steps * config.num_iterations)
    make_score = partial(
        grpo_update.make_score, mesh=mesh, temperature=config.temperature, dtype=dtype
    )
    update = grpo_update.make_update(
        graphdef,
        mesh,
        optimizer,
        config.loss,
        UpdateConfig(dtype, remat, config.prompts_per_step * config.num_generations),
        temperature=config.temperature,
    )
    return Trainer(
        optimizer,
        advantages.sharded_group_advantages,
        make_score(graphdef),
        None if teacher is None else make_score(teacher),
        update,
    )


@dataclass(frozen=True)
class Collected:
    """A step's rollout, scored: what training and the step's record take from it.

    Attributes:
        groups: P groups on the host.
        weights: reward weights at this step.
        extra_rounds: rollouts beyond the first.
        num_skipped: problems of the first rollout that `skip_uniform` replaced.
        seconds: spent on sampling and scoring.
    """

    groups: collect.Groups
    weights: rewards.RewardWeights
    extra_rounds: int
    num_skipped: int
    seconds: float

    @property
    def totals(self) -> Float[np.ndarray, "P G"]:
        """The total reward of each completion, float32, one group per row."""
        totals = self.groups.scores.totals
        return np.reshape(totals, (len(self.groups.problems), -1)).astype(np.float32)


@dataclass(frozen=True)
class Stage:
    """What the steps of the stage share.

    Attributes:
        draws: chooses the problems of each step.
        extra: the user's rewards and judges.
        packing: how the batches are cut into packs.
        learning_rates: one per update.
        reference: the parameters that the stage began with, in the compute dtype; None if beta = 0.
    """

    config: GRPOConfig
    reward: RewardConfig
    runtime: Runtime
    draws: Draws
    extra: extra_rewards.Extra
    sampler: collect.Sampler
    packing: packing.Packing
    trainer: Trainer
    learning_rates: Float[np.ndarray, " U"]
    reference: Params | None

    def step(self, state: TrainState, step: int) -> tuple[TrainState, StepResult]:
        """One step. A function of its arguments and of the groups on record."""
        started = time.monotonic()
        collected = self._collect(state.params, step)
        advantages_PG = self._advantages(collected.totals)
        packs = self._batch(collected.groups, advantages_PG, step)
        packs = self._score(state.params, packs)
        state, metrics = self._update(state, packs)
        return state, self._record(step, started, collected, advantages_PG, metrics)

    def _collect(self, params: Params, step: int) -> Collected:
        """The step's rollouts, scored. The sampler's copy of the weights is freed on return."""
        started = time.monotonic()
        progress = step / max(self.config.num_steps - 1, 1)
        weights = rewards.weights_at(self.reward.start, self.reward.end, progress)
        groups, extra_rounds = resample.collect_mixed(
            partial(
                self.sampler.collect,
                self.runtime.sampling_params(params),
                weights=weights,
                extra=self.extra,
                trace=self.reward.trace,
            ),
            partial(self.draws.batch, step),
            jax.random.fold_in(self.runtime.key, step),
            resample_rounds=self.config.resample_rounds,
        )
        num_skipped = self.draws.num_skipped(step)
        self.draws.history.add(groups.problems, groups.scores.components["correctness"])
        seconds = time.monotonic() - started
        return Collected(groups, weights, extra_rounds, num_skipped, seconds)

    def _advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """Computed on the devices, returned on the host: advantages_PG."""
        mesh = self.runtime.mesh
        advantages_PG = self.trainer.advantages(
            meshes.place_rows(mesh, rewards_PG),
            mesh,
            scale=self.config.scale,
            baseline=self.config.baseline,
        )
        return meshes.to_host(advantages_PG)

    def _batch(self, groups: collect.Groups, advantages_PG: np.ndarray, step: int) -> Packs:
        """The arrays of the step's updates, packed and on the devices."""
        config, runtime = self.config, self.runtime
        batch = grpo_update.make_batch(
            groups.prompt_ids,
            groups.prompt_mask,
            groups.rollout,
            advantages_PG.reshape(-1),
            config.loss,
        )
        keys = runtime.dropout_keys(step, config.prompts_per_step, config.num_generations)
        return meshes.place_rows(runtime.mesh, packing.pack(batch | keys, self.packing))

    def _score(self, params: Params, packs: Packs) -> Packs:
        """The packs with the log-probs that the updates need: those of the reference, the teacher
        and the old policy."""
        scores = {}
        teacher, score_teacher = self.runtime.teacher, self.trainer.score_teacher
        if self.reference is not None:
            scores["ref_logps"] = self.trainer.score(self.reference, self.runtime.frozen, packs)
        if teacher is not None and score_teacher is not None:
            scores["teacher_logps"] = score_teacher(teacher.params, {}, packs)
        if self.config.num_iterations > 1:
            scores["old_logps"] = self.trainer.score(params, self.runtime.frozen, packs)
        return tuple(
            batch | {name: logps[n] for name, logps in scores.items()}
            for n, batch in enumerate(packs)
        )

    def _update(self, state: TrainState, packs: Packs) -> tuple[TrainState, dict[str, jax.Array]]:
        """All updates on the rollout. The metrics are the last update's, except for the log-probs
        and their gap to the sampler's: these are the first's, before the weights moved."""
        frozen = self.runtime.frozen
        state, first = self.trainer.update(state, frozen, packs)
        last = first
        for _ in range(self.config.num_iterations - 1):
            state, last = self.trainer.update(state, frozen, packs)
        of_first = ("logp_gap/mean", "logp_gap/rms", "trainer_logps")
        return state, last | {name: first[name] for name in of_first}

    def _record(
        self,
        step: int,
        started: float,
        collected: Collected,
        advantages_PG: np.ndarray,
        metrics: dict[str, jax.Array],
    ) -> StepResult:
        """The step's record. The host does its part first, and then waits for the devices."""
        rollouts = _rollout_rows(collected.groups, advantages_PG)
        rollout_metrics = _rollout_metrics(collected, self.extra)
        metrics = jax.device_get(metrics) | rollout_metrics
        tokens = collect.token_arrays(
            collected.groups.rollout, collected.groups.characters, metrics.pop("trainer_logps")
        )
        config, lora = self.config, self.runtime.lora
        if lora.rank and lora.dropout:  # the sampler drops nothing: the gap would show the dropout
            metrics |= dict.fromkeys(("logp_gap/mean", "logp_gap/rms"))
        progress = step / config.num_steps
        last_update = (step + 1) * config.num_iterations - 1
        metrics["learning_rate"] = float(self.learning_rates[last_update])
        is_phased = config.curriculum == "phases"
        metrics["phase"] = batches.curriculum_phase(progress) if is_phased else "all"
        seconds = time.monotonic() - started
        metrics |= {
            "time/step_s": seconds,
            "time/rollout_s": collected.seconds,
            "time/reward_s": collected.groups.scores.seconds,
            "tokens_per_s": float(collected.groups.rollout.completion_mask.sum()) / seconds,
        }
        return StepResult(metrics, rollouts, tokens)


def train(
    config: GRPOConfig,
    reward: GivenRewards,
    runtime: Runtime,
    problems: Sequence[Problem],
    params: Params,
    files: RunFiles,
) -> Params:
    """Run the stage from `params`, or from its last checkpoint, and return its weights. After a
    collapse it may go on from the last good checkpoint at half the learning rate (`GuardConfig`).

    Raises:
        UserError: senseless settings, a reward that fails, a prompt over the budget.
        InterruptedRunError: a signal came; everything is saved.
        CollapsedError: the guard stopped the stage.
    """
    by_difficulty = batches.by_difficulty(problems)
    make_stage = partial(
        Stage,
        config,
        reward.config,
        runtime,
        extra=extra_rewards.load_rewards(reward, runtime, problems, files.run_dir),
        sampler=collect.make_sampler(
            runtime,
            num_generations=config.num_generations,
            sampling=SamplingConfig(temperature=config.temperature),
        ),
        packing=make_packing(config, runtime.lengths, runtime.mesh.size),
        reference=in_dtype(params, runtime.dtype) if config.loss.beta > 0 else None,
    )

    def begin(rate_factor: float) -> tuple[StepFn, Callable[[], TrainState]]:
        """The step function at `rate_factor` times the learning rate; what makes its first state"""
        rate = rate_factor * config.optimizer.learning_rate
        slower = replace(config, optimizer=replace(config.optimizer, learning_rate=rate))
        trainer = make_trainer(
            slower,
            runtime.graphdef,
            runtime.mesh,
            dtype=runtime.dtype,
            remat=runtime.remat,
            teacher=None if runtime.teacher is None else runtime.teacher.graphdef,
        )
        rates = learning_rates(slower.optimizer, config.num_steps * config.num_iterations)
        draws = Draws(config, by_difficulty, runtime.seed, History(files.run_dir))
        stage = make_stage(draws=draws, trainer=trainer, learning_rates=rates)
        return stage.step, partial(init_train_state, params, trainer.optimizer, runtime.mesh)

    state = run_guarded(
        "grpo",
        begin,
        files,
        config.guard,
        num_steps=config.num_steps,
        checkpoint_every=config.checkpoint_every,
    )
    return state.params


def _rollout_metrics(collected: Collected, extra: extra_rewards.Extra) -> dict[str, float | None]:
    """The step's metrics of problems, completions and rewards."""
    groups, rewards_PG = collected.groups, collected.totals
    mixed_P = resample.mixed_groups(groups)
    correct_PG = np.reshape(groups.scores.components["correctness"], rewards_PG.shape)
    components = {}
    for name, values in groups.scores.components.items():
        scored = [value for value in values if value is not None]
        components[f"reward/{name}"] = float(np.mean(scored)) if scored else None
    for name, reward, _ in extra:
        if isinstance(reward, JudgedReward | rewards.TolerantReward):
            values = groups.scores.components[name]
            components[f"missing/{name}"] = reward.num_missing(groups.samples, values)
    return components | {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std(axis=1).mean()),
        **{f"weight/{name}": value for name, value in collected.weights.named().items()},
        "zero_signal_groups": int(np.asarray(advantages.zero_signal_groups(rewards_PG)).sum()),
        "mixed_groups": int(mixed_P.sum()),
        "all_right_groups": float((correct_PG > 0).all(axis=1).mean()),
        "all_wrong_groups": float((correct_PG == 0).all(axis=1).mean()),
        "resample_rounds": collected.extra_rounds,
        "skipped_problems": collected.num_skipped,
        "completion_length/mean": float(groups.rollout.completion_mask.sum(axis=1).mean()),
        "truncated": float(1 - groups.rollout.stopped.mean()),
        **_difficulty_shares(groups.problems),
    }


def _difficulty_shares(problems_P: Sequence[Problem]) -> dict[str, float]:
    """The share of each difficulty among the problems."""
    drawn = [problem.difficulty for problem in problems_P]
    return {f"share/{name}": drawn.count(name) / len(drawn) for name in DIFFICULTIES}


def _rollout_rows(groups: collect.Groups, advantages_PG: np.ndarray) -> list[dict]:
    """The record of each completion: text, length, advantage, every reward component."""
    G = advantages_PG.shape[1]
    return [
        {
            "group": row // G,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "difficulty": sample.difficulty,
            "domain": groups.problems[row // G].domain,
            "completion": sample.completion,
            "num_tokens": sample.num_tokens,
            "stopped": sample.stopped,
            "reward": groups.scores.totals[row],
            "advantage": float(advantages_PG[row // G, row % G]),
            **{name: values[row] for name, values in groups.scores.components.items()},
        }
        for row, sample in enumerate(groups.samples)
    ]
