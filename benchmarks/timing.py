"""Warm-up, waiting for the device, medians, and one JSON line for each result."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def median_seconds(run: Callable[[], Any], *, repeats: int) -> tuple[float, float, float]:
    """(median, smallest, largest) wall-clock seconds of `run`, after one call that warms up."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), min(seconds), max(seconds)


def cpus() -> str:
    """How many cores of which CPU, as Linux has it: "2 x AMD EPYC"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}"


def print_row(**values: Any) -> None:
    """One JSON line: the values, the device and the version."""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(json.dumps({"device": device, "jax": jax.__version__, **values}), flush=True)
