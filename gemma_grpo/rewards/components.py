"""The built-in reward components: one completion in, one float in [0, 1] out.

A policy is rewarded for finding loopholes, so completions are parsed strictly: an ambiguous one
earns nothing.
"""

import math
import re
from collections import Counter

from gemma_grpo.rewards import answers, blocks
from gemma_grpo.rewards.quantities import Quantity
from gemma_grpo.rewards.sample import Reward, Sample
from gemma_grpo.rewards.steps import MAX_LINE_CHARS, Steps, num_numbers, read_steps

STEPS_NEEDED = {"easy": 1, "medium": 2, "hard": 3}  # reasoning steps for a full trace score
WRONG_SHARE = 1 / 3  # of a trace's score if the answer is wrong
FREE_SHARE = {"easy": 0.5, "medium": 0.65, "hard": 0.8}  # of max_tokens: this share costs nothing


def correctness(sample: Sample) -> float:
    """1 if the one answer block matches the gold answer, else 0. Nothing else is read."""
    return float(answers.answers_match(blocks.parse(sample.completion).answer, sample.answer))


def trace(sample: Sample) -> float:
    """How much of the work that this difficulty needs is shown and true, in [0, 1].

    The steps (`steps.read_steps`) that lead to the answer count, traced back from it through the
    operands, plus one for a sentence about this problem. Without such a chain all steps count, for
    half the score. If the question has fewer than two numbers, every sentence about it counts.
    STEPS_NEEDED[difficulty] steps are a full score.

    A wrong answer's trace is worth WRONG_SHARE of that: its steps may be true, but not its idea.
    """
    parsed = blocks.parse(sample.completion)
    if parsed.reasoning is None:
        return 0.0
    found = read_steps(parsed.reasoning, sample.prompt)
    share = 1.0
    if num_numbers(sample.prompt) < 2:
        count = found.sentences + len(found.equations)
    else:
        count = _steps_to(parsed.answer, found)
        if not count:
            count, share = len(found.equations), 0.5
        count += bool(count and found.sentences)
    return share * _of_needed(count, sample)


def structure(sample: Sample) -> float:
    """Like `trace`, by structure alone: calculations and sentences count, true or not."""
    reasoning = blocks.parse(sample.completion).reasoning
    return 0.0 if reasoning is None else _of_needed(reasoning_steps(reasoning), sample)


def _of_needed(count: int, sample: Sample) -> float:
    """The share of the steps needed, less if the answer is wrong."""
    share = 1.0 if correctness(sample) else WRONG_SHARE
    return share * min(1.0, count / STEPS_NEEDED[sample.difficulty])


def _steps_to(answer: str | None, found: Steps) -> int:
    """How many equations the answer follows from, one for each use of a number; 0 if from none."""
    said = answers.reading(answer) if answer else None
    said = said.of if isinstance(said, answers.Equation) else said
    if not isinstance(said, Quantity):
        return 0
    needed, results, count = Counter([said.value]), Counter(e.result for e in found.equations), 0
    for equation in reversed(found.equations):
        operands, result = equation.operands, equation.result
        # "3 + 4 - 4 = 3" shows nothing if another equation gives the 3.
        is_circular = len(operands) > 2 and result in operands and results[result] > 1
        if needed[result] and not is_circular:
            needed[result] -= 1
            needed.update(operands)
            count += 1
    return count


def confidence(sample: Sample) -> float:
    """Calibrated confidence in [0, 1]: a proper score of the sampler's probability of its answer.

    c = exp(sum(answer_logps)) is the probability that the sampler gave this answer. With y = 1 if
    the answer is right, else 0 (Brier 1950):

        score = 1/2 (1 - (y - c)^2) + y/2
              = 1 - (1-c)^2 / 2   if right: 0.5 at c=0, 1 at c=1
              = (1 - c^2) / 2     if wrong: 0.5 at c=0, 0 at c=1

    The term y/2 does not contain c: the rule stays proper (expected score is highest at
    c = P(right)), and no wrong answer scores above a right one, as it does under plain Brier.
    Without an answer, or without log-probs of one, the score is the lowest, 0.
    """
    answer = blocks.parse(sample.completion).answer
    if answer is None or not sample.answer_logps:
        return 0.0
    # Rounding may leave a log-prob just above 0; NaN stays NaN.
    c = math.exp(min(sum(sample.answer_logps), 0.0))
    if answers.answers_match(answer, sample.answer):
        return 1.0 - (1.0 - c) ** 2 / 2.0
    return (1.0 - c**2) / 2.0


def verbosity(sample: Sample) -> float:
    """Penalty in [0, 1] for length in tokens; its weight is negative.

    0 up to FREE_SHARE[difficulty] of max_tokens, then linear to 1 at max_tokens; 1 if truncated.
    The shape is DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4) with a free share
    that depends on the difficulty.
    """
    if not sample.stopped:
        return 1.0
    free = FREE_SHARE[sample.difficulty] * sample.max_tokens
    return min(1.0, max(0.0, (sample.num_tokens - free) / (sample.max_tokens - free)))


def format_ok(sample: Sample) -> float:
    """1 if the completion is well formed (`blocks.Parsed`) and ended on a stop token, else 0."""
    return float(sample.stopped and blocks.parse(sample.completion).well_formed)


# --- reasoning steps ------------------------------------------------------------------------------

_LABEL = re.compile(r"^(?:[-*•]\s+|\(?\d{1,3}[.)]\s+|step\b\s*\d*\s*[:.)–-]*\s*)+", re.IGNORECASE)
_NUMBER = r"[-$€£]?\.?\d[\d,.]*%?"
_CALCULATION = re.compile(
    rf"{_NUMBER}\s*(?:[-+*/×÷·^−–]|x\b|of\b|times\b|plus\b|minus\b)\s*\(?{_NUMBER}"
    r".*?(?:[=≈→]|\b(?:is|are|gives|makes|equals|leaves)\b).*?\d",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+")
_NOT_IN_KEY = re.compile(r"[^\w+*/×÷^=<>%−–.-]|\.(?!\d)")


def reasoning_steps(reasoning: str) -> int:
    """The number of distinct steps in `reasoning`, at most one per line.

    A line is a step if it holds a calculation (two numbers, an operator between them, a result) or
    a sentence (three different words or numbers, at least two of them words). Labels such as "Step
    2:", "3." or "-" are not part of a step. Lines that differ only in label, case, whitespace or
    punctuation count once.
    """
    steps = set()
    for line in reasoning.splitlines():
        line = _LABEL.sub("", line.strip().strip("*#").strip()).lstrip("* ")[:MAX_LINE_CHARS]
        words = _WORD.findall(line.casefold())
        is_sentence = len(set(words)) >= 3 and sum(not word.isdigit() for word in words) >= 2
        if is_sentence or _CALCULATION.search(line):
            steps.add(_NOT_IN_KEY.sub("", line.casefold()))
    return len(steps)


COMPONENTS: dict[str, Reward] = {  # the fields of RewardWeights, in their order
    "correctness": correctness,
    "trace": trace,
    "confidence": confidence,
    "verbosity": verbosity,
    "format": format_ok,
}

TRACES: dict[str, Reward] = {"arithmetic": trace, "structure": structure}  # `RewardConfig.trace`
