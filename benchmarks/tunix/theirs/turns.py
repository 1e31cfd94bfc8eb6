"""What the sides' processes share: requests, the clock, and what a compiler says.

Imports nothing of ours, because Tunix's process imports this file too. A request is (name,
arguments), an answer ("answer", dictionary) or ("error", text), pickled with its arrays.
"""

import importlib.metadata
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np


class Server:
    """Answers requests by the methods of `side` that have their names."""

    def __init__(self, side: object):
        self.side, self.connection = side, Connection(int(sys.argv[1]))
        Path("/proc/self/oom_score_adj").write_text("800")  # if memory runs out, this process ends

    def serve(self, until: str = "") -> dict:
        """Answer, up to the first request named `until`: its arguments, which the caller answers by
        `exchange`. When requests end, so does the process."""
        while True:
            try:
                name, arguments = self.connection.recv()
            except EOFError:
                os._exit(0)  # a library's threads may still be waiting
            if name == until:
                return arguments
            try:
                answer = "answer", getattr(self.side, name)(**arguments)
            except Exception as error:
                traceback.print_exc()
                answer = "error", f"{type(error).__name__}: {str(error)[:2000]}"
            self.connection.send(answer)

    def exchange(self, answer: dict, *, until: str) -> dict:
        """Answer the request at hand, then serve."""
        self.connection.send(("answer", answer))
        return self.serve(until)


def start() -> Callable[[], dict[str, float]]:
    """Starts the clock, and returns what reads it: `wall` and `cpu` seconds (all threads of this
    process), `peak`, the most resident bytes meanwhile, and, where JAX's device reports it,
    `device_peak`, the most bytes on it so far."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    wall, cpu = time.perf_counter(), time.process_time()

    def read() -> dict[str, float]:
        reading = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        lines = Path("/proc/self/status").read_text().splitlines()
        reading["peak"] = next(1024 * int(s.split()[1]) for s in lines if s.startswith("VmHWM:"))
        of_device = jax.devices()[0].memory_stats()
        return reading | ({"device_peak": of_device["peak_bytes_in_use"]} if of_device else {})

    return read


def versions(*packages: str) -> dict[str, str]:
    """Of the packages installed here."""
    return {name: importlib.metadata.version(name) for name in packages}


def first_moment(optimizer: Any) -> np.ndarray:
    """Adam's first moment of the final norm: the gradient that an optimizer saw, if it was its
    first."""
    names = lambda path: {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
    leaves = jax.tree.leaves_with_path(optimizer)
    (found,) = [leaf for path, leaf in leaves if {"mu", "final_norm"} <= names(path)]
    return np.asarray(found, np.float32)


def compiled(traced: jax.stages.Traced, text: str) -> dict:
    """Compile a traced program, for its devices. The optimised HLO goes to the file `text`.

    Returns:
        `fits`; where it does not `why`; else bytes a device (`arguments`, `temporaries`, `peak`),
        and the `compile_cpu` seconds of all threads.
    """
    lowered = traced.lower()
    cpu = time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "why": " ".join(str(error).split())[:300]}
    figures = {"fits": True, "compile_cpu": time.process_time() - cpu}
    Path(text).write_text(executable.as_text())
    memory = executable.memory_analysis()
    return figures | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
