"""One run from base model to report: base -> SFT -> GRPO, each measured on the same held-out
problems.

Everything a finished stage leaves (its weights, its evaluation) appears complete or not at all, so
a run that was killed goes on from the last file that is there.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from gemma_grpo import config, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.data import sources
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import processes
from gemma_grpo.errors import UserError
from gemma_grpo.evaluation.evaluator import Evaluator, compare, evaluation_prompts, make_evaluator
from gemma_grpo.model import Params
from gemma_grpo.records import compile_clock, files, report
from gemma_grpo.records.metrics import MetricsWriter
from gemma_grpo.records.saving import CheckpointConfig
from gemma_grpo.runtime import Runtime, load_model
from gemma_grpo.text.prompts import encode_completions, encode_prompts
from gemma_grpo.training import grpo, sft
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.loop import RunFiles


@dataclass(frozen=True)
class Task:
    """Everything of a run that is loaded before it starts, and checked.

    Attributes:
        runtime: how the model is run.
        base: the weights it starts from.
        train, test: problems; they share none.
    """

    runtime: Runtime
    base: Params
    train: list[Problem]
    test: list[Problem]


def load_task(run: RunConfig) -> Task:
    """Loads and checks what a run needs. Raises UserError for the first thing that is wrong."""
    runtime, base = load_model(run.model, seed=run.seed)
    data = run.data
    train = sources.load(data.source, split="train", num=data.num_train, seed=run.seed)
    # The seed of the test problems is fixed: runs of all seeds are measured on the same ones.
    test = sources.load(data.source, split="test", num=data.num_test, seed=0)
    _check(run, runtime, train, test)
    return Task(runtime, base, train, test)


def _check(run: RunConfig, runtime: Runtime, train: list[Problem], test: list[Problem]) -> None:
    """Raises UserError now for what would else stop the run in its middle."""
    grpo.load_extra_rewards(run.reward.extra)
    encode_prompts(
        train + test,
        runtime.tokenizer,
        instruction=runtime.instruction,
        max_prompt_length=runtime.max_prompt_length,
    )
    if "sft" in run.stage_list:
        encode_completions(
            train, runtime.tokenizer, max_completion_length=runtime.max_completion_length
        )
    runtime.check_rows(batch_sizes(run))


def batch_sizes(run: RunConfig) -> dict[str, int]:
    """Prompts in one pass of each kind of batch, by field; they are split over the devices."""
    sizes = {"evaluation.batch_size / num_samples": evaluation_prompts(run.evaluation)}
    if "sft" in run.stage_list:
        sizes["sft.batch_size / accumulation_steps"] = (
            run.sft.batch_size // run.sft.accumulation_steps
        )
    if "grpo" in run.stage_list:
        sizes["grpo.prompts_per_step / accumulation_steps"] = (
            run.grpo.prompts_per_step // run.grpo.accumulation_steps
        )
    return sizes


def execute(run: RunConfig, run_dir: Path) -> dict:
    """Runs or resumes a run in its directory, and returns the summary it wrote there.

    Raises:
        UserError: bad input; what the run had is kept.
        InterruptedRunError: a signal came; everything is saved, and --resume goes on.
    """
    with compile_clock.running() as clock:
        _run_stages(run, run_dir)
    processes.run_on_primary(lambda: _record_seconds(run_dir, "compile", clock.seconds))
    stages = ["base", *run.stage_list]
    return processes.broadcast_from_primary(lambda: _summarize(run, stages, run_dir))


def _run_stages(run: RunConfig, run_dir: Path) -> None:
    """All that is not done yet, in order: what each leaves is in the run's directory."""
    task = load_task(run)
    evaluator = make_evaluator(run.evaluation, task.runtime)
    params = task.base
    _evaluate(evaluator, "base", params, task.test, run_dir)
    train = {
        "sft": lambda params, files: sft.train(run.sft, task.runtime, task.train, params, files),
        "grpo": lambda params, files: grpo.train(
            run.grpo, run.reward, task.runtime, task.train, params, files
        ),
    }
    for stage in run.stage_list:
        path = run_dir / "weights" / f"{stage}.safetensors"
        if not processes.broadcast_from_primary(path.exists):
            started = time.monotonic()
            params = _train_stage(stage, train[stage], params, run_dir, run.checkpoint)
            seconds = time.monotonic() - started
            processes.run_on_primary(partial(_record_seconds, run_dir, stage, seconds))
            path.parent.mkdir(exist_ok=True)
            weights.save(path, params)
        # Read back even when just written: a resumed run and this one then hold the same arrays.
        params = weights.load(path, task.base)
        if not run.keep_checkpoints:  # also what a run killed before this line left
            processes.run_on_primary(run.checkpoint.of_stage(run_dir, stage).remove)
        _evaluate(evaluator, stage, params, task.test, run_dir)


def new_run_dir(run_dir: Path, run: RunConfig) -> None:
    """Makes the directory with its config.yaml. Raises UserError if something is there already."""
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is there already; --resume goes on with it, or name another")
    run_dir.mkdir(parents=True, exist_ok=True)
    files.write_text(run_dir / "config.yaml", config.to_yaml(run))


def _train_stage(
    stage: str,
    train: Callable[[Params, RunFiles], Params],
    params: Params,
    run_dir: Path,
    checkpoint: CheckpointConfig,
) -> Params:
    def open_writer() -> MetricsWriter:
        done = checkpoint.of_stage(run_dir, stage).latest() or 0
        return MetricsWriter(run_dir, resume_from={"stage": stage, "step": done})

    with Interrupt() as interrupt:
        writer = processes.run_on_primary(open_writer)
        try:
            return train(params, RunFiles(run_dir, writer, interrupt, checkpoint))
        finally:
            if writer is not None:
                writer.close()


def _evaluate(
    evaluator: Evaluator, stage: str, params: Params, problems: list[Problem], run_dir: Path
) -> None:
    """Measures a stage's model unless that is on file already."""
    folder = run_dir / "evaluations"
    if processes.broadcast_from_primary((folder / f"{stage}.json").exists):
        return
    started = time.monotonic()
    result, rows = evaluator.run(params, problems)

    def write() -> None:
        folder.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(folder / f"{stage}.jsonl", lines)
        _record_seconds(run_dir, f"evaluate_{stage}", time.monotonic() - started)
        files.write_text(folder / f"{stage}.json", json.dumps(result, indent=1) + "\n")

    processes.run_on_primary(write)


def _record_seconds(run_dir: Path, name: str, seconds: float) -> None:
    """Adds wall-clock seconds to seconds.json; a stage that was resumed counts all its parts.
    `compile` is in the others."""
    path = run_dir / "seconds.json"
    spent = json.loads(path.read_text()) if path.exists() else {}
    spent[name] = round(spent.get(name, 0.0) + seconds, 2)
    files.write_text(path, json.dumps(spent) + "\n")


def _summarize(run: RunConfig, stages: list[str], run_dir: Path) -> dict:
    """Writes summary.json and curves.png from what the stages left."""
    folder = run_dir / "evaluations"
    results = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in stages}
    rows = {
        stage: [
            json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().split("\n")[:-1]
        ]
        for stage in stages
    }
    device = jax.devices()[0]
    summary = {
        "weights": run.model.weights,
        "seed": run.seed,
        "device": f"{jax.device_count()} x {device.device_kind} ({platform.machine()})",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "stages": results,
        "paired": {
            f"{after}_vs_{before}": compare(rows[before], rows[after])
            for before, after in zip(stages, stages[1:], strict=False)
        },
        "seconds": json.loads((run_dir / "seconds.json").read_text()),
    }
    files.write_text(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    if len(stages) > 1:
        report.plot_curves(run_dir)
    return summary
