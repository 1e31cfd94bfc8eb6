"""The built-in curriculum: arithmetic word problems in three difficulties, with worked solutions.

Everything is drawn from a seed. Which side of the train/test
split a problem stands on follows from its numbers alone (a hash of its family and them, in any
order), so the two sides share no problem whatever the seed, the names or the wording.

    easy    one operation                        12 + 7
    medium  two operations                       5 * 6, then - 8
    hard    rates, percentages, work problems    three lines: two or three operations, a conclusion
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError

Split = Literal["train", "test"]

TEST_SHARE = 10  # one problem in this many is held out
MOST_REPEATS = 1000  # drafts in a row that are known: hardly any other is left then
BRIEF_SHARE = 0.5  # of the demonstrations that name the result and skip the steps

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Max", "Lea")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs", "toys", "stamps")


@dataclass(frozen=True)
class Draft:
    """One problem before it is put into a format.

    Attributes:
        numbers: those of the question; with the family, and in any order, they decide the split.
        question: the text asked.
        steps: one calculation a line, such as "5 * 6 = 30".
        conclusion: a closing sentence.
        answer: the result.
    """

    numbers: tuple[int, ...]
    question: str
    steps: tuple[str, ...]
    conclusion: str
    answer: int


def operation(a: int, sign: str, b: int) -> tuple[str, int]:
    """The line "a sign b = c" and c. Divisions are exact by the caller's choice of numbers."""
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    return f"{a} {sign} {b} = {result}", result


def addition(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 50), rng.randint(2, 49)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    question = rng.choice(
        (
            f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            f"There are {a} {things} in one box and {b} in another. How many {things} in all?",
            f"What is {a} + {b}?",
        )
    )
    line, total = operation(a, "+", b)
    return Draft((a, b), question, (line,), f"There are {total} in all.", total)


def subtraction(rng: random.Random) -> Draft:
    b, left = rng.randint(2, 49), rng.randint(1, 50)
    a = b + left
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    question = rng.choice(
        (
            f"{name} has {a} {things} and gives away {b}. How many {things} are left?",
            f"There were {a} {things} in a box. {name} took {b}. How many {things} are left?",
            f"What is {a} - {b}?",
        )
    )
    line, rest = operation(a, "-", b)
    return Draft((a, b), question, (line,), f"So {rest} are left.", rest)


def multiplication(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    question = rng.choice(
        (
            f"{name} has {a} boxes with {b} {things} each. How many {things} does {name} have?",
            f"There are {a} bags. Each bag holds {b} {things}. How many {things} in all?",
            f"What is {a} * {b}?",
        )
    )
    line, total = operation(a, "*", b)
    return Draft((a, b), question, (line,), f"There are {total} in all.", total)


def division(rng: random.Random) -> Draft:
    each, b = rng.randint(2, 12), rng.randint(2, 12)
    a = each * b
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    question = rng.choice(
        (
            f"{name} puts {a} {things} into {b} boxes, the same in each. How many in each box?",
            f"{a} {things} are shared by {b} friends. How many {things} does each friend get?",
            f"What is {a} / {b}?",
        )
    )
    line, share = operation(a, "/", b)
    return Draft((a, b), question, (line,), f"Each gets {share}.", share)


def boxes_then_change(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 9), rng.randint(2, 10)
    sign = rng.choice("+-")
    c = rng.randint(2, 20) if sign == "+" else rng.randint(1, a * b - 1)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    change = f"buys {c} more" if sign == "+" else f"gives away {c}"
    question = (
        f"{name} has {a} boxes with {b} {things} each and {change}. "
        f"How many {things} does {name} have now?"
    )
    first, product = operation(a, "*", b)
    second, total = operation(product, sign, c)
    return Draft((a, b, c), question, (first, second), f"{name} has {total} {things}.", total)


def buy_and_give(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 40), rng.randint(2, 30)
    c = rng.randint(1, a + b - 1)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    question = (
        f"{name} has {a} {things}, buys {b} more and gives away {c}. How many {things} are left?"
    )
    first, total = operation(a, "+", b)
    second, left = operation(total, "-", c)
    return Draft((a, b, c), question, (first, second), f"So {left} are left.", left)


def pool_and_share(rng: random.Random) -> Draft:
    each, friends = rng.randint(2, 10), rng.randint(2, 8)
    total = each * friends
    a = rng.randint(1, total - 1)
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    question = (
        f"{name} has {a} {things} and {other} has {total - a}. They share all of them with "
        f"{friends} friends. How many {things} does each friend get?"
    )
    first, _ = operation(a, "+", total - a)
    second, _ = operation(total, "/", friends)
    numbers = (a, total - a, friends)
    return Draft(numbers, question, (first, second), f"Each gets {each}.", each)


def rate(rng: random.Random) -> Draft:
    per_hour, first_day, second_day = rng.randint(2, 9), rng.randint(1, 6), rng.randint(1, 5)
    hours = first_day + second_day
    broken = rng.randint(1, per_hour * hours - 1)
    things = rng.choice(THINGS)
    question = (
        f"A machine makes {per_hour} {things} an hour. It runs {first_day} hours and then "
        f"{second_day} more. {broken} {things} break. How many are left?"
    )
    first, _ = operation(first_day, "+", second_day)
    second, made = operation(per_hour, "*", hours)
    third, left = operation(made, "-", broken)
    numbers = (per_hour, first_day, second_day, broken)
    return Draft(numbers, question, (first, second, third), f"So {left} are left.", left)


def percentage(rng: random.Random) -> Draft:
    percent = rng.choice((10, 20, 25, 50))
    step = {10: 10, 20: 5, 25: 4, 50: 2}[percent]
    price = step * rng.randint(2, 80 // step)
    part = price * percent // 100
    up = rng.choice((True, False))
    change = "goes up" if up else "falls"
    question = f"A bag costs {price} coins. The price {change} by {percent}%. What is it now?"
    second, new = operation(price, "+" if up else "-", part)
    steps = (f"{percent}% of {price} = {part}", second)
    return Draft((percent, price), question, steps, f"It costs {new} coins now.", new)


def work(rng: random.Random) -> Draft:
    workers, others = rng.sample(range(2, 11), 2)
    days = others * rng.randint(1, 10)
    while workers * days % others or workers * days > 100:
        days = rng.randint(2, 12)
    question = (
        f"{workers} workers build a wall in {days} days. How many days do {others} workers need?"
    )
    first, total = operation(workers, "*", days)
    second, needed = operation(total, "/", others)
    numbers = (workers, days, others)
    return Draft(numbers, question, (first, second), f"They need {needed} days.", needed)


Family = Callable[[random.Random], Draft]
FAMILIES: dict[str, tuple[Family, ...]] = {
    "easy": (addition, subtraction, multiplication, division),
    "medium": (boxes_then_change, buy_and_give, pool_and_share),
    "hard": (rate, percentage, work),
}


def drafts(split: Split, seed: int, difficulties: tuple[str, ...] = tuple(FAMILIES)) -> Iterator:
    """Endless `(difficulty, family, draft)` of one side of the split, difficulties in turn."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        for difficulty in difficulties:
            family = rng.choice(FAMILIES[difficulty])
            draft = family(rng)
            while side(family, draft) != split:
                draft = family(rng)
            yield difficulty, family, draft


def side(family: Family, draft: Draft) -> Split:
    """The side of the split a draft stands on: a function of its family and its numbers alone,
    whatever their order and the direction of change. A held-out problem so has no twin in training
    that asks the same of swapped numbers, or the opposite of the same ones."""
    digest = zlib.crc32(f"{family.__name__} {sorted(draft.numbers)}".encode())
    return "test" if digest % TEST_SHARE == 0 else "train"


def worked(draft: Draft) -> str:
    """The solution in the answer format, every step on a line of its own."""
    return in_format([*draft.steps, draft.conclusion], draft.answer)


def brief(draft: Draft) -> str:
    """The solution in the answer format, the steps left out: how people write when in a hurry."""
    return in_format([draft.conclusion], draft.answer)


def in_format(lines: list[str], answer: int) -> str:
    """The lines and the answer between the tags that SFT and GRPO teach."""
    reasoning = "\n".join(lines)
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def problems(
    split: Split, num: int, seed: int, difficulties: tuple[str, ...] = tuple(FAMILIES)
) -> list[Problem]:
    """`num` problems with demonstrations, difficulties in equal parts, no two alike.

    `BRIEF_SHARE` of the demonstrations skip the steps, as demonstrations written by people do. SFT
    imitates the mixture; that the steps pay is for GRPO to find out.

    Raises:
        UserError: some difficulties alone have fewer different ones.
    """
    rng = random.Random(f"style-{split}-{seed}")
    found: dict[str, Problem] = {}
    repeats = 0
    for difficulty, family, draft in drafts(split, seed, difficulties):
        if len(found) >= num:
            break
        repeats = repeats + 1 if draft.question in found else 0
        if repeats > MOST_REPEATS:
            raise UserError(
                f"curriculum: {', '.join(difficulties)} problems alone give hardly more than "
                f"{len(found):,} different {split} problems: ask for fewer than {num:,}"
            )
        style = brief if rng.random() < BRIEF_SHARE else worked
        found.setdefault(
            draft.question,
            Problem(draft.question, str(draft.answer), style(draft), difficulty, family.__name__),
        )
    return list(found.values())
