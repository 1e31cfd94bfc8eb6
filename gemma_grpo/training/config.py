"""The settings of training: the two stages, their optimizer, checkpoints. Does not import jax."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gemma_grpo.errors import UserError
from gemma_grpo.objective import checks
from gemma_grpo.objective.config import Baseline, LossConfig, Scale
from gemma_grpo.records.metric_notes import NOTES

Curriculum = Literal["phases", "pass_rate", "none"]

LARGE = 1e9  # more than any limit of a guard


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a clipped gradient and a schedule."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the updates over which the rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the schedule after the warm-up."""
    final_rate: float = 0.1
    """Rate at the last update, as a share of the peak (linear and cosine)."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.95
    """Adam's decay of the second moment."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay; norm gains are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self):
        for name, value, low, high, wanted in (
            ("learning_rate", self.learning_rate, 0, math.inf, "0 or more, and finite"),
            ("weight_decay", self.weight_decay, 0, math.inf, "0 or more, and finite"),
            ("b1", self.b1, 0, 1, "in [0, 1)"),
            ("b2", self.b2, 0, 1, "in [0, 1)"),
        ):
            if not low <= value < high:  # true for NaN too
                raise UserError(f"optimizer: {name}={value} must be {wanted}")
        for name, share in (("warmup", self.warmup), ("final_rate", self.final_rate)):
            if not 0 <= share <= 1:
                raise UserError(f"optimizer: {name}={share} must be in [0, 1]")
        if not self.max_grad_norm > 0:
            raise UserError(f"optimizer: max_grad_norm={self.max_grad_norm} must be above 0")


@dataclass(frozen=True)
class OwnConfig:
    """How stage one's demonstrations are sampled from the model itself: STaR (arXiv 2203.14465,
    without its rationalizations) and rejection sampling (arXiv 2308.01825)."""

    num_problems: int = 0
    """How many training problems are asked, from the first on; 0: all."""
    num_samples: int = 4
    """Completions of each problem."""
    temperature: float = 0.7
    """Temperature of the sampler."""
    shots: int = 4
    """Worked examples before each question, from the given solutions; they are not asked
    themselves. 0: only the instruction."""
    shots_length: int = 1024
    """Most tokens of these examples."""
    max_per_problem: int = 2
    """Most different completions, right and well formed, that are kept for a problem."""
    batch_size: int = 64
    """Completions sampled at a time."""

    def __post_init__(self):
        for name, number, least in (
            ("num_problems", self.num_problems, 0),
            ("num_samples", self.num_samples, 1),
            ("shots", self.shots, 0),
            ("shots_length", self.shots_length, 1),
            ("max_per_problem", self.max_per_problem, 1),
            ("batch_size", self.batch_size, 1),
        ):
            if number < least:
                raise UserError(f"sft.own: {name}={number} must be at least {least}")
        if self.batch_size % self.num_samples:
            raise UserError(
                f"sft.own: batch_size={self.batch_size} must be a multiple of "
                f"num_samples={self.num_samples}"
            )
        if not 0 <= self.temperature <= 1e6:
            raise UserError(f"sft.own: temperature={self.temperature} must be from 0 to 1e6")

    @property
    def prompts(self) -> int:
        """Problems per batch."""
        return self.batch_size // self.num_samples

    @property
    def extra_length(self) -> int:
        """Tokens of a prompt besides the problem's own."""
        return self.shots_length if self.shots else 0


@dataclass(frozen=True)
class SFTConfig:
    """Stage one: SFT."""

    demonstrations: Literal["given", "own"] = "given"
    """What is imitated: the solutions that come with the problems (given), or the model's own right
    answers (own)."""
    own: OwnConfig = field(default_factory=OwnConfig)
    """How the model's own demonstrations are sampled."""
    num_steps: int = 100
    """Optimizer updates."""
    batch_size: int = 32
    """Demonstrations per update."""
    pack_tokens: int = 0
    """Tokens that a device computes at a time: prompts and completions are packed into rows of this
    length, or of the longest prompt plus completion if that is more. Fewer tokens need less memory.
    0 computes its whole share at once, padding included."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, weight_decay=0.01)
    )
    """The optimizer."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0: none by steps."""

    def __post_init__(self):
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError("sft: num_steps and batch_size must be at least 1")
        if self.checkpoint_every < 0:
            raise UserError(f"sft: checkpoint_every={self.checkpoint_every} must be 0 or more")
        if self.pack_tokens < 0:
            raise UserError(f"sft: pack_tokens={self.pack_tokens} must be 0 or more")


@dataclass(frozen=True)
class GuardConfig:
    """When GRPO has collapsed, and what is done then.

    A limit of 0 is off; the others count from the first step that keeps them. A loss or gradient
    that is not finite is a collapse at once.
    """

    action: Literal["none", "stop", "rollback"] = "none"
    """After a collapse: do nothing; stop with the last good checkpoint; or roll back to it, with
    half the learning rate. A checkpoint is good if its step and the next meet all limits, and the
    share of right completions is above the midpoint between its limit and its best."""
    patience: int = 10
    """Consecutive steps outside one limit that count as a collapse."""
    rollbacks: int = 3
    """A run rolls back at most this often; the next collapse stops it."""
    min_format: float = NOTES["reward/format"].low or 0.0
    """Smallest share of completions that are well formed."""
    min_correctness: float = 0.5
    """Smallest share of right completions, averaged over `patience` steps, as a multiple of the
    best such mean in the same phase of the curriculum."""
    min_entropy: float = NOTES["entropy"].low or 0.0
    """Smallest entropy of the sampler, nats per token."""
    max_entropy: float = NOTES["entropy"].high or 0.0
    """Largest entropy of the sampler, nats per token."""
    min_length: float = 0.25
    """Smallest mean length of completions, as a multiple of that of the first `patience` steps."""
    max_length: float = 4.0
    """Largest mean length of completions, as such a multiple."""
    max_truncated: float = 0.5
    """Largest share of completions that hit the token limit."""
    max_kl: float = 1.0
    """Largest KL to the reference, nats per token; measured with grpo.loss.beta above 0."""
    max_logp_gap: float = NOTES["logp_gap/mean"].high or 0.0
    """Largest mean gap between the trainer's and the sampler's log-probs, nats."""

    def __post_init__(self):
        for name, number in (("patience", self.patience), ("rollbacks", self.rollbacks)):
            if number < 1:
                raise UserError(f"grpo.guard: {name}={number} must be at least 1")
        for name, value, low, high, wanted in (
            ("min_format", self.min_format, 0, 1, "in [0, 1]"),
            ("min_correctness", self.min_correctness, 0, 1, "in [0, 1]"),
            ("max_truncated", self.max_truncated, 0, 1, "in [0, 1]"),
            ("min_length", self.min_length, 0, 1, "in [0, 1]"),
            ("max_length", self.max_length or 1, 1, LARGE, "0, or 1 and more"),
            ("min_entropy", self.min_entropy, 0, LARGE, "0 or more"),
            ("max_entropy", self.max_entropy or LARGE, self.min_entropy, LARGE, "0 or above min"),
            ("max_kl", self.max_kl, 0, LARGE, "0 or more"),
            ("max_logp_gap", self.max_logp_gap, 0, LARGE, "0 or more"),
        ):
            if not low <= value <= high:  # true for NaN too
                raise UserError(f"grpo.guard: {name}={value} must be {wanted}")

    @property
    def is_on(self) -> bool:
        """Whether anything is done after a collapse."""
        return self.action != "none"


@dataclass(frozen=True)
class GRPOConfig:
    """Stage two: GRPO."""

    num_steps: int = 200
    """Steps; each is one rollout and `num_iterations` updates."""
    prompts_per_step: int = 8
    """P, different prompts per step."""
    num_generations: int = 8
    """G, completions of each prompt."""
    temperature: float = 1.0
    """Temperature of the sampler, and of the log-probs trained on."""
    num_iterations: int = 1
    """Updates on each rollout (mu)."""
    pack_tokens: int = 0
    """Tokens that a device computes at a time in an update: prompts and completions are packed into
    rows of this length, or of the longest prompt plus completion if that is more. Fewer tokens need
    less memory. 0 computes its whole share at once, padding included."""
    scale: Scale = "group"
    """What advantages are divided by: the group's std, the batch's, the group's mean (MaxRL: only
    if correctness alone is paid), or nothing."""
    baseline: Baseline = "mean"
    """What is subtracted from a reward: the mean of its group, or of the group's other rewards
    (leave_one_out)."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    teacher: str = ""
    """A model with the same tokenizer whose log-probs of the sampled completions are distilled
    (grpo.loss.distill_weight): a run folder, or weights as for model.weights. "": none."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    resample_rounds: int = 0
    """Most extra rollouts per step, to replace groups that are all right or all wrong (DAPO)."""
    curriculum: Curriculum = "phases"
    """phases: easy problems first, then medium, then hard ones; pass_rate: kinds of problems
    (difficulty and domain) by how mixed their recent groups were; none: all problems, epoch by
    epoch."""
    skip_uniform: float = 0.0
    """Chance that a problem whose last group was all right or all wrong is replaced by another of
    its difficulty; after z such groups in a row 1 - (1 - skip_uniform)^z."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0: none by steps."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What to do after a collapse."""

    def __post_init__(self):
        if self.num_steps < 1 or self.prompts_per_step < 1:
            raise UserError("grpo: num_steps and prompts_per_step must be at least 1")
        if self.checkpoint_every < 0:
            raise UserError(f"grpo: checkpoint_every={self.checkpoint_every} must be 0 or more")
        if self.pack_tokens < 0:
            raise UserError(f"grpo: pack_tokens={self.pack_tokens} must be 0 or more")
        if not 1e-6 <= self.temperature <= 1e6:
            raise UserError(
                f"grpo: temperature={self.temperature} must be above 0 to explore, from 1e-6 to 1e6"
            )
        if self.resample_rounds < 0:
            raise UserError(f"grpo: resample_rounds={self.resample_rounds} must be 0 or more")
        if self.resample_rounds and self.loss.policy_weight == 0:
            raise UserError(
                f"grpo: resample_rounds={self.resample_rounds} samples until rewards differ, which "
                "teach nothing at loss.policy_weight=0: use 0"
            )
        if not 0 <= self.skip_uniform < 1:
            raise UserError(
                f"grpo: skip_uniform={self.skip_uniform} must be 0 or more, and below 1"
            )
        if self.guard.is_on and not self.checkpoint_every:
            raise UserError(
                f"grpo.guard: action={self.guard.action} needs checkpoints to go back to: set "
                "grpo.checkpoint-every above 0"
            )
        self.check()

    def check(self) -> list[str]:
        """Warnings about unwise settings; UserError for senseless ones."""
        return checks.check_combination(
            self.loss,
            num_generations=self.num_generations,
            scale=self.scale,
            baseline=self.baseline,
            num_iterations=self.num_iterations,
            has_teacher=bool(self.teacher),
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When training states are saved, where, and how many are kept."""

    minutes: float = 0.0
    """Also save when this many minutes have passed since the last save; 0: only by steps
    (sft.checkpoint-every, grpo.checkpoint-every)."""
    share: float = 0.05
    """Largest share of a stage's time that training may wait for saves: a save that would exceed it
    is postponed, unless the state is below 100 MB. Writing while training continues does not
    count."""
    keep: int = 2
    """How many checkpoints of a stage are kept; there is one more while it is being written."""
    folder: str = ""
    """Absolute path of a separate folder for this run's checkpoints, such as one on a larger disk;
    if the run stops early, its last one goes to the run's own folder. "": all go there."""

    def __post_init__(self):
        if not (self.minutes >= 0 and math.isfinite(self.minutes)):
            raise UserError(f"checkpoint: minutes={self.minutes} must be 0 or more, and finite")
        if not 0 < self.share <= 1:
            raise UserError(f"checkpoint: share={self.share} must be above 0, and 1 at most")
        if self.keep < 1:
            raise UserError(f"checkpoint: keep={self.keep}: keep at least 1, better 2")
        if self.folder and not Path(self.folder).is_absolute():
            raise UserError(f"checkpoint: folder={self.folder!r} must be an absolute path")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The making of gemma3-nano."""

    steps: int = 10_000
    """Updates, over which the learning rate falls to zero."""
    batch_size: int = 32
    """Rows per step."""
    length: int = 96
    """Tokens per row."""
    learning_rate: float = 3e-3
    """Peak learning rate, reached after 2 % of the steps."""
    seed: int = 0
    """Random seed of the text and of the initial weights."""

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or self.length < 2:
            raise UserError("--steps and --batch-size must be at least 1, --length at least 2")
        if not 0 < self.learning_rate <= 1:  # false for NaN too
            raise UserError(f"--learning-rate {self.learning_rate}: must be above 0, and 1 at most")
