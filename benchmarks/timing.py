"""Warm-up, waiting for the device, medians, and one JSON line for each result, out and in."""

import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from gemma_grpo.config import RunConfig

T = TypeVar("T")


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


@functools.cache
def commit() -> str:
    """This repository's commit, with "+" behind it where files were changed since; "" without
    git."""
    git = ["git", "-C", Path(__file__).parent]
    git += ["describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def about(run: RunConfig) -> dict:
    """What rows of a run say: the machine, the commit, and the run's sizes."""
    return {
        "device": cpus(),
        "commit": commit(),
        "model": run.model.weights,
        "dtype": run.model.dtype,
        "prompts": run.grpo.prompts_per_step,
        "generations": run.grpo.num_generations,
        "prompt_length": run.model.max_prompt_length,
        "budget": run.model.max_completion_length,
        "learning_rate": run.grpo.optimizer.learning_rate,
        "seed": run.seed,
    }


def chosen(names: Sequence[str], known: Mapping[str, T]) -> dict[str, T]:
    """What is known by these names. Exits, before anything is measured, where one is unknown."""
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def rounded(result: Mapping[str, Any]) -> dict[str, int | float]:
    """An evaluation's figures, to four digits."""
    return {key: round(value, 4) for key, value in result.items() if isinstance(value, int | float)}


def read_rows(*files: Path) -> list[dict]:
    """The rows of files of JSON lines."""
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def print_row(**values: Any) -> None:
    """One JSON line: the device, jax's version, the commit, and the values: `benchmark`, shapes,
    `dtype`, versions of other packages that compute, and what was measured."""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    row = {"device": device, "jax": jax.__version__, "commit": commit()} | values
    print(json.dumps(row), flush=True)
