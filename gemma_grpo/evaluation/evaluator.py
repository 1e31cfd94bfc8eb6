"""How good a model is on given problems: greedy accuracy, pass@k, maj@k, format."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import PyTree

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.evaluation import statistics
from gemma_grpo.evaluation.config import EvaluationConfig
from gemma_grpo.generation import collect
from gemma_grpo.generation.config import GREEDY
from gemma_grpo.rewards import answers, blocks, lenient, steps
from gemma_grpo.runtime import Runtime


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

    def run(
        self,
        params: PyTree,
        problems: Sequence[Problem],
        before_batch: Callable[[], None] = lambda: None,
    ) -> tuple[dict, list[dict], dict[str, np.ndarray]]:
        """Measure a model.

        Args:
            before_batch: called before each batch is sampled; what it raises ends the measurement.

        Returns:
            The result, ready for JSON (see `summarize`); a row for every generation (see `rows`):
            the greedy ones, then the sampled ones; and their tokens (`collect.token_arrays`).
        """
        params = self.runtime.sampling_params(params)
        key = self.runtime.key
        complete = partial(
            _complete, params=params, problems=problems, key=key, before_batch=before_batch
        )
        greedy, logps, tokens = complete(self.greedy, num_prompts=self.config.batch_size)
        sampled = None
        generations = rows(problems, greedy, logps, greedy=True)
        if self.sampled is not None:
            num_prompts = self.config.batch_size // self.config.num_samples
            sampled, logps, more = complete(self.sampled, num_prompts=num_prompts)
            generations += rows(problems, sampled, logps, greedy=False)
            tokens = _joined([tokens, more])
        return summarize(problems, greedy, sampled), generations, tokens


def make_evaluator(config: EvaluationConfig, runtime: Runtime) -> Evaluator:
    """The compiled samplers for `config`."""

    sampled = None
    if config.num_samples:
        sampled = collect.make_sampler(
            runtime, num_generations=config.num_samples, sampling=config.sampling
        )
    greedy = collect.make_sampler(runtime, num_generations=1, sampling=GREEDY)
    return Evaluator(config, greedy, sampled, runtime)


def prompts_at_once(wanted: int, num_problems: int, num_devices: int) -> int:
    """How many prompts a batch holds: no more than fill the devices with all problems."""
    return min(wanted, -(-num_problems // num_devices) * num_devices)


def _complete(
    sampler: collect.Sampler,
    *,
    params: PyTree,
    problems: Sequence[Problem],
    num_prompts: int,
    key: jax.Array,
    before_batch: Callable[[], None],
) -> tuple[list[rewards.Sample], list[float], dict[str, np.ndarray]]:
    """Samples of all problems, group-major, `num_prompts` problems at a time; the log-prob of each
    completion under the distribution it was drawn from; and the tokens of all."""
    samples, logps, tokens = [], [], []
    num_prompts = prompts_at_once(num_prompts, len(problems), sampler.mesh.size)
    for start in range(0, len(problems), num_prompts):
        batch = list(problems[start : start + num_prompts])
        before_batch()
        # The last batch is filled up so that its shape is compiled already.
        filled = batch + [batch[-1]] * (num_prompts - len(batch))
        groups = sampler.collect(
            params, filled, jax.random.fold_in(key, start), rewards.END_WEIGHTS, ()
        )
        kept = len(batch) * sampler.num_generations
        samples += groups.samples[:kept]
        drawn = jax.tree.map(lambda leaf, kept=kept: leaf[:kept], groups.rollout)
        logps += np.sum(drawn.sampler_logps, axis=1, where=drawn.completion_mask).tolist()
        tokens.append(collect.token_arrays(drawn, groups.characters[:kept]))
    return samples, logps, _joined(tokens)


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tokens of all parts, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summarize(
    problems: Sequence[Problem],
    greedy: Sequence[rewards.Sample],
    sampled: Sequence[rewards.Sample] | None,
) -> dict:
    """Figures from completions: one greedy one a problem, and k sampled ones, group-major.

    Returns:
        `accuracy` (strict: the one answer block is right), `lenient_accuracy` (the answer found by
        a forgiving parser), `format_rate`, `truncation_rate`, each with its 95 % interval under
        its name with `_ci95` behind it (`statistics.mean_interval`); `trace_score`, `reward` (at
        the end weights of the original design document's annealing), `completion_length`, `n`;
        `steps`, the lines of reasoning with an equation, and `true_steps`, the share of them that
        is true (None without any); accuracy `by_difficulty` and `by_domain`; the figures of
        `_of_samples` if sampled.
    """
    scores = rewards.score(greedy, rewards.END_WEIGHTS)
    correct = np.asarray(scores.components["correctness"]) > 0
    reasonings = [blocks.parse(sample.completion).reasoning or "" for sample in greedy]
    num_true, num_steps = np.sum([steps.true_lines(each) for each in reasonings], axis=0).tolist()
    result = {
        **_with_interval("accuracy", correct.tolist()),
        **_with_interval("lenient_accuracy", [_is_right(s, lenient_reading(s)) for s in greedy]),
        **_with_interval("format_rate", scores.components["format"]),
        **_with_interval("truncation_rate", [not sample.stopped for sample in greedy]),
        "trace_score": float(np.mean(scores.components["trace"])),
        "reward": float(np.mean(scores.totals)),
        "completion_length": float(np.mean([sample.num_tokens for sample in greedy])),
        "n": len(problems),
        "steps": num_steps,
        "true_steps": num_true / num_steps if num_steps else None,
        "by_difficulty": _shares(correct, [problem.difficulty for problem in problems]),
        "by_domain": _shares(correct, [problem.domain for problem in problems]),
    }
    if sampled is not None:
        result |= _of_samples(sampled, len(problems))
    return result


def rows(
    problems: Sequence[Problem],
    samples: Sequence[rewards.Sample],
    logps: Sequence[float],
    *,
    greedy: bool,
) -> list[dict]:
    """A row for every completion, ready for JSON: `problem` counts from 0, `sample` within it.

    Args:
        problems: each with as many samples as the others.
        samples: group-major.
        logps: of the samples, under the distribution they were drawn from.
        greedy: how they were drawn.
    """
    per_problem = len(samples) // len(problems)
    components = rewards.score(samples, rewards.END_WEIGHTS).components
    return [
        {
            "problem": i // per_problem,
            "sample": i % per_problem,
            "greedy": greedy,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "difficulty": sample.difficulty,
            "domain": problems[i // per_problem].domain,
            "completion": sample.completion,
            "stopped": sample.stopped,
            "num_tokens": sample.num_tokens,
            "logp": logps[i],
            "strict_answer": strict_reading(sample),
            "lenient_answer": lenient_reading(sample),
            "lenient_correctness": float(_is_right(sample, lenient_reading(sample))),
            **{name: values[i] for name, values in components.items()},
        }
        for i, sample in enumerate(samples)
    ]


def compare(before: Sequence[dict], after: Sequence[dict]) -> dict:
    """Paired difference in strict greedy accuracy between two models' rows on the same problems."""
    of = lambda rows: np.asarray([row["correctness"] > 0 for row in rows if row["greedy"]])
    return asdict(statistics.paired_difference(of(before), of(after)))


def strict_reading(sample: rewards.Sample) -> str | None:
    """The answer as the rewards read it."""
    return blocks.parse(sample.completion).answer


def lenient_reading(sample: rewards.Sample) -> str | None:
    """The answer as a generous reader would find it."""
    return lenient.lenient_answer(sample.completion)


def _of_samples(sampled: Sequence[rewards.Sample], n: int) -> dict:
    """Over k samples of each of n problems, with 95 % intervals beside them.

    `pass_at_1` (mean accuracy), `pass_at_k`, `maj_at_k` as the strict parser reads the answers, and
    the same by the lenient one; `pass_at`, strict, at every power of two below k and at k: the
    unbiased estimator's mean over problems; `sampled_truncation_rate` of all samples, its interval
    taken over problems.
    """
    k = len(sampled) // n
    groups = [sampled[i * k : (i + 1) * k] for i in range(n)]
    truncated = [float(np.mean([not sample.stopped for sample in group])) for group in groups]
    result = {"k": k, **_with_interval("sampled_truncation_rate", truncated)}
    for prefix, read in (("", strict_reading), ("lenient_", lenient_reading)):
        right = [sum(_is_right(sample, read(sample)) for sample in group) for group in groups]
        at = lambda j, right=right: [statistics.pass_at_k(k, count, j) for count in right]
        result |= _with_interval(f"{prefix}pass_at_1", at(1))
        result |= _with_interval(f"{prefix}pass_at_k", at(k))
        majority = [_majority_is_right(group, read) for group in groups]
        result |= _with_interval(f"{prefix}maj_at_k", majority)
        if not prefix:
            budgets = sorted({2**power for power in range(k.bit_length())} | {k})
            result["pass_at"] = {str(j): float(np.mean(at(j))) for j in budgets}
            result["pass_at_ci95"] = {
                str(j): list(statistics.mean_interval(at(j))) for j in budgets
            }
    return result


def _majority_is_right(
    group: Sequence[rewards.Sample], read: Callable[[rewards.Sample], str | None]
) -> bool:
    """Whether the answer most completions gave is right; the grader says which are the same."""
    given = [read(sample) for sample in group]
    winner = statistics.majority_answer(given, answers.answers_match)
    return _is_right(group[0], winner)


def _is_right(sample: rewards.Sample, answer: str | None) -> bool:
    return answers.answers_match(answer, sample.answer)


def _with_interval(name: str, values: Sequence[float | int]) -> dict:
    """The mean of one value in 0..1 for each problem, and its interval beside it."""
    interval = statistics.mean_interval(values)
    return {name: float(np.mean(values)), f"{name}_ci95": list(interval)}


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
