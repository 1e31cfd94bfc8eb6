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
    """The range of a healthy metric, both ends included; None leaves a side open."""

    metric: str
    low: float | None = None
    high: float | None = None

    def broken_by(self, value: float) -> str:
        """How the value is out of range, such as "below 0.5"; "" within it."""
        if self.low is not None and value < self.low:
            return f"below {self.low:g}"
        if self.high is not None and value > self.high:
            return f"above {self.high:g}"
        return ""


class CollapsedError(Exception):
    """GRPO has collapsed; its checkpoints after the last good one are deleted.

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
    """Watches one stage for a collapse. `see` takes the metrics of every step in order, and the
    state depends on them alone: a resumed run decides as an uninterrupted one.

    A step's metrics are of the weights before its update, so whether its checkpoint is good shows
    in the next step's metrics.

    Attributes:
        collapse: why the stage has collapsed, as of the last step; "" if it has not.
    """

    def __init__(self, config: GuardConfig, checkpoint_every: int):
        self.collapse = ""
        self._config, self._every = config, checkpoint_every
        # Consecutive steps out of range, for each metric that was within its range once. The length
        # is from the start: its range comes from the first steps.
        self._streaks = {LENGTH: 0}
        self._lengths: list[float] = []  # of the first `patience` steps
        self._phase: str | None = None  # of the curriculum
        self._correct: list[float] = []  # of this phase's last `patience` steps
        self._most_correct = 0.0  # this phase's best mean of `patience` steps
        self._was_healthy = False  # the last step
        self._good: set[int] = set()  # steps whose checkpoints are good

    def see(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of one step, counted from 1; None where one was not measured."""
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
        share = self._see_correct(_number(metrics, CORRECT), metrics.get("phase"))
        if share < (1 + self._config.min_correctness) / 2:  # halfway to a collapse
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
        """Whether to save after this step, by its number alone: where a run goes back to must not
        depend on the clock."""
        return step % self._every == 0

    def best(self, steps: Iterable[int]) -> int:
        """The step to go back to, of these that have a checkpoint: the newest good one that
        `needs_checkpoint`, else the newest good one; 0, the stage's beginning, if none is good."""
        good = [step for step in steps if step in self._good]
        return max(good, key=lambda step: (self.needs_checkpoint(step), step), default=0)

    def _see_correct(self, correct: float | None, phase: str | None) -> float:
        """Takes a step's share of right completions; returns the mean over the last steps, as a
        share of the best such mean, or 1 where nothing is known. One step has too few completions
        to judge by, and an earlier phase of the curriculum has easier problems."""
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
        """The limits that apply now."""
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
    """A stage's guard that has seen the steps in the run's metrics.jsonl."""
    guard, path = Guard(config, checkpoint_every), run_dir / "metrics.jsonl"
    steps, _ = read.json_lines(path)  # the last line may be torn
    for metrics in steps:
        if metrics.get("stage") == stage:
            guard.see(metrics["step"], metrics)
    return guard


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric's value; None where it was not measured or is not finite: metrics.jsonl writes both
    as null."""
    value = metrics.get(name)
    value = None if value is None else float(value)
    return value if value is not None and math.isfinite(value) else None
