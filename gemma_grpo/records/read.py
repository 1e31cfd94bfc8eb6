"""A run's folder read back, also that of a run still being written, or killed in mid-line.

What is missing or torn is left out, never guessed. Does not import jax.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from gemma_grpo.errors import UserError
from gemma_grpo.records import files
from gemma_grpo.records.metrics import STAGES

_OF_A_RUN = ("config.yaml", "metrics.jsonl", "evaluations", "rollouts", "summary.json")


def require_run(run_dir: Path) -> None:
    """Raises UserError if the folder is no run's."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; name a run, such as runs/NAME")
    if not any((run_dir / name).exists() for name in _OF_A_RUN):
        raise UserError(
            f"{run_dir} is no run: it has no config.yaml, metrics.jsonl or evaluations/; "
            "name a folder that train has written"
        )


def evaluated(run_dir: Path) -> list[str]:
    """The names of a run's evaluations, in the order of training: base, then each stage's steps,
    then the stage."""
    found = (run_dir / "evaluations").glob("*.jsonl")
    names = [path.stem for path in found if not path.is_dir()]  # a task may be called so

    def order(name: str) -> tuple:
        stage, _, step = name.partition("-step-")
        place = ("base", *STAGES).index(stage) if stage in ("base", *STAGES) else len(STAGES) + 1
        return place, int(step) if step.isdecimal() else float("inf"), name

    return sorted(names, key=order)


def rollout_steps(run_dir: Path) -> dict[int, Path]:
    """The files of a run's GRPO rollouts by step, in order."""
    found = {
        int(match[1]): path
        for path in (run_dir / "rollouts").glob("*.jsonl")
        if (match := re.fullmatch(r"grpo-(\d+)\.jsonl", path.name))
    }
    return dict(sorted(found.items()))


def last_weights(run_dir: Path) -> Path:
    """What the run's last stage has left of the trained parameters, cut short by a deadline or not.

    Raises:
        UserError: no stage has left any.
    """
    for stage in reversed(STAGES):
        path = run_dir / "weights" / f"{stage}.safetensors"
        if path.is_file():
            return path
        # What a deadline left of a stage that was not through.
        if partial := sorted(path.parent.glob(f"{stage}-step-*.safetensors")):
            return partial[-1]
    raise UserError(f"{run_dir}: no stage has finished; go on with --resume first")


def json_lines(path: Path) -> tuple[list[dict], int]:
    """The objects of a .jsonl file, and how many of its lines are none; none where it is absent."""
    try:
        text = files.read_bytes(path).decode(errors="replace")
    except OSError:
        return [], 0
    rows, bad = [], 0
    for line in text.split("\n"):
        row = _parsed(line)
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += bool(line.strip())
    return rows, bad


def json_object(path: Path) -> dict:
    """The object in a .json file; empty where there is none."""
    try:
        value = _parsed(files.read_bytes(path).decode(errors="replace"))
    except OSError:
        return {}
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that can be computed with: finite, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN too


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether a completion's row says that it is right."""
    correctness = row.get("correctness")
    return is_number(correctness) and correctness > 0


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
