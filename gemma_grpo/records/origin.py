"""What a run began with: its settings, the folder it was started in, and digests of its problems,
base weights, tokenizer, teacher, the files of own rewards and the weights of judges.

They are kept in the run's origin.json. What goes on with the run, or uses its model, compares them:
a file that was changed meanwhile would make another run of it without a word. Does not import jax.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
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


def changed(run_dir: Path, digests: Mapping[str, str]) -> list[str]:
    """Which digests, by what they are of, differ from those the run began with; what it does not
    know is not compared."""
    known = files.read_json(run_dir / NAME) or {}
    return [name for name, digest in digests.items() if known.get(name, digest) != digest]


def check(run_dir: Path, digests: Mapping[str, str], *, way_out: str = "") -> None:
    """Compares digests as `changed`.

    Args:
        way_out: what the user does to go on all the same.

    Raises:
        UserError: some differ.
    """
    way_out = way_out or f"delete {run_dir / NAME} to go on all the same"
    if differing := changed(run_dir, digests):
        raise UserError(
            f"{run_dir}: its {' and '.join(differing)} are not what the run began with; put them "
            f"back, or {way_out}"
        )


@contextlib.contextmanager
def begun_elsewhere(run_dir: Path) -> Iterator[None]:
    """Adds to a UserError in the block that the run was begun in another folder, if it was: paths
    in its settings may count from there."""
    try:
        yield
    except UserError as error:
        folder = (files.read_json(run_dir / NAME) or {}).get("folder", os.getcwd())
        if folder == os.getcwd():
            raise
        raise UserError(
            f"{error}; the run was begun in {folder}: relative paths count from there, so start "
            "it there, or name a reward where it is now with --reward FILE:NAME"
        ) from error


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
