"""What a run's seconds.json and summary.json say of its time, and of an end before the last step.

Does not import jax.
"""

import json
from pathlib import Path
from typing import Any

from gemma_grpo.records import files
from gemma_grpo.records.read import is_number

LONGEST = 1e9  # seconds; more are none


def add_seconds(run_dir: Path, name: str, seconds: float) -> None:
    """Adds wall-clock seconds to seconds.json; a stage that was resumed counts all its parts.
    `compile` is in the others."""
    spent = seconds_of(run_dir)
    spent[name] = round(spent.get(name, 0.0) + seconds, 2)
    files.write_text(run_dir / "seconds.json", json.dumps(spent) + "\n")


def seconds_of(run_dir: Path) -> dict[str, float]:
    """A run's seconds.json: what each part took, by its name. What is no such number is left out;
    of a damaged file a line on stderr says so."""
    spent = files.read_json(run_dir / "seconds.json") or {}
    is_time = lambda value: is_number(value) and 0 <= value < LONGEST
    return {name: seconds for name, seconds in spent.items() if is_time(seconds)}


def unfinished_at(unfinished: dict[str, Any]) -> str:
    """Where a run stopped, from summary.json's "unfinished"; for messages."""
    stage, step = unfinished["stage"], unfinished["step"]
    if step is None:
        return f"before the evaluation of {stage}"
    return f"{stage} step {step} of {unfinished['num_steps']}"


def collapsed(unfinished: dict[str, Any]) -> str:
    """That the guard stopped the run, and why, from summary.json's "unfinished"; for messages."""
    what, stage = unfinished["collapse"], unfinished["stage"]
    kept = f"{unfinished_at(unfinished)} is kept" if unfinished["step"] else "no step of it is good"
    return f"{stage} has collapsed: {what}; {kept}"
