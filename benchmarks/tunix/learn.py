"""Learning curves, ours against Tunix's: GRPO from the same weights, on the same problems.

JAX_PLATFORMS=cpu python -m benchmarks.tunix.learn [--seeds 0 1 2] [--steps 200] > rows.jsonl
needs the environment of `python -m benchmarks.tunix.install`; `curves` makes the summary and the
chart of the rows

docs/tunix.md says what is the same on the three sides: `ours`, `tunix`, and `ours_stop_untrained`,
which is ours with the token that ends a completion left out of the loss, as it is of Tunix's. A
step is taken by each in turn while the others wait. `reward`, `accuracy`, `format`, `length`
(tokens, stop token included) are means over a step's completions; `cpu` (of all threads) and `wall`
are its seconds, rollout and update, without the scoring, which is the same for all. `held_out` is
what our evaluator says of the weights in the end, `held_out_before` of those in the beginning.
"""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.timing import print_row
from benchmarks.tunix import convert, install
from benchmarks.tunix.sides import Opener, SideProcess, about, comparable_run
from gemma_grpo import pipeline, rewards, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.data import batches
from gemma_grpo.data.problem import Problem
from gemma_grpo.evaluation.evaluator import make_evaluator
from gemma_grpo.generation.samples import make_samples
from gemma_grpo.model import Params
from gemma_grpo.presets import GEMMA3_NANO
from gemma_grpo.rewards import RewardWeights
from gemma_grpo.text import padding
from gemma_grpo.text.prompts import encode_prompts
from gemma_grpo.text.tokenizer import Tokenizer

PAID = RewardWeights(correctness=0.6, trace=0.3, confidence=0.0, verbosity=0.0, format=0.1)


def main(seeds: tuple[int, ...] = (0, 1, 2), steps: int = GEMMA3_NANO.grpo.num_steps) -> None:
    """A row for each seed and side.

    Args:
        seeds: of our SFT, the problems and the sampling.
        steps: of GRPO.
    """
    install.check()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            for row in learn(comparable_run(seed=seed, num_steps=steps), Path(folder)):
                print_row(**row)


def learn(run: RunConfig, folder: Path) -> list[dict]:
    """SFT, the sides' GRPO in turn, and the evaluation of what each has learned."""
    pipeline.new_run_dir(folder / "run", run)
    summary = pipeline.execute(run, folder / "run")
    task = pipeline.load_task(run)
    started = weights.load(folder / "run" / "weights" / "sft.safetensors", task.base)
    evaluator = make_evaluator(run.evaluation, task.runtime)
    opener, sides = open_sides(task, run, started, folder)
    row = {"benchmark": "tunix/learn", "steps": run.grpo.num_steps, **about(run)}
    row |= opener.apart() | {"held_out_before": rounded(summary["stages"]["sft"])}
    steps = {side.name: [] for side in sides}
    for number, side in itertools.product(range(run.grpo.num_steps), sides):
        steps[side.name].append(step(side, number, run, task))
    rows = []
    for side in sides:
        result, *_ = evaluator.run(weights_of(side, folder, task.base), task.test)
        of_steps = {key: [step[key] for step in steps[side.name]] for key in steps["ours"][0]}
        said = {"held_out": rounded(result), "versions": opener.versions[side.name]}
        rows.append(row | {"side": side.name} | of_steps | said)
    return rows


def open_sides(
    task: pipeline.Task, run: RunConfig, params: Params, folder: Path
) -> tuple[Opener, list[SideProcess]]:
    """What opens sides, and all sides with these weights, ready for their first step."""
    opener = Opener(run, params, folder, stop_ids=task.runtime.tokenizer.stop_ids)
    without_stop = opener.ours(name="ours_stop_untrained", trained_stop=False)
    return opener, [opener.ours(), without_stop, opener.tunix()]


def problems_of(run: RunConfig, task: pipeline.Task, number: int) -> tuple[list[Problem], list]:
    """Those of a step, as our training takes them without a curriculum, and their prompts' ids."""
    num_prompts = run.grpo.prompts_per_step
    taken = batches.batch_indices(number, num_prompts, len(task.train), run.seed)
    problems_P = [task.train[index] for index in taken]
    prompts = encode_prompts(
        problems_P,
        task.runtime.tokenizer,
        instruction=run.model.instruction,
        max_prompt_length=run.model.max_prompt_length,
    )
    return problems_P, prompts


def step(side: SideProcess, number: int, run: RunConfig, task: pipeline.Task) -> dict[str, float]:
    """One whole step of one side."""
    problems_P, prompts = problems_of(run, task, number)
    drawn = side.call("draw", prompts=prompts, number=number)
    completions, stopped = drawn["completions"], drawn["stopped"]
    budget, tokenizer = run.model.max_completion_length, task.runtime.tokenizer
    scores = score(problems_P, completions, stopped, budget=budget, tokenizer=tokenizer)
    learned = side.call("learn", rewards=scores.totals)
    readings = drawn["reading"], learned["reading"]
    return {
        "reward": round(float(np.mean(scores.totals)), 4),
        "accuracy": round(float(np.mean(scores.components["correctness"])), 4),
        "format": round(float(np.mean(scores.components["format"])), 4),
        "length": round((sum(map(len, completions)) + sum(stopped)) / len(completions), 2),
        "cpu": round(sum(reading["cpu"] for reading in readings), 3),
        "wall": round(sum(reading["wall"] for reading in readings), 3),
    }


def score(
    problems_P: Sequence[Problem],
    completions: Sequence[Sequence[int]],
    stopped: Sequence[bool],
    *,
    budget: int,
    tokenizer: Tokenizer,
) -> rewards.Scores:
    """What completions are paid, whichever side drew them; rows are group-major, without their stop
    token."""
    num_generations = len(completions) // len(problems_P)
    ids_BT, mask_BT = padding.pad_right(completions, length=budget, pad_id=tokenizer.pad_id)
    samples = make_samples(
        [problem for problem in problems_P for _ in range(num_generations)],
        ids_BT,
        mask_BT,
        np.zeros(ids_BT.shape, np.float32),
        np.array(stopped),
        tokenizer,
    )
    return rewards.score(samples, PAID, trace="structure")


def weights_of(side: SideProcess, folder: Path, like: Params) -> Params:
    """What a side has learned, as parameters of ours."""
    path = folder / f"{side.name}.npz"
    side.call("save", out=str(path))
    with np.load(path) as file:
        params = convert.from_tunix(file)
    return jax.tree.map(lambda own, leaf: jnp.asarray(leaf, own.dtype), like, params)


def rounded(result: dict) -> dict:
    """An evaluation's figures, to four digits."""
    return {key: round(value, 4) for key, value in result.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    tyro.cli(main)
