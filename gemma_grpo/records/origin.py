"""What a run began with: its settings, and digests of its problems, base weights and tokenizer.

They are kept in the run's origin.json. What goes on with the run, or uses its model, compares them:
a file that was changed meanwhile would make another run of it without a word. Does not import jax.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_grpo.errors import UserError
from gemma_grpo.records import files

NAME = "origin.json"
_BLOCKS, _BLOCK = 64, 1 << 16  # what is read of each large file: 4 MB, evenly spread


def note(run_dir: Path, what: Mapping[str, Any]) -> None:
    """Adds to what the run began with."""
    known = files.read_json(run_dir / NAME) or {}
    files.write_text(run_dir / NAME, json.dumps(known | dict(what), indent=1) + "\n")


def check(run_dir: Path, digests: Mapping[str, str]) -> None:
    """Compares digests, by what they are of, with those the run began with; what it does not know
    is not compared.

    Raises:
        UserError: some differ.
    """
    known = files.read_json(run_dir / NAME) or {}
    if changed := [name for name, digest in digests.items() if known.get(name, digest) != digest]:
        raise UserError(
            f"{run_dir}: its {' and '.join(changed)} are not what the run began with; put them "
            f"back, or delete {run_dir / NAME} to go on all the same"
        )


def of_rows(rows: Iterable[Any]) -> str:
    """A digest of dataclass instances of plain fields, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            json.dumps(dataclasses.asdict(row), sort_keys=True, default=str).encode() + b"\n"
        )
    return digest.hexdigest()


def of_files(path: Path) -> str:
    """A digest of a file, or of a checkpoint's folder. Of large files a sample is read: other
    weights differ everywhere, and gigabytes need not be read twice."""
    if path.is_file():
        parts = [path]
    else:
        parts = [*sorted(path.glob("*.safetensors")), *path.glob("config.json")]
        parts = parts or sorted(part for part in path.rglob("*") if part.is_file())
    digest = hashlib.sha256()
    for part in parts:
        size = part.stat().st_size
        digest.update(f"{part.relative_to(path) if part != path else ''} {size}\n".encode())
        with part.open("rb") as file:
            if size <= _BLOCKS * _BLOCK:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
