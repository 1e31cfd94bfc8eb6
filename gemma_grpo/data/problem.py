"""One problem: what is asked, what is right, how hard it is."""

from dataclasses import dataclass

DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Problem:
    """A question with a known answer.

    Attributes:
        prompt: the question as a person would write it, without chat turns.
        answer: the final answer that counts as right.
        completion: a worked solution in the answer format, for SFT; None where there is none.
        difficulty: one of `DIFFICULTIES`; the curriculum's phases choose by it.
        domain: a free label; evaluation reports accuracy for each.
    """

    prompt: str
    answer: str
    completion: str | None = None
    difficulty: str = "medium"
    domain: str = "general"
