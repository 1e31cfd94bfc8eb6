"""Runs as text, for a terminal without a browser."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gemma_grpo.records import read, report, trace


def show(run_dir: Path, number: int | None = None) -> None:
    """Prints a run, or one of its held-out problems. Raises as `overview` and `problem`."""
    trace.show(overview(run_dir) if number is None else problem(run_dir, number))


def show_comparisons(run_dirs: Sequence[Path]) -> None:
    """Prints how each run but the first compares with the first."""
    for run_dir in run_dirs[1:]:
        trace.show("\n" + comparison(run_dirs[0], run_dir))


def overview(run_dir: Path) -> str:
    """The before/after table, which problems changed, and one that was gained.

    Raises:
        UserError: the folder is no run's.
    """
    read.require_run(run_dir)
    names = read.evaluated(run_dir)
    if not names:
        return f"{run_dir}: no evaluation has finished yet"
    stages = trace.without_snapshots(trace.greedy_rows(run_dir))
    names = list(stages)
    results = {name: read.json_object(run_dir / "evaluations" / f"{name}.json") for name in names}
    summary = read.json_object(run_dir / "summary.json")
    parts = [report.before_after_table({"stages": results, "paired": summary.get("paired")})]
    for before, after in zip(names, names[1:], strict=False):
        parts.append(_changes(stages[before], stages[after], f"{before} to {after}"))
    if shown := trace.gained(run_dir):
        parts.append(shown)
    return "\n\n".join(parts)


def problem(run_dir: Path, number: int) -> str:
    """One held-out problem through all stages.

    Raises:
        UserError: the folder is no run's, or the run has no such problem.
    """
    read.require_run(run_dir)
    return trace.through_stages(trace.greedy_rows(run_dir), number)


def comparison(before: Path, after: Path) -> str:
    """The last stages of two runs, paired over the problems that both answered greedily.

    Problems with the same question and answer are the same; of runs on other data there are none.
    """
    from gemma_grpo.evaluation import statistics  # --help does not wait for SciPy

    stage_before, was = _last_verdicts(before)
    stage_after, is_now = _last_verdicts(after)
    both = [problem for problem in was if problem in is_now]
    if not both:
        return f"{after} against {before}: no held-out problem that both answered"
    before_P = np.array([was[problem] for problem in both])
    after_P = np.array([is_now[problem] for problem in both])
    pair = report.describe_pair(asdict(statistics.paired_difference(before_P, after_P)))
    return (
        f"{after} ({stage_after}) against {before} ({stage_before}), the {len(both)} problems that "
        f"both answered:\n"
        f"  accuracy {100 * after_P.mean():.1f} % against {100 * before_P.mean():.1f} %: {pair}"
    )


def _last_verdicts(run_dir: Path) -> tuple[str, Mapping[tuple[str, str], bool]]:
    """A run's last stage, and by (question, answer) whether its greedy completion is right there;
    an empty name without any evaluation."""
    stages = trace.without_snapshots(trace.greedy_rows(run_dir))
    name, rows = list(stages.items())[-1] if stages else ("", {})
    return name, {
        (str(row.get("prompt")), str(row.get("answer"))): read.is_right(row)
        for row in rows.values()
    }


def _changes(before: dict[int, dict], after: dict[int, dict], label: str) -> str:
    """The numbers of the problems gained and lost, the first twenty of each."""
    was = {number: read.is_right(row) for number, row in before.items()}
    is_now = {number: read.is_right(row) for number, row in after.items()}
    both = sorted(was.keys() & is_now.keys())
    gained = [number for number in both if is_now[number] and not was[number]]
    lost = [number for number in both if was[number] and not is_now[number]]
    return "\n".join(
        f"{label}, {name} {len(found)}: {' '.join(map(str, found[:20]))}"
        f"{' ...' if len(found) > 20 else ''}".rstrip(": ")
        for name, found in (("gained", gained), ("lost", lost))
    )
