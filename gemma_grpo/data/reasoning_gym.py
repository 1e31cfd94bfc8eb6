"""Problems of the `reasoning-gym` package's tasks.

The rewards compare a completion with the one gold answer, so a task in which many answers are
right (`countdown`, `word_ladder`) counts some of them wrong: the package's own scorer would need
the task's metadata, which a `Problem` does not carry. Tasks without a gold answer are refused.

Tasks are drawn with the package's default settings, and every problem is "medium": its curricula
are not used, because 8 of its 102 fail or stall within their first three levels (version 0.1.25).
"""

import contextlib
import difflib
import hashlib
import itertools
import os
import random
from collections.abc import Iterator
from typing import Literal

from gemma_grpo.data import splits
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError

HELD_OUT_SHARE = 1 / 4  # each test problem costs four draws, and some tasks take 0.2 s a draw
CHUNK = 1000  # draws asked for at once: some tasks make all of them up front, or refuse too many
MAX_FRUITLESS_DRAWS = 200  # in a row: with new problems rarer than about 1 in 100, give up

# Measured on version 0.1.25 by drawing each task in two processes. The first set follows
# Python's hash seed (it iterates over sets of strings); the second differs even with that fixed.
HASH_DEPENDENT_TASKS = frozenset(
    ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
)
UNREPEATABLE_TASKS = frozenset(("codeio",))


def reasoning_gym_problems(
    task: str, *, split: Literal["train", "test"], num: int, seed: int
) -> list[Problem]:
    """`num` different problems of one task; train and test never share a prompt, at any seed.

    The side is a hash of the prompt (`splits.is_held_out`): a split by seed would leak, for the
    package draws item i from seed + i, and small tasks repeat themselves anyway.

    Args:
        task: a name of the package, as "chain_sum"; becomes the problems' domain.
        num: how many, at least 1.
        seed: each seed has draws of its own.

    Raises:
        UserError: the package or the task is missing, the task cannot be drawn, has no gold
            answers, has fewer than `num` different problems, or would not repeat exactly.
    """
    _check_repeatable(task)
    problems: dict[str, Problem] = {}
    fruitless = 0
    with _global_random_seeded(seed):
        for problem in _draws(task, seed):
            name = splits.normalised(problem.prompt)
            is_held_out = splits.is_held_out(name, share=HELD_OUT_SHARE)
            if not problem.answer or name in problems or is_held_out != (split == "test"):
                fruitless += 1  # "ab" has items whose right answer is the empty string
            else:
                problems[name] = problem
                fruitless = 0
            if len(problems) == num or fruitless == MAX_FRUITLESS_DRAWS:
                break
    if len(problems) < num:
        raise UserError(
            f'reasoning_gym task "{task}" has too few different {split} problems: '
            f"found {len(problems)} of the {num} asked for; ask for fewer"
        )
    return list(problems.values())


def _check_repeatable(task: str) -> None:
    if not task:
        raise UserError("reasoning_gym needs a task, such as reasoning_gym:chain_sum")
    if task in UNREPEATABLE_TASKS:
        raise UserError(
            f'reasoning_gym task "{task}" draws other problems in every process, so that no run '
            f"could be resumed: use another task"
        )
    if task in HASH_DEPENDENT_TASKS and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        raise UserError(
            f'reasoning_gym task "{task}" draws by Python\'s string hashes, so that a resumed run '
            f"would see other problems: set PYTHONHASHSEED=0 in the environment"
        )


def _draws(task: str, seed: int) -> Iterator[Problem]:
    """The task's problems without end, both sides of the split and repeats included."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f'reasoning_gym tasks need an extra package: pip install "gemma_grpo[tasks]" ({error})'
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS) or sorted(DATASETS)[:3]
        raise UserError(f'no reasoning_gym task named "{task}": did you mean {" or ".join(near)}?')
    for chunk in itertools.count():
        try:
            items = reasoning_gym.create_dataset(
                task, seed=_base_seed(task, seed, chunk), size=CHUNK
            )
            for index in range(CHUNK):
                item = items[index]
                yield _problem(item["question"], item["answer"], task)
        except UserError:
            raise
        except Exception as error:  # whatever the task's own checks and searches raise
            raise UserError(f'reasoning_gym task "{task}" cannot be drawn: {error}') from error


def _problem(question: str, answer: str | None, task: str) -> Problem:
    if answer is None:
        raise UserError(
            f'reasoning_gym task "{task}" gives no gold answers, only a scorer: use another task'
        )
    return Problem(prompt=question.strip(), answer=answer.strip(), domain=task)


def _base_seed(task: str, seed: int, chunk: int) -> int:
    # Item i is drawn from base + i: nearby bases would share almost all items.
    digest = hashlib.sha256(f"{task}\n{seed}\n{chunk}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # NumPy's seeds end at 2**32


@contextlib.contextmanager
def _global_random_seeded(seed: int) -> Iterator[None]:
    # list_functions draws from the global `random` whatever seed it is given.
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
