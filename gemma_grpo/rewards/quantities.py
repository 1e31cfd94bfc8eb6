"""One number with its unit, read exactly out of plain text: money, fractions, powers of ten."""

import re
from dataclasses import dataclass
from fractions import Fraction

from gemma_grpo.rewards import number_words
from gemma_grpo.rewards.units import unit_of

MAX_QUANTITY_CHARS = 100  # longer answers are compared as text; int() of a huge string is slow


@dataclass(frozen=True)
class Quantity:
    """One number with its unit.

    Attributes:
        value: exact.
        unit: canonical words; empty where none was written.
        doubtful: those of `unit` that count only where the other answer says them too.
    """

    value: Fraction
    unit: frozenset[str] = frozenset()
    doubtful: frozenset[str] = frozenset()

    def matches(self, other: "Quantity") -> bool:
        """Equal values whose units do not contradict each other.

        A percentage may stand without its sign only above 1 (or at 0): 0.5 may be a share.
        """
        return (
            self.value == other.value
            and (abs(self.value) > 1 or not self.value or not {"%"} & (self.unit ^ other.unit))
            and (self.unit <= other.unit or other.unit <= self.unit)
            and self.doubtful <= other.unit
            and other.doubtful <= self.unit
        )


# 1,234,567 and 1 234 567 and 1'234'567 and 1_234_567, and India's 12,34,567
_GROUPED = (
    "[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+|(?:'[0-9]{3})+|(?:_[0-9]{3})+)"
    "|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}"
)
DECIMAL = rf"(?:(?:(?:{_GROUPED})(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
CURRENCY = r"(?:us\$|usd|eur|gbp|inr|rs\.?|[$€£¥₹])"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]|(?:minus|negative)\s)?\s*(?P<currency>{CURRENCY})?\s*(?P<sign2>[-+])?\s*"
    r"(?:(?:(?P<whole>[0-9]+)\s+)?(?P<top>-?[0-9]+)\s*/\s*(?P<bottom>-?[0-9]+)"
    rf"|(?:(?P<times>{DECIMAL})\s*[*x]\s*)?10\s*\^\s*\(?(?P<power>[-+]?[0-9]{{1,2}})\)?(?![0-9])"
    rf"|(?P<decimal>{DECIMAL})(?:e(?P<exponent>[-+]?[0-9]{{1,2}})(?![0-9]))?)"
    r"(?P<scale>\s?(?:k|mn|mln|m|bn|b|tn|t)(?![^\W_]|[\^/]))?"
    r"(?P<unit>(?:[^\W\d_]|(?<=[^\W\d_])\^-?[0-9]|(?<=[^\W\d_])-(?=[^\W\d_])"
    r"|[\s/%$€£¥₹¢°.()])*)",
    re.IGNORECASE,
)
_SCALES = {"k": 3, "m": 6, "mn": 6, "mln": 6, "b": 9, "bn": 9, "t": 12, "tn": 12}
_SCALES_WITHOUT_MONEY = frozenset(("k", "K", "M", "B", "mln", "bn", "tn", " mln", " bn", " tn"))


def quantity(text: str) -> Quantity | None:
    """`text`, plain already (`typography.plain`), as one number with an optional unit.

    None where it is anything else, has no value (1/0) or is a division not carried out (36/2).
    """
    if len(text) > MAX_QUANTITY_CHARS:
        return None
    match = _QUANTITY.fullmatch(_with_digits(text))
    if match is None or (match["sign"] and match["sign2"]):
        return None
    value, (power, unit_text) = _value(match), _scale(match)
    if value is None:
        return None
    unit = unit_of(unit_text, few=abs(value) <= 1 and not power)
    if unit is None:
        return None
    sign = -1 if (match["sign"] or match["sign2"] or "+") != "+" else 1
    return Quantity(sign * value * 10**power * unit.multiplier, unit.words, unit.doubtful)


def _with_digits(text: str) -> str:
    """`text` with the number words it begins with as digits, unless it looks like a title."""
    if not text[:1].isalpha():
        return text
    start = re.sub(r"^(?:minus|negative) ", "", text, flags=re.IGNORECASE)
    run = number_words.RUN.match(start)
    if run is None or re.search(r"\s[A-Z][a-z]", start[run.end() :]):
        return text
    return text[: len(text) - len(start)] + number_words.to_digits(run[0]) + start[run.end() :]


def _value(match: re.Match[str]) -> Fraction | None:
    if match["power"]:
        return _decimal(match["times"] or "1") * Fraction(10) ** int(match["power"])
    if match["decimal"]:
        return _decimal(match["decimal"]) * Fraction(10) ** int(match["exponent"] or 0)
    whole, top, bottom = (int(match[name] or 0) for name in ("whole", "top", "bottom"))
    if bottom == 0 or top % bottom == 0:
        return None
    if match["whole"] and not 0 < top < bottom:  # "5 10/2" is two numbers
        return None
    return whole + Fraction(top, bottom)


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub("[, '_]", "", text))


def _scale(match: re.Match[str]) -> tuple[int, str]:
    """The power of ten that a suffix says ("$2.5B", "5k"), and all that is unit."""
    scale, unit = match["scale"] or "", f"{match['unit']} {match['currency'] or ''}"
    is_money = bool(match["currency"] or re.search(r"[$€£¥₹]|\b(?:dollar|usd|eur)", unit, re.I))
    if scale and (is_money or scale in _SCALES_WITHOUT_MONEY):
        return _SCALES[scale.strip().lower()], unit
    return 0, f"{scale}{unit}"
