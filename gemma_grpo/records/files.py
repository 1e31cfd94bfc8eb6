"""Files and folders that appear complete or not at all, and the message if one cannot be written.

What is written gets a temporary name beside its own, reaches the disk, and is then renamed: a
process killed at any moment leaves the old file, or the new one. Links are followed; a device or a
FIFO is written to as it stands. Does not import jax.
"""

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gemma_grpo.errors import UserError

TEMPORARY = ".tmp"  # the suffix of what is not finished
SUMS = "SHA256SUMS"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NAME_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR)


@contextlib.contextmanager
def atomic_write(
    path: Path,
    *,
    durable: bool = True,
    shared: bool = False,
    another_place: str | None = None,
) -> Iterator[Path]:
    """Gives the block a temporary path; the file or folder it makes there is renamed to `path`.

    The folder around it is made if need be. If the block raises, nothing stays. What an earlier,
    killed process left under the temporary name is removed first.

    Args:
        path: a file, which is replaced if it exists, or a folder, which must not exist or be empty.
        durable: wait until the bytes are on the disk, so that a power cut cannot empty the file.
        shared: other processes may make the same file or folder now; the first to finish wins.
        another_place: how the user chooses another path, for the message.

    Raises:
        UserError: an operating system's error, as `write_errors` names it.
    """
    if is_stream(path):
        with write_errors(path, another_place=another_place):
            yield path
        return
    own = f".{os.getpid()}" if shared else ""
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise UserError(f"cannot write {path}: a link to itself; {another_place or 'remove it'}")
    if not path.name:  # the root
        raise UserError(f"cannot write {path}: it is a folder; {another_place or 'name a file'}")
    unfinished = path.with_name(f"{path.name}{own}{TEMPORARY}")
    with write_errors(path, another_place=another_place):
        _remove(unfinished)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            if durable:
                _sync_tree(unfinished)
            _rename(unfinished, path, may_exist=shared)
            if durable:
                _sync(path.parent)
        finally:
            _remove(unfinished)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Writes a UTF-8 file that appears complete or not at all. Raises as `atomic_write`."""
    with atomic_write(path, durable=durable) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_bytes(path: Path) -> bytes:
    """What is in a file. Raises OSError for a FIFO too, which might never say anything."""
    if is_stream(path):
        raise OSError(errno.EINVAL, "is no file", str(path))
    return path.read_bytes()


def read_json(path: Path) -> dict | None:
    """The JSON object in a file; None without one. Of a damaged file a line on stderr says so, and
    None is returned: of use for what can be made again."""
    try:
        content = json.loads(read_bytes(path).decode())
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        pass
    print(f"warning: {path} is damaged: passed over", file=sys.stderr)
    return None


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Writes the sha256 of these files of a folder into its SHA256SUMS, as sha256sum has them."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def require_sums(folder: Path, patterns: Sequence[str]) -> None:
    """Compares files of a folder, whose names fit one of `patterns`, with its SHA256SUMS.

    A folder without one passes, and so does what it does not list, or is not there.

    Raises:
        UserError: a file has changed, or the sums cannot be read.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except ValueError as error:
        raise UserError(f"{sums}: no lines of a digest and a name; delete it") from error
    for name, digest in expected.items():
        path = folder / Path(name).name
        is_wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        if is_wanted and path.is_file() and _sha256(path) != digest:
            raise UserError(
                f"{path} has changed since it was written; put it back, or, if you changed it, "
                f"take its line out of {sums}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_stream(path: Path) -> bool:
    """Whether a device, a FIFO or a socket is there, which cannot be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def require_new_file(path: Path) -> None:
    """Raises UserError unless a file can be made there, or a device or FIFO be written to."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if path.is_file():
        raise UserError(f"{path} is there already; name another file, or delete it")
    _require_parent(path)


def require_new_folder(path: Path, *, another: str = "name another folder") -> None:
    """Raises UserError unless a folder can be made there: nothing is there, or an empty folder."""
    if path.exists() and os.path.samefile(path, "."):
        raise UserError(f"{path} is the folder you are in; name one to be made")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; {another}")
    _require_parent(path)


def _require_parent(path: Path) -> None:
    """Raises UserError if nothing can be made beside `path`, as far as the system tells."""
    if is_stream(path):
        return
    with write_errors(path):
        parent = Path(os.path.realpath(path)).parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def write_errors(path: Path, *, another_place: str | None = None) -> Iterator[None]:
    """Turns an operating system's error in the block into a UserError, in `explain`'s words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and error_number(error) is None:
            raise
        raise UserError(explain(path, error, another_place=another_place)) from error


def explain(path: Path, error: Exception, *, another_place: str | None = None) -> str:
    """One line: the file that cannot be written, the system's reason, and the fix."""
    place = another_place or "name another folder"
    number = error_number(error)
    reason = str(error) if number is None else os.strerror(number)
    if number in _NO_SPACE:
        retry = "then try again (a training run with --resume)"
        fix = f"free some space, {f'or {another_place}' if another_place else retry}"
    elif number in _NAME_TAKEN:
        fix = f"something else has that name; move it away, or {place}"
    else:
        fix = place
    return f"cannot write {path}: {reason}; {fix}"


def error_number(error: BaseException) -> int | None:
    """The errno behind an error, or None. tensorstore ("os_error_code='28'") and safetensors
    ("(os error 28)") say it only in their text."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(match[1] or match[2]) if match else None


def _rename(unfinished: Path, path: Path, *, may_exist: bool) -> None:
    try:
        unfinished.replace(path)
    except OSError:
        if not (may_exist and path.exists()):  # else another process was faster
            raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync_tree(path: Path) -> None:
    for inside in path.rglob("*"):
        _sync(inside)
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
