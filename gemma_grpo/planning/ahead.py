"""Compiles a run's programs side by side, ahead of their first calls.

A call compiles nothing that was compiled here, as it reaches the same jitted function: their makers
return the one they made before for equal settings, and JAX keeps what it compiled for equal shapes.
"""

import os
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from gemma_grpo.planning.programs import Program

THREADS = min(4, os.cpu_count() or 1)  # an update of the 1B takes the compiler gigabytes


class Ahead:
    """Threads that compile the programs of a run while it goes on.

    On leaving the context, what is being compiled is waited for, since XLA cannot be stopped; the
    rest is dropped.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(THREADS)
        self._built: dict[str, Future] = {}

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, programs: Iterable[Program]) -> None:
        """Compiles these in order, `THREADS` at a time, and returns at once."""
        for program in programs:
            self._built[program.name] = self._pool.submit(_build, program)

    def wait(self, names: Collection[str]) -> None:
        """Returns when the programs of these names are compiled, as far as they were started. One
        that failed is compiled again when it is called, and fails there."""
        wait([built for name, built in self._built.items() if name in names])


def _build(program: Program) -> None:
    program.trace().lower().compile()
