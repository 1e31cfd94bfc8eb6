"""Which lines of a reasoning are steps: true equations on this problem's numbers, and sentences
about this problem. A step's arithmetic is exact.

An equation is a step if it is true, all its operands stand in the question or are results of
earlier steps, and it is new: the same numbers in another order are a restatement, and "5 * 1 = 5"
is filler. "120 minutes = 2 hours" is a conversion: neither true nor false.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from gemma_grpo.rewards import number_words
from gemma_grpo.rewards.arithmetic import evaluate, number
from gemma_grpo.rewards.typography import plain
from gemma_grpo.rewards.units import are_of_one_dimension

MAX_LINE_CHARS = 500  # this much of a line is looked at: enough to see a step
MAX_LINES = 60
MIN_NEW_WORDS = 2  # content words that a sentence adds to those before it

# Numbers that a question says without digits: "twice", "half", and what its units are made of.
_IMPLIED = {
    **dict.fromkeys("half halves twice double doubled pair pairs both couple".split(), (2,)),
    **dict.fromkeys("third thirds thrice triple tripled triples".split(), (3,)),
    **dict.fromkeys("quarter quarters fourth fourths".split(), (4,)),
    **dict.fromkeys("fifth fifths".split(), (5,)),
    **dict.fromkeys("dozen dozens".split(), (12,)),
    **dict.fromkeys("week weeks weekly".split(), (7, 52)),
    **dict.fromkeys("year years yearly annually annual".split(), (12, 52, 365)),
    **dict.fromkeys("month months monthly".split(), (12, 30, 4)),
    **dict.fromkeys("day days daily".split(), (7, 24)),
    **dict.fromkeys("hour hours hourly minute minutes second seconds".split(), (60,)),
    **dict.fromkeys("foot feet inch inches".split(), (12,)),
    **dict.fromkeys("cent cents dollar dollars percent percentage".split(), (100,)),
    **dict.fromkeys("average equally".split(), (2,)),
    **dict.fromkeys("kilometer kilometers km kilogram kilograms kg grams meters".split(), (1000,)),
}
_MAX_DIGITS = 100  # of a number; Python refuses to read very long ones
_FILLER = re.compile(r"[\d.,]+\s*(?:[*/]\s*1|[-+]\s*0)|(?:1\s*\*|0\s*\+)\s*[\d.,]+")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_LABEL = re.compile(r"^(?:[-*•]\s+|\(?\d{1,3}[.)]\s+|step\b\s*\d*\s*[:.)–-]*\s*)+", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{3,}")
_STOP_WORDS = frozenset(
    "the and are that this there these those with for from has have had was were will would can "
    "all now then thus therefore hence how many much what who which where when its his her their "
    "they them she you our your not but into out over than also each one two three step steps "
    "answer result problem question number numbers get gets is so we in it to of".split()
)
_UNIT_BEFORE_SIGN = re.compile(
    r"(?<=[\d%])\s*(?:[^\W\d_]+\s+){0,2}[^\W\d_]{2,}(?:/[^\W\d_]+)?\s*(?=[-+*/=)]\s*[\d(.])"
)
_QUANTITY = re.compile(rf"\s*(\$?)\s*(?:{_NUMBER})\s*([^\W\d_]*)")
_SUFFIX = re.compile(r"[-+*/^()\d.,%\s]*$")
_PREFIX = re.compile(r"^\s*-?\s*[\d(.][-+*/^()\d.,%\s]*")


@dataclass(frozen=True)
class Equation:
    """One true equation: the numbers it starts from, in order of size, and what it gives."""

    operands: tuple[Fraction, ...]
    result: Fraction


@dataclass(frozen=True)
class Steps:
    """The steps of a reasoning.

    Attributes:
        equations: in the order they stand.
        sentences: how many sentences about this problem.
        num_false: equations that are not true.
    """

    equations: tuple[Equation, ...]
    sentences: int
    num_false: int


@dataclass(frozen=True)
class Line:
    """A line of a reasoning.

    Attributes:
        kind: "step", with new equations on this problem's numbers; "idle", with true equations that
            are no steps; "false", with an equation that is not true; "sentence" about this problem;
            or "other".
        equations: the steps in it.
    """

    kind: Literal["step", "idle", "false", "sentence", "other"]
    equations: tuple[Equation, ...] = ()


def read_steps(reasoning: str, prompt: str) -> Steps:
    """The steps of `reasoning`, one line or sentence after the other."""
    lines = list(read_lines(reasoning, prompt))
    equations = tuple(equation for line in lines for equation in line.equations)
    count = lambda kind: sum(line.kind == kind for line in lines)
    return Steps(equations, count("sentence"), count("false"))


def read_lines(reasoning: str, prompt: str) -> Iterator[Line]:
    """The first MAX_LINES lines of `reasoning` as they are read, in order."""
    numbers, asked, flat_prompt = _question(prompt)
    known, has_sentence = set(numbers), False
    seen: set[Equation] = set()
    said: set[str] = set()
    for line in _lines(reasoning):
        found, false = _equations(line)
        if false:
            yield Line("false")
        elif found:
            steps = []
            for equation in found:
                if set(equation.operands) <= known and equation not in seen:
                    seen.add(equation)
                    known.add(equation.result)
                    steps.append(equation)
            yield Line("step" if steps else "idle", tuple(steps))
        else:
            words, is_new = _content_words(line), False
            about = len(words & asked) + bool(line_numbers(line) & known)
            if about >= 2 - bool(seen) and _flat(line) not in flat_prompt:
                is_new = len(words - said) >= MIN_NEW_WORDS or bool(seen and not has_sentence)
                has_sentence |= is_new
                said |= words
            yield Line("sentence" if is_new else "other")


@lru_cache(maxsize=1000)  # the completions of a group share it
def _question(prompt: str) -> tuple[frozenset[Fraction], frozenset[str], str]:
    """The numbers of a question, its words, and its text as `_flat` has it."""
    words = frozenset(_content_words(prompt))
    return frozenset(question_numbers(prompt)), words, _flat(prompt)


def true_lines(reasoning: str) -> tuple[int, int]:
    """How many lines of a reasoning hold an equation, and how many of those only true ones.

    Read as `read_steps` reads them, but whatever numbers they start from and however often they
    stand there; "5 * 1 = 5" is filler and counts for neither. Returns (true ones, all).
    """
    read = [_equations(line) for line in _lines(reasoning)]
    num_true, num_false = sum(bool(found) for found, _ in read), sum(false for _, false in read)
    return num_true, num_true + num_false


def question_numbers(prompt: str) -> set[Fraction]:
    """The numbers that a question says: digits, words ("five", "twice"), percentages both ways."""
    numbers = line_numbers(prompt)
    for percent in re.findall(rf"({_NUMBER})\s*(?:%|percent)", prompt):
        if len(percent) > _MAX_DIGITS:
            continue
        part = number(percent) / 100
        numbers |= {part, 1 - part, 1 + part, Fraction(100), 100 - 100 * part, 100 + 100 * part}
    for top, bottom in re.findall(r"(\d{1,9})/(\d{1,9})", prompt):
        if int(bottom):
            numbers |= {Fraction(int(top), int(bottom)), 1 - Fraction(int(top), int(bottom))}
    for word in re.findall(r"[^\W\d_]+", prompt.lower()):
        numbers |= {Fraction(value) for value in _IMPLIED.get(word, ())}
    if "$" in prompt:
        numbers.add(Fraction(100))
    return numbers


def line_numbers(text: str) -> set[Fraction]:
    """The numbers of a text, in digits and in words."""
    text = number_words.to_digits(text[:20_000])
    return {number(found) for found in re.findall(_NUMBER, text) if len(found) <= _MAX_DIGITS}


def num_numbers(prompt: str) -> int:
    """How many numbers a question says, one said twice counted twice."""
    return len(re.findall(_NUMBER, number_words.to_digits(prompt[:20_000])))


def _lines(reasoning: str) -> list[str]:
    """The lines that are looked at, without labels such as "Step 2:"."""
    lines = (line.strip().strip("*#").strip() for line in reasoning.splitlines()[:MAX_LINES])
    return [_LABEL.sub("", line).lstrip("* ")[:MAX_LINE_CHARS] for line in lines]


@lru_cache(maxsize=10_000)  # completions have many lines in common
def _equations(line: str) -> tuple[tuple[Equation, ...], bool]:
    """The true equations of a line, and whether one of its equations is false."""
    if "=" not in line:
        return (), False
    line = re.sub(r"<<[^<>]*>>|[€£¥₹]", "", plain(line))
    written, line = line.split("="), line.replace("$", " ")
    line = re.sub(r"(?<=[\d)%])\s*[xX]\s*(?=[\d(.])", " * ", line)
    line = re.sub(r"(?<=[^\W\d_]{2})\s+[xX]\s+(?=[\d(.])", " * ", line)  # "5 vans x 28"
    line = re.sub(r"(?<=[\d%])\s+(?:of|times)\s+(?=[\d(])", " * ", line)
    line = _UNIT_BEFORE_SIGN.sub(" ", line)
    sides, found = line.split("="), []
    for i, (left, right) in enumerate(zip(sides, sides[1:], strict=False)):
        suffix, result = _SUFFIX.search(left), _PREFIX.match(right)
        assert suffix is not None  # it may be empty
        formula = _readable(suffix[0].lstrip(" ,").rstrip(" ,."), part=-1)
        is_formula = re.search(r"[\d)%]\s*[-+*/^]\s*[-(\d.]", formula)
        if result is None or not (is_formula or (i and formula == left.strip())):  # "3+4 = 7 = 8"
            continue
        if re.match(r"[+*/^]|-\s", formula):  # behind a word: "M + 4 + 2 = 8"
            continue
        said = _readable(result[0].rstrip("-+*/^( ,."), part=0)
        left_value, right_value = evaluate(formula), evaluate(said)
        if left_value is None or right_value is None:
            continue
        as_percentage = "%" not in formula and said.endswith("%")  # "100 - 50 = 50%"
        if left_value[0] not in (right_value[0], 100 * right_value[0] if as_percentage else None):
            if _is_conversion(*written[i : i + 2]):
                continue
            return (), True
        if is_formula and not _is_filler(formula):
            operands = sorted(map(number, re.findall(_NUMBER, formula)))
            found.append(Equation(tuple(operands), left_value[0]))
    return tuple(found), False


def _is_conversion(left: str, right: str) -> bool:
    """ "120 minutes" and "2 hours": a number in one unit, and one in another of its dimension."""
    one, other = _QUANTITY.fullmatch(left.rstrip()), _QUANTITY.match(right)
    if one is None or other is None:
        return False
    return are_of_one_dimension(one[1] or one[2], other[1] or other[2])


def _readable(text: str, *, part: int) -> str:
    """The expression or, where it is none, its first (0) or last (-1) part: "15 (3 boxes", "15, 15
    + 2"."""
    return text if evaluate(text) else re.split(r"[,.]\s+|\s+\(", text)[part].strip()


def _is_filler(formula: str) -> bool:
    """ "5 * 1", "5 + 0": true, and nothing is found out by it."""
    return _FILLER.fullmatch(formula.strip()) is not None


def _content_words(text: str) -> set[str]:
    """The words that carry meaning, each by its first five letters: "works" and "workers"."""
    return {word[:5].rstrip("s") for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS}


def _flat(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
