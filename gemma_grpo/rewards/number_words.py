"""English number words to digits: "twenty-one" is 21, "two hundred and five" is 205."""

import re

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * tens for tens, word in enumerate(_TENS, start=2)
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
_WORD = "|".join([*VALUES, *_SCALES])
RUN = re.compile(
    rf"\b(?:{'|'.join(VALUES)})(?:(?:[ -]|\s+and\s+)(?:{_WORD}))*\b(?!-)", re.IGNORECASE
)


def to_digits(text: str) -> str:
    """`text` with each run of number words as digits; a run that is no number stays as it is."""
    return RUN.sub(_digits, text)


def _digits(match: re.Match[str]) -> str:
    value = _value(match[0])
    return match[0] if value is None else str(value)


def _value(run: str) -> int | None:
    total, group, smallest, last_scale = 0, 0, 1000, 10**9
    for word in re.split(r"[\s-]+", run.lower()):
        if word in VALUES:
            value = VALUES[word]
            if value >= smallest:  # "one two" is two numbers
                return None
            group, smallest = group + value, 10 if value >= 20 else 1
            smallest = smallest if value else 0
        elif word == "hundred":
            if not 0 < group < 10:
                return None
            group, smallest = group * 100, 100
        elif word in _SCALES:
            scale = _SCALES[word]
            if not group or scale >= last_scale:
                return None
            total, group, smallest, last_scale = total + group * scale, 0, 1000, scale
    return total + group
