"""A run's folder: made new, or copied from a read-only one. Does not import jax.

Both are called with the folder's lock held, and begin again what a killed process has left.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, lock, origin, rollbacks

STAGES = ("sft", "grpo")  # in the order in which a run goes through them
CONFIG = "config.yaml"
COPYING = "copying.tmp"  # there while a copy is under way
DEMONSTRATIONS = ("demonstrations.jsonl", "demonstrations.json")  # the model's own; their figures
_COPIED = (
    *("metrics.jsonl", "seconds.json", "summary.json", origin.NAME, rollbacks.NAME),
    *DEMONSTRATIONS,
)
_COPIED_FOLDERS = ("rollouts", "evaluations", "weights", "tensorboard", "verdicts")
_PATTERN_CHARACTERS = "[]*?\\"
ANOTHER = "name another --checkpoint.folder"
OWNER = "run.txt"  # in a folder for checkpoints alone: the run whose they are
CACHE = ".jax_cache"  # compiled programs, beside the runs


def unused(path: Path) -> Path:
    """The path, or with -2, -3 ... behind it the first that nothing has; the folder is made, so
    that two processes never get the same."""
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            with files.write_errors(candidate):
                candidate.parent.mkdir(parents=True, exist_ok=True)
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1


def require_free(run_dir: Path) -> None:
    """Raises UserError if the folder holds anything but what a start or a copy that was cut short
    has left, or if no checkpoint could be read back from a folder of that name."""
    require_readable(run_dir)
    if not run_dir.exists():
        return
    if (run_dir / COPYING).exists() and not (run_dir / CONFIG).exists():
        return
    if not all(_is_of_start(path.name) for path in run_dir.iterdir()):
        raise UserError(
            f"{run_dir} is there already; --resume goes on with it (in Python "
            "gemma_grpo.resume), or name another"
        )


def require_readable(folder: Path) -> None:
    """Raises UserError if no checkpoint that is written to this folder could be read back."""
    if found := sorted(set(str(folder.absolute())) & set(_PATTERN_CHARACTERS)):
        raise UserError(
            f"{folder}: its path holds {found[0]}, which Orbax, that reads checkpoints, takes for "
            "a pattern; name another folder"
        )


def write_config(run_dir: Path, text: str) -> None:
    """Makes the folder a run's, by its config.yaml. Raises as `require_free`."""
    _clear(run_dir)
    origin.note(run_dir, {"config": text, "folder": os.getcwd()})
    files.write_text(run_dir / CONFIG, text)


def remove_unused(run_dir: Path) -> None:
    """Removes the folder of a run that could not start, if it holds nothing but its settings."""
    if {path.name for path in run_dir.iterdir()} <= {CONFIG, lock.NAME, origin.NAME}:
        shutil.rmtree(run_dir, ignore_errors=True)


def copy(source: Path, run_dir: Path, text: str, checkpoints: dict[Path, Path]) -> None:
    """Makes `run_dir` a run that goes on where `source`, which is only read, stopped.

    Args:
        text: of the new config.yaml.
        checkpoints: the one to copy of each stage that has one, by where it is to be.

    Raises:
        UserError: as `require_free`, or the disk is full.
    """
    _clear(run_dir)
    with files.write_errors(run_dir):
        (run_dir / COPYING).touch()
        for name in (*_COPIED, *_COPIED_FOLDERS):
            _copy(source / name, run_dir / name)
        for target, path in checkpoints.items():
            with files.atomic_write(target, durable=False) as unfinished:
                _copy(path, unfinished)
        files.write_text(run_dir / CONFIG, text)
        (run_dir / COPYING).unlink()


def claim_checkpoints(folder: Path, run_dir: Path) -> None:
    """Makes a folder for the checkpoints of a new run alone.

    Raises:
        UserError: it holds checkpoints already, or something else where they are to be, or cannot
            be written.
    """
    require_readable(folder)
    used = [path for stage in STAGES if (path := folder / stage).exists()]
    is_own = owner(folder) == run_dir.absolute()
    if is_own and (run_dir / COPYING).exists() and not (run_dir / CONFIG).exists():
        for path in used:  # a copy that was cut short
            shutil.rmtree(path)
    elif next(folder.glob("*/[0-9]*"), None):
        raise UserError(
            f"{folder} holds the checkpoints of {owner(folder) or 'a run'}; {ANOTHER}, or delete "
            "them if that run is not to go on"
        )
    elif used:
        raise UserError(f"{used[0]} is there already, where checkpoints are to be; {ANOTHER}")
    with files.atomic_write(folder / OWNER, another_place=ANOTHER) as unfinished:
        unfinished.write_text(f"{run_dir.absolute()}\n", encoding="utf-8")


def require_apart(folder: str, run_dir: Path) -> None:
    """Raises UserError if the folder for checkpoints alone is the run's own, or within it."""
    if folder and Path(folder).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"--checkpoint.folder {folder} is in the run's own folder, {run_dir}: leave it out, "
            f"and checkpoints go to {run_dir / 'checkpoints'}, or name a folder elsewhere"
        )


@contextlib.contextmanager
def hold_checkpoints(folder: str, *, is_new: bool) -> Iterator[None]:
    """Holds the lock of a folder for checkpoints alone, if there is one, while the block runs; a
    new run's is made. Raises UserError if another run holds it, or it cannot be written."""
    path = Path(folder)
    if folder and is_new:
        with files.write_errors(path, another_place=ANOTHER):
            path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if folder and path.is_dir():
            held.enter_context(lock.hold(path, "--checkpoint.folder"))
        yield


def partial_name(stage: str, step: int) -> str:
    """Of an evaluation between a stage's steps, and of the weights that a deadline has left."""
    return f"{stage}-step-{step:06d}"


def remove_partial_weights(run_dir: Path, stage: str, after: int = 0) -> None:
    """Those that a deadline has left of a stage, or only those of steps after `after`."""
    for path in (run_dir / "weights").glob(f"{stage}-step-*.safetensors"):
        if path.stem > partial_name(stage, after):
            path.unlink()


def owner(folder: Path) -> Path | None:
    """The run whose checkpoints a folder holds; None where it says none, or is not there."""
    path = folder / OWNER
    return Path(path.read_text(encoding="utf-8").strip()) if path.is_file() else None


def copy_cache(source: Path, runs: Path) -> None:
    """Copies the compiled programs that lie beside the run `source` to beside those in `runs`."""
    cache = source.absolute().parent / CACHE
    for path in cache.rglob("*") if cache.is_dir() else ():
        target = runs / CACHE / path.relative_to(cache)
        if path.is_file() and not target.exists():
            with files.atomic_write(target, durable=False, shared=True) as unfinished:
                shutil.copyfile(path, unfinished)


def _is_of_start(name: str) -> bool:
    """Whether it is written before config.yaml, with which a folder becomes a run's."""
    is_unfinished = name.startswith((CONFIG, origin.NAME)) and name.endswith(files.TEMPORARY)
    return is_unfinished or name in (lock.NAME, origin.NAME)


def _clear(run_dir: Path) -> None:
    """Makes the folder and removes what was cut short. Raises as `require_free`."""
    require_free(run_dir)
    with files.write_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in run_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != lock.NAME:
                path.unlink()


def _copy(source: Path, target: Path) -> None:
    """A file or a folder, without the modes, which may be read-only; what is not there is not
    copied, nor what a killed process left unfinished."""
    if source.name.endswith(files.TEMPORARY):
        return
    if source.is_dir():
        target.mkdir(parents=True)
        for path in source.iterdir():
            _copy(path, target / path.name)
    elif source.exists():
        shutil.copyfile(source, target)
