"""Rewards: one completion in, one float per component out. Knows no jax, model or tokenizer.

A reward is any `Callable[[Sample], float]`. Five are built in, each in [0, 1]:

    correctness  the answer block holds the gold answer                       weight 0.40->0.60
    trace        enough reasoning steps for the difficulty                    weight 0.45->0.25
    confidence   a proper score of the sampler's probability of its answer    weight 0.15
    verbosity    tokens used beyond a free share of the budget (a penalty)    weight -0.05
    format       well formed and ended on its own stop token                  weight 0

The total is the weighted sum. Weights anneal linearly over the run, from paying for the trace to
paying for the answer. Format has no weight by default, because structure already pays through the
trace (no reasoning block, no trace) and through correctness (no answer block, no answer).

Completions are text from a policy that is paid to find holes, so every reading here is strict: what
can be read in two ways pays nothing.
"""

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import SupportsFloat

from gemma_grpo import answers
from gemma_grpo.errors import UserError

STEPS_NEEDED = {"easy": 1, "medium": 2, "hard": 3}  # reasoning steps for a full trace score
FREE_SHARE = {"easy": 0.5, "medium": 0.65, "hard": 0.8}  # of max_tokens: so much costs nothing


@dataclass(frozen=True)
class Sample:
    """Everything a reward may look at, for one completion.

    Attributes:
        prompt: the question as the person wrote it.
        completion: decoded text, the stop token removed.
        answer: the gold answer.
        difficulty: "easy", "medium" or "hard".
        num_tokens: completion tokens, the stop token included.
        max_tokens: the completion's token budget.
        answer_logps: the sampler's log-probs (natural log, Python floats) of the tokens between
            `<answer>` and `</answer>`; empty if there are none.
        stopped: it ended on its own stop token; False means it was truncated.

    Raises:
        UserError: unknown difficulty, negative num_tokens, or no token budget.
    """

    prompt: str
    completion: str
    answer: str
    difficulty: str
    num_tokens: int
    max_tokens: int
    answer_logps: tuple[float, ...]
    stopped: bool

    def __post_init__(self):
        if self.difficulty not in STEPS_NEEDED:
            known = ", ".join(STEPS_NEEDED)
            raise UserError(f"difficulty {self.difficulty!r} is unknown: use one of {known}")
        if self.num_tokens < 0 or self.max_tokens < 1:
            raise UserError(
                f"num_tokens must be >= 0 and max_tokens >= 1,"
                f" got {self.num_tokens} and {self.max_tokens}"
            )


Reward = Callable[[Sample], float]

# --- components -----------------------------------------------------------------------------------


def correctness(sample: Sample) -> float:
    """1 if the one answer block says what the gold answer says, else 0. Nothing else is read."""
    return float(answers.answers_match(answers.parse(sample.completion).answer, sample.answer))


def trace(sample: Sample) -> float:
    """Share of the reasoning steps this difficulty asks for, in [0, 1].

    min(1, reasoning_steps / STEPS_NEEDED[difficulty]); 0 without a reasoning block. It looks at
    structure only: a wrong calculation is a step as well, and correctness is what pays for truth.
    """
    reasoning = answers.parse(sample.completion).reasoning
    if reasoning is None:
        return 0.0
    return min(1.0, reasoning_steps(reasoning) / STEPS_NEEDED[sample.difficulty])


def confidence(sample: Sample) -> float:
    """Calibrated confidence in [0, 1]: a proper score of the sampler's probability of its answer.

    c = exp(mean(answer_logps)), the geometric mean over the answer's tokens, so that a long answer
    is not taken for an unsure one. With y = 1 if the answer is right, else 0 (Brier 1950):

        score = 1/2 (1 - (y - c)^2) + y/2
              = 1 - (1-c)^2 / 2   if right: 0.5 at c=0, 1 at c=1
              = (1 - c^2) / 2     if wrong: 0.5 at c=0, 0 at c=1

    The term y/2 does not contain c: the rule stays proper (expected score is highest at
    c = P(right)), and no wrong answer scores above a right one, as it does under plain Brier.
    Without an answer, or without log-probs of one, the score is the lowest, 0.
    """
    answer = answers.parse(sample.completion).answer
    if answer is None or not sample.answer_logps:
        return 0.0
    mean_logp = sum(sample.answer_logps) / len(sample.answer_logps)
    c = math.exp(min(mean_logp, 0.0))  # rounding may leave a log-prob just above 0; NaN stays NaN
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
    """1 if the completion is well formed (`answers.Parsed`) and stopped by itself, else 0."""
    return float(sample.stopped and answers.parse(sample.completion).well_formed)


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
MAX_LINE_CHARS = 500  # so much of a line is looked at: enough to see a step


def reasoning_steps(reasoning: str) -> int:
    """The number of different real steps in `reasoning`, one a line at most.

    A line is a step if it holds a calculation (two numbers, an operator between them, a result) or
    a sentence (three different words or numbers, and two words among them). Labels such as
    "Step 2:", "3." or "-" are not part of a step. Lines that differ only in label, case, white
    space or punctuation count once.
    """
    steps = set()
    for line in reasoning.splitlines():
        line = _LABEL.sub("", line.strip().strip("*#").strip()).lstrip("* ")[:MAX_LINE_CHARS]
        words = _WORD.findall(line.casefold())
        is_sentence = len(set(words)) >= 3 and sum(not word.isdigit() for word in words) >= 2
        if is_sentence or _CALCULATION.search(line):
            steps.add(_NOT_IN_KEY.sub("", line.casefold()))
    return len(steps)


# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardWeights:
    """What each component is worth. The defaults are those at the start of the run.

    Raises:
        UserError: a weight that is not finite, a negative reward, a positive penalty, or weights
            whose sum is negative (then saying nothing would be the best completion).
    """

    correctness: float = 0.40
    trace: float = 0.45
    confidence: float = 0.15
    verbosity: float = -0.05
    format: float = 0.0

    def __post_init__(self):
        for name, weight in self.named().items():
            if not math.isfinite(weight):
                raise UserError(f"reward weight {name} is {weight}: give a finite number")
            if name == "verbosity" and weight > 0:
                raise UserError(
                    f"reward weight verbosity is {weight}, which would pay for length:"
                    f" it is a penalty, give {-weight}"
                )
            if name != "verbosity" and weight < 0:
                raise UserError(
                    f"reward weight {name} is {weight}, which would punish it: give 0 or more"
                )
        if sum(self.named().values()) < 0:
            raise UserError(
                f"reward weights sum to {sum(self.named().values()):g}: the sum must not be"
                " negative, give a reward some weight or set verbosity to 0"
            )

    def named(self) -> dict[str, float]:
        """Component name -> weight, in the order of the components."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


START_WEIGHTS = RewardWeights()
END_WEIGHTS = replace(START_WEIGHTS, correctness=0.60, trace=0.25)


def weights_at(start: RewardWeights, end: RewardWeights, progress: float) -> RewardWeights:
    """Weights at `progress` in [0, 1] of the run: linear, and exactly `start` and `end` there.

    Raises:
        UserError: progress outside [0, 1] or NaN.
    """
    if not 0.0 <= progress <= 1.0:
        raise UserError(f"annealing progress is {progress}: it must lie in [0, 1]")
    if progress == 1.0:
        return end  # start + 1 * (end - start) may differ from it in the last bit
    last = end.named()
    return RewardWeights(
        **{name: first + progress * (last[name] - first) for name, first in start.named().items()}
    )


# --- scoring --------------------------------------------------------------------------------------

_COMPONENTS: dict[str, Reward] = {  # the fields of RewardWeights, in their order
    "correctness": correctness,
    "trace": trace,
    "confidence": confidence,
    "verbosity": verbosity,
    "format": format_ok,
}


@dataclass(frozen=True)
class Scores:
    """Rewards of B samples, rows in the order they came.

    Attributes:
        components: reward name -> B unweighted values; the built-in five, then the extras.
        totals: B weighted sums.
    """

    components: dict[str, list[float]]
    totals: list[float]


def score(
    samples: Sequence[Sample],
    weights: RewardWeights,
    extra: Sequence[tuple[str, Reward, float]] = (),
) -> Scores:
    """Every component and the weighted total of each sample.

    Args:
        samples: B samples.
        weights: of the built-in components.
        extra: (name, reward, weight) of the user's own rewards.

    Raises:
        UserError: an extra whose name is taken or whose weight is not finite; a reward that raises,
            or returns anything but a finite number. It names the reward and the row.
    """
    rewards, weight_of = dict(_COMPONENTS), weights.named()
    for name, reward, weight in extra:
        if name in rewards:
            raise UserError(f"two rewards are named {name!r}: rename one of them")
        if not math.isfinite(weight):
            raise UserError(f"reward {name!r} has weight {weight}: give a finite number")
        rewards[name], weight_of[name] = reward, weight
    components = {
        name: [_checked(name, reward, row, sample) for row, sample in enumerate(samples)]
        for name, reward in rewards.items()
    }
    totals = [
        sum(weight_of[name] * values[row] for name, values in components.items())
        for row in range(len(samples))
    ]
    return Scores(components, totals)


def _checked(name: str, reward: Reward, row: int, sample: Sample) -> float:
    """`reward(sample)` as a finite float, or the one line that says why not and where."""
    where = f"on row {row} (prompt {_one_line(sample.prompt, 40)!r})"
    try:
        value = reward(sample)
    except Exception as error:
        raise UserError(
            f"reward {name!r} raised {_described(error)} {where}: mend it or return 0.0 there"
        ) from error
    try:
        # SupportsFloat takes 0-d arrays and Fractions too; a str has float() but no __float__.
        number = float(value) if isinstance(value, SupportsFloat) else None
    except Exception as error:
        raise UserError(
            f"reward {name!r} returned a {type(value).__name__} {where} that is no single number"
            f" ({_one_line(str(error), 80)}): return one finite float"
        ) from error
    if number is None or not math.isfinite(number):
        shown = _one_line(repr(value), 40)
        raise UserError(f"reward {name!r} returned {shown} {where}: return one finite float")
    return number


def _described(error: Exception) -> str:
    """Type, message and innermost place of `error`, in one line."""
    message = f"{type(error).__name__}: {_one_line(str(error), 120)}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{message} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def _one_line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


# --- the user's own rewards -----------------------------------------------------------------------


def load_reward(spec: str) -> Reward:
    """The function that "path/to/file.py:function" names. Runs the file once.

    Raises:
        UserError: no ":function", no such file, an error while running it, no such function in it,
            or something that cannot be called.
    """
    file, colon, name = spec.rpartition(":")
    if not (colon and file and name.isidentifier()):
        raise UserError(f"reward {spec!r} names no function: write path/to/file.py:function")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"reward {spec!r}: there is no Python file {file!r}; check the path")
    module = _run_file(path)
    if name not in vars(module):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        has = ", ".join(own) or "no function"
        raise UserError(f"reward {spec!r}: {file} has no {name!r}; it has {has}")
    reward = vars(module)[name]
    if not callable(reward):
        kind = type(reward).__name__
        raise UserError(f"reward {spec!r}: {name!r} is of type {kind}; name a function")
    return reward


def _run_file(path: Path):
    """The module made by running `path`; registered, since dataclasses look their module up."""
    module_name = f"gemma_grpo_reward:{path.resolve()}"
    module_spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(path, error)
        raise UserError(
            f"reward file {path}, line {line}: {type(error).__name__}:"
            f" {_one_line(str(error), 120)}; mend the file"
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> int | str:
    """The last line of `path` on the way to `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    return lines[-1] if lines else "?"
