"""The answer format: which text of a completion is its reasoning and which its answer.

White space around the parts is free:

    <reasoning>
    one step a line
    </reasoning>
    <answer>
    42
    </answer>
"""

import re
from dataclasses import dataclass
from functools import lru_cache

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


@lru_cache(maxsize=64)  # the components of one sample all ask for the same completion
def parse(completion: str) -> Parsed:
    """Read `completion` strictly: an answer counts only where no second reading is possible."""
    pieces = _TAG.split(completion)
    texts, tags = pieces[0::2], tuple(pieces[1::2])
    if tags not in _TEXTS:
        return Parsed(None, None, well_formed=False)
    reasoning, answer = (None if i is None else visible(texts[i]) for i in _TEXTS[tags])
    outside = texts[0] + texts[2] + texts[4] if tags == _WHOLE else "no"
    return Parsed(reasoning, answer, bool(reasoning and answer and not outside.strip()))


def visible(text: str) -> str | None:
    """The stripped text, or None if nothing in it can be seen (a zero-width space is nothing)."""
    text = text.strip()
    return text if any(char.isprintable() and not char.isspace() for char in text) else None
