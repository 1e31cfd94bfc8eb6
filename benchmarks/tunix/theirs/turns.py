"""What both sides' processes share: they take requests and return measured answers.

Standard library only, because Tunix's process imports this file too. A request is a JSON line
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


@contextlib.contextmanager
def measured(device: Any = None) -> Iterator[dict[str, float]]:
    """Fills in at its end: `wall` and `cpu` seconds (all threads of this process), `peak`, the
    most resident bytes meanwhile, and, where the JAX device reports it, `device_peak`, the most
    bytes on it so far."""
    reading: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    wall, cpu = time.perf_counter(), time.process_time()
    yield reading
    reading["wall"] = time.perf_counter() - wall
    reading["cpu"] = time.process_time() - cpu
    lines = Path("/proc/self/status").read_text().splitlines()
    reading["peak"] = next(1024 * int(s.split()[1]) for s in lines if s.startswith("VmHWM:"))
    if device is not None and (of_device := device.memory_stats()):
        reading["device_peak"] = of_device["peak_bytes_in_use"]


def serve(calls: dict[str, Callable[..., dict]]) -> None:
    """Answer requests until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    Path("/proc/self/oom_score_adj").write_text("800")  # if memory runs out, this process ends
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": calls[request["call"]](**request["with"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # a library's threads may still be waiting


def serve_side(side: Any) -> None:
    """Answer the calls that a side of `cpu`, `gpu`, `learn` and `replay` has."""
    calls = ("load", "logits", "begin", "draw", "learn", "moment", "save")
    serve({name: getattr(side, name) for name in calls})
