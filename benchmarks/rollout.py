"""Warm decode speed of gemma3-nano: tokens a second of a whole rollout, prefill included.

python -m benchmarks.rollout [--devices 2]

A row a batch size; no completion may stop, so that the count of tokens is exact. The baseline of
each row's `ratio` is the row of one device.
"""

import os

import jax
import numpy as np
import tyro

from benchmarks.timing import median_seconds, print_row
from gemma_grpo import model, weights
from gemma_grpo.devices import mesh
from gemma_grpo.generation.rollout import RolloutConfig, make_rollout

PROMPT_LENGTH, COMPLETION_LENGTH, GENERATIONS = 48, 60, 8


def main(devices: int = os.cpu_count() or 1, repeats: int = 20) -> None:
    """Time rollouts on one CPU device and on several.

    Args:
        devices: CPU devices of the second kind of row.
        repeats: timed rollouts a row.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    source = weights.open_source("gemma3-nano")
    graphdef, shapes = model.abstract(source.config)
    params = weights.assemble(source, shapes, dtype="float32", sharding=None)
    rng = np.random.default_rng(0)
    for batch in (32, 64, 256):
        prompts = batch // GENERATIONS
        ids = rng.integers(8, 512, (prompts, PROMPT_LENGTH)).astype(np.int32)
        mask = np.ones_like(ids, bool)
        baseline = None
        for count in dict.fromkeys((1, devices)):
            config = RolloutConfig(
                num_generations=GENERATIONS,
                max_completion_length=COMPLETION_LENGTH,
                stop_ids=(),
                pad_id=0,
            )
            rollout = make_rollout(graphdef, mesh.data_mesh(jax.devices()[:count]), config)
            run = lambda program=rollout, ids=ids, mask=mask: program(
                params, ids, mask, jax.random.key(0)
            )
            median, low, high = median_seconds(run, repeats=repeats)
            speed = batch * COMPLETION_LENGTH / median
            baseline = baseline or speed
            print_row(
                benchmark="rollout",
                model="gemma3-nano",
                dtype="float32",
                batch=batch,
                prompt_length=PROMPT_LENGTH,
                completion_length=COMPLETION_LENGTH,
                devices_used=count,
                tokens_per_s=round(speed),
                seconds={"median": median, "min": low, "max": high},
                ratio=round(speed / baseline, 2),
            )


if __name__ == "__main__":
    tyro.cli(main)
