"""How much disk a run holds at its peak, from its settings and sizes alone, and whether that is
free."""

import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax

from gemma_grpo import model
from gemma_grpo.config import RunConfig
from gemma_grpo.errors import UserError
from gemma_grpo.model import Gemma3Config
from gemma_grpo.training.state import fresh_state, make_optimizer

GSM8K_PROBLEMS = 1319  # held out; taken where the data says "all"
GSM8K_TRAIN = 7473  # to learn from; taken where the data says "all"
BYTES_PER_TOKEN = 4  # of English text, in Gemma's vocabulary
DRAWN_BYTES = 8  # of a completion's token: id, characters, log-prob and gap, compressed
ROW_BYTES = 350  # of a rollout's or an evaluation's line, beside the texts
STEP_BYTES = 8192  # of metrics, TensorBoard, and the end of a last block
INDEX_BYTES, ARRAY_BYTES = 65536, 2048  # of a checkpoint and of each array, beside the arrays
PROGRAM_BYTES, PROGRAMS = 30_000_000, 10  # in the compilation cache; an estimate
SUMMARY_BYTES = 500_000  # curves.png, summary.json, config.yaml


@dataclass(frozen=True)
class Disk:
    """A run's files, in bytes.

    Attributes:
        weights: of one stage's weights.
        checkpoint: of one checkpoint.
        records: of rollouts, evaluations and metrics at the end; estimated, by full token budgets.
        run_folder: most that the run's folder ever holds.
        checkpoint_folder: most that the checkpoints' own folder ever holds; 0 if there is none.
    """

    weights: int
    checkpoint: int
    records: int
    run_folder: int
    checkpoint_folder: int


def of_run(run: RunConfig, architecture: Gemma3Config) -> Disk:
    """The run's peak, whenever it is stopped and resumed."""
    shapes = model.abstract(architecture, run.model.lora)[1]
    trained = model.partition(shapes)[0] if run.model.lora.rank else shapes
    make_state = partial(fresh_state, optimizer=make_optimizer(run.grpo.optimizer, 1))
    arrays = jax.tree.leaves(jax.eval_shape(make_state, trained))
    checkpoint = sum(array.size * array.dtype.itemsize + ARRAY_BYTES for array in arrays)
    checkpoint += INDEX_BYTES
    itemsize = 2 if run.weights_dtype == "bfloat16" else 4
    weights = sum(leaf.size * itemsize + ARRAY_BYTES for leaf in jax.tree.leaves(trained))
    records, num_stages, keep = _records(run), len(run.stage_list), run.checkpoint.keep
    # Those that are kept, one being written, and one that a guard would go back to; of the stages
    # before only if asked.
    guarded = "grpo" in run.stage_list and run.grpo.guard.is_on
    running = (keep + 1 + guarded) * checkpoint
    running += run.keep_checkpoints * (num_stages - 1) * keep * checkpoint
    # Weights of the stages before, those that a deadline left of the last, and either a checkpoint
    # being written or, with all else written, the last stage's own.
    beside = num_stages * weights + records
    if run.checkpoint.folder:
        in_folder = beside + max(checkpoint, weights)
        return Disk(weights, checkpoint, records, in_folder, running)
    return Disk(weights, checkpoint, records, beside + running, 0)


def lines(run: RunConfig, disk: Disk) -> list[str]:
    """What `train --dry-run` and `plan` print."""
    folder, text = run.checkpoint.folder, _size_text
    count = 1 if folder else (disk.run_folder - disk.records) // disk.checkpoint
    parts = (
        f"a stage's weights {text(disk.weights)}, checkpoints {count} x {text(disk.checkpoint)}, "
        f"records {text(disk.records)} (estimated)"
    )
    first = f"disk       {text(disk.run_folder)} at most in the run's folder: {parts}"
    second = f"           {text(disk.checkpoint_folder)} at most in {folder}"
    return [first, second] if folder else [first]


def require_room(
    run: RunConfig, architecture: Gemma3Config, run_dir: Path, *, cache: bool, fixed: bool
) -> None:
    """Raises UserError if the run's peak is more than what is there of it and what is free.

    Args:
        cache: compiled programs are kept beside the run.
        fixed: the run's settings cannot be changed any more.
    """
    missing, where = _missing(run, architecture, run_dir, cache=cache)
    if missing <= 0:
        return
    how = "free some space" if fixed else _fix(run, architecture, run_dir, cache=cache)
    raise UserError(
        f"the disk of {where} is too small for the run, by {_size_text(missing)}; {how}, or insist "
        "with --ignore-plan"
    )


def _missing(
    run: RunConfig, architecture: Gemma3Config, run_dir: Path, *, cache: bool
) -> tuple[int, str]:
    """Bytes that one of the run's file systems lacks, the most of all, and its folders."""
    disk = of_run(run, architecture)
    needs = {run_dir: disk.run_folder - _size(run_dir)}
    if cache:
        needs[run_dir.parent] = PROGRAMS * PROGRAM_BYTES
    if folder := run.checkpoint.folder:
        needs[Path(folder)] = disk.checkpoint_folder - _size(Path(folder))
    systems: dict[int, tuple[int, list[str]]] = {}
    for path, need in needs.items():
        there = _existing(path)
        system = os.stat(there).st_dev
        missing, names = systems.get(system, (-shutil.disk_usage(there).free, []))
        systems[system] = (missing + max(need, 0), [*names, str(path)])
    missing, names = max(systems.values())
    return missing, " and ".join(name for name in names if name != str(run_dir.parent))


def _fix(run: RunConfig, architecture: Gemma3Config, run_dir: Path, *, cache: bool) -> str:
    """The first setting that fits, or a checkpoints' folder on another disk."""
    one = replace(run, checkpoint=replace(run.checkpoint, keep=1))
    half = replace(run, weights_dtype="bfloat16")
    for flags, other in (
        ("--checkpoint.keep 1", one),
        ("--weights-dtype bfloat16", half),
        (
            "--checkpoint.keep 1 --weights-dtype bfloat16",
            replace(one, weights_dtype="bfloat16"),
        ),
    ):
        if _missing(other, architecture, run_dir, cache=cache)[0] <= 0:
            return f"{flags} fits"
    free = shutil.disk_usage(_existing(run_dir)).free + _size(run_dir)
    for flags, other in (("", one), ("--weights-dtype bfloat16 ", half)):
        checkpoint = replace(run.checkpoint, keep=1, folder="/")
        disk = of_run(replace(other, checkpoint=checkpoint), architecture)
        if disk.run_folder + cache * PROGRAMS * PROGRAM_BYTES <= free:
            return (
                f"{flags}--checkpoint.keep 1 --checkpoint.folder PATH fits, with a PATH on another "
                f"disk that has {_size_text(disk.checkpoint_folder)} free"
            )
    return "free some space"


def _records(run: RunConfig) -> int:
    """Bytes of metrics, rollouts and evaluations at the end."""
    tokens = run.model.max_prompt_length + run.model.max_completion_length
    row = ROW_BYTES + BYTES_PER_TOKEN * tokens + DRAWN_BYTES * run.model.max_completion_length
    num_test = run.data.num_test or GSM8K_PROBLEMS
    models = 2 + len(run.stage_list)  # the base, each stage, and what a deadline left of one
    rows = models * num_test * (1 + run.evaluation.num_samples)
    steps = run.sft.num_steps if "sft" in run.stage_list else 0
    if "grpo" in run.stage_list:
        steps += run.grpo.num_steps
        rows += run.grpo.num_steps * run.grpo.prompts_per_step * run.grpo.num_generations
        if every := run.evaluation.every:
            few = min(run.evaluation.snapshot_problems, num_test)
            rows += run.grpo.num_steps // every * few
    if run.samples_demonstrations:
        own = run.sft.own
        rows += asked_problems(run) * min(own.max_per_problem, own.num_samples)
    return rows * row + steps * STEP_BYTES + SUMMARY_BYTES


def asked_problems(run: RunConfig) -> int:
    """Training problems that own demonstrations are sampled of; GSM8K's where the data says all."""
    all_problems = (run.data.num_train or GSM8K_TRAIN) - run.sft.own.shots
    return max(0, min(run.sft.own.num_problems or all_problems, all_problems))


def _size(folder: Path) -> int:
    """Bytes of the files below a folder, which need not be there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _size_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
