"""What other rewards, weights or readers would have paid for completions that were saved.

Nothing is sampled: the saved values of each component stand, unless a reward replaces them or
another reader is asked for. Does not import jax.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gemma_grpo.errors import UserError, shown
from gemma_grpo.rewards import answers, components, custom, lenient, scores
from gemma_grpo.rewards.sample import BatchReward, Reward, Sample
from gemma_grpo.rewards.weights import END_WEIGHTS, RewardWeights, weights_at

Reader = Literal["saved", "strict", "lenient"]
READ_FROM_TEXT = ("correctness", "trace", "verbosity", "format")  # confidence needs log-probs
TOTAL = "reward"  # the name of the weighted sum among the columns


@dataclass(frozen=True)
class Part:
    """The completions that one file of a run holds.

    Attributes:
        name: of the file, from the run's folder.
        stage: "grpo" for rollouts; an evaluation's name, such as "base".
        step: of rollouts, from 1; None for an evaluation.
        rows: as they were saved, with whatever fields.
        groups: of each row, which group of completions of one prompt it belongs to.
    """

    name: str
    stage: str
    step: int | None
    rows: list[dict]
    groups: list[int]

    @property
    def has_totals(self) -> bool:
        """Whether each row's total is saved: not by versions that only summed them up."""
        return all(TOTAL in row for row in self.rows)


@dataclass(frozen=True)
class SavedSample(Sample):
    """A sample of a finished run, whose log-probs were not saved: without them it is printed,
    hashed and compared, so that a reward may be cached.

    Raises:
        LookupError: `answer_logps` is read.
    """

    answer_logps: tuple[float, ...] = field(repr=False, compare=False)

    def __getattribute__(self, name: str) -> Any:
        if name == "answer_logps":
            raise LookupError("answer_logps were not saved with the run")
        return super().__getattribute__(name)


@dataclass(frozen=True)
class Change:
    """What is to be different.

    Attributes:
        extra: (name, function, weight) of rewards; one whose name the run knows replaces it.
        weights: constant over all steps, by component; the others keep the run's own.
        reader: "saved" takes the saved values; "strict" reads the text again by this version;
            "lenient" does so too, and reads the answer as a generous reader.
        trace: "arithmetic" or "structure" reads the trace again; None takes the reader's.
    """

    extra: Sequence[tuple[str, Reward | BatchReward, float]] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    reader: Reader = "saved"
    trace: str | None = None


@dataclass(frozen=True)
class RunSettings:
    """Of a run's config.yaml, what paid its completions.

    Attributes:
        start, end: weights of the built-in components at the first and the last step.
        num_steps: GRPO steps.
        extra: weight of each reward of the user's own.
        judges: weight of each judge, who is not asked in evaluations.
        max_tokens: a completion's budget.
    """

    start: RewardWeights
    end: RewardWeights
    num_steps: int
    extra: dict[str, float]
    judges: dict[str, float]
    max_tokens: int

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "RunSettings":
        """From the values in config.yaml. Raises UserError where another version wrote them."""
        try:
            reward = settings["reward"]
            judges = reward.get("rubric", {}).get("judges", [])
            return RunSettings(
                RewardWeights(**reward["start"]),
                RewardWeights(**reward["end"]),
                int(settings["grpo"]["num_steps"]),
                _weights(reward["extra"]),
                _weights(judges),
                int(settings["model"]["max_completion_length"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(
                f"config.yaml is of another version of gemma_grpo ({type(error).__name__}: {error})"
                "; read the run with that one"
            ) from error

    def weights_of(self, part: Part) -> dict[str, float]:
        """By component, those that paid the part's completions."""
        if part.step is None:  # `evaluator.Pay`; versions without totals had constant weights
            return self.end.named() | self.extra if part.has_totals else END_WEIGHTS.named()
        progress = min((part.step - 1) / max(self.num_steps - 1, 1), 1.0)
        return weights_at(self.start, self.end, progress).named() | self.extra | self.judges


def _weights(specs: Sequence[str]) -> dict[str, float]:
    """By name, of "place:name=weight", where the name of a judge that is a model may be a path."""
    split = [custom.split_weight(spec, "config.yaml:") for spec in specs]
    return {PurePath(location.rpartition(":")[2]).name: weight for location, weight in split}


class Column(NamedTuple):
    """One component's values, or the total's, of the completions of a part.

    Attributes:
        old: NaN where the run had no such component, or it was missing.
        new: NaN where a reward failed.
    """

    old: Float[np.ndarray, " B"]
    new: Float[np.ndarray, " B"]


@dataclass(frozen=True)
class Rescored:
    """A part with its columns.

    Attributes:
        columns: the total first, then each component.
        groups: of each row.
        unpaid: right by the lenient reader, and 0 by the one that is asked for.
        failures: a message for each value that a reward did not give.
        off: completions whose saved reward is not the weighted sum of their saved components.
    """

    part: Part
    columns: dict[str, Column]
    groups: Int[np.ndarray, " B"]
    unpaid: Bool[np.ndarray, " B"]
    failures: dict[str, list[str]]
    off: int


def rescore(part: Part, settings: RunSettings, change: Change) -> Rescored:
    """The part's completions under the change.

    Raises:
        UserError: a weight or a component that the run does not have.
    """
    samples = [_sample(row, settings.max_tokens) for row in part.rows]
    weights = settings.weights_of(part)
    old = {name: _saved(part, name) for name in weights}
    new, failures = dict(old), {}
    for name, read in _readers(change).items():
        new[name] = np.array([read(sample) for sample in samples])
    for name, reward, _ in change.extra:
        values, messages = scores.tolerant_column(name, reward, samples)
        new[name] = np.array(values, np.float64)
        failures[name] = [f"{part.name}: {message}" for message in messages]
    paid = weights | {name: weight for name, _, weight in change.extra}
    paid |= {name: weight for name, weight in change.weights.items() if name in paid}
    nothing = np.full(len(samples), np.nan)
    start, groups = np.zeros(len(samples)), np.array(part.groups, np.int64)
    # What was missing was paid its group's mean; where a reward fails now, there is no total.
    given = {name: _filled(values, groups) for name, values in old.items()}
    summed = sum((weights[name] * given[name] for name in weights), start)
    given |= {name: values for name, values in new.items() if values is not old.get(name)}
    saved = summed if part.step is None and not part.has_totals else _saved(part, TOTAL)
    total = Column(saved, sum((paid[name] * given[name] for name in new), start))
    columns = {name: Column(old.get(name, nothing), new[name]) for name in new}
    return Rescored(
        part,
        {TOTAL: total, **columns},
        groups,
        _unpaid(part, new["correctness"]),
        failures,
        int(np.sum(np.abs(summed - saved) > 1e-5)),
    )


def _readers(change: Change) -> dict[str, Callable[[Sample], float]]:
    """The components that are read from the text again."""
    readers = {}
    if change.reader != "saved":
        readers = {name: components.COMPONENTS[name] for name in READ_FROM_TEXT}
    if change.reader == "lenient":
        readers["correctness"] = lambda sample: float(
            _is_leniently_right(sample.completion, sample.answer)
        )
    if change.trace is not None:
        readers["trace"] = components.TRACES[change.trace]
    return readers


def _sample(row: dict, max_tokens: int) -> Sample:
    return SavedSample(
        prompt=row["prompt"],
        completion=row["completion"],
        answer=row["answer"],
        difficulty=row["difficulty"],
        num_tokens=row["num_tokens"],
        max_tokens=max_tokens,
        answer_logps=(),
        stopped=row["stopped"],
        domain=row.get("domain", Sample.domain),
    )


def _saved(part: Part, name: str) -> Float[np.ndarray, " B"]:
    """A component's saved values, NaN where it is null. Raises UserError if the run did not save
    it, or if one is no number."""
    values = []
    for number, row in enumerate(part.rows, start=1):
        if name not in row:
            raise UserError(
                f"{part.name} has no {name!r}: the run is of another version of gemma_grpo, or its "
                "config.yaml of another run"
            )
        value = math.nan if row[name] is None else row[name]
        if not isinstance(value, int | float) or abs(value) > sys.float_info.max:
            raise UserError(
                f"{part.name}:{number}: {name} is {shown(value)}, no number; delete the line"
            )
        values.append(value)
    return np.array(values, np.float64)


def _filled(values: np.ndarray, groups: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """The values, NaN replaced by the mean of its group's, or 0, as `scores.score` pays."""
    is_missing = np.isnan(values)
    if not is_missing.any():
        return values
    _, of_row = np.unique(groups, return_inverse=True)
    sums = np.bincount(of_row, np.where(is_missing, 0.0, values))
    means = sums / np.maximum(np.bincount(of_row, ~is_missing), 1)
    return np.where(is_missing, means[of_row], values)


def _unpaid(part: Part, correctness: Float[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
    return np.array(
        [
            value == 0 and _is_leniently_right(row["completion"], row["answer"])
            for value, row in zip(correctness, part.rows, strict=True)
        ],
        bool,
    )


def _is_leniently_right(completion: str, answer: str) -> bool:
    return answers.answers_match(lenient.lenient_answer(completion), answer)


# --- figures --------------------------------------------------------------------------------------


def figures(parts: Sequence[Rescored]) -> dict[str, Any]:
    """What changed over some parts, ready for JSON.

    Returns:
        `n` completions; `columns`, for each its mean before (`old`) and after (`new`), and
        `rank_correlation`, Spearman's between the two within a group, mean over the groups in which
        both vary; None where there is nothing to average. Of the `groups` with more than one
        completion, and no failed reward: `best_changed`, none of the best before is among the best
        after; `signal_gained` and `signal_lost`, all rewards were equal before, or are after.
        `lenient_unpaid`, completions that a generous reader finds right and the reader 0.
    """
    totals = [_by_size(part.columns[TOTAL], part.groups) for part in parts]
    before = [old for groups in totals for old, _ in groups]
    after = [new for groups in totals for _, new in groups]
    pairs = list(zip(before, after, strict=True))
    flat = lambda groups_PG: (np.abs(groups_PG - groups_PG[:, :1]) < 1e-9).all(axis=1)
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return {
        "n": sum(len(part.groups) for part in parts),
        "columns": {name: _column_figures(name, parts) for name in names},
        "groups": sum(len(old) for old in before),
        "best_changed": sum(int((~_share_a_best(old, new)).sum()) for old, new in pairs),
        "signal_gained": sum(int((flat(old) & ~flat(new)).sum()) for old, new in pairs),
        "signal_lost": sum(int((~flat(old) & flat(new)).sum()) for old, new in pairs),
        "lenient_unpaid": sum(int(part.unpaid.sum()) for part in parts),
    }


def moved(parts: Iterable[Rescored], number: int) -> list[dict]:
    """The completions whose reward moved most against the rest of their group: rows of the files,
    with `file`, `shift`, and `change`, (before, after) of each column."""
    found = []
    for part in parts:
        old, new = part.columns[TOTAL]
        shift = new - old - _group_means(new - old, part.groups)
        for row in np.argsort(-np.abs(np.nan_to_num(shift)), kind="stable")[:number].tolist():
            found.append((float(np.nan_to_num(shift[row])), part, row))
    found.sort(key=lambda entry: -abs(entry[0]))
    return [
        {
            "file": part.part.name,
            "shift": shift,
            "change": {
                name: [_number(column.old[row]), _number(column.new[row])]
                for name, column in part.columns.items()
            },
            **{name: part.part.rows[row][name] for name in ("prompt", "answer", "completion")},
        }
        for shift, part, row in found[:number]
        if abs(shift) > 1e-9
    ]


def _column_figures(name: str, parts: Sequence[Rescored]) -> dict[str, float | None]:
    columns = [(part.columns[name], part.groups) for part in parts if name in part.columns]
    correlations = [
        correlation
        for column, groups in columns
        for old, new in _by_size(column, groups)
        for correlation in rank_correlations(old, new)
    ]
    return {
        "old": _mean(np.concatenate([column.old for column, _ in columns])),
        "new": _mean(np.concatenate([column.new for column, _ in columns])),
        "rank_correlation": _mean(np.array(correlations)),
    }


def rank_correlations(
    old_PG: Float[np.ndarray, "P G"], new_PG: Float[np.ndarray, "P G"]
) -> Float[np.ndarray, " P"]:
    """Spearman's rank correlation of each row, ties at their mean rank; NaN where one is flat."""
    ranks = [_ranks(values) - (values.shape[1] + 1) / 2 for values in (old_PG, new_PG)]
    norms_P = np.sqrt(np.square(ranks[0]).sum(axis=1) * np.square(ranks[1]).sum(axis=1))
    products_P = (ranks[0] * ranks[1]).sum(axis=1)
    return np.divide(products_P, norms_P, out=np.full(len(norms_P), np.nan), where=norms_P > 0)


def _ranks(values_PG: np.ndarray) -> np.ndarray:
    """From 1 within each row; what is equal gets the mean of its ranks."""
    here, other = values_PG[:, :, None], values_PG[:, None, :]
    return (other < here).sum(axis=2) + ((other == here).sum(axis=2) + 1) / 2


def _share_a_best(old_PG: np.ndarray, new_PG: np.ndarray) -> Bool[np.ndarray, " P"]:
    best = lambda values_PG: values_PG >= values_PG.max(axis=1, keepdims=True) - 1e-9
    return (best(old_PG) & best(new_PG)).any(axis=1)


def _by_size(column: Column, groups: Int[np.ndarray, " B"]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The groups with two completions and more and no NaN, as (old_PG, new_PG) for each G."""
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    found = []
    for size in np.unique(sizes[sizes > 1]).tolist():
        rows_PG = order[starts[sizes == size][:, None] + np.arange(size)]
        whole = ~np.isnan(column.old[rows_PG] + column.new[rows_PG]).any(axis=1)
        found.append((column.old[rows_PG[whole]], column.new[rows_PG[whole]]))
    return found


def _group_means(values: np.ndarray, groups: Int[np.ndarray, " B"]) -> np.ndarray:
    """Of each row its group's mean; where all groups hold one row, the mean over all rows."""
    _, of_row = np.unique(groups, return_inverse=True)
    valid = ~np.isnan(values)
    counts = np.bincount(of_row, valid)
    if counts.size and counts.max() <= 1:
        return np.full(len(values), np.nanmean(values) if valid.any() else np.nan)
    sums = np.bincount(of_row, np.where(valid, values, 0.0))
    return (sums / np.maximum(counts, 1))[of_row]


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
