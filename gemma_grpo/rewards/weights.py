"""What completions are paid for: components' weights, how they change, the user's rewards."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from gemma_grpo.errors import UserError


@dataclass(frozen=True)
class RewardWeights:
    """What each component is worth. The defaults are those at the start of the run.

    Raises:
        UserError: a weight that is not finite, a negative reward, a positive penalty, or weights
            whose sum is negative (then saying nothing would be the best completion).
    """

    correctness: float = 0.40
    """Of a right answer."""
    trace: float = 0.45
    """Of the reasoning shown (see --reward.trace)."""
    confidence: float = 0.15
    """Of a proper score of the sampler's probability of its own answer."""
    verbosity: float = -0.05
    """Of tokens beyond a free share of the budget: a penalty, at most 0."""
    format: float = 0.1
    """Of a completion that is well formed and ended with its own stop token."""

    def __post_init__(self):
        for name, weight in self.named().items():
            if not math.isfinite(weight):
                raise UserError(f"reward weight {name} is {weight}: give a finite number")
            if name == "verbosity" and weight > 0:
                raise UserError(
                    f"reward weight verbosity is {weight}, which would pay for length:"
                    f" it is a penalty, give {-weight}"
                )
            if name != "verbosity" and weight < 0:
                raise UserError(
                    f"reward weight {name} is {weight}, which would punish it: give 0 or more"
                )
        if sum(self.named().values()) < 0:
            raise UserError(
                f"reward weights sum to {sum(self.named().values()):g}: the sum must not be"
                " negative, give a reward some weight or set verbosity to 0"
            )

    def named(self) -> dict[str, float]:
        """Component name -> weight, in the order of the components."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


START_WEIGHTS = RewardWeights()
END_WEIGHTS = replace(START_WEIGHTS, correctness=0.60, trace=0.25)


def weights_at(start: RewardWeights, end: RewardWeights, progress: float) -> RewardWeights:
    """Weights at `progress` in [0, 1] of the run: linear, and exactly `start` and `end` there.

    Raises:
        UserError: progress outside [0, 1] or NaN.
    """
    if not 0.0 <= progress <= 1.0:
        raise UserError(f"annealing progress is {progress}: it must lie in [0, 1]")
    if progress == 1.0:
        return end  # start + 1 * (end - start) may differ from it in the last bit
    last = end.named()
    return RewardWeights(
        **{name: first + progress * (last[name] - first) for name, first in start.named().items()}
    )


@dataclass(frozen=True)
class RubricConfig:
    """Yes/no criteria that judges answer."""

    file: str = ""
    """A YAML file: for each domain of the data a list of yes/no questions about a completion, each
    a text or {ask: text, weight: number}; the same as `train --rubric`."""
    judges: tuple[str, ...] = ()
    """All judges, each path/to/file.py:function=weight, or model:WEIGHTS=weight for a Gemma 3's
    probability of yes; weight 0 records the score and pays nothing. `train --judge` adds one."""
    timeout: float = 60.0
    """Seconds that a step waits for a judge; a completion without all its verdicts then gets no
    reward from that judge. A model has no limit."""
    parallel: int = 4
    """Parallel calls of a judge."""
    per_call: int = 8
    """Questions per call of a judge; for a model, rows computed at a time."""
    question_tokens: int = 512
    """Most tokens of a question to a model, including completion and criterion; a longer one is not
    judged."""

    def __post_init__(self):
        if bool(self.file) != bool(self.judges):
            raise UserError("reward.rubric: a rubric needs a judge and a judge a rubric: give both")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UserError(f"reward.rubric: timeout={self.timeout} must be a number above 0")
        if min(self.parallel, self.per_call, self.question_tokens) < 1:
            raise UserError(
                "reward.rubric: parallel, per_call and question_tokens must be at least 1"
            )


@dataclass(frozen=True)
class RewardConfig:
    """What a completion is paid for; the weights go linearly from `start` to `end`."""

    start: RewardWeights = START_WEIGHTS
    """Weights at the first step."""
    end: RewardWeights = END_WEIGHTS
    """Weights at the last step."""
    trace: Literal["arithmetic", "structure"] = "arithmetic"
    """What a reasoning step must be: true on this problem's numbers, or, for data without
    arithmetic, any different calculation or sentence."""
    extra: tuple[str, ...] = ()
    """All rewards of your own, each path/to/file.py:function or path/to/file.py:function=weight;
    `train --reward` adds one."""
    rubric: RubricConfig = RubricConfig()
    """Yes/no criteria that judges answer."""

    @property
    def is_binary(self) -> bool:
        """Whether a completion earns either nothing or what a right answer is worth. Rewards and
        judges of the user's own count, unless their weight is written as 0."""
        others = [
            weight
            for weights in (self.start, self.end)
            for name, weight in weights.named().items()
            if name != "correctness"
        ]
        of_the_user = (*self.extra, *self.rubric.judges)
        return not any(others) and all(spec.endswith("=0") for spec in of_the_user)
