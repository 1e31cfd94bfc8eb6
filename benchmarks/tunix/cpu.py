"""One GRPO step on CPU, ours against Tunix's: rollout, update and their sum, in turns.

python -m benchmarks.tunix.cpu [--model gemma3-nano | gemma3-270m] [--rounds 3]

For the 270M, of which there is no room for two in 24 GB:
--model gemma3-270m --pack-tokens 512 --apart

docs/tunix.md says what is measured. One row a side and part; `first_` is of the first step, which
compiles. `wall` and `cpu` (of all threads) are seconds, medians over the rounds (`_all` has each);
`peak` is the most bytes resident in the part, its weights and optimizer included, and `device_peak`
the most that a GPU has held until its end.
"""

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from benchmarks import packing
from benchmarks.lengths import GENERATIONS
from benchmarks.timing import about, print_row
from benchmarks.tunix.sides import COMPARABLE, SIDES, Opener, SideProcess
from gemma_grpo.config import RunConfig
from gemma_grpo.model import CONFIGS, Gemma3, Remat, split

Reading = dict[str, Any]  # part -> figure -> value


@dataclass(frozen=True)
class Options:
    """Take both sides through whole GRPO steps in turn."""

    model: str = "gemma3-nano"  # architecture
    rounds: int = 5  # timed steps of each side, after one that compiles and one that warms up
    dtype: str = "float32"  # or bfloat16; Tunix's weights and moments are in it, ours float32
    rows: int = 32  # B, eight for each prompt, at most 64
    prompt_length: int = 128  # S, tokens
    budget: int = 128  # T, tokens
    pack_tokens: int = 320  # of our update (grpo.pack_tokens); 0 computes all padded rows at once
    remat: Remat = "none"  # of ours (model.remat)
    tunix_micro_batch: int = 1  # prompts of a pass of Tunix's update (train_micro_batch_size)
    apart: bool = False  # hold one side in memory at a time, where there is no room for two
    platform: str = "cpu"  # of JAX


def main(options: Options) -> None:
    """Take the steps, and print a row for each side and part."""
    jax.config.update("jax_platforms", "cpu")  # of this process: a GPU is the sides'
    run, micro_batch = run_of(options), options.tunix_micro_batch
    make = lambda key: split(Gemma3(CONFIGS[options.model], rngs=nnx.Rngs(params=key)))[1]
    params = jax.jit(make)(jax.random.key(0))  # random ones cost what trained ones do
    opener = Opener(run, params, platform=options.platform, micro_batch=micro_batch)
    taken = take_turns(opener, frozen_batch(run), options.rounds, apart=options.apart)
    row = {"benchmark": f"tunix/{options.platform}", "rounds": options.rounds, **about(run)}
    row |= opener.apart({name: steps[0]["moment"] for name, steps in taken.items()})
    if options.platform != "cpu":
        row["device"] = opener.opened["ours"]["device"]
    settings = {
        "ours": {"pack_tokens": options.pack_tokens, "remat": options.remat},
        "tunix": {"train_micro_batch_size": micro_batch, "remat": "NONE"},
    }
    for part, side in itertools.product(("rollout", "update", "step"), SIDES):
        said = {"settings": settings[side], "versions": opener.opened[side]["versions"]}
        print_row(**row, side=side, part=part, **summary(taken[side], part), **said)


def run_of(options: Options) -> RunConfig:
    """The run of which both sides take steps."""
    return COMPARABLE.replace(
        {
            "model.weights": options.model,
            "model.dtype": options.dtype,
            "model.remat": options.remat,
            "model.max_prompt_length": options.prompt_length,
            "model.max_completion_length": options.budget,
            "grpo.num_steps": options.rounds + 2,
            "grpo.prompts_per_step": options.rows // GENERATIONS,
            "grpo.num_generations": GENERATIONS,
            "grpo.pack_tokens": options.pack_tokens,
            "grpo.optimizer.learning_rate": 1e-6,
            "grpo.optimizer.warmup": 0.0,
            "grpo.optimizer.decay": "constant",
        }
    )


def frozen_batch(run: RunConfig) -> dict[str, Any]:
    """What both sides run: `prompts`, `completions` and their `rewards`, groups one after another.
    Random tokens with the first lengths of `benchmarks.lengths`, scaled to the budget, which one of
    the first sixteen takes whole; `budgets` are the tokens if all did, as in the rollouts."""
    made = packing.batch_of(run, vocab_size=CONFIGS[run.model.weights].vocab_size)
    rows = zip(made["completion_ids"], made["completion_mask"], strict=True)
    return {
        "prompts": made["prompt_ids"].tolist(),
        "completions": [ids[mask].tolist() for ids, mask in rows],
        "budgets": made["completion_ids"].size,
        "rewards": (np.random.default_rng(0).integers(0, 5, len(made["advantages"])) / 4).tolist(),
    }


def take_turns(
    opener: Opener, batch: dict[str, Any], rounds: int, *, apart: bool
) -> dict[str, list[Reading]]:
    """Each side's first step, which compiles, and then those that count. Both sides are in memory,
    take one more step to warm up, and then A B A B ...; or, `apart`, one side is at a time: each
    starts anew in each round, compiles (later from a cache), and takes one step that counts."""
    sessions, steps = ([(name,) for name in SIDES * rounds], 2) if apart else ([SIDES], rounds + 2)
    taken: dict[str, list[Reading]] = {name: [] for name in SIDES}
    for session in sessions:
        sides = [opener.open(name) for name in session]
        if len(opener.opened) == len(SIDES):
            opener.apart()  # before hours are spent on what is not the same model
        for number, side in itertools.product(range(steps), sides):
            taken[side.name].append(step(side, batch, number))
        for side in sides:
            side.close()
    counted = slice(1, None, 2) if apart else slice(2, None)
    return {name: [each[0], *each[counted]] for name, each in taken.items()}


def step(side: SideProcess, batch: dict[str, Any], number: int) -> Reading:
    """Readings of a step's parts and of their sum, and Adam's first `moment` after it."""
    prompts, completions = batch["prompts"], batch["completions"]
    drawn = side.call("draw", prompts=prompts, number=number, instead=completions)
    if drawn["drawn"] != batch["budgets"]:
        raise SystemExit(f"{side.name} drew {drawn['drawn']} tokens, not {batch['budgets']}")
    learned = side.call("learn", rewards=batch["rewards"])
    rollout, update = drawn["reading"], learned["reading"]
    whole = {key: rollout[key] + update[key] for key in ("wall", "cpu")}
    return {"rollout": rollout, "update": update, "step": whole, "moment": learned["moment"]}


def summary(taken: list[Reading], part: str) -> dict:
    """The figures of a part's row."""
    first, *counted = (reading[part] for reading in taken)
    row = {}
    for key in ("wall", "cpu"):
        seconds = [round(reading[key], 4) for reading in counted]
        row[key], row[f"{key}_all"] = statistics.median(seconds), seconds
        row[f"first_{key}"] = round(first[key], 2)
    peaks = [key for key in first if key not in ("wall", "cpu")]
    return row | {key: max(reading[key] for reading in counted) for key in peaks}


if __name__ == "__main__":
    main(tyro.cli(Options))
