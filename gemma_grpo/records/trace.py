"""One held-out problem through a run's stages, as text for a terminal. Does not import jax."""

import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.records import read

WIDTH = 100  # characters of a line
MOST_LINES = 14  # of a completion


def gained(run_dir: Path) -> str | None:
    """The trace of a problem that the last stage gets right and an earlier one did not; None if
    there is none.

    Of these one that the most stages get wrong, and of those the one whose last completion is the
    longest: it shows the most work.
    """
    stages = without_snapshots(greedy_rows(run_dir))
    *earlier, last = list(stages.values()) or [{}]
    wrong_in = {
        number: sum(number in rows and not read.is_right(rows[number]) for rows in earlier)
        for number, row in last.items()
        if read.is_right(row)
    }
    if not any(wrong_in.values()):
        return None
    shown = max(wrong_in, key=lambda number: (wrong_in[number], len(_text(last[number]))))
    return through_stages(stages, shown)


def without_snapshots(stages: Mapping[str, dict[int, dict]]) -> dict[str, dict[int, dict]]:
    """The stages, and what was measured between their steps on all problems, as when a deadline
    came; not on a few."""
    most = max(map(len, stages.values()), default=0)
    return {
        name: rows for name, rows in stages.items() if "-step-" not in name or len(rows) == most
    }


def greedy_rows(run_dir: Path) -> dict[str, dict[int, dict]]:
    """By stage, in order, the row of each problem's greedy completion by the problem's number."""
    stages = {}
    for name in read.evaluated(run_dir):
        rows, _ = read.json_lines(run_dir / "evaluations" / f"{name}.jsonl")
        stages[name] = {
            row["problem"]: row
            for row in rows
            if row.get("greedy", True) and isinstance(row.get("problem"), int)
        }
    return stages


def through_stages(stages: Mapping[str, Mapping[int, dict]], number: int) -> str:
    """What each stage wrote on a problem, greedily, and how it was paid.

    Raises:
        UserError: no stage has this problem.
    """
    found = {name: rows[number] for name, rows in stages.items() if number in rows}
    if not found:
        most = max((max(rows, default=-1) for rows in stages.values()), default=-1)
        has = f"problems 0 to {most}" if most >= 0 else "no held-out completions"
        raise UserError(f"problem {number} is not in this run: it has {has}")
    first = next(iter(found.values()))
    lines = [f"problem {number}", *_wrapped(printable(str(first.get("prompt"))), "  ")]
    lines.append(f"  answer: {printable(str(first.get('answer')))}")
    for name, row in found.items():
        right = "right" if read.is_right(row) else "wrong"
        lines += ["", f"{name}: {right}{_paid(row)}", *_cut(_text(row))]
    return "\n".join(lines)


def show(text: str) -> None:
    """Prints a text, also where the terminal's encoding lacks some of its characters."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


def printable(text: str) -> str:
    """The text without control and direction characters, which a terminal would obey."""
    shown = (
        char if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else "\ufffd"
        for char in text
    )
    return "".join(shown)


def _text(row: Mapping) -> str:
    return str(row.get("completion") or "")


def _paid(row: Mapping) -> str:
    names = ("trace", "confidence", "format", "reward")
    return "".join(f", {name} {row[name]:.2f}" for name in names if read.is_number(row.get(name)))


def _cut(text: str) -> Sequence[str]:
    """The first lines of a completion, wrapped, and a note of what was left out."""
    lines = _wrapped(printable(text[: WIDTH * MOST_LINES * 2]), "  | ") or ["  | (nothing)"]
    if len(lines) > MOST_LINES or len(text) > WIDTH * MOST_LINES * 2:
        lines = [*lines[:MOST_LINES], f"  ... {len(text):,} characters in all"]
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return [
        indent + part
        for line in text.splitlines()
        for part in textwrap.wrap(line, WIDTH - len(indent)) or [""]
    ]
