"""When a stage's state is saved, and the thread that writes it while the devices go on."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from gemma_grpo.errors import UserError
from gemma_grpo.records.checkpoint import Checkpoints


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go, how many are kept, how often they are written."""

    folder: str = ""
    """Folder for the checkpoints, which get a folder of the run's name there; "" keeps them in the
    run's own. What is lost with the folder cannot be resumed: weights of finished stages stay in
    the run's."""
    keep: int = 2
    """Checkpoints kept at a time; one more exists while it is written."""
    minutes: float = 10.0
    """A checkpoint is also due once this many minutes have passed since the last one."""
    share: float = 0.05
    """Share of the time that may be spent saving: a checkpoint that is due waits until the seconds
    of the last save are no more than this share. 1: it never waits."""

    def __post_init__(self):
        if self.keep < 1 or not self.minutes > 0 or not 0 < self.share <= 1:
            raise UserError(
                f"checkpoint: keep={self.keep} must be at least 1, minutes={self.minutes} above "
                f"0, share={self.share} above 0 and at most 1"
            )

    def of_stage(self, run_dir: Path, stage: str) -> Checkpoints:
        """The checkpoints of one stage of the run in `run_dir`."""
        own = run_dir / "checkpoints"
        folder = Path(self.folder) / run_dir.absolute().name if self.folder else own
        return Checkpoints(folder / stage, self.keep)


class Saver:
    """Saves one stage's states, each in a thread of its own, one at a time.

    The state is copied to the host before `save` returns, so that the next update may overwrite the
    devices' arrays. In a job of many processes, where all write their own shards together, `save`
    returns when everything is written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: CheckpointConfig,
        *,
        every: int,
        done: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`done` steps lie behind; a checkpoint is due at each multiple of `every` steps."""
        self._checkpoints, self._config, self._every = checkpoints, config, every
        self._clock, self._saved, self._ended = clock, done, clock()
        self._seconds = 0.0  # that the last save took, copy and thread
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def is_due(self, step: int) -> bool:
        """Whether to save after `step`: a multiple of `every`, or `minutes`, have passed since the
        last save, and so has the time that its seconds may be a `share` of."""
        if self._thread is not None and self._thread.is_alive():
            return False
        since = self._clock() - self._ended
        asked = step // self._every > self._saved // self._every
        late = since >= 60 * self._config.minutes
        return (asked or late) and since >= self._seconds * (1 / self._config.share - 1)

    def save(self, step: int, state: PyTree, host: dict) -> None:
        """Copies the state, and writes it as `Checkpoints.save` does while the caller goes on.

        Waits for the save before it. Raises what that one raised, as `wait` and `check` do.
        """
        self.wait()
        started = self._clock()
        self._saved = step
        if jax.process_count() > 1:
            self._write(started, step, state, host)
            self.check()
            return
        arrays = jax.tree.map(_copy_to_host, state)
        how = {"target": self._write, "args": (started, step, arrays, host), "name": "checkpoint"}
        self._thread = threading.Thread(**how)
        self._thread.start()

    def check(self) -> None:
        """Raises what the last save raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when the last save is complete. Raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, started: float, step: int, state: PyTree, host: dict) -> None:
        try:
            self._checkpoints.save(step, state, host)
        except BaseException as error:  # raised again in the caller's thread
            self._error = error
        self._ended = self._clock()
        self._seconds = self._ended - started


def _copy_to_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """The array on the host, in memory of its own: on a CPU `device_get` shows the device's, which
    a donating update writes over."""
    return np.array(jax.device_get(leaf), copy=True)
