"""Stage two, GRPO: sample, score, compare within the group, update. Knows no flag, file or preset.

Group Relative Policy Optimization, Shao et al., arXiv 2402.03300, section 4. As the config's
defaults stand it departs from the paper in these points:

1. The loss averages over all tokens of the batch (DAPO), not over completions first.
2. The ratio is clipped asymmetrically (DAPO's clip-higher).
3. beta is 0, so no reference model is loaded; with beta > 0 the KL's gradient is the unbiased one.
4. With one update per rollout the ratio is exactly 1 and no old log-probs are computed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from gemma_grpo import rewards
from gemma_grpo.data import batches
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.generation import collect
from gemma_grpo.model import Params, Remat, in_dtype
from gemma_grpo.objective import advantages
from gemma_grpo.objective import checks as loss_checks
from gemma_grpo.rewards import RewardConfig, load_extra_rewards
from gemma_grpo.runtime import Runtime
from gemma_grpo.training import grpo_update, packing, resample
from gemma_grpo.training.grpo_update import LossConfig
from gemma_grpo.training.loop import RunFiles, StepResult, run_steps
from gemma_grpo.training.state import (
    OptimizerConfig,
    TrainState,
    init_train_state,
    make_optimizer,
)


@dataclass(frozen=True)
class GRPOConfig:
    """Stage two."""

    num_steps: int = 200
    """Steps; each is one rollout and `num_iterations` updates."""
    prompts_per_step: int = 8
    """P, different prompts a step."""
    num_generations: int = 8
    """G, completions of each prompt."""
    temperature: float = 1.0
    """Of the sampler, and of the log-probs trained on."""
    num_iterations: int = 1
    """Updates on each rollout (mu)."""
    accumulation_steps: int = 1
    """Passes that an update's prompts are taken in; more need less memory."""
    scale: advantages.Scale = "group"
    """What advantages are divided by: the group's std, the batch's, or nothing."""
    baseline: advantages.Baseline = "mean"
    """What is subtracted from a reward: its group's mean, or that of the others (leave_one_out)."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the weights move."""
    resample_rounds: int = 0
    """Extra rollouts a step, at most, to replace groups that are all right or all wrong (DAPO)."""
    curriculum: bool = True
    """Easy problems first, then medium, then hard ones; false draws from all alike."""
    prompt_bucket: int = 128
    """Prompts are padded to a multiple of so many tokens in the update."""
    length_bucket: int = 32
    """Completions are padded to a multiple of so many tokens in the update."""
    packed_sizes: int = 8
    """Of a padded batch's completions the update works on the smallest n/packed_sizes that holds
    their tokens; each size is compiled once. 1 works on all of it."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self):
        if self.num_steps < 1 or self.prompts_per_step < 1 or self.checkpoint_every < 1:
            raise UserError(
                "grpo: num_steps, prompts_per_step and checkpoint_every must be at least 1"
            )
        if self.accumulation_steps < 1 or self.prompts_per_step % self.accumulation_steps:
            raise UserError(
                f"grpo: prompts_per_step={self.prompts_per_step} must be a multiple of "
                f"accumulation_steps={self.accumulation_steps}"
            )
        if self.prompt_bucket < 1 or self.length_bucket < 1:
            raise UserError("grpo: prompt_bucket and length_bucket must be at least 1")
        if not self.temperature > 0:
            raise UserError(f"grpo: temperature={self.temperature} must be above 0 to explore")
        packing.check_sizes("grpo", self.packed_sizes)
        if self.resample_rounds < 0:
            raise UserError(f"grpo: resample_rounds={self.resample_rounds} must be 0 or more")
        self.check()

    def check(self) -> list[str]:
        """Warnings about unwise settings; UserError for senseless ones."""
        loss = self.loss
        return loss_checks.check_combination(
            num_generations=self.num_generations,
            scale=self.scale,
            baseline=self.baseline,
            objective=loss.objective,
            level=loss.level,
            aggregation=loss.aggregation,
            epsilon=loss.epsilon,
            epsilon_high=loss.epsilon_high,
            dual_clip=loss.dual_clip,
            beta=loss.beta,
            kl_estimator=loss.kl_estimator,
            tis_cap=loss.tis_cap,
            num_iterations=self.num_iterations,
        )


@dataclass(frozen=True)
class Trainer:
    """What scores and updates on the devices: see `grpo_update`."""

    optimizer: optax.GradientTransformation
    score: Callable[[Params, Params, dict], jax.Array]
    update: Callable[[TrainState, Params, dict], tuple[TrainState, dict]]


def make_trainer(
    config: GRPOConfig, graphdef: nnx.GraphDef, mesh: Mesh, *, dtype: str, remat: Remat
) -> Trainer:
    """The stage's programs, jitted and not yet compiled: for training, and to plan it."""
    optimizer = make_optimizer(config.optimizer, config.num_steps * config.num_iterations)
    score = grpo_update.make_score(graphdef, mesh, temperature=config.temperature, dtype=dtype)
    update = grpo_update.make_update(
        graphdef,
        mesh,
        optimizer,
        config.loss,
        temperature=config.temperature,
        accumulation_steps=config.accumulation_steps,
        dtype=dtype,
        remat=remat,
    )
    return Trainer(optimizer, score, update)


def train(
    config: GRPOConfig,
    reward: RewardConfig,
    runtime: Runtime,
    problems: Sequence[Problem],
    params: Params,
    files: RunFiles,
) -> Params:
    """Run the stage from `params`, or from where its checkpoints stand, and return its weights.

    Raises:
        UserError: senseless settings, a reward that fails, a prompt over the budget.
        InterruptedRunError: a signal came; everything is saved.
    """
    extra = load_extra_rewards(reward.extra)
    trainer = make_trainer(
        config,
        runtime.graphdef,
        runtime.mesh,
        dtype=runtime.dtype,
        remat=runtime.remat,
    )
    sampler = collect.make_sampler(
        runtime, num_generations=config.num_generations, temperature=config.temperature
    )
    reference = in_dtype(params, runtime.dtype) if config.loss.beta > 0 else None
    step_fn = partial(
        _step,
        config,
        reward,
        runtime,
        batches.by_difficulty(problems),
        extra,
        sampler,
        trainer,
        reference,
    )
    state = init_train_state(params, trainer.optimizer, runtime.mesh)
    state = run_steps(
        "grpo",
        step_fn,
        state,
        files,
        num_steps=config.num_steps,
        checkpoint_every=config.checkpoint_every,
    )
    return state.params


def _step(
    config: GRPOConfig,
    reward: RewardConfig,
    runtime: Runtime,
    by_difficulty: dict[str, list[Problem]],
    extra: list[tuple[str, rewards.Reward, float]],
    sampler: collect.Sampler,
    trainer: Trainer,
    reference: Params | None,
    state: TrainState,
    step: int,
) -> tuple[TrainState, StepResult]:
    """One step: rollout -> rewards -> advantages -> log-probs where needed -> updates."""
    progress = step / max(config.num_steps - 1, 1)
    weights = rewards.weights_at(reward.start, reward.end, progress)
    draw = partial(_draw_problems, config, by_difficulty, runtime.seed, step)
    key = jax.random.fold_in(jax.random.key(runtime.seed), step)
    started = time.monotonic()
    sample = partial(
        sampler.collect,
        runtime.sampling_params(state.params),
        weights=weights,
        extra=extra,
        trace=reward.trace,
    )
    groups, extra_rounds = resample.collect_mixed(
        sample, draw, key, resample_rounds=config.resample_rounds
    )
    del sample  # with the rollout's copy of the weights: the update needs the memory
    rollout_seconds = time.monotonic() - started
    rewards_PG = np.reshape(groups.scores.totals, (config.prompts_per_step, -1)).astype(np.float32)
    advantages_PG = advantages.sharded_group_advantages(
        meshes.place_rows(runtime.mesh, rewards_PG),
        runtime.mesh,
        scale=config.scale,
        baseline=config.baseline,
    )
    advantages_PG = meshes.to_host(advantages_PG)
    batch = grpo_update.make_batch(
        groups.prompt_ids,
        groups.prompt_mask,
        groups.rollout,
        advantages_PG.reshape(-1),
        aggregation=config.loss.aggregation,
        mask_truncated=config.loss.mask_truncated,
        prompt_bucket=config.prompt_bucket,
        length_bucket=config.length_bucket,
    )
    frozen = runtime.frozen
    batch = packing.pack(
        batch | runtime.dropout_keys(step, config.prompts_per_step),
        num_devices=runtime.mesh.size,
        passes=config.accumulation_steps,
        sizes=config.packed_sizes,
    )
    batch = meshes.place_rows(runtime.mesh, batch)
    if reference is not None:
        batch["ref_logps"] = trainer.score(reference, frozen, batch)
    if config.num_iterations > 1:
        batch["old_logps"] = trainer.score(state.params, frozen, batch)
    state, first = trainer.update(state, frozen, batch)
    last = first
    for _ in range(config.num_iterations - 1):
        state, last = trainer.update(state, frozen, batch)
    # The host's part while the devices are at theirs.
    of_rollout = _rollout_metrics(groups, rewards_PG, weights, extra_rounds)
    rollout_rows = _rollout_rows(groups, advantages_PG)
    gap = {name: value for name, value in first.items() if name.startswith("logp_gap/")}
    metrics = jax.device_get(last | gap) | of_rollout
    metrics["phase"] = _phase(config, step)
    seconds = time.monotonic() - started
    metrics |= {
        "time/step_s": seconds,
        "time/rollout_s": rollout_seconds,
        "tokens_per_s": float(groups.rollout.completion_mask.sum()) / seconds,
    }
    return state, StepResult(metrics, rollout_rows)


def _phase(config: GRPOConfig, step: int) -> str:
    return batches.curriculum_phase(step / config.num_steps) if config.curriculum else "all"


def _draw_problems(
    config: GRPOConfig,
    by_difficulty: dict[str, list[Problem]],
    seed: int,
    step: int,
    sampling_round: int,
) -> list[Problem]:
    """The problems of one sampling round: a function of (seed, step, round) alone."""
    round_seed = seed + 1_000_003 * sampling_round
    if config.curriculum:
        return batches.phase_batch(
            by_difficulty,
            step=step,
            num_steps=config.num_steps,
            batch_size=config.prompts_per_step,
            seed=round_seed,
        )
    problems = sum(by_difficulty.values(), [])
    taken = batches.batch_indices(step, config.prompts_per_step, len(problems), round_seed)
    return [problems[i] for i in taken]


def _rollout_metrics(
    groups: collect.Groups,
    rewards_PG: np.ndarray,
    weights: rewards.RewardWeights,
    extra_rounds: int,
) -> dict[str, float]:
    mixed_P = resample.mixed_groups(groups)
    components = {
        f"reward/{name}": float(np.mean(values))
        for name, values in groups.scores.components.items()
    }
    return components | {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std(axis=1).mean()),
        **{f"weight/{name}": value for name, value in weights.named().items()},
        "zero_signal_groups": int(np.asarray(advantages.zero_signal_groups(rewards_PG)).sum()),
        "mixed_groups": int(mixed_P.sum()),
        "resample_rounds": extra_rounds,
        "completion_length/mean": float(groups.rollout.completion_mask.sum(axis=1).mean()),
        "truncated": float(1 - groups.rollout.stopped.mean()),
    }


def _rollout_rows(groups: collect.Groups, advantages_PG: np.ndarray) -> list[dict]:
    """What is kept of each completion: text, length, every reward component."""
    G = advantages_PG.shape[1]
    return [
        {
            "group": row // G,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "difficulty": sample.difficulty,
            "completion": sample.completion,
            "num_tokens": sample.num_tokens,
            "stopped": sample.stopped,
            "reward": groups.scores.totals[row],
            "advantage": float(advantages_PG[row // G, row % G]),
            **{name: values[row] for name, values in groups.scores.components.items()},
        }
        for row, sample in enumerate(groups.samples)
    ]
