"""How good a model is on given problems: greedy accuracy, pass@k, maj@k, format."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import PyTree

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.evaluation import statistics
from gemma_grpo.evaluation.config import EvaluationConfig
from gemma_grpo.generation import collect
from gemma_grpo.generation.config import GREEDY
from gemma_grpo.rewards import RewardConfig, answers, blocks, lenient, steps
from gemma_grpo.runtime import Runtime


@dataclass(frozen=True)
class Pay:
    """What a completion is paid at the end of a run, by which all of its stages are compared.

    Attributes:
        weights: of the built-in components.
        extra: (name, reward, weight) of the user's own, which stop no evaluation; judges are not
            asked.
        trace: how traces are read (`RewardConfig.trace`).
    """

    weights: rewards.RewardWeights = rewards.END_WEIGHTS
    extra: Sequence[tuple[str, rewards.BatchReward, float]] = ()
    trace: str = "arithmetic"


def pay_of(
    config: RewardConfig,
    functions: Mapping[str, rewards.Reward] | None = None,
    without: Callable[[str], None] | None = None,
) -> Pay:
    """The pay at the end of a run of these settings.

    Args:
        functions: of a Python session, by name.
        without: called with a line for each reward that cannot be loaded, which is then left out.

    Raises:
        UserError: a reward cannot be loaded, and there is no `without`.
    """
    extra = []
    for spec in config.extra:
        try:
            loaded = rewards.load_extra_rewards([spec], functions)
        except UserError as error:
            if without is None:
                raise
            without(f"{error}; the reward that is measured leaves it out")
            continue
        for name, reward, weight in loaded:
            tolerant = rewards.TolerantReward(name, reward, may_fail_on_all=True)
            extra.append((name, tolerant, weight))
    return Pay(config.end, extra, config.trace)


@dataclass(frozen=True)
class Completed:
    """Completions of problems, group-major: as many of each.

    Attributes:
        samples: the completions.
        scores: of them.
        logps: of them, under the distribution they were drawn from.
        tokens: of all (`collect.token_arrays`).
    """

    samples: list[rewards.Sample]
    scores: rewards.Scores
    logps: list[float]
    tokens: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluator:
    """Compiled once, used for every model of a run.

    Attributes:
        config: what is measured.
        greedy: sampler of one greedy completion a problem.
        sampled: sampler of k completions a problem, or None.
        runtime: how the model is run.
        pay: of a completion.
    """

    config: EvaluationConfig
    greedy: collect.Sampler
    sampled: collect.Sampler | None
    runtime: Runtime
    pay: Pay = Pay()

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
        complete = partial(
            self._complete,
            params=self.runtime.sampling_params(params),
            problems=problems,
            before_batch=before_batch,
        )
        greedy = complete(self.greedy, size=self._prompts(self.greedy, len(problems)))
        sampled, tokens = None, greedy.tokens
        generations = rows(problems, greedy, greedy=True)
        if self.sampled is not None:
            sampled = complete(self.sampled, size=self._prompts(self.sampled, len(problems)))
            generations += rows(problems, sampled, greedy=False)
            tokens = _joined([tokens, sampled.tokens])
        return summarize(problems, greedy, sampled), generations, tokens

    def run_first(
        self, num: int, params: PyTree, problems: Sequence[Problem]
    ) -> tuple[dict, list[dict], dict[str, np.ndarray]]:
        """Measure a model on the first `num` of the problems, greedily, by the program that
        measures it on all of them. Returns as `run`."""
        first = problems[:num]
        greedy = self._complete(
            self.greedy,
            params=self.runtime.sampling_params(params),
            problems=first,
            size=self._prompts(self.greedy, len(problems)),
        )
        return summarize(first, greedy, None), rows(first, greedy, greedy=True), greedy.tokens

    def _prompts(self, sampler: collect.Sampler, num_problems: int) -> int:
        """Prompts of a batch of the sampler, where this many problems are measured."""
        wanted = self.config.batch_size // sampler.num_generations
        return prompts_at_once(wanted, num_problems, sampler.mesh.size)

    def _complete(
        self,
        sampler: collect.Sampler,
        *,
        params: PyTree,
        problems: Sequence[Problem],
        size: int,
        before_batch: Callable[[], None] = lambda: None,
    ) -> Completed:
        """Completions of all problems, `size` problems at a time."""
        parts = []
        for start in range(0, len(problems), size):
            batch = list(problems[start : start + size])
            before_batch()
            # The last batch is filled up so that its shape is compiled already.
            filled = batch + [batch[-1]] * (size - len(batch))
            key, pay = jax.random.fold_in(self.runtime.key, start), self.pay
            groups = sampler.collect(params, filled, key, pay.weights, pay.extra, pay.trace)
            parts.append(_completed(groups, len(batch) * sampler.num_generations))
        listed = lambda lists: list(itertools.chain.from_iterable(lists))
        components = [part.scores.components for part in parts]
        return Completed(
            listed(part.samples for part in parts),
            rewards.Scores(
                {name: listed(values[name] for values in components) for name in components[0]},
                listed(part.scores.totals for part in parts),
            ),
            listed(part.logps for part in parts),
            _joined([part.tokens for part in parts]),
        )


def make_evaluator(config: EvaluationConfig, runtime: Runtime, pay: Pay = Pay()) -> Evaluator:
    """The compiled samplers for `config`, and what completions are paid."""

    sampled = None
    if config.num_samples:
        sampled = collect.make_sampler(
            runtime, num_generations=config.num_samples, sampling=config.sampling
        )
    greedy = collect.make_sampler(runtime, num_generations=1, sampling=GREEDY)
    return Evaluator(config, greedy, sampled, runtime, pay)


def prompts_at_once(wanted: int, num_problems: int, num_devices: int) -> int:
    """How many prompts a batch holds: no more than fill the devices with all problems."""
    return min(wanted, -(-num_problems // num_devices) * num_devices)


def _completed(groups: collect.Groups, num: int) -> Completed:
    """The first `num` completions of a batch."""
    drawn = jax.tree.map(lambda leaf: leaf[:num], groups.rollout)
    components = {name: values[:num] for name, values in groups.scores.components.items()}
    return Completed(
        groups.samples[:num],
        rewards.Scores(components, groups.scores.totals[:num]),
        np.sum(drawn.sampler_logps, axis=1, where=drawn.completion_mask).tolist(),
        collect.token_arrays(drawn, groups.characters[:num]),
    )


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tokens of all parts, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summarize(problems: Sequence[Problem], greedy: Completed, sampled: Completed | None) -> dict:
    """Figures from completions: one greedy one a problem, and k sampled ones.

    Returns:
        `accuracy` (strict: the one answer block is right), `lenient_accuracy` (the answer found by
        a forgiving parser), `format_rate`, `truncation_rate`, each with its 95 % interval under
        its name with `_ci95` behind it (`statistics.mean_interval`); `trace_score`, `reward` (the
        total by the evaluator's `Pay`), `completion_length`, `n`;
        `steps`, the lines of reasoning with an equation, and `true_steps`, the share of them that
        is true (None without any); accuracy `by_difficulty` and `by_domain`; the figures of
        `_of_samples` if sampled; `missing/NAME`, the completions that a reward failed on, if any.
    """
    samples, scores = greedy.samples, greedy.scores
    correct = np.asarray(scores.components["correctness"]) > 0
    reasonings = [blocks.parse(sample.completion).reasoning or "" for sample in samples]
    num_true, num_steps = np.sum([steps.true_lines(each) for each in reasonings], axis=0).tolist()
    result = {
        **_with_interval("accuracy", correct.tolist()),
        **_with_interval("lenient_accuracy", [_is_right(s, lenient_reading(s)) for s in samples]),
        **_with_interval("format_rate", scores.components["format"]),
        **_with_interval("truncation_rate", [not sample.stopped for sample in samples]),
        "trace_score": float(np.mean(scores.components["trace"])),
        "reward": float(np.mean(scores.totals)),
        "completion_length": float(np.mean([sample.num_tokens for sample in samples])),
        "n": len(problems),
        "steps": num_steps,
        "true_steps": num_true / num_steps if num_steps else None,
        "by_difficulty": _shares(correct, [problem.difficulty for problem in problems]),
        "by_domain": _shares(correct, [problem.domain for problem in problems]),
    }
    if sampled is not None:
        result |= _of_samples(sampled.samples, len(problems))
    if own := scores.components.keys() - rewards.COMPONENTS.keys():
        paid = {name: [v for v in scores.components[name] if v is not None] for name in sorted(own)}
        result["own_rewards"] = {
            name: float(np.mean(values)) if values else None for name, values in paid.items()
        }
    for name in scores.components:
        of_name = [each.scores.components[name] for each in (greedy, sampled) if each]
        if missing := sum(values.count(None) for values in of_name):
            result[f"missing/{name}"] = missing
    return result


def rows(problems: Sequence[Problem], completed: Completed, *, greedy: bool) -> list[dict]:
    """A row for every completion, ready for JSON: `problem` counts from 0, `sample` within it.

    Args:
        problems: each with as many completions as the others.
        greedy: how they were drawn.
    """
    scores, per_problem = completed.scores, len(completed.samples) // len(problems)
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
            "logp": completed.logps[i],
            "strict_answer": strict_reading(sample),
            "lenient_answer": lenient_reading(sample),
            "lenient_correctness": float(_is_right(sample, lenient_reading(sample))),
            "reward": scores.totals[i],
            **{name: values[i] for name, values in scores.components.items()},
        }
        for i, sample in enumerate(completed.samples)
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
