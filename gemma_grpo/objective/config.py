"""`LossConfig`: the settings of the objective, and the names they may take."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["clip", "cispo"]
Level = Literal["token", "sequence", "sequence_token"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3", "k3_k2grad", "k3_unbiased"]
TisLevel = Literal["token", "sequence"]


@dataclass(frozen=True)
class LossConfig:
    """The objective. `checks.check_combination` refuses settings that make no sense together."""

    objective: Objective = "clip"
    """clip: PPO's clipped surrogate; cispo: clipped weights, unclipped gradient."""
    level: Level = "token"
    """Ratio of each token, or GSPO's of the sequence."""
    aggregation: Aggregation = "token_mean"
    """token_mean (DAPO), sequence_mean (GRPO), constant (Dr.GRPO)."""
    epsilon: float = 0.2
    """Lower clip width."""
    epsilon_high: float = 0.28
    """Upper clip width."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage, above 1; none is off."""
    beta: float = 0.0
    """Weight of the KL to the reference, the model that the stage began with; 0 loads none."""
    kl_estimator: KlEstimator = "k3_unbiased"
    """Per-token estimate of that KL."""
    tis_cap: float | None = None
    """Cap of the sampler-trainer importance weight; none is off."""
    tis_level: TisLevel = "token"
    """Importance weight of each token, or of the sequence."""
    mask_truncated: bool = False
    """Leave truncated completions (cut off by the token budget) out of the loss."""
