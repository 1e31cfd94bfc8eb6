"""Whether both sides' updates are one: GRPO steps on the same completions, paid at random.

JAX_PLATFORMS=cpu python -m benchmarks.tunix.replay [--seeds 0] [--steps 30]
needs the environment of `python -m benchmarks.tunix.install`

The learners of `learn` go on from gemma3-nano's base weights through the whole course of learning
rates. Ours, without the stop token in its loss, draws; Tunix trains on those completions in the
place of its own, and both get the same rewards. `apart` says how far the weights are from one
another in the end, as a share of how far ours have gone (2-norms over all weights).
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import optax
import tyro

from benchmarks.tunix import install, learn
from benchmarks.tunix.sides import commit, processor
from gemma_grpo import pipeline, weights
from gemma_grpo.model import Params
from gemma_grpo.text.prompts import encode_prompts


def main(options: Annotated[learn.Options, tyro.conf.arg(name="")]) -> None:
    """A row for each seed."""
    install.check(options.environment)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(replay(options, seed, Path(folder))), flush=True)


def replay(options: learn.Options, seed: int, folder: Path) -> dict:
    """The steps, and how far apart they have led."""
    run, run_dir = learn.run_of(seed, options.steps), folder / "run"
    pipeline.new_run_dir(run_dir, run)
    task = pipeline.load_task(run)
    (run_dir / "weights").mkdir()
    weights.save(run_dir / "weights" / "sft.safetensors", task.base)
    tokenizer = task.runtime.tokenizer
    sides, *_ = learn.open_sides(options, run, run_dir, folder, stop_ids=tokenizer.stop_ids)
    _, ours, theirs = sides
    rng = np.random.default_rng(seed)
    for number in range(run.grpo.num_steps):
        prompts = encode_prompts(
            learn.problems_of(run, task.train, number),
            tokenizer,
            instruction=run.model.instruction,
            max_prompt_length=run.model.max_prompt_length,
        )
        drawn = ours.call("draw", prompts=prompts, number=number)["completions"]
        theirs.call("draw", prompts=prompts, number=number, instead=drawn)
        paid = (rng.integers(0, 5, len(drawn)) / 4).tolist()
        for side in (ours, theirs):
            side.call("learn", rewards=paid)
    of_ours, of_theirs = (learn.weights_of(side, folder, task.base) for side in (ours, theirs))
    for side in sides:
        side.close()
    return {
        "benchmark": "tunix/replay",
        "seed": seed,
        "steps": run.grpo.num_steps,
        "learning_rate": run.grpo.optimizer.learning_rate,
        "device": processor(),
        "commit": commit(),
        "apart": distance(of_ours, of_theirs) / distance(of_ours, task.base),
    }


def distance(one: Params, other: Params) -> float:
    """The 2-norm of the difference."""
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, one, other)))


if __name__ == "__main__":
    tyro.cli(main)
