"""Scores of a batch of samples: every component and the weighted total."""

import contextlib
import inspect
import math
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat, cast

from gemma_grpo.errors import UserError, described, one_line, shown
from gemma_grpo.rewards.components import COMPONENTS, TRACES
from gemma_grpo.rewards.sample import BatchReward, Reward, Sample
from gemma_grpo.rewards.weights import RewardWeights

SLOW_SECONDS = 300.0  # of one reward's call for all samples, until a line names it
MOST = 1e30  # of a value, which training has in float32 and squares


@dataclass(frozen=True)
class Scores:
    """Rewards of B samples, rows in the order they came.

    Attributes:
        components: reward name -> B unweighted values; the built-in five, then the extras. None
            where a judge's or a `TolerantReward`'s is missing.
        totals: B weighted sums.
        seconds: that it took to have them.
    """

    components: dict[str, list[Any]]
    totals: list[float]
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class TolerantReward:
    """A reward of the user's own within a run: a completion that it fails on has no value of it
    (`score` says what None pays), and a line on stderr names the first.

    Attributes:
        name: the reward's.
        reward: that may fail.
        may_fail_on_all: else UserError is raised where it fails on every sample.
    """

    name: str
    reward: Reward | BatchReward
    may_fail_on_all: bool
    takes_batch: bool = True
    may_be_missing: bool = True

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        values, failures = tolerant_column(self.name, self.reward, samples)
        if failures and len(failures) == len(samples) and not self.may_fail_on_all:
            raise UserError(f"all {len(samples)} completions of a step: {failures[0]}")
        if failures:
            print(
                f"warning: {failures[0]}; until then such completions are paid without it, and "
                f"counted in missing/{self.name}",
                file=sys.stderr,
            )
        return [None if math.isnan(value) else value for value in values]

    def num_missing(self, samples: Sequence[Sample], values: Sequence[float | None]) -> int:
        """How many completions it failed on."""
        return values.count(None)


def score(
    samples: Sequence[Sample],
    weights: RewardWeights,
    extra: Sequence[tuple[str, Reward | BatchReward, float]] = (),
    trace: str = "arithmetic",
) -> Scores:
    """Every component and the weighted total of each sample.

    Where a component is missing, its group's mean stands in the total: that of the other samples of
    the same prompt, or 0 if none of them has it. The mean of the group stays what it is, so the
    component gives this sample no advantage, and changes none of the others'. Zero would punish a
    completion for a failure that is not its own. The other weights made larger in its place would
    pay it more for what it has in common with its group, wherever this component is below the rest.

    Args:
        samples: B samples.
        weights: of the built-in components.
        extra: (name, reward, weight) of the user's own rewards.
        trace: how the trace is scored, "arithmetic" or "structure" (`RewardConfig.trace`).

    Raises:
        UserError: an extra whose name is taken or whose weight is not finite; a reward that raises,
            or returns anything but a finite number. It names the reward and the row.
    """
    started = time.monotonic()
    built_in = {**COMPONENTS, "trace": TRACES[trace]}
    weight_of = weights.named()
    for name, _, weight in extra:
        if name in weight_of:
            raise UserError(f"two rewards are named {name!r}: rename one of them")
        if not math.isfinite(weight):
            raise UserError(f"reward {name!r} has weight {weight}: give a finite number")
        weight_of[name] = weight
    components = {name: _column(name, reward, samples) for name, reward in built_in.items()}
    for name, reward, _ in extra:
        with _named_while_slow(name):
            components[name] = _column(name, reward, samples)
    paid = {name: _filled(values, samples) for name, values in components.items()}
    totals = [
        sum(weight_of[name] * values[row] for name, values in paid.items())
        for row in range(len(samples))
    ]
    return Scores(components, totals, time.monotonic() - started)


@contextlib.contextmanager
def _named_while_slow(name: str) -> Iterator[None]:
    """Prints one line on stderr if the block, a reward's call, takes longer than SLOW_SECONDS."""
    line = (
        f"warning: reward {name!r} has not returned for {SLOW_SECONDS:g} seconds; the run waits "
        "for it, past --hours too (Ctrl-C twice stops unsaved)"
    )
    timer = threading.Timer(SLOW_SECONDS, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True  # a reward that hangs in a thread does not keep the process from ending
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _filled(values: list[Any], samples: Sequence[Sample]) -> list[float]:
    """The values, each missing one replaced by the mean of its group's, or 0."""
    if None not in values:
        return values
    groups: dict[tuple[str, str], list[float]] = {}
    keys = [(sample.prompt, sample.answer) for sample in samples]
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(key, []).extend([] if value is None else [value])
    return [
        value if value is not None else math.fsum(groups[key]) / max(len(groups[key]), 1)
        for key, value in zip(keys, values, strict=True)
    ]


def tolerant_column(
    name: str, reward: Reward | BatchReward, samples: Sequence[Sample]
) -> tuple[list[float], list[str]]:
    """One reward's values of all samples, NaN where it failed, and the line of each failure.

    A reward that takes all samples at once has failed on all of them, or on none.
    """
    if getattr(reward, "takes_batch", False):
        try:
            return _column(name, reward, samples), []
        except UserError as error:
            return [math.nan] * len(samples), [str(error)] * len(samples)
    values, failures = [], []
    for row, sample in enumerate(samples):
        try:
            values.append(_checked(name, cast(Reward, reward), row, sample))
        except UserError as error:
            values.append(math.nan)
            failures.append(str(error))
    return values, failures


def _column(name: str, reward: Reward | BatchReward, samples: Sequence[Sample]) -> list[Any]:
    """One reward's values of all samples; None where it may be missing and is."""
    if not getattr(reward, "takes_batch", False):
        each = cast(Reward, reward)
        return [_checked(name, each, row, sample) for row, sample in enumerate(samples)]
    try:
        given: Any = cast(BatchReward, reward)(samples)
        if isinstance(given, Mapping | Set | str):  # whose items would pass for values
            raise TypeError(f"a {type(given).__name__} in place of a list")
        values = list(given)
    except UserError:  # ours: a judge's file that cannot be written
        raise
    except KeyboardInterrupt:  # a notebook's stop button
        raise
    except BaseException as error:
        raise UserError(
            f"reward {name!r} raised {_described(error)} on {len(samples)} samples: fix it or"
            " return 0.0 for each"
        ) from error
    if len(values) != len(samples):
        raise UserError(
            f"reward {name!r} returned {len(values)} values for {len(samples)} samples: return one"
            " for each"
        )
    if getattr(reward, "may_be_missing", False):
        return values
    return [
        _checked(name, _giving(value), row, sample)
        for row, (value, sample) in enumerate(zip(values, samples, strict=True))
    ]


def _giving(value: Any) -> Reward:
    return lambda _: value


def _checked(name: str, reward: Reward, row: int, sample: Sample) -> float:
    """`reward(sample)` as a finite float, or the one line that says why not and where."""
    where = f"on row {row} (prompt {one_line(sample.prompt, 40)!r})"
    try:
        value = reward(sample)
    except KeyboardInterrupt:  # a notebook's stop button
        raise
    except BaseException as error:
        raise UserError(
            f"reward {name!r} raised {_described(error)} {where}: fix it or return 0.0 there"
        ) from error
    if inspect.iscoroutine(value):
        value.close()  # else Python warns, lines later, that nobody waited for it
    try:
        # SupportsFloat takes 0-d arrays and Fractions too; a str has float() but no __float__.
        # It is slow to ask, so what is plain is asked first.
        number = float(value) if isinstance(value, float | int | SupportsFloat) else None
    except Exception as error:
        raise UserError(
            f"reward {name!r} returned a {type(value).__name__} {where} that is no single number"
            f" ({described(error)}): return one finite float"
        ) from error
    if number is None or not abs(number) <= MOST:
        raise UserError(f"reward {name!r} returned {shown(value)} {where}: return one finite float")
    return number


def _described(error: BaseException) -> str:
    """Type, message and innermost place of `error`, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{described(error)} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
