"""SIGTERM and SIGINT turned into a flag that a loop reads between steps."""

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Any

from gemma_grpo.errors import InterruptedRunError


class Interrupt:
    """A context in which the first signal only sets `signal_number` and prints a line on stderr;
    the loop then finishes its step, with a snapshot if one is due. A second SIGINT stops at once,
    unsaved. On leaving, a signal that no step has seen raises InterruptedRunError.

    Outside the main thread it does nothing: Python handles signals in the main thread only.

    Attributes:
        signal_number: of the signal that came, or None.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}  # handlers, as `signal.signal` gives them

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGTERM, signal.SIGINT) if can_catch_signals() else ():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.signal_number and kind is None:
            raise InterruptedRunError(self.signal_number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            handler = self._previous[number]
            if callable(handler):
                handler(number, frame)
            raise KeyboardInterrupt
        self.signal_number = number
        again = "; Ctrl-C again stops unsaved" if number == signal.SIGINT else ""
        # Printing fails inside another print, or if stderr is closed; saving must go on.
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            print(f"\nfinishing the step, then saving{again}", file=sys.stderr, flush=True)


def can_catch_signals() -> bool:
    """Whether this is the process's main thread."""
    return threading.current_thread() is threading.main_thread()
