"""The settings of an evaluation. Does not import jax."""

from dataclasses import dataclass

from gemma_grpo.errors import UserError
from gemma_grpo.generation.config import SamplingConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured before and after."""

    batch_size: int = 64
    """Completions sampled at a time."""
    num_samples: int = 4
    """k of pass@k and maj@k: sampled completions per problem; 0 measures only greedy
    completions."""
    temperature: float = 1.0
    """Temperature of those k samples."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens with this total probability; 1: from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the likeliest one's probability; 0: from
    all."""

    def __post_init__(self):
        if self.batch_size < 1 or self.num_samples < 0:
            raise UserError("evaluation: batch_size must be at least 1, num_samples at least 0")
        if self.num_samples and self.batch_size % self.num_samples:
            raise UserError(
                f"evaluation: batch_size={self.batch_size} must be a multiple of "
                f"num_samples={self.num_samples}"
            )
        _ = self.sampling  # refuses a value out of range

    @property
    def sampling(self) -> SamplingConfig:
        """How the k samples are drawn."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class RunEvaluationConfig(EvaluationConfig):
    """What is measured before and after each stage, and during GRPO."""

    every: int = 0
    """GRPO steps between snapshots: the same few held-out problems, answered greedily, saved as
    evaluations/grpo-step-NNNNNN; 0: none."""
    snapshot_problems: int = 64
    """How many held-out problems a snapshot takes, from the first on."""

    def __post_init__(self):
        super().__post_init__()
        if self.every < 0 or self.snapshot_problems < 1:
            raise UserError(
                f"evaluation: every={self.every} must be at least 0, "
                f"snapshot_problems={self.snapshot_problems} at least 1"
            )


def evaluation_prompts(config: EvaluationConfig) -> int:
    """Prompts of the smaller kind of batch; the greedy one holds a multiple of it."""
    return config.batch_size // max(config.num_samples, 1)
