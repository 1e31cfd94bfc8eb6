"""The rescoring command: a finished run's completions under other rewards, weights or readers.

    python -m gemma_grpo.rescore RUN --reward mine.py:f=0.5
    python -m gemma_grpo.rescore RUN --weights correctness=1,trace=0
    python -m gemma_grpo.rescore RUN --reader lenient

Reads rollouts/ and evaluations/; no model and no device is used. Does not import jax.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from gemma_grpo.errors import FlagParser, UserError, guarded, one_line, start
from gemma_grpo.records import read
from gemma_grpo.rewards import custom, rescoring
from gemma_grpo.rewards.components import TRACES
from gemma_grpo.rewards.rescoring import TOTAL, Change, Part, Rescored, RunSettings

REQUIRED = {  # of each row, with its type
    "prompt": str,
    "answer": str,
    "difficulty": str,
    "completion": str,
    "num_tokens": int,
    "stopped": bool,
}
NUMBERS = ("group", "problem")  # of a row, if they are there
MOVED = 10
SHOWN_CHARS = 600  # of a completion
SHOWN_ROWS = 10  # of the steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return guarded(lambda: _rescore(_flags(arguments)))


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = FlagParser(
        prog="python -m gemma_grpo.rescore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="FILE:FUNCTION[=WEIGHT]",
        help="a reward to add, or to replace the run's own of that name; the default weight is 1",
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="NAME=WEIGHT,...",
        help="the weights of reward components (not a model), at all steps; components that are "
        "not named keep the run's own",
    )
    parser.add_argument(
        "--reader",
        default="saved",
        choices=get_args(rescoring.Reader),
        help="strict reads each text again by this version; lenient also finds answers as a "
        "generous reader does; saved (the default) takes the saved values. Confidence needs "
        "log-probs and keeps its saved value",
    )
    parser.add_argument("--trace", choices=list(TRACES), help="score the traces again, this way")
    parser.add_argument("--json", action="store_true", help="print JSON, with each step separately")
    return parser.parse_args(arguments)


def _rescore(flags: argparse.Namespace) -> int:
    settings = RunSettings.of(_config(flags.run))
    parts, torn = _read(flags.run)
    change = _change(flags, settings)
    rescored = [rescoring.rescore(part, settings, change) for part in parts]
    report = _report(rescored, torn)
    _require_values(report["failures"], report["n"])
    print(json.dumps(report) if flags.json else _text(report, rescored))
    return 0


def _change(flags: argparse.Namespace, settings: RunSettings) -> Change:
    """Raises UserError for a flag that names what the run does not have."""
    extra = custom.load_extra_rewards(flags.reward)
    known = {*settings.start.named(), *settings.extra, *(name for name, _, _ in extra)}
    weights = {}
    for entry in filter(None, flags.weights.split(",")):
        name, _, value = entry.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"--weights {entry}: write NAME=NUMBER")
        if name not in known:
            raise UserError(f"--weights {entry}: no such component; use {', '.join(sorted(known))}")
    return Change(extra, weights, flags.reader, flags.trace)


# --- reading --------------------------------------------------------------------------------------


def _config(run_dir: Path) -> dict[str, Any]:
    """config.yaml as plain values. Raises UserError if the folder is no run's."""
    path = run_dir / "config.yaml"
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{run_dir}: not a run directory ({path.name}: {error.strerror})"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({one_line(str(error), 120)})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a mapping of fields to values")
    return settings


def _read(run_dir: Path) -> tuple[list[Part], list[str]]:
    """The files that hold completions, rollouts by step and evaluations in order, and those of them
    whose last line a kill has cut short: it is left out.

    Raises:
        UserError: there is none, a line is not JSON, or it lacks a field.
    """
    found: list[tuple[Path, str, int | None]] = []
    for path in sorted((run_dir / "rollouts").glob("*.jsonl")):
        if match := re.fullmatch(r"(\w+)-(\d+)", path.stem):
            found.append((path, match[1], int(match[2])))
    for name in read.evaluated(run_dir):
        found.append((run_dir / "evaluations" / f"{name}.jsonl", name, None))
    parts, torn = [], []
    for path, stage, step in found:
        if not path.is_file():
            raise UserError(f"{path}: not a file; move it away")
        *lines, rest = path.read_bytes().split(b"\n")  # a completion may hold other separators
        rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
        name = str(path.relative_to(run_dir))
        if rest:
            torn.append(name)
        if rows:
            parts.append(Part(name, stage, step, rows, [_group(row) for row in rows]))
    if not parts:
        raise UserError(f"{run_dir} holds no completions yet (rollouts/, evaluations/)")
    return parts, torn


def _row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON; delete the line") from error
    for name, kind in REQUIRED.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise UserError(
                f"{where}: no {name!r} of type {kind.__name__}: another version of gemma_grpo "
                "wrote it, which has to read it too"
            )
    for name in NUMBERS:
        if name in row and not (isinstance(row[name], int) and 0 <= row[name] < 2**31):
            raise UserError(f"{where}: {name!r} is no number from 0; delete the line")
    return row


def _group(row: dict) -> int:
    """In an evaluation, a problem's greedy completion is a group beside that of its samples."""
    if "group" in row:
        return row["group"]
    return 2 * row.get("problem", 0) + bool(row.get("greedy"))


# --- the report -----------------------------------------------------------------------------------


def _report(parts: Sequence[Rescored], torn: list[str]) -> dict[str, Any]:
    """All figures, ready for JSON: of all `rollouts` (None without any), of each step and each
    evaluation, and the completions that moved most."""
    rollouts = [part for part in parts if part.part.step is not None]
    failures: dict[str, list[str]] = {}
    for part in parts:
        for name, messages in part.failures.items():
            failures.setdefault(name, []).extend(messages)
    return {
        "n": sum(len(part.groups) for part in parts),
        "torn": torn,
        "off": sum(part.off for part in parts),
        "failures": {
            name: {"count": len(messages), "first": messages[0]}
            for name, messages in failures.items()
            if messages
        },
        "rollouts": rescoring.figures(rollouts) if rollouts else None,
        "parts": [
            {"stage": part.part.stage, "step": part.part.step, **rescoring.figures([part])}
            for part in parts
        ],
        "moved": rescoring.moved(parts, MOVED),
    }


def _require_values(failures: dict[str, dict], number: int) -> None:
    """Raises UserError for a reward that gave no value at all."""
    for failure in failures.values():
        if failure["count"] == number:
            raise UserError(f"all {number:,} completions: {failure['first']}")


def _text(report: dict[str, Any], parts: Sequence[Rescored]) -> str:
    """What a person reads."""
    rollouts = [part for part in parts if part.part.step is not None]
    evaluations = [part for part in parts if part.part.step is None]
    lines = [
        f"{report['n']:,} completions: {len(rollouts)} rollouts, {len(evaluations)} evaluations"
    ]
    lines += [f"note: {line}" for line in _notes(report)]
    rows = [(_steps(chunk), rescoring.figures(chunk)) for chunk in _chunks(rollouts)]
    rows += [(part.part.stage, rescoring.figures([part])) for part in evaluations]
    whole = report["rollouts"] or rescoring.figures(parts)
    of = "all rollouts" if report["rollouts"] else "all evaluations"
    header = ["", "old mean", "new mean", "rank correlation in groups"]
    table = [
        [name, *map(_decimal, (column["old"], column["new"], column["rank_correlation"]))]
        for name, column in whole["columns"].items()
    ]
    lines += ["", f"components, {of}:", *_aligned([header, *table])]
    header = ["", "n", "old reward", "new", "rank corr.", "groups", "best changed"]
    header += ["signal gained", "lost", "lenient right, paid 0"]
    cells = [[label, *_cells(row)] for label, row in rows]
    lines += ["", "reward:", *_aligned([header, *cells])]
    if report["moved"]:
        lines += ["", "moved most, against the rest of their group:"]
        lines += [line for entry in report["moved"] for line in ("", *_described(entry))]
    return "\n".join(lines)


def _notes(report: dict[str, Any]) -> Iterator[str]:
    if report["rollouts"] is None:
        yield "no rollouts: the run took no GRPO step"
    for name in report["torn"]:
        yield f"{name}: its last line was cut short, and is left out"
    for failure in report["failures"].values():
        count = failure["count"]
        yield f"{count:,} of {report['n']:,} completions are left out: {failure['first']}"
    if report["off"]:
        yield (
            f"of {report['off']:,} completions the saved reward is not the weighted sum of the "
            "saved components: another version of gemma_grpo, or another config.yaml"
        )


def _chunks(parts: list[Rescored]) -> list[list[Rescored]]:
    """The rollouts in at most `SHOWN_ROWS` runs of steps of one length."""
    size = max(1, math.ceil(len(parts) / SHOWN_ROWS))
    return [parts[start : start + size] for start in range(0, len(parts), size)]


def _steps(parts: list[Rescored]) -> str:
    first, last = parts[0].part, parts[-1].part
    steps = str(first.step) if len(parts) == 1 else f"{first.step}-{last.step}"
    return f"{first.stage} {steps}"


def _cells(row: dict[str, Any]) -> list[str]:
    column = row["columns"][TOTAL]
    counts = ("groups", "best_changed", "signal_gained", "signal_lost", "lenient_unpaid")
    decimals = map(_decimal, (column["old"], column["new"], column["rank_correlation"]))
    return [f"{row['n']:,}", *decimals, *(f"{row[name]:,}" for name in counts)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [name.ljust(widths[0])]
            + [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        ).rstrip()
        for name, *values in rows
    ]


def _described(entry: dict[str, Any]) -> list[str]:
    """A completion that moved: what changed, the question, and the text, safe for a terminal."""
    changed = [
        f"{name} {_decimal(old)} -> {_decimal(new)}"
        for name, (old, new) in entry["change"].items()
        if old != new or name == TOTAL
    ]
    text = entry["completion"]
    asked, gold = one_line(entry["prompt"], 200), one_line(entry["answer"], 60)
    shown = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + " ..."
    return [
        f"{entry['file']}, {entry['shift']:+.3f}: {', '.join(changed)}",
        f"  {_printable(asked)} [{_printable(gold)}]",
        *(f"  | {_printable(line)}" for line in shown.split("\n")),
    ]


def _printable(text: str) -> str:
    """Without what moves a terminal's cursor or turns its writing around."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # no -0.000


if __name__ == "__main__":
    start(main)
