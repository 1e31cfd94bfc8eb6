"""What a run took on this machine's cores, and what it could not take less than.

python -m benchmarks.floors RUN

RUN is a finished run that was trained on this CPU with nothing beside it. Its programs are planned
as `python -m gemma_grpo.plan` plans a TPU's, for devices as fast as these cores: the FLOPs of one
large float32 matmul and the bytes of a large array that is read, both measured first.

A row for each part of the run: the `seconds` it took, its first calls' compilation included, and
its `floor`: its matmuls at that speed and nothing else, at the plan's likely lengths. Compilation
is its own floor: the CPU seconds of all programs over the cores. The last row is a decode step of
the 270M at the lengths of `benchmarks.decode`, whose weights are read once.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import tyro
from tyro.conf import Positional

from benchmarks import decode
from benchmarks.timing import cpus, median_seconds, print_row
from gemma_grpo import config
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.model import CONFIGS
from gemma_grpo.planning import fit, ledger, programs, roofline
from gemma_grpo.planning.chips import Chip
from gemma_grpo.records import summary

WIDTH, FLOATS = 3072, 2**27  # of the matmul; of the array that is read, half a gigabyte
FLOAT32 = 4  # bytes
# Part of a run in its seconds.json -> line of the plan's ledger.
PARTS = {
    "evaluate_base": "base evaluation",
    "sft": "SFT steps",
    "evaluate_sft": "SFT evaluation",
    "grpo": "GRPO steps",
    "evaluate_grpo": "GRPO evaluation",
}


def main(run_dir: Positional[Path]) -> None:
    """Print a row for each part of a run, and one for a decode step of the 270M."""
    run, cores = config.from_yaml(run_dir / "config.yaml"), os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)
    jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
    machine = speed(cores)
    read = machine.bandwidth * FLOAT32 / roofline.BYTES
    speeds = {"gflops": round(machine.flops / 1e9), "gb_per_s": round(read / 1e9, 1)}

    architecture, ids = programs.model_of(run.model)
    core = replace(machine, flops=machine.flops / cores, bandwidth=machine.bandwidth / cores)
    rows = fit.plan(run, architecture, meshes.data_mesh(), core, ids)
    account = ledger.of_run(run, architecture, rows, cores)
    compiling = sum(row.compiled.compile_cpu_seconds for row in rows) / cores

    sizes = {"num_rows": decode.BATCH, "num_prompts": decode.BATCH}
    lengths = {"prompt_length": decode.PROMPT_LENGTH, "num_slots": decode.PROMPT_LENGTH}
    step = roofline.decode_step(CONFIGS[decode.WEIGHTS], **sizes, **lengths).seconds(machine)
    bound = {"floor": round(step, 4), "tokens_per_s": round(decode.BATCH / step)}

    for part in [
        *parts(summary.seconds_of(run_dir), account.seconds),
        {"part": "compilation of all programs", "floor": round(compiling, 2)},
        {"part": "decode step of the 270M", **bound},
    ]:
        print_row(benchmark="floors", dtype="float32", cpu=cpus(), **speeds, **part)


def parts(taken: dict[str, float], lines: Sequence[ledger.Line]) -> list[dict]:
    """What each part of a run took and its floor, in seconds; only the parts that it has."""
    likely = {line.name: line.likely for line in lines}
    return [
        {"part": part, "seconds": taken[part], "floor": round(likely[name], 2)}
        for part, name in PARTS.items()
        if part in taken
    ]


def speed(cores: int) -> Chip:
    """All cores as one chip: the faster matmul of XLA's and NumPy's, and what threads read. The
    plan counts two bytes a number, and a float32 has four: the bandwidth is in the plan's bytes."""
    square = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    on_device = jax.device_put(square)
    matmul = jax.jit(lambda x: x @ x)
    best = min(
        median_seconds(run, repeats=5)[0]
        for run in (lambda: matmul(on_device), lambda: square @ square)
    )
    parts = np.ones((cores, FLOATS // cores), np.float32)
    with ThreadPoolExecutor(cores) as pool:
        read = lambda: list(pool.map(lambda part: part.max(), parts))
        seconds, *_ = median_seconds(read, repeats=5)
    bandwidth = FLOATS * roofline.BYTES / seconds
    return Chip(memory=np.inf, flops=2 * WIDTH**3 / best, bandwidth=bandwidth)


if __name__ == "__main__":
    tyro.cli(main)
