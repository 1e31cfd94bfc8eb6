"""How good a model is on given problems: greedy accuracy, pass@k, maj@k, format. Knows no training
loop and writes no file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np

from gemma_grpo import answers, collect, rewards, statistics
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.model import Params
from gemma_grpo.runtime import Runtime


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured before and after."""

    batch_size: int = 64
    """Completions sampled at a time."""
    num_samples: int = 4
    """k of pass@k and maj@k, completions a problem; 0 measures greedy completions only."""
    temperature: float = 1.0
    """Of those k samples."""
    top_k: int = 0
    """Sample from the so many likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens with this mass; 1 from all."""

    def __post_init__(self):
        if self.batch_size < 1 or self.num_samples < 0:
            raise UserError("evaluation: batch_size must be at least 1, num_samples at least 0")
        if self.num_samples and self.batch_size % self.num_samples:
            raise UserError(
                f"evaluation: batch_size={self.batch_size} must be a multiple of "
                f"num_samples={self.num_samples}"
            )


@dataclass(frozen=True)
class Evaluator:
    """Compiled once, used for every model of a run.

    Attributes:
        config: what is measured.
        greedy: sampler of one greedy completion a problem.
        sampled: sampler of k completions a problem, or None.
        runtime: how the model is run.
    """

    config: EvaluationConfig
    greedy: collect.Sampler
    sampled: collect.Sampler | None
    runtime: Runtime

    def run(self, params: Params, problems: Sequence[Problem]) -> tuple[dict, list[dict]]:
        """Measure a model.

        Returns:
            The result, ready for JSON (see `summarize`), and a row for each problem: the prompt,
            the gold answer, the greedy completion, and what became of it.
        """
        params = self.runtime.full(params)
        key = jax.random.key(self.runtime.seed)
        greedy = _complete(self.greedy, params, problems, self.config.batch_size, key)
        sampled = None
        if self.sampled is not None:
            num_prompts = self.config.batch_size // self.config.num_samples
            sampled = _complete(self.sampled, params, problems, num_prompts, key)
        return summarize(problems, greedy, sampled)


def evaluation_prompts(config: EvaluationConfig) -> int:
    """Prompts of the smaller kind of batch; the greedy one holds a multiple of it."""
    return config.batch_size // max(config.num_samples, 1)


def make_evaluator(config: EvaluationConfig, runtime: Runtime) -> Evaluator:
    """The compiled samplers for `config`."""

    sampled = None
    if config.num_samples:
        sampled = collect.make_sampler(
            runtime,
            num_generations=config.num_samples,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
    greedy = collect.make_sampler(runtime, num_generations=1, temperature=0.0)
    return Evaluator(config, greedy, sampled, runtime)


def _complete(
    sampler: collect.Sampler,
    params: Params,
    problems: Sequence[Problem],
    num_prompts: int,
    key: jax.Array,
) -> list[rewards.Sample]:
    """Samples of all problems, group-major, `num_prompts` problems at a time."""
    samples = []
    for start in range(0, len(problems), num_prompts):
        batch = list(problems[start : start + num_prompts])
        # The last batch is filled up so that its shape is compiled already.
        filled = batch + [batch[-1]] * (num_prompts - len(batch))
        groups = sampler.collect(
            params, filled, jax.random.fold_in(key, start), rewards.END_WEIGHTS, ()
        )
        samples += groups.samples[: len(batch) * sampler.num_generations]
    return samples


def summarize(
    problems: Sequence[Problem],
    greedy: Sequence[rewards.Sample],
    sampled: Sequence[rewards.Sample] | None,
) -> tuple[dict, list[dict]]:
    """Figures from completions: one greedy one a problem, and k sampled ones, group-major.

    Returns:
        The result: `accuracy` (strict: the one answer block is right) with its 95 % Wilson
        interval, `lenient_accuracy` (the answer found by a forgiving parser), `format_rate`,
        `trace_score`, `reward` (at the end weights of the seed's annealing), `truncation_rate`,
        `n`; accuracy `by_difficulty` and `by_domain`; `k`, `pass_at_k` and `maj_at_k` if sampled.
        And the rows, one a problem.
    """
    scores = rewards.score(greedy, rewards.END_WEIGHTS)
    correct = np.asarray(scores.components["correctness"]) > 0
    n = len(problems)
    result = {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": list(statistics.wilson_interval(int(correct.sum()), n)),
        "lenient_accuracy": float(np.mean([_lenient(sample) for sample in greedy])),
        "format_rate": float(np.mean(scores.components["format"])),
        "trace_score": float(np.mean(scores.components["trace"])),
        "reward": float(np.mean(scores.totals)),
        "truncation_rate": float(np.mean([not sample.stopped for sample in greedy])),
        "completion_length": float(np.mean([sample.num_tokens for sample in greedy])),
        "n": n,
        "by_difficulty": _shares(correct, [problem.difficulty for problem in problems]),
        "by_domain": _shares(correct, [problem.domain for problem in problems]),
    }
    if sampled is not None:
        result |= _of_samples(sampled, n)
    rows = [
        {
            "prompt": sample.prompt,
            "answer": sample.answer,
            "difficulty": sample.difficulty,
            "domain": problem.domain,
            "completion": sample.completion,
            "stopped": sample.stopped,
            **{name: values[i] for name, values in scores.components.items()},
        }
        for i, (problem, sample) in enumerate(zip(problems, greedy, strict=True))
    ]
    return result, rows


def compare(before: Sequence[dict], after: Sequence[dict]) -> dict:
    """Paired difference in strict accuracy between two models' rows on the same problems."""
    of = lambda rows: np.asarray([row["correctness"] > 0 for row in rows])
    return asdict(statistics.paired_difference(of(before), of(after)))


def _of_samples(sampled: Sequence[rewards.Sample], n: int) -> dict:
    """pass@k, maj@k and mean accuracy over k samples a problem."""
    k = len(sampled) // n
    groups = [sampled[i * k : (i + 1) * k] for i in range(n)]
    right = [[rewards.correctness(sample) > 0 for sample in group] for group in groups]
    return {
        "k": k,
        "pass_at_k": float(np.mean([statistics.pass_at_k(k, sum(row), k) for row in right])),
        "pass_at_1": float(np.mean(right)),
        "maj_at_k": float(np.mean([_majority_is_right(group) for group in groups])),
    }


def _majority_is_right(group: Sequence[rewards.Sample]) -> bool:
    """Whether the answer most completions gave, by its normalised text, is right."""
    given = [answers.parse(sample.completion).answer for sample in group]
    winner = statistics.majority_answer([answer and answer.strip().casefold() for answer in given])
    return winner is not None and answers.answers_match(winner, group[0].answer)


def _lenient(sample: rewards.Sample) -> bool:
    return answers.answers_match(answers.lenient_answer(sample.completion), sample.answer)


def _shares(correct: np.ndarray, labels: Sequence[str]) -> dict[str, dict]:
    """Accuracy and n under each label, labels in order of appearance."""
    labels = np.asarray(labels)
    return {
        str(label): {
            "accuracy": float(correct[labels == label].mean()),
            "n": int((labels == label).sum()),
        }
        for label in dict.fromkeys(labels.tolist())
    }
