"""Checkpoints of a training state on disk: named arrays by Orbax, and a JSON of the caller's.

A checkpoint is one directory, complete or absent:

    checkpoints/000120/
        arrays/         an Orbax PyTree checkpoint: large arrays by name, small ones packed
        index.json      every array's name, dtype and shape, and where in the pack it lies
        host.json       the caller's dict: stage, data position, phase ...
        SHA256SUMS      of every file above; `sha256sum -c` reads it

It is written as `000120.tmp`, the sums last, and then renamed: a process killed at any moment
leaves either the old checkpoints or the old ones and the new. Nothing is synced to the disk
beyond what Orbax does: after a power cut the sums tell which checkpoints are intact.

Orbax's `AsyncCheckpointer` is used, not its `CheckpointManager`: the manager finalises a step, and
deletes the oldest, before the sums could be added. `start` returns once the arrays are copied to
the host: the caller may donate them while a thread writes. One save is under way at a time.

Small arrays share one byte array, because to Orbax each array of its own costs 2 to 3 ms,
whatever its size.

In a job of many processes each saves and restores its own shards of the large arrays; the primary
process does the rest. They need a shared file system. The number of processes may change between
saving and restoring.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.devices import processes
from gemma_grpo.errors import UserError
from gemma_grpo.records import files

SUMS = "SHA256SUMS"
PACK_BELOW = 1 << 20  # bytes; smaller arrays go into the pack


class Checkpoints:
    """The checkpoints of one run: `keep` of them at a time, named by step.

    A step here is any integer that grows; the caller says in `host` what it stands for.

    Attributes:
        also_keep: a step that is kept beside the newest ones.
        seconds: from the start of the last save until it was whole; None before there was one.
    """

    def __init__(self, directory: Path, keep: int = 2):
        if keep < 1:
            raise UserError(f"{keep=} checkpoints: keep at least 1, better 2")
        self.directory = Path(directory).absolute()  # Orbax refuses relative paths
        self.keep = keep
        self.also_keep: int | None = None
        self.seconds: float | None = None
        self._under_way: Future | None = None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending; damaged ones among them."""
        names = (sums.parent.name for sums in self.directory.glob(f"*/{SUMS}"))
        return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))

    def latest(self) -> int | None:
        """The newest step whose every byte is as it was written; None where none was finished.

        Says on stderr which damaged ones it passed over.

        Raises:
            UserError: there are finished checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            damage = _damage(self._path(step))
            if damage is None:
                return step
            print(
                f"warning: checkpoint {self._path(step)} is damaged ({damage}); "
                "trying the one before it",
                file=sys.stderr,
            )
        if steps:
            raise UserError(
                f"{self.directory}: none of its {len(steps)} checkpoints is intact; put back a "
                "copy of the directory, or delete it to start from the beginning"
            )
        return None

    def save(self, step: int, state: PyTree, host: dict) -> None:
        """Writes a checkpoint, then deletes those beyond `keep` and any later than `step`.

        Later ones are what a run left that went on from an earlier step; to resume from them
        would mix two histories.

        Args:
            step: not negative; a checkpoint of that step is replaced.
            state: pytree of arrays, jax or numpy, of any dtype but key types
                (`jax.random.key_data` turns those into integers).
            host: what JSON can hold; tuples come back as lists. A "step" in it must be `step`: by
                that a checkpoint is known whose folder was given another name.

        Raises:
            UserError: the disk is full or cannot be written. The earlier checkpoints are untouched
                and nothing half-written stays, as with any other exception.
        """
        self.start(step, state, host)
        self.wait()

    def start(self, step: int, state: PyTree, host: dict) -> None:
        """Begins a `save` and returns once the arrays are copied; `wait` waits for the rest.

        Waits first for the save under way, if there is one. Raises as `save`, for that one too.
        """
        self.wait()
        started = time.monotonic()
        arrays = _named_leaves(state)
        unfinished = self._unfinished(step)

        def begin() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            _check_space(self.directory, arrays)
            _describe(unfinished, arrays, host)

        with self._nothing_half_written(step):
            processes.run_on_primary(begin)
            written = _begin_write(unfinished / "arrays", arrays)
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way = writer.submit(self._finish, step, written, started)
        writer.shutdown(wait=False)

    def is_writing(self) -> bool:
        """Whether a save is under way."""
        return self._under_way is not None and not self._under_way.done()

    def check(self) -> None:
        """Raises what the last `start` has failed with since, as `save` does; does not wait."""
        if self._under_way is not None and self._under_way.done():
            self._under_way.result()

    def wait(self) -> None:
        """Waits until the save under way is whole, in all processes. Raises as `save`."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            processes.gather_from_all(under_way.result)

    def take(self, path: Path) -> None:
        """Copies an intact checkpoint from another folder to here, under its own name; one of that
        name is replaced.

        Raises:
            UserError: the disk is full or cannot be written, or the copy is not like the original;
                nothing half-written stays.
        """
        target = self.directory / path.name
        if damaged := _rename_away(target):
            shutil.rmtree(damaged)
        with files.atomic_write(target, durable=False) as unfinished:
            shutil.copytree(path, unfinished, copy_function=shutil.copyfile)
            if damage := _damage(unfinished):
                raise UserError(f"the copy of {path} in {self.directory} is damaged ({damage})")

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict]:
        """Reads (state, host), bit for bit as saved.

        Args:
            step: one of `steps()`.
            like: pytree of arrays or `jax.ShapeDtypeStruct`s. Each restored array goes where its
                counterpart says (its sharding, if it is committed to one); else to the default
                device.

        Raises:
            UserError: the checkpoint is absent or damaged, or does not fit `like`; names the array
                and both shapes or dtypes.
        """
        path = self._path(step)
        if step not in self.steps():
            raise UserError(f"{self.directory} has no finished checkpoint of step {step}")
        if damage := processes.broadcast_from_primary(lambda: _damage(path)):
            raise UserError(
                f"checkpoint {path} is damaged ({damage}); delete it to go on from the one before"
            )
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        wanted = _named_leaves(like)
        _check_fit(path, index, wanted)
        restored = _read(path / "arrays", index, wanted)
        state = jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])
        return state, json.loads((path / "host.json").read_text(encoding="utf-8"))

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints later than `step`. A process killed meanwhile leaves none
        half-deleted under its own name. Raises UserError if they cannot be deleted."""
        with files.write_errors(self.directory):
            self._remove_leftovers()
            for later in [other for other in self.steps() if other > step]:
                if doomed := _rename_away(self._path(later)):
                    shutil.rmtree(doomed)

    def remove(self) -> None:
        """Deletes the directory with all checkpoints, as far as the system allows; it need not be
        there. A process killed meanwhile leaves no checkpoint half-deleted under its own name."""
        with contextlib.suppress(OSError):
            for step in self.steps():
                _rename_away(self._path(step))
        shutil.rmtree(self.directory, ignore_errors=True)

    def _finish(self, step: int, written: Callable[[], None], started: float) -> None:
        """The part of a save that the background does; in the primary process all but Orbax's."""
        path, unfinished = self._path(step), self._unfinished(step)
        with self._nothing_half_written(step):
            written()
            if processes.is_primary():
                _sum_up(unfinished)
                replaced = _rename_away(path)
                os.rename(unfinished, path)
        if processes.is_primary():
            self._tidy(step, replaced)
        self.seconds = time.monotonic() - started

    @contextlib.contextmanager
    def _nothing_half_written(self, step: int) -> Iterator[None]:
        """If the block raises, the unfinished checkpoint goes, and a disk's error becomes a
        UserError."""
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self._unfinished(step), ignore_errors=True)
            if not isinstance(error, Exception) or files.error_number(error) is None:
                raise
            what = files.explain(self._path(step), error)
            raise UserError(f"{what}; {self._what_is_left()}") from error

    def _remove_leftovers(self) -> None:
        """Deletes what a killed process has left unfinished."""
        for leftover in self.directory.glob(f"*{files.TEMPORARY}"):
            shutil.rmtree(leftover)

    def _tidy(self, step: int, replaced: Path | None) -> None:
        """Deletes what the checkpoint of `step`, just written, makes superfluous."""
        kept = [other for other in self.steps() if other <= step][-self.keep :]
        kept += [other for other in self.steps() if other == self.also_keep]
        dropped = [_rename_away(self._path(other)) for other in self.steps() if other not in kept]
        for doomed in filter(None, [replaced, *dropped]):
            shutil.rmtree(doomed)

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:06d}"

    def _unfinished(self, step: int) -> Path:
        return self.directory / f"{step:06d}{files.TEMPORARY}"

    def _what_is_left(self) -> str:
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is kept" if steps else "none was saved before"


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, as in "params.layers.0.w": a name of its own for each, in tree order."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"two arrays of the state are called {name!r}")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed random key; save jax.random.key_data of it")
        leaves[name] = leaf
    return leaves


def _check_space(directory: Path, arrays: dict[str, Any]) -> None:
    """Raises OSError where a checkpoint cannot fit: Orbax fails too, but noisily and half-way."""
    index_and_metadata = 65536 + 2048 * len(arrays)
    needed = sum(array.nbytes for array in arrays.values()) + index_and_metadata
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _describe(path: Path, arrays: dict[str, Any], host: dict) -> None:
    """Makes the directory `path`, which must not exist, with all but the arrays and the sums."""
    path.mkdir()
    (path / "host.json").write_text(json.dumps(host, indent=1), encoding="utf-8")
    offset, index = 0, dict[str, dict[str, Any]]()
    for name, array in arrays.items():
        index[name] = {"dtype": str(array.dtype), "shape": list(array.shape)}
        if array.nbytes < PACK_BELOW:
            index[name]["offset"] = offset
            offset += array.nbytes
    (path / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _begin_write(path: Path, arrays: dict[str, Any]) -> Callable[[], None]:
    """Copies the arrays to the host and begins to save them with Orbax as `path`: small ones one
    behind the other, in `_describe`'s order.

    On a CPU Orbax keeps views of the arrays' own memory. JAX then gives that memory to no donated
    result as long as there is a view.

    Returns:
        A function that waits until they are written, for any thread.
    """
    small = [array for array in arrays.values() if array.nbytes < PACK_BELOW]
    large = {name: array for name, array in arrays.items() if array.nbytes >= PACK_BELOW}
    tree: dict[str, Any] = {}
    if small:
        tree["pack"] = np.concatenate(
            [meshes.to_host(array).reshape(-1).view(np.uint8) for array in small]
        )
    if large:
        tree["large"] = large
    with contextlib.ExitStack() as opened:
        checkpointer, args = opened.enter_context(_orbax())
        checkpointer.save(path, args=args.PyTreeSave(tree))
        kept_open = opened.pop_all()

    def wait() -> None:
        with kept_open:
            checkpointer.wait_until_finished()

    return wait


def _sum_up(path: Path) -> None:
    """Writes the sums, which come last."""
    sums = [f"{digest}  {name}\n" for name, digest in _digests(path).items()]
    (path / SUMS).write_text("".join(sums), encoding="utf-8")


def _read(path: Path, index: dict[str, dict], wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays `wanted` by name, each placed like its counterpart; `path` is Orbax's own."""
    import orbax.checkpoint as ocp

    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    placement = {name: meshes.sharding_of(leaf) for name, leaf in wanted.items()}
    large = {
        name: ocp.ArrayRestoreArgs(sharding=placement[name]) if placement[name] else as_numpy
        for name in wanted
        if "offset" not in index[name]
    }
    how = {}
    if len(large) < len(wanted):
        how["pack"] = as_numpy
    if large:
        how["large"] = large
    with _orbax() as (checkpointer, args):
        what = jax.tree.map(lambda _: 0, how)
        restore = args.PyTreeRestore(what, restore_args=how, partial_restore=True)
        arrays = checkpointer.restore(path, args=restore)
    restored = {}
    for name in wanted:
        if name in large:
            value = arrays["large"][name]
        else:
            value = _unpack(arrays["pack"], **index[name])
        is_placed = isinstance(value, jax.Array)
        restored[name] = value if is_placed else meshes.place(value, placement[name])
    return restored


def _unpack(pack: np.ndarray, *, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    """One array out of the pack's bytes."""
    kind = jax.numpy.dtype(dtype)
    return np.frombuffer(pack, kind, math.prod(shape), offset).reshape(shape)


def _check_fit(path: Path, index: dict[str, dict], wanted: dict[str, Any]) -> None:
    """Raises UserError where the saved arrays and the wanted ones differ in name, shape, dtype."""
    fix = "resume with the model and optimizer settings of the run's config.yaml"
    for name, leaf in wanted.items():
        if name not in index:
            raise UserError(f"checkpoint {path} has no array {name}{tuple(leaf.shape)}; {fix}")
        saved = f"{index[name]['dtype']}{tuple(index[name]['shape'])}"
        asked = f"{leaf.dtype}{tuple(leaf.shape)}"
        if saved != asked:
            raise UserError(f"checkpoint {path}: {name} is {saved}, the run wants {asked}; {fix}")
    surplus = [name for name in index if name not in wanted]
    if surplus:
        shape = tuple(index[surplus[0]]["shape"])
        raise UserError(
            f"checkpoint {path} holds {surplus[0]}{shape}, for which the run has no place; {fix}"
        )


def _digests(path: Path) -> dict[str, str]:
    """sha256 of every file below `path` but the sums themselves, by relative name."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != SUMS)

    def digest(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    names = (file.relative_to(path).as_posix() for file in files)
    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
        return dict(zip(names, pool.map(digest, files), strict=True))


def _damage(path: Path) -> str | None:
    """What is wrong with a finished checkpoint's bytes, in one phrase; None if nothing."""
    try:
        lines = files.read_bytes(path / SUMS).decode().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return f"{SUMS} is unreadable"
    try:
        found = _digests(path)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in {SUMS}"
        if found[name] != expected[name]:
            return f"{name} has changed"
    saved = json.loads((path / "host.json").read_text(encoding="utf-8")).get("step")
    if saved not in (None, int(path.name.removesuffix(files.TEMPORARY))):
        return f"it was saved as step {saved}"
    return None


def _rename_away(path: Path) -> Path | None:
    """Takes a checkpoint's name from it before it is deleted, so that none is seen half-deleted."""
    if not path.exists():
        return None
    return path.rename(path.with_name(path.name + ".old" + files.TEMPORARY))


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """An Orbax checkpointer and its argument classes; importing it takes a second.

    Its log is silenced meanwhile: what goes wrong arrives as an exception, and a full disk would
    print five tracebacks besides.
    """
    import orbax.checkpoint as ocp

    logger, threads = logging.getLogger("absl"), set(threading.enumerate())
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        # Weights hardly compress: zstd saves 8 % of the bytes and costs more time than it saves.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        with ocp.AsyncCheckpointer(handler) as checkpointer:
            yield checkpointer, ocp.args
    except BaseException:
        # Orbax raises at the first failure of several threads. The others must not write into a
        # directory that is being deleted.
        for thread in set(threading.enumerate()) - threads - {threading.current_thread()}:
            thread.join(timeout=5)
        raise
    finally:
        logger.setLevel(level)
