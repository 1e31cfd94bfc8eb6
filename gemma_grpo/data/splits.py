"""Which problems are held out, and which few are picked."""

import hashlib
from collections.abc import Iterable, Sequence

from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError

_HELD_OUT = "held out"  # the salt of the one division that every run shares


def normalised(prompt: str) -> str:
    """The prompt with each run of white space made one space: what "the same prompt" compares."""
    return " ".join(prompt.split())


def _place(prompt: str, salt: str) -> float:
    """A point in [0, 1), fixed by the salt and the prompt: SHA-256, so that no run, Python hash
    seed or NumPy version moves it."""
    digest = hashlib.sha256(f"{salt}\n{normalised(prompt)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: below 1 even as a float


def is_held_out(prompt: str, *, share: float) -> bool:
    """Whether a problem is kept from training: true for about `share` of all prompts.

    A function of the prompt alone: no seed, no order and no other problem changes its side, so
    that training can never meet a held-out problem, in this run or a later one.
    """
    return _place(prompt, _HELD_OUT) < share


def one_side(
    problems: list[Problem], *, held_out: bool, share: float, origin: str
) -> list[Problem]:
    """The training problems or the held-out ones, in the given order.

    By `is_held_out`, except that neither side is left empty: the problem whose prompt lies lowest
    is always held out and the one that lies highest always trained on. That changes only sets so
    small that one side might have come out empty.

    Args:
        origin: what the problems came from, for the message.

    Raises:
        UserError: all prompts are the same, so that nothing can be held out.
    """
    places = [_place(problem.prompt, _HELD_OUT) for problem in problems]
    lowest, highest = min(places), max(places)
    if lowest == highest:
        raise UserError(
            f"{origin}: holding problems out for the test needs at least two different prompts; "
            f"add more, or give the test problems in a file of their own (TRAIN.jsonl,TEST.jsonl)"
        )
    return [
        problem
        for problem, place in zip(problems, places, strict=True)
        if held_out == (place < highest and (place < share or place == lowest))
    ]


def pick(problems: list[Problem], num: int, seed: int) -> list[Problem]:
    """At most `num` problems (0: all) chosen by `seed`, in the given order.

    The choice is by each prompt's own place, not by row: it survives reordering, and with the same
    seed a smaller choice is part of a larger one.
    """
    if num == 0 or num >= len(problems):
        return list(problems)
    salt = f"pick {seed}"
    chosen = sorted(
        range(len(problems)), key=lambda row: (_place(problems[row].prompt, salt), row)
    )[:num]
    return [problems[row] for row in sorted(chosen)]


def of_difficulties(
    problems: list[Problem], difficulties: Sequence[str], origin: str
) -> list[Problem]:
    """Those of the given difficulties, in the given order.

    Args:
        origin: what the problems came from, for the message.

    Raises:
        UserError: there are none.
    """
    found = [problem for problem in problems if problem.difficulty in difficulties]
    if problems and not found:
        there = ", ".join(sorted({problem.difficulty for problem in problems}))
        wanted = " or ".join(difficulties)
        raise UserError(f"{origin} has no {wanted} problems (data.difficulties), only {there}")
    return found


def shared_prompts(first: Iterable[Problem], second: Iterable[Problem]) -> list[str]:
    """The prompts that stand in both, sorted; compared as `normalised`."""
    return sorted(
        {normalised(problem.prompt) for problem in first}
        & {normalised(problem.prompt) for problem in second}
    )
