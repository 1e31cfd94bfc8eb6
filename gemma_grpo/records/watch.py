"""Watches a stage's metrics, and says a line when one has left its healthy range for long.

The ranges are those of `metric_notes`, of means over `WINDOW` steps; of entropy also a single step
counts. Four rules compare metrics with each other or with the stage's beginning. Does not import
jax.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from gemma_grpo.records.metric_notes import NOTES

WINDOW = 30  # steps that a range must be left for, in the mean
QUIET = 100  # steps from one line to the next
REWARD_RISE, ACCURACY_RISE = 0.1, 0.02  # over `APART` steps; a hack earns the one without the other
APART = 100
ACCURATE = 0.9  # from here on accuracy has little room to rise
SCORING = 0.5  # largest share of a step's seconds
# Said before all others, in this order: they explain the others.
_CAUSES = ("reward/std", "entropy", "completion_length/mean", "truncated")
LONGEST, SHORTEST = 2.0, 0.5  # times the completions' length of the first `WINDOW` steps


class Finding(NamedTuple):
    """A metric that is not healthy, and what was seen."""

    metric: str
    seen: str


class History:
    """The numbers of a stage's steps, in order."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One step more: numbers of Python, numpy or jax; text and None are left out."""
        for name, value in metrics.items():
            if value is not None and not isinstance(value, str):
                self._values.setdefault(name, []).append(float(value))

    def is_zero(self, name: str) -> bool:
        """Whether it was 0 in each step so far; False if it was never measured."""
        return name in self._values and not any(self._values[name])

    def first(self, name: str) -> float | None:
        """Mean over the first window; None until it is full."""
        return _mean(self._values.get(name, [])[:WINDOW])

    def last(self, name: str, ago: int = 0) -> float | None:
        """Mean over the window that ended `ago` steps ago; None until it is full."""
        values = self._values.get(name, [])
        end = len(values) - ago
        return _mean(values[end - WINDOW : end]) if end >= WINDOW else None

    def highest(self, name: str) -> float | None:
        """The highest of the last window; None until it is full."""
        values = self._values.get(name, [])[-WINDOW:]
        return max(values) if len(values) == WINDOW else None


class Watch:
    """Of one stage; begins anew when a run is resumed."""

    def __init__(self, stage: str):
        self._stage = stage
        self._history = History()
        self._said: dict[str, int] = {}  # step in which a line was last about that metric

    def see(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """The line to say after a step, if any: at most one in `QUIET` steps.

        It is about the metric that no line was about for longest, and names the others.
        """
        self._history.add(metrics)
        if step - max(self._said.values(), default=-QUIET) < QUIET:
            return None
        found = {each.metric: each.seen for each in findings(self._history)}
        if not found:
            return None
        metric = min(found, key=lambda name: self._said.get(name, -QUIET))
        self._said[metric] = step
        others = ", ".join(name for name in found if name != metric)
        also = f" Not healthy either: {others}." if others else ""
        return f"{self._stage} step {step}: {found[metric]}. {NOTES[metric].fix}{also}"


def findings(history: History) -> list[Finding]:
    """What is not healthy now, causes before what follows from them.

    A component whose weight was 0 in all steps is left out.
    """
    order = {metric: place for place, metric in enumerate(_CAUSES)}
    return sorted(_found(history), key=lambda found: order.get(found.metric, len(order)))


def _found(history: History) -> Iterator[Finding]:
    for metric, note in NOTES.items():
        mean = history.last(metric)
        if mean is None or history.is_zero("weight/" + metric.removeprefix("reward/")):
            continue
        if note.high is not None and mean > note.high or note.low is not None and mean < note.low:
            seen = f"{metric} is {mean:.3g} in the mean of {WINDOW} steps (healthy: {note.healthy})"
            yield Finding(metric, seen)
    for rule in _RULES:
        if finding := rule(history):
            yield finding


def _no_learning_rate(history: History) -> Finding | None:
    if history.last("learning_rate") == 0:
        return Finding("learning_rate", f"learning_rate has been 0 for {WINDOW} steps")
    return None


def _entropy_peak(history: History) -> Finding | None:
    """A policy that falls apart is undecided for some steps, and may then repeat one token: the
    mean looks healthy."""
    peak, most = history.highest("entropy"), NOTES["entropy"].high
    if peak is None or most is None or peak <= most:
        return None
    return Finding(
        "entropy", f"entropy was {peak:.3g} in one of {WINDOW} steps (healthy: at most {most:g})"
    )


def _reward_without_accuracy(history: History) -> Finding | None:
    """The reward has risen, and the share of right answers has not: suspect a hack."""
    reward, accuracy = history.last("reward/mean"), history.last("reward/correctness")
    reward_before = history.last("reward/mean", APART)
    accuracy_before = history.last("reward/correctness", APART)
    if reward is None or accuracy is None or reward_before is None or accuracy_before is None:
        return None
    rise, accuracy_rise = reward - reward_before, accuracy - accuracy_before
    if rise < REWARD_RISE or accuracy_rise > ACCURACY_RISE or accuracy > ACCURATE:
        return None
    return Finding(
        "reward/mean",
        f"in {APART} steps reward/mean rose by {rise:.2f} and reward/correctness by "
        f"{accuracy_rise:.2f}: a hack?",
    )


def _length_drift(history: History) -> Finding | None:
    now = history.last("completion_length/mean")
    first = history.first("completion_length/mean")
    if not now or not first or SHORTEST <= now / first <= LONGEST:
        return None
    return Finding(
        "completion_length/mean",
        f"completions have {now:.0f} tokens, in the first {WINDOW} steps they had {first:.0f}",
    )


def _slow_rewards(history: History) -> Finding | None:
    scoring, step = history.last("time/reward_s"), history.last("time/step_s")
    if scoring is None or step is None or scoring <= SCORING * step:
        return None
    seen = f"scoring takes {scoring:.3g} of a step's {step:.3g} seconds"
    return Finding("time/reward_s", f"{seen}, in the mean of {WINDOW} steps")


_RULES: tuple[Callable[[History], Finding | None], ...] = (
    _no_learning_rate,
    _entropy_peak,
    _reward_without_accuracy,
    _length_drift,
    _slow_rewards,
)


def _mean(values: list[float]) -> float | None:
    return sum(values) / WINDOW if len(values) == WINDOW else None
