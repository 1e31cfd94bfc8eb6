"""The words behind a number: which of them are its unit, and which would take the number back."""

import re
from dataclasses import dataclass

MAX_UNIT_WORDS = 6  # "18 dollars per day" is a unit; a sentence after the number is not


@dataclass(frozen=True)
class Unit:
    """What stands behind a number.

    Attributes:
        multiplier: 10^6 for "million".
        words: canonical unit words; empty where none was written.
        doubtful: those that may change what the number means ("5 doubled", "5 less"): they count as
            a unit only where the other answer says them too.
    """

    multiplier: int
    words: frozenset[str]
    doubtful: frozenset[str]


_WORD = re.compile(r"[^\W\d_]+(?:\^-?\d)?|[%$€£¥₹¢/°]")
_MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_FILLER = frozenset("a an the of in each every".split())
_RATE = frozenset("per / a an each every".split())
_HARMLESS = frozenset(
    "total altogether all left remaining old tall long wide high deep away apart old now today "
    "respectively".split()
)
# With one of these behind it the number is not the answer: "5 and a half", "5 or six", "5x".
_TAKES_BACK = frozenset(
    "and or to not no nor than point plus minus over under below above half halves third thirds "
    "quarter quarters fifth fifths sixth sixths eighth eighths tenth tenths hundredth hundredths "
    "thousandth thousandths doubled tripled halved squared cubed factorial times x y "
    "z i e n pi π is are was were isn "
    "wrong incorrect false but if except without more less fewer short off from between zero one "
    "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty "
    "seventy eighty ninety tens ones score gross negative positive something odd".split()
)
# With a space before them, "5 M" and "5 K" may be magnitudes; "5 Mb" is no megabyte.
_SYMBOLS_IN_DOUBT = frozenset("K M B T Kb Mb Gb Tb".split())
_PLURALS = frozenset(
    "people children men women feet teeth geese mice fish sheep deer dice oxen cattle".split()
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
    "g": "gram gramme gm",
    "kg": "kilogram kilo",
    "oz": "ounce",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "gal": "gallon",
}
_OTHER_UNITS = {
    "s": "second sec",
    "ms": "millisecond",
    "min": "minute",
    "h": "hour hr",
    "day": "d",
    "week": "wk",
    "month": "mo",
    "year": "yr",
    "lb": "pound £ gbp",  # money or weight: the word alone does not say
    "dollar": "$ usd buck",
    "euro": "€ eur",
    "rupee": "₹ inr rs",
    "cent": "¢",
    "yen": "¥ jpy",
    "%": "percent pct percentage",
    "cup": "",
    "acre": "",
    "person": "people",
    "child": "children",
    "man": "men",
    "woman": "women",
    "foot": "",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "tbsp": "tablespoon",
    "tsp": "teaspoon",
    "c": "celsius",
    "f": "fahrenheit",
    "am": "",
    "pm": "",
    "°": "degree deg",
    "rad": "radian",
    "w": "watt",
    "kw": "kilowatt",
    "kwh": "",
    "v": "volt",
    "j": "joule",
    "n": "newton",
    "hz": "hertz",
    "mol": "mole",
    "gb": "gigabyte",
    "mb": "megabyte",
    "kb": "kilobyte",
    "mi/h": "mph",
    "km/h": "kmh kph",
}
_CANONICAL = {
    alias: unit for unit, aliases in (_MEASURES | _OTHER_UNITS).items() for alias in aliases.split()
}
_CANONICAL["foot"] = _CANONICAL["feet"] = "ft"
_KNOWN = frozenset(_MEASURES) | frozenset(_OTHER_UNITS)
# Of one of these a number has one unit: "3 hours days" would else be right for either.
_DIMENSIONS = [
    frozenset(f"{units} %".split())
    for units in (
        "s ms min h day week month year",
        "mm cm m km inch ft yd mi",
        "mg g kg oz lb",
        "ml l gal cup tbsp tsp",
        "dollar euro rupee cent yen lb",
        "kb mb gb",
    )
]


def unit_of(text: str, *, few: bool) -> Unit | None:
    """The unit that `text`, all that stands around a number, says; None where it is no unit.

    Args:
        few: the number is at most 1, so that a noun in the singular fits it.
    """
    text = re.sub(r"(?i)\bus\$", "$", text.replace(".", "").replace("-", " "))
    text = re.sub(r"(?i)\bper cent\b", "%", text)
    written = _WORD.findall(text)
    tokens = [token.lower() for token in written]
    if len(tokens) > MAX_UNIT_WORDS or "π" in text or _SYMBOLS_IN_DOUBT & set(written):
        return None
    multiplier, num_multipliers = 1, 0
    for token in tokens:
        scale = _MULTIPLIERS.get(_canonical(token))
        if scale is None:
            break
        multiplier, num_multipliers = multiplier * scale, num_multipliers + 1
    tokens = tokens[num_multipliers:]
    if set(tokens) & _TAKES_BACK or {*map(_canonical, tokens)} & _MULTIPLIERS.keys():
        return None
    words = _canonical_words(tokens)
    if "of" not in tokens and any(_num_of(dimension, words) > 1 for dimension in _DIMENSIONS):
        return None
    few = few and not num_multipliers
    doubtful = [token for i, token in enumerate(tokens) if _is_doubtful(tokens, i, few)]
    return Unit(multiplier, words, frozenset(map(_canonical, doubtful)))


def are_of_one_dimension(one: str, other: str) -> bool:
    """Whether two words are different units of the same: "minutes" and "hours", "cents" and "$"."""
    units = {_canonical(one.lower()), _canonical(other.lower())}
    return len(units) == 2 and any(units <= kind for kind in _DIMENSIONS)


def _num_of(dimension: frozenset[str], words: frozenset[str]) -> int:
    return sum(word.partition("^")[0] in dimension for word in words)


def _is_doubtful(tokens: list[str], i: int, few: bool) -> bool:
    """Whether the word might change the number: it is no known unit and not shaped like a noun in
    the plural, an adjective before one, or what follows "per" or "of"."""
    token = tokens[i]
    if token in _FILLER or token in _HARMLESS or token in _RATE or token in _POWERS:
        return False
    if _canonical(token.partition("^")[0]) in _KNOWN or _is_plural(token):
        return False
    if any(before in _RATE or before == "of" for before in tokens[:i]):
        return False
    if any(map(_is_plural, tokens[i + 1 :])):
        return False
    return not few or token.endswith(("ed", "ing", "ly"))


def _is_plural(token: str) -> bool:
    return token in _PLURALS or (len(token) > 2 and _canonical(token) != token)


def _canonical_words(tokens: list[str]) -> frozenset[str]:
    power, rate = "", False
    words: list[str] = []
    for token in tokens:
        word = _canonical(token)
        if token in ("/", "per") or (token in _RATE and (words or tokens[-1] in "$€£¥₹")):
            rate = True
        elif token in _POWERS:
            power = _POWERS[token]
        elif token in _FILLER or token in _HARMLESS:
            if not (token == "in" and len(tokens) == 1):
                continue
            words.append(word)
        else:
            if rate and words and words[-1].split("^")[0] in _MEASURES:
                words[-1] += "/" + word + power
            else:  # "people per car" is not "cars per person", nor "5 per hour" 5 hours
                words.append("/" * rate + word + power)
            power, rate = "", False
    return frozenset(words)


def _canonical(token: str) -> str:
    """One word for all spellings of a unit: singular, then the alias table."""
    name, caret, power = token.partition("^")
    if name not in _CANONICAL and name not in _KNOWN and len(name) > 2:
        if name.endswith(("ches", "shes", "xes", "sses")):
            name = name[:-2]
        elif name.endswith("ies") and len(name) > 4:
            name = name[:-3] + "y"
        elif name.endswith("s") and not name.endswith(("ss", "us")):
            name = name[:-1]
    return _CANONICAL.get(name, name) + caret + power
