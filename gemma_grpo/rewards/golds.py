"""Gold answers that will not be read as what they seem, found before anything is trained."""

import re
from collections.abc import Sequence

from gemma_grpo.data.problem import Problem
from gemma_grpo.rewards.answers import answers_match, reading

# A number, money or a fraction to the eye: digits and what stands in numbers, no words.
_SEEMS_A_NUMBER = re.compile(r"[-+$€£¥₹(]*\s*\d[\d\s.,/%$€£¥₹)]*")


def unreadable(problems: Sequence[Problem]) -> list[str]:
    """The gold answers that look like a number and are not read as one ("1.234.567" and "36/2"
    are right only letter by letter), or that do not even match themselves."""
    return [
        problem.answer
        for problem in problems
        if not answers_match(problem.answer, problem.answer)
        or (
            _SEEMS_A_NUMBER.fullmatch(problem.answer.strip())
            and isinstance(reading(problem.answer), str)
        )
    ]


def warning(problems: Sequence[Problem]) -> str | None:
    """One line on how many gold answers will not be read as what they seem; None if all will."""
    if not (found := unreadable(problems)):
        return None
    return (
        f"{len(found)} of {len(problems)} gold answers look like numbers and cannot be read as one "
        f"(first: {found[0][:40]!r}): completions must repeat them letter by letter; write them as "
        "1234.5 or 3/4"
    )
