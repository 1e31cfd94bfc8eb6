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
    """k of pass@k and maj@k, completions a problem; 0 measures greedy completions only."""
    temperature: float = 1.0
    """Of those k samples."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens with this mass; 1 from all."""
    min_p: float = 0.0
    """Sample from the tokens with this share of the likeliest one's probability; 0 from all."""

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


def evaluation_prompts(config: EvaluationConfig) -> int:
    """Prompts of the smaller kind of batch; the greedy one holds a multiple of it."""
    return config.batch_size // max(config.num_samples, 1)
