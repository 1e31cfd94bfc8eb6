"""Whether GRPO has collapsed, by the metrics of its steps, and which checkpoint is still good.

Does not import jax.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemma_grpo.records import read
from gemma_grpo.training.config import GuardConfig

LENGTH, CORRECT = "completion_length/mean", "reward/correctness"


class Limit(NamedTuple):
    """A range that a metric is to keep, both ends in it; None where a side is open."""

    metric: str
    low: float | None = None
    high: float | None = None

    def broken_by(self, value: float) -> str:
        """Which side the value is on, "below 0.5"; "" within the range."""
        if self.low is not None and value < self.low:
            return f"below {self.low:g}"
        if self.high is not None and value > self.high:
            return f"above {self.high:g}"
        return ""


class CollapsedError(Exception):
    """GRPO has collapsed; of its checkpoints those that are still good are kept.

    Attributes:
        why: what was seen, in words.
        stage, step, num_steps: the newest good checkpoint's step; 0 if there is none.
        params: the stage's weights after `step`, or None.
    """

    def __init__(self, why: str, stage: str, step: int, num_steps: int, params: Any = None):
        super().__init__(why)
        self.why, self.stage, self.step, self.num_steps = why, stage, step, num_steps
        self.params = params


class Guard:
    """Of one stage. It is told the metrics of its steps, in order and from the first: what it knows
    is a function of them alone, so that a resumed run's guard decides as the run's own.

    The metrics of a step are of the weights before its update. So whether a checkpoint is good
    shows in the next step's.

    Attributes:
        collapse: what the last step has shown, in words; "" if nothing has collapsed.
    """

    def __init__(self, config: GuardConfig, checkpoint_every: int):
        self.collapse = ""
        self._config, self._every = config, checkpoint_every
        # Steps in a row out of the range, of the metrics that have kept theirs once. Lengths are
        # compared with those of the first steps, which keep it.
        self._streaks = {LENGTH: 0}
        self._lengths: list[float] = []  # of the first steps
        self._phase: str | None = None  # of the curriculum
        self._correct: list[float] = []  # shares of its last steps
        self._most_correct = 0.0  # the best mean of as many steps
        self._was_healthy = False  # the last step
        self._good: set[int] = set()

    def see(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step more, from 1: numbers of Python, numpy or jax; None was not measured."""
        is_healthy, self.collapse = True, ""
        for name in ("loss", "grad_norm"):
            if name in metrics and _number(metrics, name) is None:
                is_healthy, self.collapse = False, f"{name} was not finite in step {step}"
        for limit in self._limits():
            value = _number(metrics, limit.metric)
            if value is None:
                continue
            broken = limit.broken_by(value)
            if not broken:
                self._streaks[limit.metric] = 0
            elif limit.metric in self._streaks:
                is_healthy = False
                self._streaks[limit.metric] += 1
                if self._streaks[limit.metric] >= self._config.patience:
                    self.collapse = self._in_words(limit.metric, broken, step, value)
        share = self._share_right(_number(metrics, CORRECT), metrics.get("phase"))
        if share < (1 + self._config.min_correctness) / 2:  # half-way down is not good either
            is_healthy = False
        if share < self._config.min_correctness:
            self.collapse = (
                f"{CORRECT} was {share:.3g} of its best {self._most_correct:.3g} in the mean of "
                f"steps {step - self._config.patience + 1} to {step}"
            )
        length = _number(metrics, LENGTH)
        if length is not None and len(self._lengths) < self._config.patience:
            self._lengths.append(length)
        if is_healthy and self._was_healthy:
            self._good.add(step - 1)
        self._was_healthy = is_healthy

    def needs_checkpoint(self, step: int) -> bool:
        """Whether a run may have to go back to this step: where to must not depend on the clock."""
        return step % self._every == 0

    def best(self, steps: Iterable[int]) -> int:
        """The checkpoint to go back to, of those of these steps: the newest good one that
        `needs_checkpoint`, else the newest good one; 0, the stage's beginning, if none is good."""
        good = [step for step in steps if step in self._good]
        return max(good, key=lambda step: (self.needs_checkpoint(step), step), default=0)

    def _share_right(self, correct: float | None, phase: str | None) -> float:
        """The mean of the last steps' right completions, as a share of the best such mean; 1 where
        nothing is known. Steps are too small to be looked at one by one, and those of another phase
        of the curriculum are no measure: its problems are easier."""
        patience = self._config.patience
        if phase != self._phase:
            self._phase, self._correct, self._most_correct = phase, [], 0.0
        if correct is None or not self._config.min_correctness:
            return 1.0
        self._correct = [*self._correct, correct][-patience:]
        if len(self._correct) < patience:
            return 1.0
        mean = sum(self._correct) / patience
        self._most_correct = max(self._most_correct, mean)
        return mean / self._most_correct if self._most_correct else 1.0

    def _limits(self) -> Iterator[Limit]:
        """Those that are looked at now."""
        config = self._config
        yield Limit("reward/format", low=config.min_format)
        yield Limit("entropy", config.min_entropy, config.max_entropy or None)
        yield Limit("truncated", high=config.max_truncated or None)
        yield Limit("kl", high=config.max_kl or None)
        yield Limit("logp_gap/mean", high=config.max_logp_gap or None)
        if len(self._lengths) == config.patience:
            first = sum(self._lengths) / config.patience
            most = config.max_length * first or None
            yield Limit(LENGTH, config.min_length * first, most)

    def _in_words(self, metric: str, broken: str, step: int, value: float) -> str:
        patience = self._config.patience
        if patience == 1:
            return f"{metric} was {broken} in step {step} ({value:.3g})"
        return f"{metric} was {broken} in steps {step - patience + 1} to {step} (last {value:.3g})"


def guard_of(config: GuardConfig, checkpoint_every: int, run_dir: Path, stage: str) -> Guard:
    """The guard of a stage's steps that a run has recorded in its metrics.jsonl."""
    guard, path = Guard(config, checkpoint_every), run_dir / "metrics.jsonl"
    steps, _ = read.json_lines(path)  # the last line may be torn
    for metrics in steps:
        if metrics.get("stage") == stage:
            guard.see(metrics["step"], metrics)
    return guard


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric's value; None where it was not measured, or is not finite, which metrics.jsonl does
    not tell apart."""
    value = metrics.get(name)
    value = None if value is None else float(value)
    return value if value is not None and math.isfinite(value) else None
