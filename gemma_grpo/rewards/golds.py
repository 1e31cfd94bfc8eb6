"""Gold answers and completions that will not be read as what they seem, found before training."""

import re
from collections.abc import Sequence

from gemma_grpo.data.problem import Problem
from gemma_grpo.rewards.answers import answers_match, reading
from gemma_grpo.rewards.blocks import parse

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


def completions_warnings(problems: Sequence[Problem]) -> list[str]:
    """One line on how many given completions are not well formed, and one on how many of the others
    answer something else than `answer`; problems without a completion are passed over."""
    given = [(problem, parse(problem.completion)) for problem in problems if problem.completion]
    formed = [(problem, parsed) for problem, parsed in given if parsed.well_formed]
    wrong = [
        (problem, parsed)
        for problem, parsed in formed
        if not answers_match(parsed.answer, problem.answer)
    ]
    lines = []
    if lack := len(given) - len(formed):
        lines.append(
            f"{lack} of {len(given)} completions lack "
            "<reasoning>...</reasoning><answer>...</answer>: SFT will teach what they have"
        )
    if wrong:
        problem, parsed = wrong[0]
        lines.append(
            f"{len(wrong)} of {len(given)} completions end in another answer than `answer` (first: "
            f"{(parsed.answer or '')[:40]!r}, not {problem.answer[:40]!r})"
        )
    return lines
