"""The end of a session: how much time is left, and how much of it the run still needs to stop.

Does not import jax.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

from gemma_grpo.errors import UserError
from gemma_grpo.records import summary

SAFETY = 1.2  # times the longest of each kind so far
REPORT_SECONDS = 10.0  # summary.json and curves.png, and the end of the process
MOST_HOURS = 1e6
DISK_BYTES_PER_SECOND = 1e8  # assumed until a checkpoint was measured


class OutOfTimeError(Exception):
    """The run stopped for its deadline; all finished steps are saved.

    Attributes:
        stage: the one that is unfinished, or not yet evaluated.
        step: steps taken in it, or None outside a stage's steps.
        num_steps: of the stage, or None.
        params: the stage's weights after `step`, or None.
    """

    def __init__(
        self,
        stage: str,
        step: int | None = None,
        num_steps: int | None = None,
        params: Any = None,
    ):
        super().__init__(f"out of time in {stage}")
        self.stage, self.step, self.num_steps, self.params = stage, step, num_steps, params


class Deadline:
    """When the session ends, and how long each kind of work takes, as measured so far."""

    def __init__(self, hours: float | None = None):
        """`hours` count from the process's start; None is no end.

        Raises:
            UserError: not a positive number.
        """
        if hours is not None and not (isinstance(hours, int | float) and 0 < hours <= MOST_HOURS):
            raise UserError(
                f"--hours {hours}: give the session's hours, a number above 0 and at most "
                f"{MOST_HOURS:,.0f}"
            )
        self.hours = hours
        self._longest: dict[str, float] = {}
        self._expected: dict[str, float] = {}  # used until one was measured

    def left(self) -> float:
        """Seconds until the end; infinite without one."""
        return math.inf if self.hours is None else 3600 * self.hours - seconds_since_start()

    def note(self, kind: str, seconds: float) -> None:
        """Records how long a "step", "save" (a checkpoint), "evaluate" or "snapshot" took."""
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def note_earlier_sessions(self, run_dir: Path) -> None:
        """Records the evaluations in the run's seconds.json."""
        for name, seconds in summary.seconds_of(run_dir).items():
            if name.startswith("evaluate_"):
                self.note("evaluate", seconds)

    def expect_checkpoint(self, num_bytes: int) -> None:
        """Estimates the seconds of a checkpoint, for as long as none was measured."""
        self._expected["save"] = num_bytes / DISK_BYTES_PER_SECOND

    def expect_snapshot(self) -> None:
        """Estimates the seconds of a snapshot, for as long as none was measured, by the longest
        evaluation: that measures all held-out problems, a snapshot a few."""
        self._expected["snapshot"] = self._longest.get("evaluate", 0.0)

    def allows(self, *kinds: str) -> bool:
        """Whether these and the report fit in the time left; a kind never measured counts 0."""
        seconds = self._expected | self._longest
        needed = sum(seconds.get(kind, 0.0) for kind in kinds)
        return SAFETY * needed + REPORT_SECONDS <= self.left()


def seconds_since_start() -> float:
    """Seconds since this process started, whatever is done to the system clock."""
    return _AGE_AT_IMPORT + time.monotonic() - _IMPORTED


def _age() -> float:
    """Seconds since the process started, according to the system; 0 if it does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after boot; proc(5): starttime
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


_IMPORTED, _AGE_AT_IMPORT = time.monotonic(), _age()
