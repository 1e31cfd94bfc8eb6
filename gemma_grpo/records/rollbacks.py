"""How often a run went back to an earlier checkpoint, and at which rates it went on: its
rollbacks.json.

Does not import jax.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.records import files

NAME = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """One of them.

    Attributes:
        why: what had collapsed, in words.
        at: the last step that was taken before.
        to: the step that was gone back to; 0 is the stage's beginning.
        rate_factor: what the run's learning rate is multiplied by from there on.
    """

    why: str
    at: int
    to: int
    rate_factor: float


def of_rows(rows: object) -> list[Rollback]:
    """From JSON's rows, in order. Raises ValueError if they are no rollbacks."""
    if not isinstance(rows, list):
        raise ValueError("no list of rollbacks")
    return [_of_row(row) for row in rows]


def _of_row(row: object) -> Rollback:
    match row:
        case {"why": str(why), "at": int(at), "to": int(to), "rate_factor": float(factor)} if (
            0 <= to <= at and 0 < factor < 1
        ):
            return Rollback(why, at, to, factor)
    raise ValueError("no rollback")


def read(run_dir: Path) -> list[Rollback]:
    """A run's rollbacks, in order. Raises UserError if the file is damaged."""
    path = run_dir / NAME
    if not path.exists():
        return []
    try:
        return of_rows(json.loads(files.read_bytes(path).decode()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged; put back a copy: it says at which learning rate the run goes on"
        ) from error


def write(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    """Writes a run's rollbacks. Raises UserError if the disk is full."""
    rows = [asdict(each) for each in rollbacks]
    files.write_text(run_dir / NAME, json.dumps(rows, indent=1) + "\n")


def until(rollbacks: Sequence[Rollback], step: int) -> list[Rollback]:
    """Those that lie behind a run which goes on from a checkpoint of `step`. An earlier checkpoint
    than the one last gone back to is of the time before: what came after is taken again."""
    kept = list(rollbacks)
    while kept and kept[-1].to > step:
        kept.pop()
    return kept
