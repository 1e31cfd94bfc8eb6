"""Bugs injected one at a time into a copy of the working tree: a test of the room must fail.

A bug is a text of a file that another replaces. The table, bugs.jsonl, says which tests are to
notice it; where the text is no longer there, the run ends at once.
"""

import contextlib
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".jsonl")
COPIED = ("gemma_grpo", "kernels", "benchmarks", "tests", "docs", "notebooks", "pyproject.toml")
COPIED += ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LOG.md", "setup.py")
# Imported once, for all bugs: what the package and its tests import of others.
LIBRARIES = "jax flax.nnx optax orbax.checkpoint pytest jaxtyping beartype tyro yaml sentencepiece "
LIBRARIES += "safetensors.numpy scipy.special tensorboardX matplotlib.figure"
HUNG = 3600.0  # seconds by the clock, on a busy machine


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
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True)
        else:
            shutil.copyfile(ROOT / name, tree / name)
    prepare(folder / "cache")
    caught, seconds = 0, 0.0
    for bug in table:
        with injected(bug, tree):
            verdict, said, took = tried(bug, tree, folder / "log.txt")
        caught, seconds = caught + (verdict == "caught"), seconds + took
        line = {"file": bug.file, "old": bug.old[:60], "new": bug.new[:60], "verdict": verdict}
        yield line | {"said": said, "cpu_seconds": round(took, 1)}
    yield {"bugs": len(table), "caught": caught, "cpu_seconds": round(seconds)}


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


def prepare(cache: Path) -> None:
    """Imports what the tests need of others, and nothing of the package; programs are kept."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    for name in LIBRARIES.split():
        importlib.import_module(name)


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
    child = os.fork()
    if not child:
        os._exit(_tests(bug, tree, log))
    began = time.monotonic()
    while True:
        ended, how, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > HUNG:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.1)
    failed = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    status = os.waitstatus_to_exitcode(how)
    what = {0: "lived", 1: "caught", 2: "caught"}.get(status, f"status {status}")
    return what, (failed or [""])[0][:160], used.ru_utime + used.ru_stime


def _tests(bug: Bug, tree: Path, log: Path) -> int:
    """The bug's tests, in this process; pytest's status."""
    import pytest

    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), str(tree / "tests"), *(p for p in sys.path if not _is_ours(p))]
    os.environ["PYTHONPATH"] = f"{tree}:{tree / 'tests'}"
    for name in [name for name in sys.modules if name.partition(".")[0] == "gemma_grpo"]:
        del sys.modules[name]  # the tree's is imported instead
    sys.dont_write_bytecode = True  # a file that changes twice in a second has one name for both
    quick = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--durations=0"]
    status = int(pytest.main([*quick, *shlex.split(bug.tests)]))
    sys.stdout.flush()
    return status


def _is_ours(path: str) -> bool:
    """Whether a place of imports is the tree that this module is of."""
    return Path(path or ".").resolve() in (ROOT, ROOT / "tests")
