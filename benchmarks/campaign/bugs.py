"""Bugs injected one at a time into a copy of the working tree: a test of the room must fail.

A bug is a text of a file that another replaces. The table, bugs.jsonl, says which tests are to
notice it; where the text is no longer there, the run ends at once.
"""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".jsonl")
COPIED = ("gemma_grpo", "kernels", "benchmarks", "tests", "docs", "notebooks", "pyproject.toml")
COPIED += ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LOG.md", "setup.py")
TIMEOUT = 1800.0  # seconds by the clock; on a busy machine


@dataclass(frozen=True)
class Bug:
    """What is replaced by what, in which file below gemma_grpo, and whose tests must notice."""

    file: str
    old: str
    new: str
    tests: str


def bugs(folder: Path, number: int, seed: int = 0) -> Iterator[dict]:
    """A line for each bug, and one for all. Without a number, all of the table, in its order."""
    table = read_table()
    require_texts(table, ROOT)
    if number < len(table):
        table = random.Random(seed).sample(table, number)
    tree = folder / "tree"
    tree.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tree / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    caught = 0
    for bug in table:
        with injected(bug, tree):
            verdict, said, seconds = tried(bug, tree, folder / "log.txt")
        caught += verdict == "caught"
        line = {"file": bug.file, "old": bug.old[:60], "new": bug.new[:60], "verdict": verdict}
        yield line | {"said": said, "cpu_seconds": round(seconds, 1)}
    yield {"bugs": len(table), "caught": caught}


def read_table() -> list[Bug]:
    """The bugs of bugs.jsonl."""
    return [Bug(**json.loads(line)) for line in TABLE.read_text().splitlines()]


def require_texts(table: list[Bug], root: Path) -> None:
    """Raises ValueError for a bug whose text does not stand exactly once in its file, or whose
    tests are not there."""
    for bug in table:
        count = (root / "gemma_grpo" / bug.file).read_text().count(bug.old)
        if count != 1:
            raise ValueError(f"{bug.file}: {bug.old!r} stands there {count} times, not once")
        for name in shlex.split(bug.tests):
            if name.startswith("tests/") and not (root / name).exists():
                raise ValueError(f"{bug.file}: no {name}")


@contextlib.contextmanager
def injected(bug: Bug, tree: Path) -> Iterator[None]:
    """The bug is in the tree while the block runs."""
    path = tree / "gemma_grpo" / bug.file
    sound = path.read_text()
    path.write_text(sound.replace(bug.old, bug.new))
    try:
        yield
    finally:
        path.write_text(sound)


def tried(bug: Bug, tree: Path, log: Path) -> tuple[str, str, float]:
    """Whether the tests have "caught" it or it "lived"; the first that failed; CPU seconds."""
    before, began = _children_seconds(), time.monotonic()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'tests'}"}
    with log.open("w") as file:
        child = subprocess.Popen(
            [*command, *shlex.split(bug.tests)],
            cwd=tree,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(TIMEOUT - (time.monotonic() - began))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return "hung", "", _children_seconds() - before
    failed = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    what = {0: "lived", 1: "caught", 2: "caught"}.get(status, f"status {status}")
    return what, (failed or [""])[0][:160], _children_seconds() - before


def _children_seconds() -> float:
    used = os.times()
    return used.children_user + used.children_system
