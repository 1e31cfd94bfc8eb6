"""Whether two answers say the same: numbers by value, lists by element, expressions by value.

Completions are text from a policy that is paid to find holes, so what can be read in two ways is
not equal to anything.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from gemma_grpo.rewards.arithmetic import evaluate
from gemma_grpo.rewards.dates import date
from gemma_grpo.rewards.quantities import Quantity, quantity
from gemma_grpo.rewards.typography import plain

MAX_CHARS = 1000  # longer answers are equal only letter by letter
MAX_BRACKETS = 20  # a list with more of them is compared as text


def answers_match(given: str | None, gold: str) -> bool:
    """Whether `given` says the same as `gold`. Never raises, whatever the strings.

    - Numbers, perhaps with a unit, are equal exactly: "1,234" = "1234.0" = "$1,234."; "0.5" =
      "1/2" = "\\frac12"; "5 million" = "5M" = "5e6" = "5 \\times 10^6" = "five million". Nothing
      is rounded ("0.333" is not "1/3"), and nothing may be left to work out ("36/2" is not "18",
      "3 + 4" is not "7").
    - A missing unit is right ("5" for "5 km", "5 km" for "5"), and so is a shorter or longer
      wording ("5 apples" for "5 red apples"). Another unit is wrong ("5 km" for "5 m"); so is a
      rate for an amount of a measure ("5 km/h" for "5 km"), and a word that may change the number
      ("5 doubled", "5 less"). Units are not converted: "50 cents" is not "$0.50", and "%" is a
      unit: "25" is right for "25%", "0.25" is not.
    - Lists, tuples, sets and intervals are equal element by element, sets in any order.
    - Expressions with letters or roots are equal where their values are: "2(x+3)" = "2x + 6".
    - Dates that name the month are equal to ISO dates. Other texts: case, white space, quotes and
      punctuation are ignored, signs that mean something are not. A number never equals a text.
    """
    if given is None:
        return False
    if given == gold:
        return bool(given.strip())
    if max(len(given), len(gold)) > MAX_CHARS:
        return bool(given.strip()) and given.strip() == gold.strip()
    return _same(reading(given), reading(gold))


# --- readings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """A list, tuple, set or interval: its brackets ("" for none) and what each element says."""

    brackets: str
    elements: tuple["Reading", ...]


@dataclass(frozen=True)
class Expression:
    """An expression with symbols, by its value at one point."""

    value: Fraction


@dataclass(frozen=True)
class Date:
    """A year (or None), month and day."""

    parts: tuple[int | None, int, int]


@dataclass(frozen=True)
class Equation:
    """What "x = ..." says of which name; other answers may leave the name out."""

    name: str
    of: "Reading"


Reading = Quantity | Sequence | Expression | Date | Equation | str  # a str is compared as it is

_SIMPLE = re.compile(r"[-+]?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5})(?:\.[0-9]{1,18})?")
_INTRODUCTION = re.compile(
    r"^(?:(?:so|thus|therefore|hence|then|finally|and|ok(?:ay)?)\b,?\s*)*"
    r"(?:(?:the|my|our|your)\s+)?(?:(?:final|correct|right|numerical)\s+)?"
    r"(?:answer|ans|result|solution)\s*(?:\b(?:is|equals)\b\s*:?|[:=])\s*",
    re.IGNORECASE,
)
_NAMED = re.compile(r"^(?:([^\W\d_](?:_?\d)?)\s*)?=(?![^=<>]*[=<>])\s*")


@lru_cache(maxsize=8192)  # a gold answer is read once for each of its group's completions
def reading(text: str) -> Reading:
    """What an answer says, so that two of them can be compared."""
    if _SIMPLE.fullmatch(text):
        return Quantity(Fraction(text.replace(",", "")))
    text = plain(text)
    if not text[:1].isdecimal():
        text = plain(_INTRODUCTION.sub("", text))
        if named := _NAMED.match(text):
            of = _unnamed(text[named.end() :])
            return Equation(named[1], of) if named[1] else of
    return _unnamed(text)


def _unnamed(text: str) -> Reading:
    if found := date(text):  # before numbers: "5 May" is not 5 of something
        return Date(found)
    number = quantity(text) or quantity(_without_brackets(text))
    if number is not None:
        return number
    return _sequence(text) or _expression(text) or _as_text(text)


def _without_brackets(text: str) -> str:
    """The inside of "(18)"; "(1,234)" may be a pair and "($18)" a loss, so they stay."""
    if re.fullmatch(r"\([^(),$€£¥₹]+\)", text):
        return text[1:-1].strip()
    return text


def _same(a: Reading, b: Reading) -> bool:
    if isinstance(a, Equation) and isinstance(b, Equation):
        return a.name == b.name and _same(a.of, b.of)
    if isinstance(a, Equation) or isinstance(b, Equation):
        return _same(*(x.of if isinstance(x, Equation) else x for x in (a, b)))
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        return a.matches(b)
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        return _same_elements(a, b)
    return a == b and a != ""


# --- lists, sets, intervals -----------------------------------------------------------------------

_BRACKETED = re.compile(r"([(\[{])(.*)([)\]}])", re.DOTALL)


def _sequence(text: str) -> Sequence | None:
    """A list of two or more elements that are numbers, expressions or equations; a set of any."""
    if sum(map(text.count, "([{")) > MAX_BRACKETS:
        return None
    match = _BRACKETED.fullmatch(text)
    brackets, inside = (match[1] + match[3], match[2]) if match else ("", text)
    parts = _split(inside)
    if match and (len(parts) < 2 or _split(text) != [text]) and brackets != "{}":
        brackets, parts = "", _split(text)  # "(1, 2), (3, 4)" is no bracketed list
    if brackets not in ("", "()", "[]", "[)", "(]", "{}") or (len(parts) < 2 and brackets != "{}"):
        return None
    if brackets == "[]" and len(parts) != 2:
        brackets = ""  # a list; two numbers in square brackets may be an interval
    elements = [_element(part.strip()) for part in parts]
    known = tuple(element for element in elements if element is not None)
    return Sequence(brackets, known) if len(known) == len(elements) else None


def _split(text: str) -> list[str]:
    """The parts between commas, semicolons and "and" outside brackets. Beside a semicolon or an
    "and" a comma within "1,200" separates thousands."""
    parts, depth, start = [], 0, 0
    comma = r",(?![0-9]{3}(?![0-9]))" if re.search(r";|\sand\s", text) else ","
    for mark in re.finditer(rf"[(\[{{]|[)\]}}]|(?:{comma}|;)\s*(?:and\s+)?|\s+and\s+", text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : mark.start()])
            start = mark.end()
    return [*parts, text[start:]]


def _element(text: str) -> Reading | None:
    """What an element says; None for words, which make a sentence and not a list."""
    number = quantity(text)
    if number is not None:
        return number
    if re.fullmatch(r"[-+]?(?:∞|inf(?:inity)?|oo)", text, re.IGNORECASE):
        return text[:1].strip("∞io+") + "∞"
    if re.fullmatch(r"[^\W\d_]|[^\W\d_]\s*=.*", text):
        return _as_text(text)
    return _sequence(text) or _expression(text) if not text.isalpha() else None


def _same_elements(a: Sequence, b: Sequence) -> bool:
    kinds = {a.brackets, b.brackets}
    if len(a.elements) != len(b.elements) or (
        len(kinds) > 1 and kinds not in ({"", "()"}, {"", "{}"})
    ):
        return False
    if "{}" not in kinds:
        return all(map(_same, a.elements, b.elements))
    left = list(b.elements)
    for element in a.elements:
        found = next((i for i, other in enumerate(left) if _same(element, other)), None)
        if found is None:
            return False
        del left[found]
    return True


# --- expressions and texts ------------------------------------------------------------------------


def _expression(text: str) -> Expression | None:
    """An expression with symbols. One of numbers alone may be a score, a range or a date, and
    stays text."""
    if re.fullmatch(r"\(?[^\W\d_]+\)?", text):  # "(B)"
        return None
    value = evaluate(text)
    return Expression(value[0]) if value and value[1] else None


def _as_text(text: str) -> str:
    """What is left of `text` when case, white space and harmless punctuation are taken away."""
    text = text.casefold()
    if not re.search(
        r"[\d+*/^=<>]", text
    ):  # words: brackets are punctuation, and so is "twenty-one"
        text = re.sub(r"[()]|(?<=[^\W\d_])-(?=[^\W\d_])", " ", text)
    text = re.sub(r"(?<=\b[^\W\d_])\. ?(?=[^\W\d_]\.)", "", text)  # "J. K." is "JK"
    text = re.sub(r"(?<!\w)'([^']*)'(?!\w)", r"\1", text)
    prime = r"(?<=\b[^\W\d_])'(?![^\W\d_])"  # A' is not A
    text = re.sub(rf"(?!{prime})'|\"|\.(?!\d)", "", text)  # "U.S." is "us"; "3.5" keeps its point
    text = re.sub(r"[,;?]|(?<!\d)!|(?<!\d):|:(?!\d)", " ", text)  # "5!" and "7:30" mean something
    text = " ".join(text.split())
    text = re.sub(r"^(?:the|a|an) (?=[^\W\d_]{2})", "", text)
    return re.sub(r" ?([-+*/^=<>]) ?(?=[\d(]|[^\W\d_]\b)|(?<=[\d)]) ?([-+*/^=<>]) ?", r"\1\2", text)
