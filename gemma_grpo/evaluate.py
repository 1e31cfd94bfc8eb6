"""The evaluation command: measures a run's model, or a base model, on held-out problems.

    python -m gemma_grpo.evaluate RUN [--task gsm8k:FOLDER]
    python -m gemma_grpo.evaluate --weights gemma3-270m --task reasoning_gym:chain_sum --num 200

Writes figures with 95 % intervals and their protocol, and every completion, into --out.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gemma_grpo import cli
from gemma_grpo.data import sources
from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.evaluation import gsm8k_protocol
from gemma_grpo.evaluation.config import EvaluationConfig, evaluation_prompts
from gemma_grpo.records import files, report, tokens
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.text import padding
from gemma_grpo.text.prompts import encode_prompts
from gemma_grpo.text.tokenizer import END_OF_TURN, START_OF_TURN

if TYPE_CHECKING:  # --help does not wait for JAX
    from gemma_grpo.evaluation.evaluator import Pay
    from gemma_grpo.runtime import ModelConfig, Runtime
else:
    ModelConfig = Pay = Runtime = Any

# What a prompt looks like; the instruction's line is left out where there is none.
TEMPLATE = (
    f"<bos>{START_OF_TURN}user\n{{instruction}}\n{{question}}{END_OF_TURN}\n{START_OF_TURN}model\n"
)

COMPLETION_LENGTH = 256  # for a base model on a task without a protocol or a budget of its own
_NO_CONDITIONS = ("run", "weights", "task", "out", "json", "evaluation", "batch_size")
SHARES = ("lenient_accuracy", "truncation_rate")
SHARES_OF_SAMPLES = (
    "pass_at_1",
    "pass_at_k",
    "lenient_pass_at_k",
    "maj_at_k",
    "lenient_maj_at_k",
)


@dataclass(frozen=True)
class Options:
    """Measure a model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = ""
    """The model, as for --weights."""
    weights: str = ""
    """The model: a run directory (its last finished stage), gemma3-nano (embedded), gemma3-270m
    (its installed package), a Hugging Face or Kaggle folder, or a .gguf file."""
    task: str = ""
    """curriculum, gsm8k[:PATH], gsm8k-validation[:PATH], reasoning_gym:NAME, or a .jsonl, .csv or
    .parquet file. A file is used whole, except that of the run's own file only the held-out part
    is. By default the run's own task, or the curriculum."""
    num: int | None = None
    """Number of held-out problems, at most; 0: all of a finite task. By default all, or 400 if the
    task is endless."""
    out: Path | None = None
    """A new folder for result.json (figures and their protocol) and generations.jsonl (a line for
    each completion, greedy and sampled). By default RUN/evaluations/TASK, or
    evaluations/WEIGHTS-TASK here, with other settings that are not the default in the name, as in
    curriculum-seed=1."""
    instruction: str | None = None
    """Text put before every question. By default the run's own; for a base model on GSM8K the
    protocol's, otherwise none."""
    max_prompt_length: int = 0
    """Most tokens of a prompt; 0: as in GSM8K's protocol, or what the longest prompt needs."""
    max_completion_length: int = 0
    """Most tokens of a completion, including the stop token; 0: as in GSM8K's protocol, or the
    run's own, or 256 (60 for a base model on the curriculum)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype. By default the run's own, or float32."""
    seed: int = 0
    """Random seed of the k samples."""
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = EvaluationConfig()
    """What is measured."""
    json: bool = False
    """Print the result as JSON instead of a table."""


@dataclass(frozen=True)
class Subject:
    """What is measured, and on which problems.

    Attributes:
        where: the run directory or the base model, as the user named it.
        task: the name of the problems' source.
        difficulties: of its problems.
        trained_on: the source of the run's problems; "" for a base model.
        load_train: those that it was trained on.
        model: how the model is run.
        trained: what a run's last finished stage has left; None for a base model.
        pay: what the run pays a completion in the end.
    """

    where: str
    task: str
    difficulties: tuple[str, ...]
    trained_on: str
    load_train: Callable[[], list[Problem]]
    model: ModelConfig
    trained: Path | None
    pay: Pay

    @property
    def stage(self) -> str:
        """The stage whose weights are measured, or base."""
        return self.trained.stem if self.trained else "base"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(
        lambda: _evaluate(cli.parse(Options, arguments, command="evaluate", description=__doc__))
    )


def _evaluate(options: Options) -> int:
    from gemma_grpo.evaluation.evaluator import make_evaluator

    cli.require_one_process("evaluate")
    subject = _subject(options)
    folder = options.out or _folder(options, subject.task)
    files.require_new_folder(folder, another="name another with --out")
    cli.split_cpu(subject.model.cpu_devices, evaluation_prompts(options.evaluation))
    cli.use_compilation_cache(cli.cache_for(subject.where))
    problems = _problems(subject, options.num)
    runtime, params = _load(subject, options, problems)
    protocol = _protocol(subject, len(problems), runtime, options.evaluation)
    for departure in protocol.get("departures", ()):
        print(f"warning: not the GSM8K protocol: {departure}", file=sys.stderr)
    evaluator = make_evaluator(options.evaluation, runtime, subject.pay)
    figures, generations, drawn = evaluator.run(params, problems)
    result = figures | {"protocol": protocol}
    _write(folder, result, generations, drawn)
    if options.json:
        print(json.dumps(result))
    else:
        print(_table(Path(subject.where).name, result))
        print(f"every completion: {folder / 'generations.jsonl'}")
    return 0


def _subject(options: Options) -> Subject:
    """The model and the task that the flags name, with the settings that follow from both.

    A trained model is asked as it was trained, a base model as the protocol asks.
    """
    where = cli.one_model(options.run, options.weights)
    run, trained = cli.trained(where)
    task = options.task or run.data.source
    own_length, by_protocol = run.model.max_completion_length, run.model.instruction
    if _is_gsm8k(task):
        own_length = gsm8k_protocol.MAX_COMPLETION_LENGTH
        if trained is None:
            by_protocol = gsm8k_protocol.INSTRUCTION
    elif trained is None and task != "curriculum":
        own_length = COMPLETION_LENGTH
    model = replace(
        run.model,
        instruction=by_protocol if options.instruction is None else options.instruction,
        max_completion_length=options.max_completion_length or own_length,
        dtype=options.dtype or run.model.dtype,
    )
    from gemma_grpo.evaluation.evaluator import pay_of

    warn = lambda line: print(f"warning: {line}", file=sys.stderr)
    difficulties = DIFFICULTIES if options.task else run.data.difficulty_list
    learnt_from = partial(
        sources.load,
        run.data.source,
        split="train",
        num=run.data.num_train,
        seed=run.seed,
        difficulties=run.data.difficulty_list,
    )
    return Subject(
        where,
        task,
        difficulties=difficulties,
        trained_on=run.data.source if trained else "",
        load_train=learnt_from if trained else list,
        model=model,
        trained=trained,
        pay=pay_of(run.reward, without=warn),
    )


def _problems(subject: Subject, num: int | None) -> list[Problem]:
    """The held-out problems. Their seed is fixed, as in training: all models are measured on the
    same ones."""
    return sources.to_measure(
        subject.task,
        num=num,
        difficulties=subject.difficulties,
        trained_on=subject.trained_on,
        load_train=subject.load_train,
    )


def _load(subject: Subject, options: Options, problems: Sequence[Problem]) -> tuple[Runtime, dict]:
    """The model, with a prompt budget that holds all problems.

    Raises:
        UserError: as `load_model`; a batch that does not split over the devices; a prompt that is
            too long for the budget, now and not after an hour.
    """
    from gemma_grpo.runtime import load_model

    runtime, params = load_model(subject.model, seed=options.seed, trained=subject.trained)
    runtime.check_rows({"batch_size / num_samples": evaluation_prompts(options.evaluation)})
    length = options.max_prompt_length or _prompt_length(subject.task, problems, runtime)
    encode_prompts(
        problems,
        runtime.tokenizer,
        instruction=runtime.instruction,
        max_prompt_length=length,
    )
    return replace(runtime, max_prompt_length=length), params


def _prompt_length(task: str, problems: Sequence[Problem], runtime: Runtime) -> int:
    """The protocol's, or what the longest prompt needs; a multiple of 16, so that tasks of about
    one length share compiled programs."""
    if _is_gsm8k(task):
        return gsm8k_protocol.MAX_PROMPT_LENGTH
    encoded = encode_prompts(
        problems,
        runtime.tokenizer,
        instruction=runtime.instruction,
        max_prompt_length=sys.maxsize,
    )
    return padding.bucket(max(map(len, encoded)), multiple=16)


def _protocol(
    subject: Subject, num_problems: int, runtime: Runtime, evaluation: EvaluationConfig
) -> dict:
    """All that a figure depends on; of GSM8K, also where that departs from the protocol."""
    import jax

    protocol = {
        "weights": subject.where,
        "base": subject.model.weights,
        "stage": subject.stage,
        "task": subject.task,
        "difficulties": list(subject.difficulties),
        "n": num_problems,
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
    if subject.task.partition(":")[0] == "gsm8k":
        protocol["departures"] = _departures(protocol)
    return protocol


def _write(folder: Path, result: dict, generations: Sequence[dict], drawn: tokens.Tokens) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generations]
    files.write_text(folder / "generations.jsonl", "".join(lines))
    tokens.write(folder / "generations.npz", drawn)
    files.write_text(
        folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    )


def _folder(options: Options, task: str) -> Path:
    """Where results go unless told: beside the run's own evaluations, or here; named by the task
    and by what was asked for otherwise than by default."""
    kind, _, detail = task.partition(":")
    # Of a path the name is enough; a reasoning-gym task is part of what is measured.
    name = Path(kind).name if kind.startswith("gsm8k") else Path(task.replace(":", "-")).name
    name = name.removesuffix(".jsonl").removesuffix(".csv").removesuffix(".parquet")
    asked = asdict(options) | asdict(options.evaluation)
    default = asdict(Options()) | asdict(EvaluationConfig())
    for field, value in asked.items():
        if field not in _NO_CONDITIONS and value != default[field]:
            if isinstance(value, str) and field != "dtype":  # a text by its digest
                value = hashlib.sha256(value.encode()).hexdigest()[:6]
            name += f"-{field}={value}"
    run = cli.expanded(options.run) if options.run else None
    if run is not None and (run / run_dirs.CONFIG).is_file():
        return run / "evaluations" / name
    return Path("evaluations") / f"{cli.expanded(options.run or options.weights).name}-{name}"


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
    lines += _shares(result, SHARES)
    if "k" in result:
        lines.append(f"of k = {result['k']} samples of each problem:")
        lines += _shares(result, SHARES_OF_SAMPLES)
    for label, share in (*result["by_difficulty"].items(), *result["by_domain"].items()):
        lines.append(f"  {label}: {share['accuracy']:.1%} of {share['n']}")
    return "\n".join(lines)


def _shares(result: dict, names: Sequence[str]) -> list[str]:
    """Lines of those that were measured, with their intervals."""
    return [
        f"{name} {result[name]:.1%} (95 % interval {low:.1%} to {high:.1%})"
        for name in names
        if name in result
        for low, high in [result[f"{name}_ci95"]]
    ]


if __name__ == "__main__":
    cli.start(main)
