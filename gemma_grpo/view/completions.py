"""One completion as the page holds it: parts, steps, rewards, tokens, each as little text.

The page decodes in `page/data.js` what is encoded here.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from gemma_grpo.records.read import is_number
from gemma_grpo.records.tokens import Tokens
from gemma_grpo.rewards import END_WEIGHTS
from gemma_grpo.rewards.blocks import parse
from gemma_grpo.rewards.steps import read_lines

MAX_CHARACTERS = 20_000  # of a completion; the rest stays in the run's files
COMPONENTS = tuple(END_WEIGHTS.named())

# A completion's flags, a bit each.
HAS_REASONING, HAS_ANSWER, WELL_FORMED, STOPPED, RIGHT, LENIENT_RIGHT = (1 << k for k in range(6))
_LETTERS = {"step": "e", "idle": "i", "false": "f", "sentence": "s", "other": "."}


def flags(row: Mapping) -> int:
    """What is so of a row of evaluations/ or rollouts/."""
    parsed = parse(text_of(row, "completion", whole=True))
    said = (
        parsed.reasoning is not None,
        parsed.answer is not None,
        parsed.well_formed,
        bool(row.get("stopped")),
        _number(row.get("correctness")) > 0,
        _number(row.get("lenient_correctness")) > 0,
    )
    return sum(1 << place for place, is_so in enumerate(said) if is_so)


@lru_cache(maxsize=50_000)  # a policy that has learned says the same again and again
def line_kinds(completion: str, prompt: str) -> str:
    """A letter for each line of the reasoning, as `steps.read_lines` reads it."""
    reasoning = parse(completion).reasoning
    if reasoning is None:
        return ""
    return "".join(_LETTERS[line.kind] for line in read_lines(reasoning, prompt)).rstrip(".")


def components(row: Mapping, names: tuple[str, ...]) -> list[int | float | None]:
    """The reward components of a row, to three decimals; None for what it has not."""
    return [None if row.get(name) is None else rounded(row[name], 3) for name in names]


def reward(row: Mapping) -> int | float:
    """The total that a rollout was paid; of an evaluation, the total at the end weights."""
    if "reward" in row:
        return rounded(row["reward"], 3)
    weights = END_WEIGHTS.named()
    return rounded(sum(weights[name] * _number(row.get(name)) for name in COMPONENTS), 3)


def encode_tokens(tokens: Tokens | None) -> tuple[str, str, str, int | float | None]:
    """(lengths, log-probs, gaps, mean log-prob) of a completion's tokens, a character for each.

    Characters count from "@". A length is the characters of text that a token stands for. A
    log-prob l is round(24 sqrt(-l)), at most 190. A gap g is 2 round(5 (7 + log10 |g|)), one more
    where it is negative, and 0 where |g| < 1e-7.
    """
    if tokens is None or not len(tokens["logps"]):
        return "", "", "", None
    logps = np.nan_to_num(tokens["logps"].astype(np.float32), neginf=-100.0)
    levels = np.minimum(np.rint(24 * np.sqrt(np.maximum(-logps, 0.0))), 190)
    gaps = ""
    if "gaps" in tokens:
        signed = np.nan_to_num(tokens["gaps"].astype(np.float32))
        size = np.maximum(np.abs(signed), 1e-7)
        gaps = _characters(2 * np.rint(5 * (7 + np.log10(size))) + (signed < 0))
    lengths = np.minimum(tokens["characters"], 50_000)
    return _characters(lengths), _characters(levels), gaps, rounded(float(logps.mean()), 3)


def text_of(row: Mapping, name: str, *, whole: bool = False) -> str:
    """A field that should be text, cut to MAX_CHARACTERS unless `whole`."""
    value = row.get(name)
    return str("" if value is None else value)[: None if whole else MAX_CHARACTERS]


def _characters(values: np.ndarray) -> str:
    return "".join(map(chr, (values.astype(np.int64) + 64).tolist()))


def _number(value: object) -> float:
    """0 for what is no finite number."""
    return float(value) if is_number(value) else 0.0


def rounded(value: object, digits: int) -> int | float:
    """A number to this many digits, without a zero behind the point, which JSON would spell."""
    number = round(_number(value), digits)
    return int(number) if number == int(number) else number
