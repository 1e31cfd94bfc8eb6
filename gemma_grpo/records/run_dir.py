"""A run's folder: made new, or copied from a read-only one. Does not import jax.

Both are called with the folder's lock held, and begin again what a killed process has left.
"""

import shutil
from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, lock

CONFIG = "config.yaml"
COPYING = "copying.tmp"  # there while a copy is under way
_COPIED = ("metrics.jsonl", "seconds.json", "summary.json")
_COPIED_FOLDERS = ("rollouts", "evaluations", "weights", "tensorboard", "verdicts")
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
    """Raises UserError if the folder holds anything but a lock or a copy that was cut short."""
    if not run_dir.exists():
        return
    if (run_dir / COPYING).exists() and not (run_dir / CONFIG).exists():
        return
    if any(path.name != lock.NAME for path in run_dir.iterdir()):
        raise UserError(f"{run_dir} is there already; --resume goes on with it, or name another")


def write_config(run_dir: Path, text: str) -> None:
    """Makes the folder a run's, by its config.yaml. Raises as `require_free`."""
    _clear(run_dir)
    files.write_text(run_dir / CONFIG, text)


def copy(source: Path, run_dir: Path, text: str, checkpoints: dict[str, Path]) -> None:
    """Makes `run_dir` a run that goes on where `source`, which is only read, stopped.

    Args:
        text: of the new config.yaml.
        checkpoints: the one to copy of each stage that has one, by "checkpoints/<stage>/<step>".

    Raises:
        UserError: as `require_free`, or the disk is full.
    """
    _clear(run_dir)
    with files.write_errors(run_dir):
        (run_dir / COPYING).touch()
        for name in (*_COPIED, *_COPIED_FOLDERS):
            _copy(source / name, run_dir / name)
        for name, path in checkpoints.items():
            _copy(path, run_dir / name)
        files.write_text(run_dir / CONFIG, text)
        (run_dir / COPYING).unlink()


def copy_cache(source: Path, runs: Path) -> None:
    """Copies the compiled programs that lie beside the run `source` to beside those in `runs`."""
    cache = source.absolute().parent / CACHE
    for path in cache.rglob("*") if cache.is_dir() else ():
        target = runs / CACHE / path.relative_to(cache)
        if path.is_file() and not target.exists():
            with files.atomic_write(target, durable=False, shared=True) as unfinished:
                shutil.copyfile(path, unfinished)


def _clear(run_dir: Path) -> None:
    """Makes the folder and removes a copy that was cut short. Raises as `require_free`."""
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
