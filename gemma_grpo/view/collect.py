"""From run folders to what the page holds: one tree of plain lists, dicts, numbers and text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_grpo.records import metric_notes, read, tokens
from gemma_grpo.records import summary as summaries
from gemma_grpo.view import completions

TRAINING = "training"  # the stage of rollouts, beside the names of evaluations
# Of a stage's result: what the overview's table shows.
FIGURES = (
    "accuracy accuracy_ci95 lenient_accuracy lenient_accuracy_ci95 format_rate format_rate_ci95 "
    "truncation_rate truncation_rate_ci95 pass_at_1 pass_at_1_ci95 pass_at_k pass_at_k_ci95 "
    "maj_at_k maj_at_k_ci95 k trace_score true_steps reward completion_length n"
).split()
PAIRED = ("n", "difference", "gained", "lost", "p_value")
# Columns of the completions; each is a list with an entry a completion.
COLUMNS = (
    "run stage step group prompt sample text cut flags tokens reward advantage components lines "
    "lengths logps gaps logp"
).split()


@dataclass
class _Tables:
    """What runs share: texts of problems, names, and the columns of all completions."""

    prompts: dict[tuple[str, str], int] = field(default_factory=dict)
    problems: list[dict] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    components: tuple[str, ...] = completions.COMPONENTS
    columns: dict[str, list] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def problem(self, row: dict) -> int:
        """The number of a row's problem; problems with one question and answer are one."""
        key = completions.text_of(row, "prompt"), completions.text_of(row, "answer")
        if key not in self.prompts:
            self.prompts[key] = len(self.problems)
            self.problems.append({"question": key[0], "answer": key[1]})
        problem = self.problems[self.prompts[key]]
        for name in ("difficulty", "domain"):
            if row.get(name):
                problem.setdefault(name, str(row[name]))
        return self.prompts[key]

    def stage(self, name: str) -> int:
        if name not in self.stages:
            self.stages.append(name)
        return self.stages.index(name)

    def add(self, row: dict, of_tokens: tokens.Tokens | None, **place: int) -> None:
        """A completion; `place` says its run, stage, step, group and sample."""
        text = completions.text_of(row, "completion")
        length = len(str(row.get("completion") or ""))
        lengths, logps, gaps, mean = completions.encode_tokens(of_tokens)
        advantage = row.get("advantage")
        entry = place | {
            "prompt": self.problem(row),
            "text": text,
            "cut": length - len(text),
            "flags": completions.flags(row),
            "tokens": _whole(row, "num_tokens") if "num_tokens" in row else None,
            "reward": completions.reward(row),
            "advantage": None if advantage is None else completions.rounded(advantage, 3),
            "components": completions.components(row, self.components),
            "lines": completions.line_kinds(text, completions.text_of(row, "prompt")),
            "lengths": lengths,
            "logps": logps,
            "gaps": gaps,
            "logp": mean,
        }
        for name in COLUMNS:
            self.columns[name].append(entry[name])


def collect(run_dirs: Sequence[Path], share: float = 1.0) -> dict[str, Any]:
    """What the page of these runs holds.

    Args:
        share: of the held-out problems and of the training steps to keep, evenly spaced.

    Raises:
        UserError: a folder is no run's.
    """
    for run_dir in run_dirs:
        read.require_run(run_dir)
    tables = _Tables(components=_component_names(run_dirs))
    runs = [_run(tables, number, run_dir, share) for number, run_dir in enumerate(run_dirs)]
    for run, name in zip(runs, _names(run_dirs), strict=True):
        run["name"] = name
    return {
        "runs": runs,
        "metrics": _metrics(runs),
        "stages": tables.stages,
        "components": list(tables.components),
        "problems": tables.problems,
        "completions": tables.columns,
    }


def bytes_of(run_dirs: Sequence[Path]) -> int:
    """Of the files in which the runs' completions are."""
    return sum(
        path.stat().st_size
        for run_dir in run_dirs
        for folder in ("evaluations", "rollouts")
        for path in (run_dir / folder).glob("*.jsonl")
    )


def _run(tables: _Tables, number: int, run_dir: Path, share: float) -> dict:
    """One run's own part; its completions go into the tables."""
    summary = read.json_object(run_dir / "summary.json")
    names = read.evaluated(run_dir)
    evaluations = _evaluations(tables, number, run_dir, names, share)
    training = _training(tables, number, run_dir, share)
    lines, torn = read.json_lines(run_dir / "metrics.jsonl")
    config = run_dir / "config.yaml"
    notes = _notes(summary, share, evaluations, training)
    if torn := torn + evaluations["torn"] + training["torn"]:
        notes.append(f"{torn} torn line{'s' * (torn > 1)} left out.")
    return {
        "stages": [
            {"name": name} | _figures(read.json_object(run_dir / "evaluations" / f"{name}.json"))
            for name in names
        ],
        "paired": _paired(summary),
        "seconds": _short(summaries.seconds_of(run_dir)),
        "device": _text(summary.get("device")),
        "weights": _text(summary.get("weights")),
        "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        "curves": {stage: _curves(lines, stage) for stage in ("sft", "grpo")},
        "notes": notes,
    }


def _evaluations(
    tables: _Tables, number: int, run_dir: Path, names: Sequence[str], share: float
) -> dict[str, int]:
    """Adds the held-out completions; counts problems, those kept, and torn lines."""
    problems, kept, torn, without_tokens = set(), set(), 0, 0
    for name in names:
        path = run_dir / "evaluations" / f"{name}.jsonl"
        rows, bad = read.json_lines(path)
        torn += bad
        for row, of_tokens in _with_tokens(path, rows):
            problem = _whole(row, "problem")
            problems.add(problem)
            if not _is_kept(problem, share):
                continue
            kept.add(problem)
            without_tokens += of_tokens is None
            sample = -1 if row.get("greedy", True) else _whole(row, "sample")
            place = {"run": number, "stage": tables.stage(name), "step": 0, "group": 0}
            tables.add(row, of_tokens, sample=sample, **place)
    return {"all": len(problems), "kept": len(kept), "torn": torn, "old": without_tokens}


def _training(tables: _Tables, number: int, run_dir: Path, share: float) -> dict[str, int]:
    """Adds the completions of training steps; counts steps, those kept, and torn lines."""
    files = list(read.rollout_steps(run_dir).items())
    kept, torn, without_tokens = 0, 0, 0
    for place, (step, path) in enumerate(files):
        if not _is_kept(place, share) and place + 1 < len(files):
            continue
        kept += 1
        rows, bad = read.json_lines(path)
        torn += bad
        seen: dict[int, int] = {}
        for row, of_tokens in _with_tokens(path, rows):
            group = _whole(row, "group")
            seen[group] = seen.get(group, -1) + 1
            without_tokens += of_tokens is None
            place_of = {"run": number, "stage": tables.stage(TRAINING), "step": step}
            tables.add(row, of_tokens, group=group, sample=seen[group], **place_of)
    return {"all": len(files), "kept": kept, "torn": torn, "old": without_tokens}


def _with_tokens(path: Path, rows: list[dict]) -> Iterator[tuple[dict, tokens.Tokens | None]]:
    """Each row with its tokens; None where they are not on file, or are not those of the rows."""
    of_rows = tokens.read(tokens.path_beside(path)) or []
    if [len(each["logps"]) for each in of_rows] != [row.get("num_tokens") for row in rows]:
        return ((row, None) for row in rows)
    return zip(rows, of_rows, strict=True)


def _is_kept(number: int, share: float) -> bool:
    """Of the numbers from 0 this share, evenly spaced, the first among them."""
    return math.floor(number * share) > math.floor((number - 1) * share)


def _notes(summary: dict, share: float, evaluations: dict, training: dict) -> list[str]:
    """What a reader of the page should know of what is not on it."""
    notes = []
    if not summary:
        notes.append("The run has no summary yet: it is being written, or was stopped.")
    elif summary.get("unfinished"):
        unfinished = summary["unfinished"]
        if isinstance(unfinished, dict) and "collapse" in unfinished:
            notes.append(
                "The guard has stopped the run: train --resume-from RUN --run-dir NEW goes on with "
                "another --grpo.guard."
            )
        else:
            notes.append("The run is not finished; train --resume goes on.")
    if share < 1:
        notes.append(
            f"On this page: {evaluations['kept']} of {evaluations['all']} held-out problems and "
            f"{training['kept']} of {training['all']} training steps, evenly spaced, to keep it "
            "small; --megabytes takes more. Figures and curves are of all."
        )
    if evaluations["old"] + training["old"]:
        notes.append("Some completions have no token log-probs: an older version wrote them.")
    if not training["all"]:
        notes.append("There are no training rollouts.")
    return notes


def _figures(result: dict) -> dict:
    """Those that are what the page takes them for: the files may be anyone's."""
    is_number = lambda value: type(value) in (int, float)  # NaN too, which the page says is none
    fits = {name: _is_interval if name.endswith("_ci95") else is_number for name in FIGURES}
    return {name: _short(result[name]) for name, fit in fits.items() if fit(result.get(name))}


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(read.is_number, value))


def _paired(summary: dict) -> dict[str, dict]:
    pairs = summary.get("paired")
    return {
        name: _short({key: pair[key] for key in (*PAIRED, "ci95")})
        for name, pair in (pairs.items() if isinstance(pairs, dict) else ())
        if isinstance(pair, dict)
        and all(read.is_number(pair.get(key)) for key in PAIRED)
        and _is_interval(pair.get("ci95"))
    }


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _curves(lines: Sequence[dict], stage: str) -> dict[str, list]:
    """Each numeric metric of a stage as a list over its steps, None where it was not measured."""
    lines = [line for line in lines if line.get("stage") == stage]
    number = lambda value: _short(value) if read.is_number(value) else None
    is_metric = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    names = dict.fromkeys(name for line in lines for name in line if is_metric(line[name]))
    return {name: [number(line.get(name)) for line in lines] for name in names}


def _metrics(runs: Sequence[dict]) -> dict[str, list[str]]:
    """[meaning, healthy, what to do else] of each metric that a run has."""
    curves = [curves for run in runs for curves in run["curves"].values()]
    notes = {name: metric_notes.note(name) for of_stage in curves for name in of_stage}
    return {name: [n.meaning, n.healthy, n.fix] for name, n in notes.items() if n is not None}


def _short(value: Any) -> Any:
    """Floats to five significant digits; None for nan and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _whole(row: dict, name: str) -> int:
    """A count or a number of the row; 0 for what is none, or what a page cannot count with."""
    value = row.get(name)
    return value if type(value) is int and abs(value) < 2**53 else 0


def _component_names(run_dirs: Sequence[Path]) -> tuple[str, ...]:
    """The built-in rewards, then those of the users' own that any run's rollouts were paid by."""
    names = dict.fromkeys(completions.COMPONENTS)
    for run_dir in run_dirs:
        lines, _ = read.json_lines(run_dir / "metrics.jsonl")
        own = (n.removeprefix("reward/") for n in (lines[-1] if lines else {}) if "reward/" in n)
        names |= dict.fromkeys(name for name in own if name not in ("mean", "std"))
    return tuple(names)


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """What to call each run: its folder's name, numbered where two are alike."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]
