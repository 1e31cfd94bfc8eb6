"""Stage one's demonstrations from the model itself: its right and well-formed samples.

Each problem is asked after a few worked ones, or after the instruction alone, and right answers in
the format are imitated: STaR (Zelikman et al., arXiv 2203.14465) without its rationalizations, and
RFT's rejection sampling (Yuan et al., arXiv 2308.01825).
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import jax

from gemma_grpo import rewards
from gemma_grpo.data import batches, jsonl
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.generation import collect
from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.model import Params
from gemma_grpo.records import files
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.rewards import Sample
from gemma_grpo.runtime import Runtime
from gemma_grpo.text.prompts import turns
from gemma_grpo.training.config import OwnConfig

ROWS, FIGURES = run_dirs.DEMONSTRATIONS
_STREAM = 0x8000_0DE5  # folded into the run's key; above the numbers of steps and evaluations


class Own(NamedTuple):
    """Own demonstrations.

    Attributes:
        problems: each with a completion of the model to imitate; a problem may occur twice.
        figures: counts of `asked` problems, of `sampled`, `right`, `right_and_well_formed` and
            `kept` completions, and of `kept_problems`.
    """

    problems: list[Problem]
    figures: dict[str, int]


def shots(problems: Sequence[Problem], number: int) -> list[Problem]:
    """The worked problems that stand before each question: the first ones with a completion, taking
    each difficulty in turn, so that solutions of all lengths are shown.

    Raises:
        UserError: too few problems have one.
    """
    worked = [problem for problem in problems if problem.completion]
    if len(worked) < number:
        raise UserError(
            f"sft.demonstrations=own: sft.own.shots={number}, but {len(worked)} training problems "
            "have a completion to show; take fewer, or 0 with a --model.instruction that asks for "
            "the format"
        )
    ranks = [enumerate(each) for each in batches.by_difficulty(worked).values()]
    in_turn = sorted(itertools.chain.from_iterable(ranks), key=lambda ranked: ranked[0])
    return [problem for _, problem in in_turn[:number]]


def check(config: OwnConfig, runtime: Runtime, problems: Sequence[Problem]) -> None:
    """Raises UserError if `sample` could not ask the problems."""
    shown, asked = _chosen(config, problems)
    if not asked:
        raise UserError("sft.demonstrations=own: sft.own.shots leaves no training problem to ask")
    encode = lambda examples: runtime.tokenizer.encode_turns(
        turns(runtime.instruction, examples, asked[0].prompt)
    )
    length = len(encode(_examples(shown))) - len(encode([]))
    if length > config.shots_length:
        raise UserError(
            f"sft.demonstrations=own: the {len(shown)} worked problems take {length} tokens, "
            f"sft.own.shots_length is {config.shots_length}; raise it to {length}, or take fewer "
            "sft.own.shots"
        )


def sample(
    config: OwnConfig,
    runtime: Runtime,
    problems: Sequence[Problem],
    params: Params,
    before_batch: Callable[[], None] = lambda: None,
) -> Own:
    """Samples answers to all problems but those shown, and keeps what can be imitated.

    Args:
        before_batch: called before each batch is sampled; what it raises ends the sampling.
    """
    shown, asked = _chosen(config, problems)
    sampler = make_sampler(config, runtime, _examples(shown))
    params, key = runtime.sampling_params(params), jax.random.fold_in(runtime.key, _STREAM)
    samples, scored = list[Sample](), list[tuple[float, float]]()
    for start in range(0, len(asked), config.prompts):
        batch = asked[start : start + config.prompts]
        before_batch()
        # The last batch is filled up, so that its shape is already compiled.
        filled = batch + [batch[-1]] * (config.prompts - len(batch))
        drawn = sampler.collect(
            params, filled, jax.random.fold_in(key, start), rewards.END_WEIGHTS, ()
        )
        components = drawn.scores.components
        number = len(batch) * config.num_samples
        samples += drawn.samples[:number]
        pairs = zip(components["correctness"], components["format"], strict=True)
        scored += list(pairs)[:number]
    fits = lambda text: (
        len(runtime.tokenizer.encode_completion(text)) <= runtime.max_completion_length
    )
    return select(asked, samples, scored, config.max_per_problem, fits)


def make_sampler(config: OwnConfig, runtime: Runtime, examples: Sequence[str]) -> collect.Sampler:
    """The sampler of own demonstrations, with room for the examples."""
    sampler = collect.make_sampler(
        runtime,
        num_generations=config.num_samples,
        sampling=SamplingConfig(temperature=config.temperature),
    )
    length = runtime.max_prompt_length + config.extra_length
    return replace(sampler, max_prompt_length=length, examples=examples)


def select(
    asked: Sequence[Problem],
    samples: Sequence[Sample],
    scored: Sequence[tuple[float, float]],
    most: int,
    fits: Callable[[str], bool],
) -> Own:
    """The completions to imitate: right, well formed, within the budget, each text once.

    Args:
        asked: P problems.
        samples: the same number for each problem, in the problems' order.
        scored: correctness and format of each sample, each 0 to 1.
        most: completions kept per problem; the first ones are.
        fits: whether a text is within the token budget.
    """
    per_problem, kept = len(samples) // len(asked), list[Problem]()
    for place, problem in enumerate(asked):
        rows = range(place * per_problem, (place + 1) * per_problem)
        texts = dict.fromkeys(
            samples[row].completion.strip() for row in rows if min(scored[row]) == 1
        )
        wanted = [text for text in texts if fits(text)][:most]
        kept += [replace(problem, completion=text) for text in wanted]
    figures = {
        "asked": len(asked),
        "sampled": len(samples),
        "right": sum(right == 1 for right, _ in scored),
        "right_and_well_formed": sum(min(both) == 1 for both in scored),
        "kept": len(kept),
        "kept_problems": len({problem.prompt for problem in kept}),
    }
    return Own(kept, figures)


def require_enough(own: Own, batch_size: int, run_dir: Path) -> None:
    """Raises UserError if there are fewer than an update takes; names their file in `run_dir`."""
    if own.figures["kept"] < batch_size:
        raise UserError(
            f"sft.demonstrations=own: {in_words(own.figures)}, in {run_dir / ROWS}; an update "
            f"takes sft.batch_size={batch_size}: begin a new run, ask for the format with "
            "--model.instruction, take more --sft.own.shots or --sft.own.num-samples, or "
            "--sft.demonstrations given with --data.source of that file"
        )


def in_words(figures: dict[str, int]) -> str:
    """The figures in one phrase."""
    return (
        f"of {figures['sampled']} completions of {figures['asked']} problems {figures['right']} "
        f"are right, {figures['right_and_well_formed']} of them well formed, {figures['kept']} of "
        f"{figures['kept_problems']} problems kept"
    )


def write(run_dir: Path, own: Own) -> None:
    """Writes demonstrations.jsonl, rows in the form of a data source, and then demonstrations.json,
    without which `read_back` finds none. Raises UserError if the disk is full."""
    rows = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in own.problems)
    text = "".join(rows)
    files.write_text(run_dir / ROWS, text)
    sealed = own.figures | {"sha256": _digest(text)}
    files.write_text(run_dir / FIGURES, json.dumps(sealed, indent=1) + "\n")


def read_back(run_dir: Path) -> Own | None:
    """The demonstrations that a run has sampled; None if it has not.

    Raises:
        UserError: demonstrations.jsonl is not what was written.
    """
    figures, path = files.read_json(run_dir / FIGURES), run_dir / ROWS
    if figures is None:
        return None
    digest = figures.pop("sha256", None)
    if not path.is_file() or digest != _digest(path.read_text(encoding="utf-8")):
        raise UserError(
            f"{path} is not what was sampled; put it back, or delete {run_dir / FIGURES} to sample "
            "again"
        )
    return Own(
        [jsonl.problem_from_row(row, where) for where, row in jsonl.read_rows(path)], figures
    )


def _chosen(config: OwnConfig, problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """The problems that are shown worked, and those that are asked."""
    shown = shots(problems, config.shots)
    prompts = {problem.prompt for problem in shown}
    others = [problem for problem in problems if problem.prompt not in prompts]
    return shown, others[: config.num_problems or None]


def _examples(shown: Sequence[Problem]) -> list[str]:
    """The worked problems as turns: question, completion, question, ..."""
    return [text for problem in shown for text in (problem.prompt, problem.completion or "")]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
