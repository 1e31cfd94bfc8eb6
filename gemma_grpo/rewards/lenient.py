"""The answer a generous reader would find. For evaluation, never for rewards.

With it a format error and a reasoning error can be told apart, and figures be compared with those
of other work. What it returns is compared by the strict `answers_match`.
"""

import re
from typing import NamedTuple

from gemma_grpo.rewards.answers import reading
from gemma_grpo.rewards.blocks import visible
from gemma_grpo.rewards.quantities import CURRENCY, DECIMAL, Quantity
from gemma_grpo.rewards.typography import plain

TAIL_CHARS = 300  # a bare number counts in this much of the end
MIN_SENTENCE_WORDS = 3
MAX_MARKED_CHARS = 2000  # a longer answer block is no answer, and is returned as it is

# Everything that hangs together with a number without a space, so that no half of it is read: a
# date, a time, a range's end, a fraction, a power. A sign counts only where no digit, letter or
# bracket stands before it: "10-5" ends in 5. One apart from its number is a minus or a list's dash
# as a rule, but not after "=", ":" or "is".
_CUE = r"(?:(?<=[=:])|(?<=[=:] )|(?<=\bis ))"
_NUMBER = re.compile(
    rf"(?P<text>(?:(?<![\w)])[-+]|{_CUE}- )?(?:{CURRENCY} ?-?)?(?:"
    rf"(?:{DECIMAL} ?[*x] ?)?10 ?\^ ?\(?-?\d+\)?|\d{{4}}-\d\d-\d\d"
    rf"|\d+ \d+/\d+|(?:{DECIMAL}|\d+)(?:e[-+]?\d+\b)?(?:[.,:/^]?\d+)*)"
    r"(?P<unit> ?%|(?: ?(?:hundred|thousand|million|billion|trillion|dozen)|[kKMB]|bn)\b)?)",
    re.IGNORECASE,
)


# A Markdown heading of the fourth level is no answer.
_HEADING = re.compile(
    r"(?:step|part)\b.*|(?:the )?(?:final )?(?:answer|solution|result)\W*|.*:", re.IGNORECASE
)


class _Found(NamedTuple):
    text: str
    start: int


def lenient_answer(text: str) -> str | None:
    """The answer a generous reader would find, or None.

    In this order: the last answer block that has text (even unfinished, whatever stands around it);
    the rest of the line after the last `####` that is no heading (GSM8K); the last `\\boxed{...}`
    (MATH), braces balanced; the last number within the last 300 characters. Of a marked text that
    is a sentence or an equation the one number it says is taken. A number is read whole or not at
    all.
    """
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)", text, re.DOTALL)
    lines_after_hashes = [
        line
        for line in re.findall(r"####([^\n#]*)", text)
        if not _HEADING.fullmatch(plain(line[:MAX_MARKED_CHARS]).strip("* "))
    ]
    for found in reversed(blocks), reversed(lines_after_hashes), reversed(_boxed(text)):
        for candidate in found:
            if seen := visible(candidate):
                return _of_marked(seen)
    start = max(0, len(text) - TAIL_CHARS)
    while start and start < len(text) and not text[start - 1].isspace():
        start += 1  # the cut fell inside a word: half a number is worse than none
    numbers = _numbers(text[start:])
    return numbers[-1].text if numbers else None


def _of_marked(text: str) -> str:
    """The number of a sentence or an equation; else the text as it is."""
    if len(text) > MAX_MARKED_CHARS or isinstance(reading(text), Quantity):
        return text
    boxes = _boxed(text)
    if boxes and visible(boxes[-1]):
        return _of_marked(boxes[-1].strip())
    flat = plain(text)
    numbers = _numbers(flat)
    if not numbers:
        return text
    last = numbers[-1]
    is_result = re.search(r"(?:=|:|\bis|\bare|\bequals)\s*$", flat[: last.start])
    is_only = len({number.text for number in numbers}) == 1
    is_sentence = len(re.findall(r"[^\W\d_]{2,}", flat)) >= MIN_SENTENCE_WORDS
    is_equation = is_result and not re.search(r"[^\W\d_]|,", flat) and flat.endswith(last.text)
    return last.text if is_equation or (is_sentence and (is_only or is_result)) else text


def _numbers(text: str) -> list[_Found]:
    """The numbers of `text`, typography and LaTeX taken away, in their order."""
    flat = plain(text) if len(text) <= MAX_MARKED_CHARS else text
    return [_Found(match["text"].rstrip(" .,:"), match.start()) for match in _NUMBER.finditer(flat)]


def _boxed(text: str) -> list[str]:
    """What each closed `\\boxed{...}` holds, in the order they close. One pass over `text`."""
    found, open_braces = [], []
    for brace in re.finditer(r"\\boxed\s{0,9}\{|[{}]", text):
        if brace.group() != "}":
            open_braces.append(brace)
        elif open_braces and (opened := open_braces.pop()).group() != "{":
            found.append(text[opened.end() : brace.start()])
    return found
