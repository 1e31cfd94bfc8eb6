"""The lock of a run's folder: one process at a time writes there. Does not import jax.

The system drops it when the process ends, however that happens: a kill leaves no stale lock.
"""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from gemma_grpo.errors import UserError

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def hold(run_dir: Path, flag: str = "--run-dir") -> Iterator[None]:
    """Holds the lock of a folder, which must exist, while the block runs. `flag` names folders.

    Raises:
        UserError: another process (or thread of this one) holds it, or the folder is read-only.
    """
    try:
        descriptor = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno in _READ_ONLY:
            raise UserError(
                f"cannot write {run_dir}: {os.strerror(error.errno)}; --resume-from {run_dir} "
                "--run-dir NEW goes on with the run in a new folder"
            ) from error
        raise
    try:
        _acquire(descriptor, run_dir, flag)
        yield
    finally:
        os.close(descriptor)  # drops the lock


def _acquire(descriptor: int, run_dir: Path, flag: str) -> None:
    """Takes the lock and writes this process's id into the file, for the message of the next."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        raise UserError(
            f"{run_dir} is in use by process {holder}; wait until it ends, or name another {flag}"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: {run_dir} is on a file system without locks: start no second process there",
            file=sys.stderr,
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
