"""A run as text, for a terminal without a browser."""

from pathlib import Path

from gemma_grpo.records import read, report, trace


def show(run_dir: Path, number: int | None = None) -> None:
    """Prints a run, or one of its held-out problems. Raises as `overview` and `problem`."""
    trace.show(overview(run_dir) if number is None else problem(run_dir, number))


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
