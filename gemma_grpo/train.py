"""The training command: flags in, a run out.

python -m gemma_grpo.train                       the embedded model, base -> SFT -> GRPO
python -m gemma_grpo.train --resume              go on with the newest run
python -m gemma_grpo.train --config runs/x/config.yaml --run-dir runs/y
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from gemma_grpo import cli, config, pipeline, presets
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.devices import processes
from gemma_grpo.errors import UserError
from gemma_grpo.planning import chips, fit, topology
from gemma_grpo.records import report

RUNS = Path("runs")


@dataclass(frozen=True)
class Options:
    """Flags of the command itself; they are no part of the run."""

    preset: str = "gemma3-nano"
    """Named configuration that the other flags change."""
    config: Path | None = None
    """YAML file that the other flags change, such as an earlier run's config.yaml."""
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A reward of your own, path/to/file.py:function or path/to/file.py:function=weight; give the
    flag once for each."""
    run_dir: Path | None = None
    """Where the run's files go; runs/<preset>-<date>-<time> if unsaid."""
    resume: bool = False
    """Go on with the run in --run-dir, or with the newest one in runs/."""
    dry_run: bool = False
    """Load and check everything, print the plan, train nothing."""
    ignore_plan: bool = False
    """Start on a TPU although its compiler says that the run will not fit (`plan`)."""
    json: bool = False
    """Print the summary as JSON instead of a table."""
    coordinator: str = ""
    """With many processes: host:port of the primary one, or auto, which asks the TPU pod or the
    cluster. SLURM steps and JAX_COORDINATOR_ADDRESS are noticed without it."""
    num_processes: int | None = None
    """How many processes the job has, with --coordinator host:port."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator host:port."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    # Two flags choose the defaults of all the others, so they are read first.
    file = cli.flag(arguments, "config", "")
    preset = cli.flag(arguments, "preset", Options.preset)
    default = config.from_yaml(Path(file)) if file else presets.preset(preset)
    options, run = cli.parse_run(
        arguments,
        Options(),
        default,
        command="train",
        description="Train base -> SFT -> GRPO, each measured on the same held-out problems.",
    )
    run = cli.with_rewards(run, options.reward)
    if options.resume:
        if run != default or file:
            raise UserError("--resume goes on with the run's own config.yaml: leave settings out")
        run = config.from_yaml((options.run_dir or _newest_run()) / "config.yaml")
    processes.join(options.coordinator, options.num_processes, options.process_id)
    cli.split_cpu(run.model.cpu_devices, *pipeline.batch_sizes(run).values())
    run_dir = processes.broadcast_from_primary(lambda: _run_dir(options))
    say = print if processes.is_primary() else lambda *_, **__: None
    for warning in run.grpo.check():
        say(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        say(_plan(run, pipeline.load_task(run), run_dir))
        return 0
    cli.use_compilation_cache(run_dir.parent)
    if topology.is_here() and "grpo" in run.stage_list and not options.ignore_plan:
        _require_room(run)
    if not options.resume:
        processes.run_on_primary(lambda: pipeline.new_run_dir(run_dir, run))
    say(f"run directory: {run_dir}", file=sys.stderr)
    summary = pipeline.execute(run, run_dir)
    say(json.dumps(summary) if options.json else report.before_after_table(summary))
    return 0


def _run_dir(options: Options) -> Path:
    if options.run_dir:
        return options.run_dir
    if options.resume:
        return _newest_run()
    return RUNS / f"{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def _require_room(run: RunConfig) -> None:
    """Raises UserError if the run will not fit on the chips that are here, as far as their memory
    is known. What is compiled for that stays in the compilation cache."""
    devices = jax.devices()
    chip = chips.chip_here(devices)
    if chip is not None:
        architecture = fit.model_config(run.model.weights)
        fit.require_room(run, architecture, meshes.data_mesh(devices), chip)


def _newest_run() -> Path:
    runs = sorted(RUNS.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"--resume: no run in {RUNS}/; name one with --run-dir")
    return runs[-1].parent


def _plan(run: RunConfig, task: pipeline.Task, run_dir: Path) -> str:
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
    if "sft" in run.stage_list:
        lines.append(f"sft        {run.sft.num_steps} steps of {run.sft.batch_size} demonstrations")
    if "grpo" in run.stage_list:
        lines.append(
            f"grpo       {run.grpo.num_steps} steps of {run.grpo.prompts_per_step} prompts x "
            f"{run.grpo.num_generations} generations = {completions} completions"
        )
    return "\n".join([*lines, f"writes to  {run_dir}", "all checks passed; nothing was trained"])


if __name__ == "__main__":
    sys.exit(main())
