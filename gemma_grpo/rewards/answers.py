"""Reads the answer out of a completion and compares it with the gold one. Knows no reward or model.

The answer format, white space around its parts free:

    <reasoning>
    one step a line
    </reasoning>
    <answer>
    42
    </answer>

Two readers: `parse` is strict and feeds the rewards; `lenient_answer` takes what it can find and is
for evaluation only, so that a format error and a reasoning error can be told apart.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

TAIL_CHARS = 300  # `lenient_answer` looks for a bare number in this much of the end
MAX_QUANTITY_CHARS = 100  # longer answers are compared as text; int() of a huge string is slow
MAX_UNIT_WORDS = 5  # "18 dollars per day" is a unit; a sentence after the number is not

_TAG = re.compile(r"(</?(?:reasoning|answer)>)")
_R, _R_END, _A, _A_END = "<reasoning>", "</reasoning>", "<answer>", "</answer>"
_WHOLE = (_R, _R_END, _A, _A_END)
# Which text is the reasoning and which the answer, for each sequence of tags that can be read in
# one way only. text[i] stands before tag i. Every other sequence (two answers, an answer inside
# the reasoning, nested or stray tags) is ambiguous and yields neither: guessing would be paid for.
_TEXTS = {
    _WHOLE: (1, 3),
    (_R, _R_END): (1, None),
    (_R, _R_END, _A): (1, None),  # cut off inside the answer
    (_A, _A_END): (None, 1),
    (_A, _A_END, _R, _R_END): (None, 1),  # written after the answer, it did not lead to it
}


@dataclass(frozen=True)
class Parsed:
    """What a completion holds, read strictly.

    Attributes:
        reasoning: the stripped text of its one reasoning block; None if missing, empty, ambiguous
            or placed after the answer.
        answer: the stripped text of its one answer block; None if missing, empty or ambiguous.
        well_formed: exactly one reasoning block, then exactly one answer block, both with text,
            and only white space outside and between them.
    """

    reasoning: str | None
    answer: str | None
    well_formed: bool


def parse(completion: str) -> Parsed:
    """Read `completion` strictly: an answer counts only where no second reading is possible."""
    pieces = _TAG.split(completion)
    texts, tags = pieces[0::2], tuple(pieces[1::2])
    if tags not in _TEXTS:
        return Parsed(None, None, well_formed=False)
    reasoning, answer = (None if i is None else _visible(texts[i]) for i in _TEXTS[tags])
    outside = texts[0] + texts[2] + texts[4] if tags == _WHOLE else "no"
    return Parsed(reasoning, answer, bool(reasoning and answer and not outside.strip()))


def _visible(text: str) -> str | None:
    """The stripped text, or None if nothing in it can be seen (a zero-width space is nothing)."""
    text = text.strip()
    return text if any(char.isprintable() and not char.isspace() for char in text) else None


# A sign counts only where no digit, letter or bracket stands before it: "10-5" ends in 5. One apart
# from its number is a minus or a list's dash as a rule, but not after "=", ":" or "is".
_BARE_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+\u2212]|(?:(?<=[=:])|(?<=[=:] )|(?<=\bis ))[-\u2212] )?(?:[$€£¥₹] ?)?"
    r"(?:(?:\d{1,9} )?\d+/\d+|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)%?"
)


def lenient_answer(text: str) -> str | None:
    """The answer a generous reader would find, or None.

    In this order: the last answer block that has text (even unfinished, whatever stands around it);
    the rest of the line after the last `####` (GSM8K); the last `\\boxed{...}` (MATH), braces
    balanced; the last number within the last 300 characters. For evaluation, never for rewards.
    """
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)", text, re.DOTALL)
    lines_after_hashes = re.findall(r"####([^\n#]*)", text)
    for found in reversed(blocks), reversed(lines_after_hashes), reversed(_boxed(text)):
        for candidate in found:
            if visible := _visible(candidate):
                return visible
    start = max(0, len(text) - TAIL_CHARS)
    while start and re.match(r"[\d.,/]{2}", text[start - 1 : start + 1]):
        start += 1  # the cut fell inside a number: half a number is worse than none
    numbers = _BARE_NUMBER.findall(text, start)
    return numbers[-1] if numbers else None


def _boxed(text: str) -> list[str]:
    """What each closed `\\boxed{...}` holds, in the order they close. One pass over `text`."""
    found, open_braces = [], []
    for brace in re.finditer(r"\\boxed\s{0,9}\{|[{}]", text):
        if brace.group() != "}":
            open_braces.append(brace)
        elif open_braces and (opened := open_braces.pop()).group() != "{":
            found.append(text[opened.end() : brace.start()])
    return found


def answers_match(given: str | None, gold: str) -> bool:
    """Whether `given` says the same as `gold`. Never raises, whatever the strings.

    Where both are one number, perhaps with a unit (`quantity`), the values must be equal exactly
    and the units must not contradict each other:

    - "1,234" = "1234" = "+1234.0" = "$1,234." ; "1/2" = "0.5" ; "1 1/2" = "1½" = "1.5" ;
      "5 million" = "5000000" = "5e6". Nothing is rounded: "0.333" is not "1/3".
    - A missing unit is right ("5" for "5 km", "5 km" for "5"), and so is a shorter or longer
      wording ("5 apples" for "5 red apples"). Another unit is wrong ("5 km" for "5 m"); so is a
      rate for an amount of a measure ("5 km/h" for "5 km"). Units are not converted: "50 cents"
      is not "$0.50".
    - "%" is a unit like any other: "25" and "25 percent" are right for "25%", "0.25" is wrong, for
      else two different numbers would both be right.

    Two answers that are no such number are compared as text: case, white space, quotes, round
    brackets and punctuation are ignored; signs that mean something (+ - * / ^ % < >, a decimal
    point) are not. A number never equals a text.
    """
    if given is None or not given.strip() or not gold.strip():
        return False
    a, b = quantity(given), quantity(gold)
    if a is not None and b is not None:
        return a.value == b.value and (a.unit <= b.unit or b.unit <= a.unit)
    if a is not None or b is not None:
        return False
    text = _text_form(given)
    return text == _text_form(gold) if text else given.strip() == gold.strip()


# --- numbers with units ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """One number with its unit. `unit` holds canonical words; empty where none was written."""

    value: Fraction
    unit: frozenset[str]


_INT = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_QUANTITY = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<currency>us\$|usd|eur|gbp|inr|rs\.?|[$€£¥₹])?\s*(?P<sign2>[-+]?)\s*"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    rf"|(?P<decimal>(?:{_INT}(?:\.\d*)?|\.\d+)(?:e[-+]?\d\d?(?!\d))?))"
    r"(?P<kilo>k(?![^\W_]))?"
    r"(?P<unit>(?:[^\W\d_]|(?<=[^\W\d_])\^-?\d|(?<=[^\W\d_])-(?=[^\W\d_])|[\s/%$€£¥₹¢°.()])*)",
    re.IGNORECASE,
)
_UNIT_WORD = re.compile(r"[^\W\d_]+(?:\^-?\d)?|[%$€£¥₹¢/]")
_MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_FILLER = frozenset("a an the of in total each every altogether degree".split())
# With one of these behind it the number is not the answer: "5 and a half", "5 or six", "5x", "5π".
_NOT_UNITS = frozenset(
    "and or to not than point plus minus over half halves third thirds fifth fifths tenth tenths "
    "hundredth hundredths thousandth thousandths squared cubed factorial x y z i e pi π".split()
)
# Measures: a rate of one of them is another unit, while "$18 per day" only says more than "$18".
_MEASURES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "inch": "in",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gramme",
    "kg": "kilogram kilo",
    "oz": "ounce",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "gal": "gallon",
}
_OTHER_UNITS = {
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "day": "d",
    "week": "wk",
    "year": "yr",
    "lb": "pound £ gbp",  # money or weight: the word alone does not say
    "dollar": "$ usd buck",
    "euro": "€ eur",
    "rupee": "₹ inr rs",
    "cent": "¢",
    "yen": "¥",
    "%": "percent pct percentage",
    "person": "people",
    "child": "children",
    "man": "men",
    "woman": "women",
    "c": "celsius",
    "f": "fahrenheit",
    "mi/h": "mph",
    "km/h": "kmh kph",
}
_CANONICAL = {
    alias: unit for unit, aliases in (_MEASURES | _OTHER_UNITS).items() for alias in aliases.split()
}


def quantity(text: str) -> Quantity | None:
    """`text` as one number with an optional unit; None where it is anything else (or 1/0)."""
    if len(text) > MAX_QUANTITY_CHARS:
        return None
    match = _QUANTITY.fullmatch(_plain(text))
    if match is None or (match["sign"] and match["sign2"]):
        return None
    value, unit = _value(match), _unit((match["currency"] or "") + " " + match["unit"])
    if value is None or unit is None:
        return None
    multiplier, words = unit
    sign = -1 if "-" in (match["sign"], match["sign2"]) else 1
    kilo = 1000 if match["kilo"] else 1
    return Quantity(sign * value * kilo * multiplier, words)


def _value(match: re.Match[str]) -> Fraction | None:
    if match["decimal"]:
        return Fraction(match["decimal"].replace(",", ""))
    whole, top, bottom = (int(match[name] or 0) for name in ("whole", "top", "bottom"))
    if bottom == 0 or (match["whole"] and top >= bottom):  # "5 10/2" is two numbers
        return None
    return whole + Fraction(top, bottom)


def _unit(text: str) -> tuple[int, frozenset[str]] | None:
    """A multiplier ("million") and the canonical unit words; None where `text` is no unit."""
    text = re.sub(r"\bper cent\b", "%", text.lower().replace(".", ""))
    tokens = _UNIT_WORD.findall(text)
    if len(tokens) > MAX_UNIT_WORDS:
        return None
    multiplier, power, rate, words = 1, "", False, []
    for token in tokens:
        word = _canonical(token)
        if token in _NOT_UNITS:  # as written: "5 points" is a score, "5 point two" is not 5
            return None
        if token in ("/", "per"):
            rate = True
        elif word in _MULTIPLIERS:
            multiplier *= _MULTIPLIERS[word]
        elif token in _POWERS:
            power = _POWERS[token]
        elif word not in _FILLER and not (token == "in" and len(tokens) > 1):
            if rate and words and words[-1].split("^")[0] in _MEASURES:
                words[-1] += "/" + word + power
            else:
                words.append(word + power)
            power, rate = "", False
    return multiplier, frozenset(words)


def _canonical(token: str) -> str:
    """One word for all spellings of a unit: singular, then the alias table."""
    name, caret, power = token.partition("^")
    if name not in _CANONICAL and len(name) > 2:
        if name.endswith(("ches", "shes", "xes", "sses")):
            name = name[:-2]
        elif name.endswith("ies") and len(name) > 4:
            name = name[:-3] + "y"
        elif name.endswith("s") and not name.endswith(("ss", "us")):
            name = name[:-1]
    return _CANONICAL.get(name, name) + caret + power


# --- text -----------------------------------------------------------------------------------------

# "Answer: 5", "The final answer is 5", "x = 5", "= 5"
_LEAD_IN = re.compile(
    r"^(?:(?:the )?(?:final )?answer\s*(?:is\b|[:=])|(?:[^\W\d_]\w?\s*)?=)\s*", re.IGNORECASE
)
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")


def _plain(text: str) -> str:
    """`text` without typography: one kind of minus, digit and fraction; no LaTeX or quote marks."""
    if not text.isascii():
        text = "".join(map(_plain_char, text.translate(_DASHES)))
    text = text.replace("{,}", ",").replace("\\!", "")  # LaTeX's ways to write 1,234
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|boxed)\s*\{([^{}]*)\}", r" \1", text)
    text = text.replace("\\$", "$").replace("\\%", "%").strip("*`'\"“”‘’ \t\r\n")
    text = _LEAD_IN.sub("", text)
    for left, right in ("$$", "()"):
        if len(text) > 2 and text.startswith(left) and text.endswith(right):
            text = text[1:-1]
    return text.strip("*`'\"“”‘’ \t\r\n").rstrip(",;:? ")


def _plain_char(char: str) -> str:
    """NFKC one character at a time, because NFKC reads "1½" as 11/2 and "5²" as 52."""
    plain = unicodedata.normalize("NFKC", char)
    kind = unicodedata.decomposition(char).partition(" ")[0]
    if kind == "<fraction>":
        return " " + plain.replace("\u2044", "/")
    return {"<super>": "^", "<sub>": "_"}.get(kind, "") + plain.replace("\u2044", "/")


def _text_form(text: str) -> str:
    """What is left of `text` when case, white space and harmless punctuation are taken away."""
    text = _plain(text).casefold()
    text = re.sub(r"['\"“”‘’`]|\.(?!\d)", "", text)  # "U.S." is "us"; "3.5" keeps its point
    text = re.sub(r"[,;?()]|(?<!\d)!|(?<!\d):|:(?!\d)", " ", text)  # "5!" and "7:30" mean something
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text)  # "twenty-one"; but "-5" stays
    text = " ".join(text.split())
    return re.sub(r" ?([=<>]) ?", r"\1", text)  # "x=1, y=2" and "x = 1, y = 2"
