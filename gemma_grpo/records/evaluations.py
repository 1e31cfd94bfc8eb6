"""The files of one evaluation: its completions, their tokens, and its sealed result.

Does not import jax.
"""

import hashlib
import json
import sys
from pathlib import Path

from gemma_grpo.records import files, tokens

SEAL = "sha256"  # the key under which NAME.json holds its `seal`


def write(folder: Path, name: str, result: dict, rows: list[dict], drawn: tokens.Tokens) -> None:
    """Writes NAME.jsonl, NAME.npz and last NAME.json, without which `read_back` finds none.

    Args:
        result: the figures, ready for JSON.
        rows: one for each completion.
        drawn: their tokens.
    """
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_text(folder / f"{name}.jsonl", lines)
    tokens.write(folder / f"{name}.npz", drawn)
    sealed = result | {SEAL: seal(result, lines)}
    files.write_text(folder / f"{name}.json", json.dumps(sealed, indent=1) + "\n")


def read_back(folder: Path, name: str) -> tuple[dict, list[dict]] | None:
    """An evaluation that is on file, its result and rows; None if there is none, or no whole one
    with its seal, of which a line on stderr says so."""
    result = files.read_json(folder / f"{name}.json")
    if result is None:
        return None
    path = folder / f"{name}.jsonl"
    try:
        lines = files.read_bytes(path).decode()
        rows = [json.loads(line) for line in lines.split("\n")[:-1]]
        if result.pop(SEAL) == seal(result, lines):
            return result, rows
    except (OSError, ValueError, KeyError):
        pass
    print(f"warning: {path} is damaged: passed over", file=sys.stderr)
    return None


def seal(result: dict, lines: str) -> str:
    """A digest of an evaluation: its figures, and the lines of its completions."""
    return hashlib.sha256((json.dumps(result, sort_keys=True) + lines).encode()).hexdigest()
