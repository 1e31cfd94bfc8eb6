"""The planning command: will this run fit on those chips, and what will all of it take there?

python -m gemma_grpo.plan --preset gemma3-1b --topology v5e:2x4

Compiles every program of the run with the real TPU compiler; no TPU is needed (`planning/fit.py`
and `planning/ledger.py` say what each figure is). On a TPU host it plans for the chips that are
there, and `train` finds what was compiled.
"""

import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_grpo import cli
from gemma_grpo.config import RunConfig

if TYPE_CHECKING:  # --help does not wait for JAX
    from gemma_grpo.planning.chips import Chip
    from gemma_grpo.planning.fit import Row
    from gemma_grpo.planning.ledger import Ledger, Line
    from gemma_grpo.planning.topology import Target
else:
    Target = Chip = Row = Ledger = Line = Any


@dataclass(frozen=True)
class Options:
    """Flags of the command itself; all others are a run's."""

    preset: str = "gemma3-1b"
    """Named configuration that the other flags change."""
    config: Path | None = None
    """YAML file that the other flags change, such as an earlier run's config.yaml; used instead of
    --preset."""
    topology: str = ""
    """Chips to compile for, such as v5e:2x4 or v5e:16x16. By default those of this host, or v5e:2x4
    if it has none."""
    hours: float = 9.0
    """Hours of a session (Kaggle's has 9): how many GRPO steps fit into it after everything
    else."""
    run_dir: Path = Path("runs/run")
    """Where training will write; compiled programs are kept beside that folder, for `train`."""
    search: bool = False
    """Also double the prompts per step until they no longer fit."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 if the run does not fit."""
    return cli.guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    options, run = cli.parse_run(
        arguments,
        Options(),
        cli.default_run(arguments, Options.preset),
        command="plan",
        description="Compile a run for a TPU that is not there, and read off what it takes.",
    )
    from gemma_grpo.planning import fit, ledger, programs, topology

    ledger.check_hours(options.hours)
    architecture, ids = programs.model_of(run.model)
    where = topology.target(options.topology)
    if topology.is_here() and not options.topology:
        cli.use_compilation_cache(options.run_dir.parent)
    else:  # of chips that are not here, a kept program cannot be read, and is compiled again
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
    rows = fit.plan(run, architecture, where.mesh, where.chip, ids)
    account = ledger.of_run(run, architecture, rows, where.mesh.size)
    result = summary(run, rows, account, where.chip, where.mesh.size, options.hours)
    if options.search:
        result["largest_prompts_per_step"] = (
            fit.largest(run, architecture, where.mesh, where.chip) if result["fits"] else 0
        )
    print(json.dumps(result) if options.json else table(run, rows, account, result, where))
    return 0 if result["fits"] else 1


def summary(
    run: RunConfig, rows: list[Row], account: Ledger, chip: Chip, num_chips: int, hours: float
) -> dict:
    """What `--json` prints; times of a chip whose speed is not known are null."""
    from gemma_grpo.planning import disk, fit

    steps = account.steps_in(hours)
    epochs = [number * run.grpo.prompts_per_step / disk.GSM8K_TRAIN for number in steps]
    result = {
        "chips": num_chips,
        "memory_per_chip": chip.memory,
        "programs": [asdict(row) | {"headroom": chip.memory - row.memory} for row in rows],
        "compile_seconds": sum(row.compiled.compile_seconds for row in rows),
        "compile_cpu_seconds": sum(row.compiled.compile_cpu_seconds for row in rows),
        "ledger": asdict(account),
        "run_hours": _pair(account.hours()),
        "hours": hours,
        "steps_in_hours": _pair(steps),
        "gsm8k_epochs_in_hours": _pair(epochs),
        "fits": not any(fit.excess(row, chip) for row in rows),
    }
    return _without_nan(result)


def _pair(values: Sequence[int | float]) -> dict[str, int | float]:
    return dict(zip(("likely", "full_lengths"), values, strict=True))


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def table(run: RunConfig, rows: list[Row], account: Ledger, result: dict, where: Target) -> str:
    """What a person reads."""
    from gemma_grpo.planning import disk, fit

    model, grpo = run.model, run.grpo
    lines = [
        f"{model.weights} on {where.name}: {grpo.prompts_per_step} prompts x "
        f"{grpo.num_generations}, {model.max_prompt_length} + {model.max_completion_length} "
        f"tokens, {model.dtype}"
        + (f", LoRA rank {model.lora.rank}" if model.lora.rank else ", all weights")
        + (f", teacher {grpo.teacher}" if run.has_teacher else ""),
        "",
        *_of_programs(rows, where.chip),
        "",
        *_of_run(account),
        *disk.lines(run, account.disk),
        "",
        *_steps(run, account, result),
    ]
    if "largest_prompts_per_step" in result:
        lines.append(f"largest prompts per step: {result['largest_prompts_per_step']}")
    worst = max(rows, key=lambda row: fit.excess(row, where.chip))
    if over := fit.excess(worst, where.chip):
        lines.append(
            f"DOES NOT FIT, by {over / 1e9:.2f} GB a chip; "
            f"{fit.fix(run, worst.name, where.mesh.size)}"
        )
    return "\n".join(lines)


def _of_programs(rows: list[Row], chip: Chip) -> list[str]:
    lines = [
        "            GB per chip: the compiler's  + the rest               compile,  s of a call"
        " (model)",
        "program     arguments  temporaries   peak  resident  headroom    s (CPU s)     likely  "
        "full length  bound",
    ]
    for row in rows:
        c = row.compiled
        lines.append(
            f"{row.name:11}{c.arguments / 1e9:10.2f}{c.temporaries / 1e9:13.2f}{c.peak / 1e9:7.2f}"
            f"{row.resident / 1e9:10.2f}{(chip.memory - row.memory) / 1e9:10.2f}"
            f"{c.compile_seconds:8.0f} ({c.compile_cpu_seconds:.0f})"
            f"{_seconds(row.likely_seconds):>11}{_seconds(row.model_seconds):>13}  {row.bound}"
        )
    for row in rows:
        if row.flops:
            hbm = "unread" if row.compiled.hbm_bytes is None else f"{row.compiled.hbm_bytes:.3g}"
            ratio = "" if row.counted is None else f"; {row.counted:.3g} {row.unit}, "
            ratio += "" if row.counted is None else f"{row.counted / row.floor:.3f} x the floor"
            lines.append(
                f"  {row.name}: {row.flops:.3g} matmul FLOPs and {hbm} HBM bytes a chip{ratio}"
            )
    for row in rows:
        for found in row.compiled.collectives or []:
            place = "in loops" if found.in_loop else "outside"
            lines.append(
                f"  {row.name}: {found.count} {found.kind} {place}, the largest "
                f"{found.largest / 1e6:.1f} MB"
            )
    return lines


def _of_run(account: Ledger) -> list[str]:
    """Sections of lines with their basis."""
    seconds = lambda line: f"{_seconds(line.likely):>10}{_seconds(line.most):>13}"
    size = lambda line: f"{_size(line.most):>23}"
    sections = (
        ("seconds of the run                    likely  full length", account.seconds, seconds),
        ("bytes over the host bus", account.bus, size),
        ("memory of the host", account.host, size),
    )
    return [
        text
        for title, lines, figures in sections
        for text in (title, *(_line(line, figures(line)) for line in lines))
    ]


def _line(line: Line, figures: str) -> str:
    return f"  {line.name:30}{figures}  {line.basis:9} {line.note}".rstrip()


def _steps(run: RunConfig, account: Ledger, result: dict) -> list[str]:
    from gemma_grpo.planning import batches

    likely, most = account.hours()
    lines = [f"the run: {likely:.2f} hours, at full lengths {most:.2f}, by these lines"]
    if math.isnan(most):
        lines = ["the run: how long it takes is unknown"]
    if account.step.most:
        number, bound = result["steps_in_hours"].values()
        epochs = result["gsm8k_epochs_in_hours"]["likely"]
        is_known = number is not None and "gsm8k" in run.data.source
        of_gsm8k = f" ({epochs:.1f} epochs of GSM8K)" if is_known else ""
        lines.append(
            f"in {result['hours']:g} hours, beside all else: "
            + (
                "an unknown number of GRPO steps (the chip's speed is not known)"
                if number is None
                else f"{number} GRPO steps{of_gsm8k}, {bound} at full lengths"
            )
        )
    P, S, T = (
        run.grpo.prompts_per_step,
        run.model.max_prompt_length,
        run.model.max_completion_length,
    )
    prompts = batches.prompt_lengths(P, S)
    mean = batches.completion_lengths(P * run.grpo.num_generations, T).mean()
    return [
        *lines,
        "likely: completions as long as benchmarks/lengths.py has them (synthetic, mean "
        f"{mean:.0f} of {T}), prompts of {prompts.min()} to {prompts.max()} tokens",
    ]


def _seconds(value: int | float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _size(num_bytes: int | float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


if __name__ == "__main__":
    cli.start(main)
