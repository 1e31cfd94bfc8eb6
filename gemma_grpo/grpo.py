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
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from gemma_grpo import advantages, collect, losses, padding, rewards
from gemma_grpo import mesh as meshes
from gemma_grpo.accumulation import accumulate
from gemma_grpo.data import batches
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.logps import completion_logps
from gemma_grpo.loop import RunFiles, StepResult, run_steps
from gemma_grpo.model import Params
from gemma_grpo.rollout import make_rollout
from gemma_grpo.runtime import Runtime
from gemma_grpo.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    in_dtype,
    init_train_state,
    make_optimizer,
)


@dataclass(frozen=True)
class RewardConfig:
    """What a completion is paid for; the weights go linearly from `start` to `end`."""

    start: rewards.RewardWeights = rewards.START_WEIGHTS
    """Weights at the first step."""
    end: rewards.RewardWeights = rewards.END_WEIGHTS
    """Weights at the last step."""
    extra: tuple[str, ...] = ()
    """Rewards of your own, each path/to/file.py:function or path/to/file.py:function=weight."""


@dataclass(frozen=True)
class LossConfig:
    """The objective. `losses.check_combination` refuses what makes no sense together."""

    objective: losses.Objective = "clip"
    """clip: PPO's clipped surrogate; cispo: clipped weights, unclipped gradient."""
    level: losses.Level = "token"
    """Ratio of each token, or GSPO's of the sequence."""
    aggregation: losses.Aggregation = "token_mean"
    """token_mean (DAPO), sequence_mean (GRPO), constant (Dr.GRPO)."""
    epsilon: float = 0.2
    """Lower clip width."""
    epsilon_high: float = 0.28
    """Upper clip width."""
    dual_clip: float | None = None
    """Bound on the loss of bad tokens, above 1; none is off."""
    beta: float = 0.0
    """Weight of the KL to the reference, the model that the stage began with; 0 loads none."""
    kl_estimator: losses.KlEstimator = "k3_unbiased"
    """Per-token estimate of that KL."""
    tis_cap: float | None = None
    """Cap of the sampler-trainer importance weight; none is off."""
    tis_level: losses.TisLevel = "token"
    """Importance weight of each token, or of the sequence."""
    mask_truncated: bool = False
    """Leave completions that ran out of budget out of the loss."""


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
    length_bucket: int = 32
    """Completions are padded to a multiple of so many tokens in the update."""
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
        if not self.temperature > 0:
            raise UserError(f"grpo: temperature={self.temperature} must be above 0 to explore")
        if self.resample_rounds < 0:
            raise UserError(f"grpo: resample_rounds={self.resample_rounds} must be 0 or more")
        self.check()

    def check(self) -> list[str]:
        """Warnings about unwise settings; UserError for senseless ones."""
        loss = self.loss
        return losses.check_combination(
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


def make_batch(
    groups: collect.Groups,
    advantages_B: np.ndarray,
    *,
    aggregation: losses.Aggregation,
    mask_truncated: bool,
    length_bucket: int,
) -> dict[str, np.ndarray]:
    """The arrays of an update. Completions are cut to the bucket of the longest one.

    `loss_mask` is the completion mask, without truncated completions if they are to be left out;
    `weights` is each token's share in the loss of the whole batch.
    """
    rollout = groups.rollout
    T = rollout.completion_ids.shape[1]
    longest = int(rollout.completion_mask.sum(axis=1).max())
    cut = slice(0, padding.bucket(longest, multiple=length_bucket, maximum=T))
    mask_BT = rollout.completion_mask[:, cut]
    loss_mask_BT = mask_BT & rollout.stopped[:, None] if mask_truncated else mask_BT
    weights_BT = losses.token_weights(
        loss_mask_BT.astype(np.float32), aggregation=aggregation, max_completion_length=T
    )
    return {
        "prompt_ids": groups.prompt_ids,
        "prompt_mask": groups.prompt_mask,
        "completion_ids": rollout.completion_ids[:, cut],
        "completion_mask": mask_BT,
        "loss_mask": loss_mask_BT,
        "weights": np.asarray(weights_BT),
        "sampler_logps": rollout.sampler_logps[:, cut],
        "advantages": np.asarray(advantages_B, np.float32),
    }


def make_score(
    graphdef: nnx.GraphDef, mesh: Mesh, *, temperature: float, dtype: str, logits_chunk: int
) -> Callable[[Params, dict], jax.Array]:
    """The jitted (params, batch) -> logps_BT, without gradient: reference and old log-probs."""

    def score(params: Params, batch: dict) -> jax.Array:
        logps_BT, _ = completion_logps(
            nnx.merge(graphdef, in_dtype(params, dtype)),
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["completion_ids"],
            batch["completion_mask"],
            temperature=temperature,
            logits_chunk=logits_chunk,
        )
        return logps_BT

    rows, whole = meshes.rows(mesh), meshes.whole(mesh)
    return jax.jit(score, in_shardings=(whole, rows), out_shardings=rows)


def make_update(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    *,
    temperature: float,
    accumulation_steps: int,
    dtype: str,
    logits_chunk: int,
    remat: bool,
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted (state, batch) -> (state, metrics): one optimizer update on a rollout.

    The batch may hold `old_logps` (without them the update is on-policy) and must hold `ref_logps`
    if beta > 0. Metrics beside those of `losses.metric_means`: `loss`; `entropy`, nats per token;
    `logp_gap/mean` and `logp_gap/rms`, |trainer - sampler| log-prob over completion tokens, which
    says something about the code on the first update of a rollout only; `grad_norm`, before
    clipping.
    """

    def loss_fn(params: Params, batch: dict) -> tuple[jax.Array, dict]:
        logps_BT, entropy_BT = completion_logps(
            nnx.merge(graphdef, in_dtype(params, dtype)),
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["completion_ids"],
            batch["completion_mask"],
            temperature=temperature,
            logits_chunk=logits_chunk,
            remat=remat,
        )
        total, sums = losses.policy_loss(
            logps_BT,
            batch.get("old_logps"),
            batch.get("ref_logps"),
            batch["sampler_logps"],
            batch["advantages"],
            batch["loss_mask"].astype(jnp.float32),
            batch["weights"],
            objective=loss.objective,
            level=loss.level,
            epsilon=loss.epsilon,
            epsilon_high=loss.epsilon_high,
            dual_clip=loss.dual_clip,
            beta=loss.beta,
            kl_estimator=loss.kl_estimator,
            tis_cap=loss.tis_cap,
            tis_level=loss.tis_level,
        )
        mask_BT = batch["completion_mask"]
        gap_BT = jnp.where(mask_BT, jnp.abs(logps_BT - batch["sampler_logps"]), 0.0)
        sums |= {
            "loss": total,
            "sampled_tokens": mask_BT.sum().astype(jnp.float32),
            "entropy_sum": jnp.where(mask_BT, entropy_BT, 0.0).sum(),
            "gap_sum": gap_BT.sum(),
            "gap_square_sum": jnp.square(gap_BT).sum(),
        }
        return total, jax.tree.map(jax.lax.stop_gradient, sums)

    def update(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        num_prompts = batch["prompt_ids"].shape[0]
        grads, sums = accumulate(
            loss_fn, state.params, batch, num_prompts=num_prompts, passes=accumulation_steps
        )
        metrics = losses.metric_means(sums) | {
            "loss": sums["loss"],
            "entropy": sums["entropy_sum"] / sums["sampled_tokens"],
            "logp_gap/mean": sums["gap_sum"] / sums["sampled_tokens"],
            "logp_gap/rms": jnp.sqrt(sums["gap_square_sum"] / sums["sampled_tokens"]),
            "grad_norm": optax.global_norm(grads),
        }
        return apply_gradients(state, grads, optimizer), metrics

    rows, whole = meshes.rows(mesh), meshes.whole(mesh)
    return jax.jit(update, donate_argnums=0, in_shardings=(whole, rows), out_shardings=whole)


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
    runtime.check_rows(prompts_per_step=config.prompts_per_step)
    padding.encode_prompts(  # all of them now: a prompt over the budget must not show at step 150
        problems,
        runtime.tokenizer,
        instruction=runtime.instruction,
        max_prompt_length=runtime.max_prompt_length,
    )
    optimizer = make_optimizer(config.optimizer, config.num_steps * config.num_iterations)
    programs = _Programs(
        sampler=collect.Sampler(
            rollout=make_rollout(
                runtime.graphdef,
                runtime.mesh,
                num_generations=config.num_generations,
                max_completion_length=runtime.max_completion_length,
                stop_ids=runtime.tokenizer.stop_ids,
                pad_id=runtime.tokenizer.pad_id,
                temperature=config.temperature,
            ),
            tokenizer=runtime.tokenizer,
            instruction=runtime.instruction,
            max_prompt_length=runtime.max_prompt_length,
            num_generations=config.num_generations,
        ),
        score=make_score(
            runtime.graphdef,
            runtime.mesh,
            temperature=config.temperature,
            dtype=runtime.dtype,
            logits_chunk=runtime.logits_chunk,
        ),
        update=make_update(
            runtime.graphdef,
            runtime.mesh,
            optimizer,
            config.loss,
            temperature=config.temperature,
            accumulation_steps=config.accumulation_steps,
            dtype=runtime.dtype,
            logits_chunk=runtime.logits_chunk,
            remat=runtime.remat,
        ),
    )
    reference = jax.tree.map(jnp.copy, params) if config.loss.beta > 0 else None
    step_fn = partial(
        _step, config, reward, runtime, batches.by_difficulty(problems), extra, programs, reference
    )
    # Placed before the first update, which would else be compiled for this placement and again
    # for that of its own result.
    state = jax.device_put(
        init_train_state(jax.tree.map(jnp.copy, params), optimizer), meshes.whole(runtime.mesh)
    )
    state = run_steps(
        "grpo",
        step_fn,
        state,
        files,
        num_steps=config.num_steps,
        checkpoint_every=config.checkpoint_every,
    )
    return state.params


def load_extra_rewards(specs: Sequence[str]) -> list[tuple[str, rewards.Reward, float]]:
    """(name, function, weight) of each `path/to/file.py:function[=weight]`; the weight is 1 if
    unsaid.

    Raises:
        UserError: an unreadable weight, or what `rewards.load_reward` refuses.
    """
    loaded = []
    for spec in specs:
        location, equals, weight = spec.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError as error:
            raise UserError(f"--reward {spec}: {weight!r} is no weight; give a number") from error
        loaded.append((location.rpartition(":")[2], rewards.load_reward(location), value))
    return loaded


@dataclass(frozen=True)
class _Programs:
    sampler: collect.Sampler
    score: Callable[[Params, dict], jax.Array]
    update: Callable[[TrainState, dict], tuple[TrainState, dict]]


def _step(
    config: GRPOConfig,
    reward: RewardConfig,
    runtime: Runtime,
    by_difficulty: dict[str, list[Problem]],
    extra: list[tuple[str, rewards.Reward, float]],
    programs: _Programs,
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
        programs.sampler.collect,
        in_dtype(state.params, runtime.dtype),
        weights=weights,
        extra=extra,
    )
    groups, extra_rounds = collect.collect_mixed(
        sample, draw, key, resample_rounds=config.resample_rounds
    )
    rollout_seconds = time.monotonic() - started
    rewards_PG = np.reshape(groups.scores.totals, (config.prompts_per_step, -1)).astype(np.float32)
    advantages_PG = advantages.sharded_group_advantages(
        jnp.asarray(rewards_PG), runtime.mesh, scale=config.scale, baseline=config.baseline
    )
    batch = make_batch(
        groups,
        np.asarray(advantages_PG).reshape(-1),
        aggregation=config.loss.aggregation,
        mask_truncated=config.loss.mask_truncated,
        length_bucket=config.length_bucket,
    )
    if reference is not None:
        batch["ref_logps"] = programs.score(reference, batch)
    if config.num_iterations > 1:
        batch["old_logps"] = programs.score(state.params, batch)
    state, first = programs.update(state, batch)
    last = first
    for _ in range(config.num_iterations - 1):
        state, last = programs.update(state, batch)
    gap = {name: value for name, value in first.items() if name.startswith("logp_gap/")}
    metrics = jax.device_get(last | gap)
    metrics |= _rollout_metrics(groups, rewards_PG, weights, extra_rounds)
    metrics["phase"] = _phase(config, step)
    seconds = time.monotonic() - started
    metrics |= {
        "time/step_s": seconds,
        "time/rollout_s": rollout_seconds,
        "tokens_per_s": float(groups.rollout.completion_mask.sum()) / seconds,
    }
    return state, StepResult(metrics, _rollout_rows(groups, np.asarray(advantages_PG)))


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
    mixed_P = collect.mixed_groups(groups)
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
