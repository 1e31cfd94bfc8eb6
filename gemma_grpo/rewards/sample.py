"""What a reward may look at of one completion, and what a reward is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.errors import UserError


@dataclass(frozen=True)
class Sample:
    """Everything a reward may look at, for one completion.

    Attributes:
        prompt: the question as the person wrote it.
        completion: decoded text, the stop token removed.
        answer: the gold answer.
        difficulty: "easy", "medium" or "hard".
        num_tokens: completion tokens, the stop token included.
        max_tokens: the completion's token budget.
        answer_logps: the sampler's log-probs (natural log, Python floats) of the tokens between
            `<answer>` and `</answer>`; empty if there are none.
        stopped: it ended on its own stop token; False means it was truncated.
        domain: the problem's label.

    Raises:
        UserError: unknown difficulty, negative num_tokens, or no token budget.
    """

    prompt: str
    completion: str
    answer: str
    difficulty: str
    num_tokens: int
    max_tokens: int
    answer_logps: tuple[float, ...]
    stopped: bool
    domain: str = Problem.domain

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            known = ", ".join(DIFFICULTIES)
            raise UserError(f"difficulty {self.difficulty!r} is unknown: use one of {known}")
        if self.num_tokens < 0 or self.max_tokens < 1:
            raise UserError(
                f"num_tokens must be >= 0 and max_tokens >= 1,"
                f" got {self.num_tokens} and {self.max_tokens}"
            )


Reward = Callable[[Sample], float]
BatchReward = Callable[[Sequence[Sample]], Sequence[float | None]]


def batch_reward(reward: BatchReward) -> BatchReward:
    """Decorator of a reward that takes all samples of a step at once and returns a value each."""
    vars(reward)["takes_batch"] = True
    return reward
