"""The settings of the objective, and the names they may take. Does not import jax."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["clip", "cispo"]
Level = Literal["token", "sequence", "sequence_token"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3", "k3_k2grad", "k3_unbiased"]
TisLevel = Literal["token", "sequence"]
Scale = Literal["group", "batch", "mean", "none"]
Baseline = Literal["mean", "leave_one_out"]

# (epsilon, epsilon_high) by objective and by whether the ratio is per token. `checks` refuses CISPO
# with a ratio per sequence.
_DEFAULT_WIDTHS = {
    ("clip", True): (0.2, 0.28),  # DAPO, 2503.14476
    ("clip", False): (3e-4, 4e-4),  # GSPO, 2507.18071: a mean over the tokens moves far less
    ("cispo", True): (1.0, 4.0),  # the cap of 5 of ScaleRL (2510.13786), as TRL recommends it
    ("cispo", False): (1.0, 4.0),
}


@dataclass(frozen=True)
class LossConfig:
    """The objective. `checks.check_combination` refuses settings that make no sense together."""

    objective: Objective = "clip"
    """clip: PPO's clipped surrogate; cispo: clipped weights, unclipped gradient."""
    level: Level = "token"
    """The ratio of each token, or GSPO's ratio of the sequence."""
    aggregation: Aggregation = "token_mean"
    """token_mean (DAPO), sequence_mean (GRPO), constant (Dr.GRPO)."""
    epsilon: float | None = None
    """Lower clip width: ratios below 1 - epsilon are clipped. none uses the objective's default:
    0.2; 3e-4 for a sequence's ratio; 1 with cispo (no lower bound)."""
    epsilon_high: float | None = None
    """Upper clip width: ratios above 1 + epsilon_high are clipped. none uses the objective's
    default: 0.28; 4e-4 for a sequence's ratio; 4 with cispo (a cap of 5)."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage, above 1; none turns it off."""
    beta: float = 0.0
    """Weight of the KL to the reference, the model that the stage started from; with 0 no reference
    is loaded."""
    kl_estimator: KlEstimator = "k3_unbiased"
    """Per-token estimate of that KL, and of the KL to a teacher."""
    distill_weight: float = 1.0
    """Weight of the KL to the teacher (grpo.teacher), if there is one."""
    policy_weight: float = 1.0
    """Weight of the policy loss. 0 with a teacher only distils; rewards are then only recorded."""
    tis_cap: float | None = None
    """Cap of the sampler-trainer importance weight; none turns it off."""
    tis_level: TisLevel = "token"
    """The importance weight of each token, or of the sequence."""
    mask_truncated: bool = False
    """Leave truncated completions (cut off by the token budget) out of the loss."""

    @property
    def widths(self) -> tuple[float, float]:
        """`epsilon` and `epsilon_high`, with the objective's default where one is None."""
        low, high = _DEFAULT_WIDTHS[self.objective, self.level == "token"]
        return (
            low if self.epsilon is None else self.epsilon,
            high if self.epsilon_high is None else self.epsilon_high,
        )
