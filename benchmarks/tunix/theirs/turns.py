"""What both sides' processes have in common: requests in, measured answers out. Knows no library.

Standard library only, for Tunix's process reads this file too. A request is a JSON line
{"call": name, "with": {...}}, an answer {"answer": {...}} or {"error": text}.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Measured = dict[str, float]


@contextlib.contextmanager
def measured(device: Any = None) -> Iterator[Measured]:
    """Fills in, at its end, `wall` and `cpu` seconds (all threads of this process), `peak`, the
    most bytes resident meanwhile, and, of a JAX device that says it, `device_peak`, the most bytes
    on it so far."""
    reading: Measured = {}
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    wall, cpu = time.perf_counter(), time.process_time()
    yield reading
    reading["wall"] = time.perf_counter() - wall
    reading["cpu"] = time.process_time() - cpu
    reading["peak"] = _status("VmHWM")
    if device is not None and (of_device := device.memory_stats()):
        reading["device_peak"] = of_device["peak_bytes_in_use"]


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def serve(calls: dict[str, Callable[..., dict]]) -> None:
    """Answer requests until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    Path("/proc/self/oom_score_adj").write_text("800")  # if memory runs out, this one ends
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": calls[request["call"]](**request["with"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # a library's threads may wait for more
