"""Whether both sides' updates are one: GRPO steps on the same completions, paid at random.

JAX_PLATFORMS=cpu python -m benchmarks.tunix.replay [--seeds 0] [--steps 30]

The learners of `learn` go on from gemma3-nano's base weights through the whole course of learning
rates. Ours, without the stop token in its loss, draws; Tunix trains on those completions in the
place of its own, and both get the same rewards. `apart` says how far the weights are from one
another in the end, as a share of how far ours have gone (2-norms over all weights).
"""

import jax
import numpy as np
import optax
import tyro

from benchmarks.timing import about, print_row
from benchmarks.tunix.learn import problems_of
from benchmarks.tunix.sides import Opener, comparable_run
from gemma_grpo import pipeline
from gemma_grpo.model import Params


def main(seeds: tuple[int, ...] = (0,), steps: int = 30) -> None:
    """Take GRPO steps, and print how far apart they have led: a row for each seed (of the problems
    and the sampling)."""
    for seed in seeds:
        run = comparable_run({"seed": seed, "grpo.num_steps": steps})
        rng = np.random.default_rng(seed)
        task = pipeline.load_task(run)
        opener = Opener(run, task.base, stop_ids=task.runtime.tokenizer.stop_ids)
        ours, theirs = opener.open("ours_stop_untrained"), opener.open("tunix")
        for number in range(steps):
            _, prompts = problems_of(run, task, number)
            drawn = ours.call("draw", prompts=prompts, number=number)["completions"]
            theirs.call("draw", prompts=prompts, number=number, instead=drawn)
            paid = (rng.integers(0, 5, len(drawn)) / 4).tolist()
            for side in (ours, theirs):
                side.call("learn", rewards=paid)
        one, other = (side.learned(task.base) for side in (ours, theirs))
        row = {"benchmark": "tunix/replay", "steps": steps, **about(run)}
        print_row(**row, apart=distance(one, other) / distance(one, task.base))


def distance(one: Params, other: Params) -> float:
    """The 2-norm of the difference."""
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, one, other)))


if __name__ == "__main__":
    tyro.cli(main)
