"""Seconds that this process has spent in XLA's compiler, or reading what it compiled before."""

import contextlib
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"  # the persistent cache's reading is within it


class CompileClock:
    """Counts while it is entered.

    Attributes:
        seconds: so far.
    """

    def __init__(self):
        self.seconds = 0.0

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT:
            self.seconds += duration_secs


@contextlib.contextmanager
def running() -> Iterator[CompileClock]:
    """A clock for as long as the block runs."""
    clock = CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock._note)
    try:
        yield clock
    finally:
        jax.monitoring.unregister_event_duration_listener(clock._note)
