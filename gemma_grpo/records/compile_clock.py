"""Seconds in which XLA's compiler was at work in this process, or read what it compiled before."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"  # the persistent cache's reading is within it


class CompileClock:
    """Counts while it is entered. Programs that are compiled at the same time count once."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []  # the clock's start and end of each program

    @property
    def seconds(self) -> float:
        """So far."""
        total, until = 0.0, -math.inf
        for start, end in sorted(self._spans):
            total += max(end - max(start, until), 0.0)
            until = max(until, end)
        return total

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT:
            now = time.monotonic()
            self._spans.append((now - duration_secs, now))


@contextlib.contextmanager
def running() -> Iterator[CompileClock]:
    """A clock for as long as the block runs."""
    clock = CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock._note)
    try:
        yield clock
    finally:
        jax.monitoring.unregister_event_duration_listener(clock._note)
