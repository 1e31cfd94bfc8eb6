"""Learning curves, ours against Tunix's: GRPO from the same weights, on the same problems.

JAX_PLATFORMS=cpu python -m benchmarks.tunix.learn [--seeds 0 1 2] [--steps 200] > rows.jsonl
`curves` makes the summary and the chart of the rows. `replay` is the command of that name.

docs/tunix.md says what is the same on the three sides: `ours`, `tunix`, and `ours_stop_untrained`,
which is ours with the token that ends a completion left out of the loss, as it is of Tunix's. A
step is taken by each in turn while the others wait. `reward`, `accuracy`, `format`, `length`
(tokens, stop token included) are means over a step's completions; `cpu` (of all threads) and `wall`
are its seconds, rollout and update, without the scoring, which is the same for all. `held_out` is
what our evaluator says of the weights in the end, `held_out_before` of those in the beginning.
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import optax
import tyro

from benchmarks.timing import about, print_row, rounded
from benchmarks.tunix import install
from benchmarks.tunix.sides import COMPARABLE, Opener, SideProcess
from gemma_grpo import pipeline, rewards, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.data import batches
from gemma_grpo.data.problem import Problem
from gemma_grpo.evaluation.evaluator import make_evaluator
from gemma_grpo.generation.samples import make_samples
from gemma_grpo.model import Params
from gemma_grpo.presets import GEMMA3_NANO
from gemma_grpo.runtime import Runtime
from gemma_grpo.text import padding

PAID = rewards.RewardWeights(correctness=0.6, trace=0.3, confidence=0.0, verbosity=0.0, format=0.1)


def main(seeds: tuple[int, ...] = (0, 1, 2), steps: int = GEMMA3_NANO.grpo.num_steps) -> None:
    """A row for each side and seed (of our SFT, the problems and the sampling)."""
    install.check()
    for seed in seeds:
        for row in learn(COMPARABLE.replace({"seed": seed, "grpo.num_steps": steps})):
            print_row(**row)


def learn(run: RunConfig) -> Iterator[dict]:
    """SFT, the sides' GRPO in turn, and the evaluation of what each has learned: a row a side."""
    task = pipeline.load_task(run)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        pipeline.new_run_dir(run_dir, run)
        before = pipeline.execute(run, run_dir)["stages"]["sft"]
        started = weights.load(run_dir / "weights" / "sft.safetensors", task.base)
    opener = Opener(run, started, stop_ids=task.runtime.tokenizer.stop_ids)
    sides = [opener.open(name) for name in ("ours", "ours_stop_untrained", "tunix")]
    row = {"benchmark": "tunix/learn", "steps": run.grpo.num_steps, **about(run)}
    row |= opener.apart() | {"held_out_before": rounded(before)}
    steps = {side.name: [] for side in sides}
    for number, side in itertools.product(range(run.grpo.num_steps), sides):
        steps[side.name].append(step(side, number, run, task))
    evaluator = make_evaluator(run.evaluation, task.runtime)
    for side in sides:
        result, *_ = evaluator.run(side.learned(task.base), task.test)
        of_steps = {key: [step[key] for step in steps[side.name]] for key in steps["ours"][0]}
        said = {"held_out": rounded(result), "versions": opener.opened[side.name]["versions"]}
        yield row | {"side": side.name} | of_steps | said


def problems_of(run: RunConfig, task: pipeline.Task, number: int) -> tuple[list[Problem], list]:
    """Those of a step, as our training takes them without a curriculum, and their prompts' ids."""
    taken = batches.batch_indices(number, run.grpo.prompts_per_step, len(task.train), run.seed)
    problems_P = [task.train[index] for index in taken]
    return problems_P, task.runtime.encode_prompts(problems_P)


def step(side: SideProcess, number: int, run: RunConfig, task: pipeline.Task) -> dict[str, float]:
    """One whole step of one side: means over its completions, and its seconds."""
    problems_P, prompts = problems_of(run, task, number)
    drawn = side.call("draw", prompts=prompts, number=number)
    scores = score(problems_P, drawn, task.runtime)
    learned = side.call("learn", rewards=scores.totals)
    mean = lambda values, digits=4: round(float(np.mean(values)), digits)
    seconds = lambda clock: round(drawn["reading"][clock] + learned["reading"][clock], 3)
    tokens = [len(ids) for ids in drawn["completions"]]
    return {
        "reward": mean(scores.totals),
        "accuracy": mean(scores.components["correctness"]),
        "format": mean(scores.components["format"]),
        "length": mean(np.add(tokens, drawn["stopped"]), 2),
        "cpu": seconds("cpu"),
        "wall": seconds("wall"),
    }


def score(problems_P: Sequence[Problem], drawn: dict, runtime: Runtime) -> rewards.Scores:
    """What `completions` are paid, whichever side drew them; rows are group-major, without their
    stop token."""
    completions, tokenizer = drawn["completions"], runtime.tokenizer
    num_generations = len(completions) // len(problems_P)
    problems_B = [problem for problem in problems_P for _ in range(num_generations)]
    T, pad_id = runtime.max_completion_length, tokenizer.pad_id
    ids_BT, mask_BT = padding.pad_right(completions, length=T, pad_id=pad_id)
    logps_BT, stopped_B = np.zeros(ids_BT.shape, np.float32), np.array(drawn["stopped"])
    samples = make_samples(problems_B, ids_BT, mask_BT, logps_BT, stopped_B, tokenizer)
    return rewards.score(samples, PAID, trace="structure")


def replay(seeds: tuple[int, ...] = (0,), steps: int = 30) -> None:
    """Take GRPO steps, and print how far apart they have led: a row for each seed (of the problems
    and the sampling)."""
    for seed in seeds:
        run = COMPARABLE.replace({"seed": seed, "grpo.num_steps": steps})
        task, rng = pipeline.load_task(run), np.random.default_rng(seed)
        opener = Opener(run, task.base, stop_ids=task.runtime.tokenizer.stop_ids)
        ours, theirs = opener.open("ours_stop_untrained"), opener.open("tunix")
        empty, moments_apart = [], []
        for number in range(steps):
            _, prompts = problems_of(run, task, number)
            drawn = ours.call("draw", prompts=prompts, number=number)["completions"]
            theirs.call("draw", prompts=prompts, number=number, instead=drawn)
            paid = (rng.integers(0, 5, len(drawn)) / 4).tolist()
            one, other = (s.call("learn", rewards=paid)["moment"] for s in (ours, theirs))
            moments_apart.append(f"{np.abs(one - other).max() / np.abs(other).max():.1e}")
            empty.append(sum(not ids for ids in drawn))
        one, other = (side.learned(task.base) for side in (ours, theirs))
        row = {"benchmark": "tunix/replay", "steps": steps, **about(run)}
        row |= {"empty": empty, "moments_apart": [float(each) for each in moments_apart]}
        print_row(**row, apart=distance(one, other) / distance(one, task.base))


def distance(one: Params, other: Params) -> float:
    """The 2-norm of the difference."""
    return float(optax.tree.norm(optax.tree.sub(one, other)))


if __name__ == "__main__":
    tyro.cli(main)
