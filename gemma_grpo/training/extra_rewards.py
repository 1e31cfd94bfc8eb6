"""The user's rewards and judges: loaded, and tried on gold completions."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax

from gemma_grpo import rewards, weights
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.generation.samples import answer_span
from gemma_grpo.records import origin
from gemma_grpo.rewards import custom
from gemma_grpo.rewards.judge import Judge, load_judge
from gemma_grpo.rewards.rubric import JudgedReward, load_rubric
from gemma_grpo.rewards.verdicts import Verdicts
from gemma_grpo.runtime import Runtime
from gemma_grpo.training.judge_model import Dtype, load_judge_model

Extra = list[tuple[str, rewards.Reward | rewards.BatchReward, float]]  # name, function, weight

MODEL = "model:"  # before the weights of a judge that is a model
TRIED = 4  # gold completions that each reward is tried on


def load_rewards(
    given: rewards.GivenRewards,
    runtime: Runtime,
    problems: Sequence[Problem],
    run_dir: Path | None = None,
) -> Extra:
    """The user's rewards, in the order of their flags, judges last. A reward that fails on some
    completions of a step is left out of their totals; if it fails on all of them, the run stops.

    Args:
        problems: to learn from.
        run_dir: where judges' verdicts are kept; None keeps none.

    Raises:
        UserError: a reward, a rubric or a judge cannot be used.
    """
    own = custom.load_extra_rewards(given.config.extra, given.functions)
    extra: Extra = [
        (name, rewards.TolerantReward(name, reward, may_fail_on_all=False), weight)
        for name, reward, weight in own
    ]
    settings = given.config.rubric
    if not settings.file:
        return extra
    rubric = load_rubric(Path(settings.file), {problem.domain for problem in problems})
    taken = {*rewards.COMPONENTS, *(name for name, _, _ in extra)}
    for spec in settings.judges:
        location, weight = custom.split_weight(spec, "--judge")
        judge = _load_judge(location, settings, runtime)
        custom.take_name(judge.name, taken, f"--judge {spec}")
        path = run_dir and run_dir / "verdicts" / f"{judge.name}-{jax.process_index()}.jsonl"
        verdicts = Verdicts(judge, settings, path)
        extra.append((judge.name, JudgedReward(judge.name, rubric, verdicts), weight))
    return extra


def digests_of(config: rewards.RewardConfig) -> dict[str, str]:
    """Digests of the user's rewards, judges and rubric, by kind and name, once they are loaded: of
    a file, of the modules that it imported from its own folder, and of a judge's weights."""
    specs = [("reward", spec) for spec in config.extra]
    specs += [("judge", spec) for spec in config.rubric.judges]
    files = {"rubric": Path(config.rubric.file)} if config.rubric.file else {}
    models = {}
    for kind, spec in specs:
        location, _ = custom.split_weight(spec, f"--{kind}")
        if location.startswith(MODEL):
            where = location.removeprefix(MODEL)
            models[f"{kind} {Path(where).name}"] = weights.digest(where)
        elif not location.startswith(custom.SESSION):
            file, _, name = location.rpartition(":")
            files[f"{kind} {name}"] = Path(file)
            beside = custom.modules_beside(Path(file))
            files |= {f"{kind} {name}'s {path}": module for path, module in beside.items()}
    return {name: origin.of_files(path) for name, path in files.items()} | models


def check_rewards(
    given: rewards.GivenRewards, runtime: Runtime, problems: Sequence[Problem]
) -> None:
    """Loads the user's rewards and tries each on gold completions, so that faults show before
    anything is trained. A judge is asked about one completion of each domain.

    Raises:
        UserError: as `load_rewards`, a reward that fails, or a judge without verdicts.
    """
    config, extra = given.config, load_rewards(given, runtime, problems)
    for name, reward, weight in extra:
        if isinstance(reward, JudgedReward):
            firsts = {problem.domain: problem for problem in reversed(problems)}
            samples = [gold_sample(firsts[domain], runtime) for domain in reward.rubric]
            values, reason = reward.judged(samples)
            if reward.num_missing(samples, values):
                raise UserError(f"judge {name}, tried on a gold completion: {reason}; fix it")
        elif isinstance(reward, rewards.TolerantReward):  # the reward inside must not fail here
            samples = [gold_sample(problem, runtime) for problem in problems[:TRIED]]
            rewards.score(samples, config.start, [(name, reward.reward, weight)], config.trace)


def gold_sample(problem: Problem, runtime: Runtime) -> rewards.Sample:
    """A right completion of a problem: its worked solution, or its answer in the format."""
    completion = problem.completion or (
        f"<reasoning>\n{problem.answer}\n</reasoning>\n<answer>\n{problem.answer}\n</answer>"
    )
    ids = runtime.tokenizer.encode_completion(completion)
    num_answer = len(answer_span(runtime.tokenizer.pieces(ids)))
    return rewards.Sample(
        prompt=problem.prompt,
        completion=completion,
        answer=problem.answer,
        difficulty=problem.difficulty,
        num_tokens=len(ids),
        max_tokens=runtime.max_completion_length,
        answer_logps=(0.0,) * num_answer,
        stopped=True,
        domain=problem.domain,
    )


def _load_judge(location: str, settings: rewards.RubricConfig, runtime: Runtime) -> Judge:
    if not location.startswith(MODEL):
        return load_judge(location)
    where = location.removeprefix(MODEL)
    return load_judge_model(
        where,
        Path(where).name,
        dtype=cast(Dtype, runtime.dtype),
        question_tokens=settings.question_tokens,
        num_rows=settings.per_call,
    )
