"""The planning command: will this run fit on those chips, and what will a step take there?

python -m gemma_grpo.plan --preset gemma3-1b --topology v5e:2x4

Compiles the programs of a GRPO step with the real TPU compiler; no TPU is needed (`planning/fit.py`
says what each figure is). On a TPU host it plans for the chips that are there. Nothing is measured.
"""

import json
import sys
from dataclasses import asdict, dataclass

import jax

from gemma_grpo import cli, presets
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.planning import chips, disk, fit, topology
from gemma_grpo.planning.chips import Chip
from gemma_grpo.planning.fit import Row

SESSION_HOURS = 9  # of Kaggle
GSM8K_PROBLEMS = 7473  # in its training split


@dataclass(frozen=True)
class Options:
    """Flags of the command itself; all others are a run's."""

    preset: str = "gemma3-1b"
    """Named configuration that the other flags change."""
    topology: str = ""
    """Chips to compile for, such as v5e:2x4 or v5e:16x16; those of this host if it has any, else
    v5e:2x4."""
    search: bool = False
    """Also double the prompts per step until they no longer fit."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 if the run does not fit."""
    return cli.guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    default = presets.preset(cli.flag(arguments, "preset", Options.preset))
    options, run = cli.parse_run(
        arguments,
        Options(),
        default,
        command="plan",
        description="Compile a run for a TPU that is not there, and read off its memory.",
    )
    architecture = fit.model_config(run.model.weights)
    if not options.topology and topology.is_here():
        devices, where = jax.devices(), f"{jax.device_count()} chips of this host"
        chip = chips.chip_here(devices)
        if chip is None:
            kind = devices[0].device_kind
            raise UserError(f"the memory of a {kind} is not known; name chips with --topology")
    else:
        where = options.topology or "v5e:2x4"
        jax.config.update("jax_platforms", "cpu")  # the chips planned for are not this machine's
        devices = topology.devices(where)
        chip = chips.chip_of(where, devices)
    mesh = meshes.data_mesh(devices)
    rows = fit.plan(run, architecture, mesh, chip)
    result = summary(run, rows, chip, mesh.size)
    if options.search:
        result["largest_prompts_per_step"] = (
            fit.largest(run, architecture, mesh, chip) if result["fits"] else 0
        )
    print(json.dumps(result) if options.json else table(run, rows, result, chip, where))
    return 0 if result["fits"] else 1


def summary(run: RunConfig, rows: list[Row], chip: Chip, num_chips: int) -> dict:
    """What `--json` prints."""
    step_seconds = sum(row.model_seconds for row in rows)
    steps = SESSION_HOURS * 3600 / step_seconds
    return {
        "chips": num_chips,
        "memory_per_chip": chip.memory,
        "programs": [asdict(row) | {"headroom": chip.memory - row.memory} for row in rows],
        "compile_seconds": sum(row.compiled.compile_seconds for row in rows),
        "model_step_seconds": step_seconds,
        "model_steps_per_session": int(steps),
        "model_gsm8k_epochs_per_session": steps * run.grpo.prompts_per_step / GSM8K_PROBLEMS,
        "fits": not any(fit.excess(row, chip) for row in rows),
    }


def table(run: RunConfig, rows: list[Row], result: dict, chip: Chip, where: str) -> str:
    """What a person reads."""
    lines = [
        f"{run.model.weights} on {where}: {run.grpo.prompts_per_step} prompts x "
        f"{run.grpo.num_generations}, {run.model.max_prompt_length} + "
        f"{run.model.max_completion_length} tokens, {run.model.dtype}"
        + (f", LoRA rank {run.model.lora.rank}" if run.model.lora.rank else ", all weights"),
        "",
        "         GB per chip: the compiler's  + the rest                   seconds (model)",
        "program  arguments  temporaries   peak  resident  headroom  compile  full length  bound",
    ]
    for row in rows:
        c = row.compiled
        lines.append(
            f"{row.name:8} {c.arguments / 1e9:9.2f} {c.temporaries / 1e9:12.2f} {c.peak / 1e9:6.2f}"
            f" {row.resident / 1e9:9.2f} {(chip.memory - row.memory) / 1e9:9.2f}"
            f" {c.compile_seconds:6.0f} s {row.model_seconds:11.2f}   {row.bound}"
        )
    lines += [
        f"  {row.name}: {row.flops:.3g} matmul FLOPs and {row.compiled.hbm_bytes:.3g} HBM bytes a "
        f"chip; {row.counted:.3g} {row.unit}, {row.counted / row.floor:.3f} x the floor"
        for row in rows
    ]
    for row in rows:
        for found in row.compiled.collectives:
            place = "in loops" if found.in_loop else "outside"
            lines.append(
                f"  {row.name}: {found.count} {found.kind} {place}, the largest "
                f"{found.largest / 1e6:.1f} MB"
            )
    lines += [
        "",
        f"a step: {result['model_step_seconds']:.2f} s (model); in {SESSION_HOURS} hours "
        f"{result['model_steps_per_session']} steps, "
        f"{result['model_gsm8k_epochs_per_session']:.1f} epochs of GSM8K",
    ]
    if "largest_prompts_per_step" in result:
        lines.append(f"largest prompts per step: {result['largest_prompts_per_step']}")
    lines += disk.lines(run, disk.of_run(run, fit.model_config(run.model.weights)))
    if over := max(fit.excess(row, chip) for row in rows):
        lines.append(f"DOES NOT FIT, by {over / 1e9:.2f} GB a chip; {fit.fix(run)}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.start(main)
