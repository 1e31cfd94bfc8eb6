"""Whether both sides' updates are one: GRPO steps on the same completions, paid at random.

JAX_PLATFORMS=cpu python -m benchmarks.tunix.replay [--seeds 0] [--steps 30]
needs the environment of `python -m benchmarks.tunix.install`

The learners of `learn` go on from gemma3-nano's base weights through the whole course of learning
rates. Ours, without the stop token in its loss, draws; Tunix trains on those completions in the
place of its own, and both get the same rewards. `apart` says how far the weights are from one
another in the end, as a share of how far ours have gone (2-norms over all weights).
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

from benchmarks.timing import print_row
from benchmarks.tunix import install, learn
from benchmarks.tunix.sides import about, comparable_run
from gemma_grpo import pipeline
from gemma_grpo.config import RunConfig
from gemma_grpo.model import Params


def main(seeds: tuple[int, ...] = (0,), steps: int = 30) -> None:
    """A row for each seed.

    Args:
        seeds: of the problems and the sampling.
        steps: of GRPO.
    """
    install.check()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            print_row(**replay(comparable_run(seed=seed, num_steps=steps), Path(folder)))


def replay(run: RunConfig, folder: Path) -> dict:
    """The steps, and how far apart they have led."""
    task = pipeline.load_task(run)
    rng = np.random.default_rng(run.seed)
    _, (_, ours, theirs) = learn.open_sides(task, run, task.base, folder)
    for number in range(run.grpo.num_steps):
        _, prompts = learn.problems_of(run, task, number)
        drawn = ours.call("draw", prompts=prompts, number=number)["completions"]
        theirs.call("draw", prompts=prompts, number=number, instead=drawn)
        paid = (rng.integers(0, 5, len(drawn)) / 4).tolist()
        for side in (ours, theirs):
            side.call("learn", rewards=paid)
    learned, their_own = (learn.weights_of(side, folder, task.base) for side in (ours, theirs))
    row = {"benchmark": "tunix/replay", "steps": run.grpo.num_steps, **about(run)}
    return row | {"apart": distance(learned, their_own) / distance(learned, task.base)}


def distance(one: Params, other: Params) -> float:
    """The 2-norm of the difference."""
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, one, other)))


if __name__ == "__main__":
    tyro.cli(main)
