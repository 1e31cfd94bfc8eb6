"""Seconds and host memory that loading a checkpoint of Gemma 3 1B's size takes, from a warm cache.

python -m benchmarks.load_weights [--transformers] [--dtype float32]

Random bfloat16 weights are written into a temporary folder (2.0 GB), then loaded onto the CPU in a
process of its own for each repeat. `peak_over_file` is the process's highest resident memory less
what it was before the load, over the size of the file. On a CPU the parameters themselves are in
host memory: in bfloat16 they alone are 1.0.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
import tyro

from benchmarks.timing import print_row
from gemma_grpo import model
from gemma_grpo.weights import assemble, open_source
from gemma_grpo.weights.hf_write import write_folder
from gemma_grpo.weights.names import their_shapes

CONFIG = model.CONFIGS["gemma3-1b"]


def main(
    transformers: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    repeats: int = 5,
    load_only: Path | None = None,
) -> None:
    """Write a checkpoint and time its loading.

    Args:
        transformers: let transformers write it (random initialisation), not ourselves.
        dtype: of the parameters in memory.
        repeats: timed loads, after one that warms up.
        load_only: of a child process: load this folder once and print the figures.
    """
    if load_only is not None:
        print(json.dumps(measure(load_only, dtype)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        (write_by_transformers if transformers else write)(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        command = [sys.executable, "-m", "benchmarks.load_weights", "--load-only", str(folder)]
        runs = [
            json.loads(subprocess.check_output([*command, "--dtype", dtype]))
            for _ in range(1 + repeats)
        ][1:]
    seconds = sorted(run["seconds"] for run in runs)
    peak = max(run["peak_bytes"] - run["baseline_bytes"] for run in runs)
    print_row(
        benchmark="load_weights",
        model="gemma3-1b",
        written_by="transformers" if transformers else "gemma_grpo",
        dtype=dtype,
        file_gb=round(size / 1e9, 3),
        seconds={
            "median": seconds[len(seconds) // 2],
            "min": seconds[0],
            "max": seconds[-1],
        },
        cpu_seconds=sorted(run["cpu_seconds"] for run in runs)[len(runs) // 2],
        baseline_gb=round(max(run["baseline_bytes"] for run in runs) / 1e9, 3),
        peak_over_file=round(peak / size, 4),
    )


def write(folder: Path) -> None:
    """A folder by our own writer."""
    generator, shapes = np.random.default_rng(0), their_shapes(CONFIG)
    tensors = (
        (name, 0.02 * generator.standard_normal(shape, dtype=np.float32))
        for name, shape in shapes.items()
    )
    dtype = np.dtype(ml_dtypes.bfloat16)
    write_folder(folder, tensors, CONFIG, dtype=dtype, tokenizer=None)


def write_by_transformers(folder: Path) -> None:
    """A folder by `save_pretrained` of a model that transformers initialised at random."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=CONFIG.vocab_size,
        num_hidden_layers=CONFIG.num_layers,
        hidden_size=CONFIG.embed_dim,
        intermediate_size=CONFIG.hidden_dim,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        head_dim=CONFIG.head_dim,
        sliding_window=CONFIG.sliding_window,
    )
    torch.set_default_dtype(torch.bfloat16)
    Gemma3ForCausalLM(config).save_pretrained(folder)


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """One load in this process."""
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend's own memory is no part of it
    source = open_source(str(folder))
    like = model.abstract(source.config)[1]
    baseline, started, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    jax.block_until_ready(assemble(source, like, dtype=dtype, sharding=None))
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "baseline_bytes": baseline,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The highest resident memory of this process so far, on Linux. `getrusage` would not do: it
    counts the parent's, from before the child became another program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    tyro.cli(main)
