"""The training command: flags in, a run out.

python -m gemma_grpo.train                       the embedded model, base -> SFT -> GRPO
python -m gemma_grpo.train --resume              go on with the newest run
python -m gemma_grpo.train --resume-from /kaggle/input/x/runs/y     go on with a read-only copy
python -m gemma_grpo.train --config runs/x/config.yaml --run-dir runs/y
"""

import contextlib
import io
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from gemma_grpo import cli, config
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import preflight
from gemma_grpo.errors import UserError, expanded
from gemma_grpo.records import files, lock, report, trace
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.records import summary as summaries

if TYPE_CHECKING:  # --help does not wait for JAX
    from gemma_grpo.pipeline import Deadline, Task
else:
    Deadline = Task = Any

RUNS = Path("runs")
OUT_OF_TIME = 75  # exit status: stopped for --hours, to be resumed (EX_TEMPFAIL of sysexits.h)
# Settings that may differ between the processes of one run: what their paths lead to may not.
_OF_A_HOST = (
    *("model.weights", "model.tokenizer", "model.cpu_devices", "data.source", "grpo.teacher"),
    "checkpoint.folder",
)
COLLAPSED = 76  # exit status: stopped by --grpo.guard; none of sysexits.h says that


@dataclass(frozen=True)
class Options:
    """Flags of the command itself; they are no part of the run."""

    preset: str = "gemma3-nano"
    """Named configuration that the other flags change."""
    config: Path | None = None
    """YAML file that the other flags change, such as an earlier run's config.yaml."""
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adds a reward of your own to --reward.extra: path/to/file.py:function or
    path/to/file.py:function=weight; repeat the flag for each. With --resume or --resume-from: where
    the file of that function is now."""
    rubric: str = ""
    """The same as --reward.rubric.file: a YAML file of yes/no criteria for each domain of the data,
    which --judge answers. With --resume or --resume-from: where it is now."""
    judge: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adds a judge of the criteria of --rubric to --reward.rubric.judges:
    path/to/file.py:function=weight, or model:WEIGHTS=weight for a Gemma 3; weight 0 only records.
    Repeat the flag for each. With --resume or --resume-from: where that judge is now."""
    run_dir: Path | None = None
    """Folder for the run's files. By default runs/<preset>-<date>-<time>, or with --resume-from
    runs/<the name of its folder>; a number is added if it exists."""
    resume: bool = False
    """Continue the run in --run-dir, or the newest one in runs/."""
    resume_from: Path | None = None
    """Continue the run in this folder, which may be read-only, in a new --run-dir: what is needed
    is copied there. --model.weights, --model.tokenizer and --data.source may name moved files,
    --checkpoint.folder another folder, and --grpo.guard may change."""
    restart_stage: bool = False
    """With --resume or --resume-from: start a stage again if its checkpoints are lost."""
    hours: float | None = None
    """Stop within this many hours of the process's start: save, evaluate what was finished, and
    exit with status 75. --resume continues."""
    allow_changed_data: bool = False
    """With --resume or --resume-from: accept other problems than the run started with; if the
    held-out ones differ, everything is measured again."""
    allow_changed_base: bool = False
    """With --resume or --resume-from: accept other base weights, tokenizer or teacher than the run
    started with; what was measured or sampled with them is redone."""
    allow_changed_rewards: bool = False
    """With --resume or --resume-from: accept changed files of custom rewards, judges or rubric; if
    a reward's file changed, everything is measured again."""
    dry_run: bool = False
    """Load and check everything and print the plan, but train nothing."""
    ignore_plan: bool = False
    """Start even if the run will not fit, according to the TPU compiler (`plan`) or the disk's
    size."""
    json: bool = False
    """Print the summary as JSON instead of a table."""
    quiet: bool = False
    """Print only errors, warnings and the result."""
    coordinator: str = ""
    """With many processes: host:port of the primary one, or auto, which asks the TPU pod or the
    cluster. SLURM steps and JAX_COORDINATOR_ADDRESS are detected without it."""
    num_processes: int | None = None
    """How many processes the job has, with --coordinator host:port."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator host:port."""

    def __post_init__(self):
        resumes = self.resume or self.resume_from is not None
        if not resumes and (self.may_change or self.restart_stage):
            raise UserError(
                "--allow-changed-data, --allow-changed-base, --allow-changed-rewards and "
                "--restart-stage go with --resume or --resume-from"
            )

    @property
    def may_change(self) -> list[str]:
        """Of `pipeline.CHANGES`."""
        flags = {
            "data": self.allow_changed_data,
            "base": self.allow_changed_base,
            "rewards": self.allow_changed_rewards,
        }
        return [kind for kind, is_allowed in flags.items() if is_allowed]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    default = _default(arguments)
    options, run = cli.parse_run(
        arguments,
        Options(),
        default,
        command="train",
        description="Train base -> SFT -> GRPO, each measured on the same held-out problems.",
    )
    resumes = options.resume or options.resume_from is not None
    with_rewards = cli.with_moved_rewards if resumes else cli.with_rewards
    run = with_rewards(run, options.reward, options.rubric, options.judge)
    import jax

    from gemma_grpo import pipeline
    from gemma_grpo.devices import processes

    deadline = pipeline.Deadline(options.hours)
    if resumes:
        _check_settings(options, run, default)
    preflight.check()
    processes.join(options.coordinator, options.num_processes, options.process_id)
    cli.split_cpu(run.model.cpu_devices, *run.batch_sizes.values())
    preflight.check_backend(jax.default_backend())
    if processes.is_primary():
        for warning in [*run.grpo.check(), *config.without_effect(default, run)]:
            print(f"warning: {warning}", file=sys.stderr)
    return _train(options, run, deadline)


def _default(arguments: list[str]) -> RunConfig:
    """What stands where no flag is given: four flags choose that, so they are read first.

    Raises:
        UserError: more than one of them is given, or what they name cannot be read.
    """
    source = cli.flag(arguments, "resume-from", None)
    resumes = "--resume" in arguments
    others = ["--resume-from"] * (source is not None) + ["--resume"] * resumes
    run = cli.default_run(arguments, Options.preset, others)
    if source is not None:
        return cli.config_of(expanded(source))
    if resumes:
        named = cli.flag(arguments, "run-dir", None)
        return cli.config_of(expanded(named) if named else _newest_run())
    return run


def _check_settings(options: Options, run: RunConfig, default: RunConfig) -> None:
    """Raises UserError for settings that a resumed run cannot change."""
    changed = config.changed_fields(cli.without_places(default), cli.without_places(run))
    if options.resume and changed:
        cli.check_unchanged(default, run, "--resume with other settings")
        raise UserError(f"--resume: {changed[0]}: only --resume-from goes on with another")
    cli.check_unchanged(default, run, "--resume-from with other settings")


def _require_same_settings(run: RunConfig) -> None:
    """Raises UserError where a process has other settings than the primary; paths may differ."""
    from gemma_grpo.devices import processes

    first, *others = processes.gather_from_all(lambda: run)
    for number, other in enumerate(others, start=1):
        changed = config.changed_fields(first, other)
        if named := [line for line in changed if not line.startswith(_OF_A_HOST)]:
            raise UserError(
                f"process {number} has other settings than process 0 ({', '.join(named)}); start "
                "all with the same ones"
            )


def _train(options: Options, run: RunConfig, deadline: Deadline) -> int:
    """The run, once the devices are chosen; returns the exit status."""
    from gemma_grpo import pipeline
    from gemma_grpo.devices import processes
    from gemma_grpo.planning import topology

    _require_same_settings(run)
    named = processes.broadcast_from_primary(lambda: _run_dir(options))
    say = print if processes.is_primary() else lambda *_, **__: None
    if not options.resume:
        folder = run.checkpoint.folder
        processes.run_on_primary(lambda: run_dirs.require_apart(folder, named))
    if options.run_dir and not options.resume:
        processes.run_on_primary(lambda: run_dirs.require_free(named))
    if not options.ignore_plan:
        processes.run_on_primary(lambda: _require_disk(options, run, named))
    if options.dry_run:
        with contextlib.redirect_stdout(sys.stderr):
            task = pipeline.load_task(run)
        say(_plan(run, task, named))
        return 0
    if options.resume_from and processes.is_primary():
        run_dirs.copy_cache(options.resume_from, named.parent)
    cli.use_compilation_cache(named.parent)
    if topology.is_here() and not options.ignore_plan:
        left = lambda: pipeline.stages_left(run, options.resume_from or named)
        quietly = contextlib.redirect_stderr(io.StringIO() if options.quiet else sys.stderr)
        with quietly:  # not the lines on what is compiled
            _require_room(run, processes.broadcast_from_primary(left))
    with contextlib.ExitStack() as held:
        run_dir = processes.broadcast_from_primary(lambda: _claim(options, run, named, held))
        if not options.quiet:
            say(f"run directory: {run_dir}", file=sys.stderr)
        # What a user's reward prints is no part of the result, which --json promises to be JSON.
        held.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            summary = pipeline.execute(
                run, run_dir, deadline, may_change=options.may_change, quiet=options.quiet
            )
        except UserError:
            if not options.resume and processes.is_primary():
                run_dirs.remove_unused(run_dir)
            raise
    say(json.dumps(summary) if options.json else report.before_after_table(summary))
    if not options.json and processes.is_primary():
        _show_end(run_dir)
    unfinished = summary["unfinished"]
    if unfinished is None:
        return 0
    if "collapse" in unfinished:
        another = f"--resume-from {run_dir} --run-dir NEW goes on with another --grpo.guard"
        say(f"stopped by the guard: {summaries.collapsed(unfinished)}; {another}", file=sys.stderr)
        return COLLAPSED
    where = summaries.unfinished_at(unfinished)
    say(f"stopped for --hours {options.hours}: {where}; --resume goes on", file=sys.stderr)
    return OUT_OF_TIME


def _show_end(run_dir: Path) -> None:
    """Prints a problem that was gained, through the stages; where the pictures are, and what to do
    next."""
    if shown := trace.gained(run_dir):
        trace.show(f"\n{shown}")
    run, curves = shlex.quote(str(run_dir)), run_dir / "curves.png"
    print()
    if curves.is_file():
        print(f"curves:           {curves}")
    if any(run_dir.glob("weights/*.safetensors")):
        print(f"the model:        python -m gemma_grpo.export {run} OUT")
    print(f"every completion: python -m gemma_grpo.view {run}")


def _claim(options: Options, run: RunConfig, run_dir: Path, held: contextlib.ExitStack) -> Path:
    """The run's folder, with its config.yaml, and its lock held.

    Raises:
        UserError: another process uses it, it is no new one, or it cannot be written.
    """
    from gemma_grpo import pipeline

    if not options.resume:
        if options.run_dir is None:
            run_dir = run_dirs.unused(run_dir)
        run_dirs.require_free(run_dir)
        with files.write_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock.hold(run_dir))
    again = options.restart_stage
    if options.resume:
        pipeline.resume_run_dir(run_dir, run, restart_stage=again)
    folder = run.checkpoint.folder
    held.enter_context(run_dirs.hold_checkpoints(folder, is_new=not options.resume))
    if options.resume_from:
        pipeline.copy_run_dir(options.resume_from, run_dir, run, restart_stage=again)
    elif not options.resume:
        pipeline.new_run_dir(run_dir, run)
    return run_dir


def _run_dir(options: Options) -> Path:
    if options.run_dir:
        return options.run_dir
    if options.resume:
        return _newest_run()
    if options.resume_from:
        return RUNS / options.resume_from.absolute().name
    return RUNS / f"{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def _require_room(run: RunConfig, stages: list[str]) -> None:
    """Raises UserError if what is left of the run will not fit on the chips that are here, as far
    as their memory is known. What is compiled for that stays in the compilation cache."""
    import jax

    from gemma_grpo.devices import mesh as meshes
    from gemma_grpo.planning import chips, fit

    devices = jax.devices()
    chip = chips.chip_here(devices)
    if chip is not None:
        fit.require_room(run, meshes.data_mesh(devices), chip, stages)


def _require_disk(options: Options, run: RunConfig, run_dir: Path) -> None:
    """Raises UserError if the run's files will not find room on the disk."""
    from gemma_grpo.planning import disk, programs

    disk.require_room(
        run,
        programs.model_config(run.model.weights),
        run_dir,
        cache=not os.environ.get("JAX_COMPILATION_CACHE_DIR"),
        fixed=options.resume,
    )


def _newest_run() -> Path:
    runs = sorted(RUNS.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"--resume: no run in {RUNS}/; name one with --run-dir")
    return runs[-1].parent


def _plan(run: RunConfig, task: Task, run_dir: Path) -> str:
    import jax

    from gemma_grpo.planning import disk, programs

    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (task.base, task.runtime.frozen)
    )
    completions = run.grpo.prompts_per_step * run.grpo.num_generations
    lines = [
        f"model      {run.model.weights}, {trained:,} parameters trained, {frozen:,} frozen, "
        f"{run.model.dtype}",
        f"devices    {jax.device_count()} x {jax.devices()[0].device_kind}",
        f"data       {run.data.source}: {len(task.train)} to learn from, {len(task.test)} held out",
        f"lengths    {run.model.max_prompt_length} prompt + "
        f"{run.model.max_completion_length} completion tokens",
    ]
    if teacher := task.runtime.teacher:
        size = sum(leaf.size for leaf in jax.tree.leaves(teacher.params))
        lines.append(f"teacher    {run.grpo.teacher}, {size:,} parameters, {run.model.dtype}")
    if "sft" in run.stage_list:
        lines.append(f"sft        {run.sft.num_steps} steps of {run.sft.batch_size} demonstrations")
    if run.samples_demonstrations:
        own = run.sft.own
        asked = min(own.num_problems or len(task.train), len(task.train) - own.shots)
        lines.append(
            f"           of the model's own: {own.num_samples} completions of each of {asked} "
            f"problems behind {own.shots} worked ones"
        )
    if "grpo" in run.stage_list:
        lines.append(
            f"grpo       {run.grpo.num_steps} steps of {run.grpo.prompts_per_step} prompts x "
            f"{run.grpo.num_generations} generations = {completions} completions"
        )
    lines += disk.lines(run, disk.of_run(run, programs.model_config(run.model.weights)))
    return "\n".join([*lines, f"writes to  {run_dir}", "all checks passed; nothing was trained"])


if __name__ == "__main__":
    cli.start(main, hint="; --resume goes on from what was saved")
