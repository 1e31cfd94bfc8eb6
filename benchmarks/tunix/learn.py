"""Learning curves, ours against Tunix's: GRPO from the same weights, on the same problems.

JAX_PLATFORMS=cpu python -m benchmarks.tunix.learn [--seeds 0 1 2] [--steps 200] > rows.jsonl
needs the environment of `python -m benchmarks.tunix.install`; `curves` makes the summary and the
chart of the rows

For each seed our SFT makes gemma3-nano's weights, and every side goes on from them by GRPO with the
preset's settings: the same problems in the same order, the same AdamW and learning rates,
temperature 1, beta 0, mu 1, epsilon 0.2, advantages over the group's std (ddof 1 and 1e-6 on both
sides), the loss a mean over sequences of means over tokens. Completions come here as ids and are
paid by one function of ours, with fixed weights for being right, for steps, and for the form.

Three sides: `ours`, `tunix`, and `ours_stop_untrained`, which is ours with one thing of Tunix's:
the token that ends a completion is left out of the loss. What else differs: the sampler's random
numbers (Tunix is given another seed each step), and that Tunix's mean over sequences is one of each
prompt's group, averaged over groups, which is the same unless a completion has no token at all.

Each side is a process of its own, and a step is taken by each in turn while the others wait.
`reward`, `accuracy`, `format`, `length` (tokens, stop token included) are means over a step's
completions; `cpu` (of all threads) and `wall` are its seconds, rollout and update, without the
scoring, which is the same for all. A side's first step compiles. `held_out` is what our evaluator
says of the weights in the end, `held_out_before` of those in the beginning, and
`accuracy_over_tunix` is the difference in greedy accuracy on the same problems, paired.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.tunix import convert, install
from benchmarks.tunix.sides import Opener, SideProcess, commit, processor
from gemma_grpo import pipeline, rewards, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.data import batches
from gemma_grpo.data.problem import Problem
from gemma_grpo.evaluation.evaluator import Evaluator, compare, make_evaluator
from gemma_grpo.model import Params
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.presets import GEMMA3_NANO
from gemma_grpo.rewards import RewardWeights, Sample
from gemma_grpo.text.prompts import encode_prompts
from gemma_grpo.text.tokenizer import Tokenizer

PAID = RewardWeights(correctness=0.6, trace=0.3, confidence=0.0, verbosity=0.0, format=0.1)
HELD_OUT = (
    "accuracy",
    "accuracy_ci95",
    "pass_at_1",
    "pass_at_1_ci95",
    "format_rate",
    "truncation_rate",
    "completion_length",
    "n",
)


@dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of our SFT, the problems and the sampling."""
    steps: int = GEMMA3_NANO.grpo.num_steps
    """GRPO steps."""
    tunix_micro_batch: int = 1
    """Prompts of a pass of Tunix's update; one is its default and its best."""
    environment: Path = field(default_factory=install.default_folder)
    """Folder of Tunix's environment."""


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """A row for each seed and side."""
    install.check(options.environment)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for row in learn(options, seed, Path(folder)):
                print(json.dumps(row), flush=True)


def run_of(seed: int, steps: int) -> RunConfig:
    """The preset with what Tunix cannot do, or does otherwise, taken out."""
    grpo = replace(
        GEMMA3_NANO.grpo,
        num_steps=steps,
        curriculum=False,
        scale="group",
        loss=LossConfig(aggregation="sequence_mean", epsilon=0.2, epsilon_high=0.2),
    )
    return replace(GEMMA3_NANO, seed=seed, stages="sft", grpo=grpo)


def learn(options: Options, seed: int, folder: Path) -> list[dict]:
    """SFT, the sides' GRPO in turn, and the evaluation of what each has learned."""
    run, run_dir = run_of(seed, options.steps), folder / "run"
    pipeline.new_run_dir(run_dir, run)
    summary = pipeline.execute(run, run_dir)
    task = pipeline.load_task(run)
    tokenizer = task.runtime.tokenizer
    sides, versions, apart = open_sides(options, run, run_dir, folder, stop_ids=tokenizer.stop_ids)
    steps = {side.name: [] for side in sides}
    for number in range(run.grpo.num_steps):
        problems_P = problems_of(run, task.train, number)
        prompts = encode_prompts(
            problems_P,
            tokenizer,
            instruction=run.model.instruction,
            max_prompt_length=run.model.max_prompt_length,
        )
        for side in sides:
            steps[side.name].append(_step(side, number, run, problems_P, prompts, tokenizer))
    evaluator = make_evaluator(run.evaluation, task.runtime)
    measured = {
        side.name: _evaluate(evaluator, weights_of(side, folder, task.base), task.test)
        for side in sides
    }
    for side in sides:
        side.close()
    of = lambda result: _rounded({name: result[name] for name in HELD_OUT})
    about = _about(options, run) | {
        "logits_apart": apart,
        "held_out_before": of(summary["stages"]["sft"]),
    }
    return [
        about
        | {"side": name, "seed": seed, "versions": versions[name]}
        | {key: [step[key] for step in taken] for key in taken[0]}
        | {"held_out": of(measured[name][0])}
        | {"accuracy_over_tunix": _rounded(compare(measured["tunix"][1], measured[name][1]))}
        for name, taken in steps.items()
    ]


def open_sides(
    options: Options, run: RunConfig, run_dir: Path, folder: Path, *, stop_ids: Sequence[int]
) -> tuple[list[SideProcess], dict[str, dict], float]:
    """All sides with the weights that SFT has left, ready for their first step; their versions, and
    how far apart their logits are."""
    opener = Opener(run, folder, stop_ids=stop_ids)
    trained = str(run_dir / "weights" / "sft.safetensors")
    sides = [
        opener.ours(trained=trained),
        opener.ours(name="ours_stop_untrained", trained=trained, trained_stop=False),
        opener.theirs(options.environment, micro_batch=options.tunix_micro_batch, remat="NONE"),
    ]
    return sides, opener.versions, opener.logits_apart()


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
    per_problem = len(completions) // len(problems_P)
    samples = [
        Sample(
            prompt=problems_P[row // per_problem].prompt,
            completion=tokenizer.decode(ids),
            answer=problems_P[row // per_problem].answer,
            difficulty=problems_P[row // per_problem].difficulty,
            num_tokens=len(ids) + ended,
            max_tokens=budget,
            answer_logps=(),
            stopped=ended,
        )
        for row, (ids, ended) in enumerate(zip(completions, stopped, strict=True))
    ]
    return rewards.score(samples, PAID, trace="structure")


def problems_of(run: RunConfig, problems: Sequence[Problem], number: int) -> list[Problem]:
    """Those of a step, as our training takes them without a curriculum."""
    taken = batches.batch_indices(number, run.grpo.prompts_per_step, len(problems), run.seed)
    return [problems[i] for i in taken]


def _step(
    side: SideProcess,
    number: int,
    run: RunConfig,
    problems_P: Sequence[Problem],
    prompts: list[list[int]],
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """One whole step of one side."""
    drawn = side.call("draw", prompts=prompts, number=number)
    completions, stopped = drawn["completions"], drawn["stopped"]
    budget = run.model.max_completion_length
    scores = score(problems_P, completions, stopped, budget=budget, tokenizer=tokenizer)
    learned = side.call("learn", rewards=scores.totals)
    lengths = [len(ids) + ended for ids, ended in zip(completions, stopped, strict=True)]
    readings = drawn["reading"], learned["reading"]
    return {
        "reward": round(float(np.mean(scores.totals)), 4),
        "accuracy": round(float(np.mean(scores.components["correctness"])), 4),
        "format": round(float(np.mean(scores.components["format"])), 4),
        "length": round(float(np.mean(lengths)), 2),
        "cpu": round(sum(reading["cpu"] for reading in readings), 3),
        "wall": round(sum(reading["wall"] for reading in readings), 3),
    }


def weights_of(side: SideProcess, folder: Path, like: Params) -> Params:
    """What a side has learned, as parameters of ours."""
    if side.name != "tunix":
        path = folder / f"{side.name}.safetensors"
        side.call("save", out=str(path))
        return weights.load(path, like)
    path = folder / "tunix.npz"
    side.call("save", out=str(path))
    with np.load(path) as file:
        theirs = convert.from_tunix(file)
    return jax.tree.map(lambda own, leaf: jnp.asarray(leaf, own.dtype), like, theirs)


def _evaluate(
    evaluator: Evaluator, params: Params, problems: list[Problem]
) -> tuple[dict, list[dict]]:
    result, rows, _ = evaluator.run(params, problems)
    print(f"held out: {result['accuracy']}", file=sys.stderr, flush=True)
    return result, rows


def _rounded(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: round(leaf, 4), tree)


def _about(options: Options, run: RunConfig) -> dict:
    """What is the same for every row of a seed."""
    grpo, model = run.grpo, run.model
    return {
        "benchmark": "tunix/learn",
        "model": model.weights,
        "dtype": model.dtype,
        "device": processor(),
        "commit": commit(),
        "steps": grpo.num_steps,
        "prompts": grpo.prompts_per_step,
        "generations": grpo.num_generations,
        "prompt_length": model.max_prompt_length,
        "budget": model.max_completion_length,
        "learning_rate": grpo.optimizer.learning_rate,
        "decay": grpo.optimizer.decay,
        "paid": {name: weight for name, weight in PAID.named().items() if weight},
        "tunix_micro_batch": options.tunix_micro_batch,
    }


if __name__ == "__main__":
    tyro.cli(main)
