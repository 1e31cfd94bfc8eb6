"""What the sides' processes share: requests, the clock, and what a compiler says.

Imports nothing of ours, because Tunix's process imports this file too. A request is (name,
arguments), its answer a dictionary, both pickled with their arrays.
"""

import importlib.metadata
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax


class Server:
    """Answers requests by the methods of `side` that have their names."""

    def __init__(self, side: object):
        self.side, self.connection = side, Connection(int(sys.argv[1]))
        Path("/proc/self/oom_score_adj").write_text("800")  # if memory runs out, this process ends

    def serve(self, until: str = "", answer: dict | None = None) -> dict:
        """Give the answer that is due, if any, and answer up to the first request named `until`:
        its arguments, whose answer is due then. Where a request fails, or none can come any more,
        the process ends."""
        try:
            if answer is not None:
                self.connection.send(answer)
            while True:
                name, arguments = self.connection.recv()
                if name == until:
                    return arguments
                self.connection.send(getattr(self.side, name)(**arguments))
        except Exception:
            traceback.print_exc()
            os._exit(1)  # a library's threads may still be waiting


def start() -> Callable[[], dict[str, float]]:
    """Starts the clock, and returns what reads it: `wall` and `cpu` seconds (all threads of this
    process), `peak`, the most resident bytes meanwhile, and, where JAX's device reports it,
    `device_peak`, the most bytes on it so far."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    wall, cpu = time.perf_counter(), time.process_time()

    def read() -> dict[str, float]:
        reading = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        status = Path("/proc/self/status").read_text()
        reading["peak"] = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
        of_device = jax.devices()[0].memory_stats()
        return reading | ({"device_peak": of_device["peak_bytes_in_use"]} if of_device else {})

    return read


def versions(*packages: str) -> dict[str, str]:
    """Of the packages installed here."""
    return {name: importlib.metadata.version(name) for name in packages}


def first_moment(optimizer: Any) -> np.ndarray:
    """Adam's first moment of the final norm: the gradient that an optimizer saw, if it was its
    first."""
    return np.asarray(optax.tree.get(optimizer, "mu")["final_norm"]["scale"], np.float32)


def compiled(traced: jax.stages.Traced) -> dict:
    """What the compiler says of a program, for its devices: whether it `fits`; where it does not
    `why`; else bytes a device (`arguments`, `temporaries`, `peak`), the `compile_cpu` seconds of
    all threads, and the optimised program's text (`hlo`)."""
    lowered = traced.lower()
    cpu = time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "why": " ".join(str(error).split())[:300]}
    figures = {"fits": True, "compile_cpu": time.process_time() - cpu}
    memory = executable.memory_analysis()
    return figures | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hlo": executable.as_text(),
    }
