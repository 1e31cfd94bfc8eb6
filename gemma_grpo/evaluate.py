"""The evaluation command: how good is a run's model, or a base model, on held-out problems.

python -m gemma_grpo.evaluate RUN [--task gsm8k:FOLDER]
python -m gemma_grpo.evaluate --weights gemma3-270m --task reasoning_gym:chain_sum --num 200

Writes DIR/result.json (figures with 95 % intervals, and the protocol they were taken under) and
DIR/generations.jsonl (every completion, greedy and sampled, one JSON line each).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from gemma_grpo import cli
from gemma_grpo.config import DataConfig, RunConfig
from gemma_grpo.data import sources
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.evaluation import gsm8k_protocol
from gemma_grpo.evaluation.evaluator import EvaluationConfig, evaluation_prompts, make_evaluator
from gemma_grpo.records import files, report
from gemma_grpo.runtime import ModelConfig, Runtime, load_model
from gemma_grpo.text import padding
from gemma_grpo.text.prompts import encode_prompts
from gemma_grpo.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer

# What a prompt looks like; the instruction's line is left out where there is none.
TEMPLATE = (
    f"<bos>{START_OF_TURN}user\n{{instruction}}\n{{question}}{END_OF_TURN}\n{START_OF_TURN}model\n"
)

COMPLETION_LENGTH = 256  # for a base model on a task without a protocol or a budget of its own
GENERATED_TASKS = ("curriculum", "reasoning_gym")  # they have no end
SHARES = (
    "lenient_accuracy",
    "truncation_rate",
    "pass_at_1",
    "pass_at_k",
    "lenient_pass_at_k",
    "maj_at_k",
    "lenient_maj_at_k",
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: tyro.cli(_evaluate, args=arguments, description=__doc__))


def _evaluate(
    run: tyro.conf.Positional[str] = "",
    weights: str = "",
    task: str = "",
    num: int | None = None,
    out: Path | None = None,
    instruction: str | None = None,
    max_prompt_length: int = 0,
    max_completion_length: int = 0,
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = EvaluationConfig(),  # noqa: B008 (frozen)
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Measure a model.

    Args:
        run: a run directory; its last finished stage is measured.
        weights: a base model instead: gemma3-nano, gemma3-270m, a folder or a file.
        task: curriculum, gsm8k[:PATH], gsm8k-validation[:PATH], reasoning_gym:NAME or a .jsonl or
            .parquet file, of which the tenth is taken that training holds out. The run's own, else
            the curriculum.
        num: held-out problems at most; 0 for all of a task that ends. 400 of a task that has no
            end, else all.
        out: a new folder for the results. RUN/evaluations/TASK, or evaluations/WEIGHTS-TASK here.
        instruction: put before every question. The run's own; for a base model on GSM8K the
            protocol's, else none.
        max_prompt_length: tokens; 0 takes GSM8K's protocol's, or what the longest prompt needs.
        max_completion_length: tokens, stop token included; 0 takes GSM8K's protocol's, or the
            run's own, or 256 (60 for a base model on the curriculum).
        dtype: computed in. The run's own, else float32.
        seed: of the k samples.
        evaluation: what is measured.
        json_output: print the result as JSON instead of a table.
    """
    where = cli.one_model(run, weights)
    trained_run, stage_weights = cli.trained(where)
    task = task or trained_run.data.source
    folder = out or _folder(run, weights, task)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name another with --out")
    model = _model(
        trained_run,
        task,
        is_run=stage_weights is not None,
        instruction=instruction,
        max_completion_length=max_completion_length,
        dtype=dtype,
    )
    cli.split_cpu(model.cpu_devices, evaluation_prompts(evaluation))
    cli.use_compilation_cache(cli.cache_for(where))
    if num is None:
        num = DataConfig().num_test if task.partition(":")[0] in GENERATED_TASKS else 0
    # The seed of the problems is fixed, as in training: all models are measured on the same ones.
    problems = sources.load(task, split="test", num=num, seed=0)
    runtime, params = load_model(model, seed=seed, trained=stage_weights)
    runtime.check_rows({"batch_size / num_samples": evaluation_prompts(evaluation)})
    if not max_prompt_length:
        max_prompt_length = _prompt_length(task, problems, runtime.tokenizer, model.instruction)
    runtime = replace(runtime, max_prompt_length=max_prompt_length)
    encode_prompts(  # a prompt that is too long is refused now, not after an hour
        problems,
        runtime.tokenizer,
        instruction=runtime.instruction,
        max_prompt_length=max_prompt_length,
    )
    protocol = {
        "weights": where,
        "base": model.weights,
        "stage": stage_weights.stem if stage_weights else "base",
        "task": task,
        "n": len(problems),
        **_conditions(runtime, evaluation),
    }
    if task.partition(":")[0] == "gsm8k":
        protocol["departures"] = _departures(protocol)
        for departure in protocol["departures"]:
            print(f"warning: not the GSM8K protocol: {departure}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    figures, generations = make_evaluator(evaluation, runtime).run(params, problems)
    result = figures | {"protocol": protocol}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generations]
    files.write_text(folder / "generations.jsonl", "".join(lines))
    files.write_text(
        folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    )
    if json_output:
        print(json.dumps(result))
    else:
        print(_table(Path(where).name, result))
        print(f"every completion: {folder / 'generations.jsonl'}")
    return 0


def _folder(run: str, weights: str, task: str) -> Path:
    """Where results go unless told: beside the run's own evaluations, or here."""
    kind, _, detail = task.partition(":")
    # Of a path the name is enough; a reasoning-gym task is part of what is measured.
    name = Path(kind).name if kind.startswith("gsm8k") else Path(task.replace(":", "-")).name
    if run and Path(run).is_dir():
        return Path(run) / "evaluations" / name
    return Path("evaluations") / f"{Path(run or weights).name}-{name}"


def _model(
    run: RunConfig,
    task: str,
    *,
    is_run: bool,
    instruction: str | None,
    max_completion_length: int,
    dtype: str | None,
) -> ModelConfig:
    """The run's model settings with what the task and the flags make of them.

    A trained model is asked in the words it was trained with, a base model in the protocol's.
    """
    on_gsm8k = _is_gsm8k(task)
    if instruction is None:
        by_protocol = on_gsm8k and not is_run
        instruction = gsm8k_protocol.INSTRUCTION if by_protocol else run.model.instruction
    if not max_completion_length:
        if on_gsm8k:
            max_completion_length = gsm8k_protocol.MAX_COMPLETION_LENGTH
        elif is_run or task == "curriculum":
            max_completion_length = run.model.max_completion_length
        else:
            max_completion_length = COMPLETION_LENGTH
    return replace(
        run.model,
        instruction=instruction,
        max_completion_length=max_completion_length,
        dtype=dtype or run.model.dtype,
    )


def _prompt_length(
    task: str, problems: Sequence[Problem], tokenizer: Tokenizer, instruction: str
) -> int:
    """The protocol's, or what the longest prompt needs; a multiple of 16, so that tasks of about
    one length share compiled programs."""
    if _is_gsm8k(task):
        return gsm8k_protocol.MAX_PROMPT_LENGTH
    encoded = encode_prompts(
        problems, tokenizer, instruction=instruction, max_prompt_length=sys.maxsize
    )
    return padding.bucket(max(map(len, encoded)), multiple=16, maximum=sys.maxsize)


def _conditions(runtime: Runtime, evaluation: EvaluationConfig) -> dict:
    """All that a figure depends on besides the model and the problems."""
    return {
        "template": TEMPLATE,
        "instruction": runtime.instruction,
        "max_prompt_length": runtime.max_prompt_length,
        "max_completion_length": runtime.max_completion_length,
        "dtype": runtime.dtype,
        "greedy_temperature": 0.0,
        "samples": asdict(evaluation) | {"seed": runtime.seed},
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _is_gsm8k(task: str) -> bool:
    return task.partition(":")[0] in ("gsm8k", "gsm8k-validation")


def _departures(protocol: dict) -> list[str]:
    """How a GSM8K measurement differs from the pinned one, a sentence each. The prompt's budget and
    the number format change no answer worth comparing; they are on record anyway."""
    found = []
    if protocol["n"] != gsm8k_protocol.NUM_TEST:
        found.append(f"{protocol['n']} problems, not {gsm8k_protocol.NUM_TEST}")
    if protocol["instruction"] != gsm8k_protocol.INSTRUCTION:
        found.append(f"the instruction is {protocol['instruction']!r}")
    if protocol["max_completion_length"] != gsm8k_protocol.MAX_COMPLETION_LENGTH:
        found.append(
            f"completions of {protocol['max_completion_length']} tokens, not "
            f"{gsm8k_protocol.MAX_COMPLETION_LENGTH}"
        )
    return found


def _table(name: str, result: dict) -> str:
    lines = [report.before_after_table({"stages": {name: result}})]
    for share in SHARES:
        if share in result:
            low, high = result[f"{share}_ci95"]
            lines.append(f"{share} {result[share]:.1%} (95 % interval {low:.1%} to {high:.1%})")
    for label, share in (result["by_difficulty"] | result["by_domain"]).items():
        lines.append(f"  {label}: {share['accuracy']:.1%} of {share['n']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
