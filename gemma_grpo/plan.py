"""The planning command: will this run fit on those chips, and what will a step take there?

python -m gemma_grpo.plan --preset gemma3-1b --topology v5e:2x4

Compiles the programs of a GRPO step with the real TPU compiler; no TPU is needed. Memory and
collectives are the compiler's, per chip; times are a roofline model's, from stated formulas
(`roofline.py`), at the full token budgets. Nothing is measured.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace

import jax
from jax.sharding import Mesh

from gemma_grpo import cli, compiled, model, presets, programs, roofline, topology, weights
from gemma_grpo import mesh as meshes
from gemma_grpo.compiled import Compiled
from gemma_grpo.config import RunConfig
from gemma_grpo.errors import UserError
from gemma_grpo.model import Gemma3Config
from gemma_grpo.rollout import LAYOUTS
from gemma_grpo.roofline import Chip, Work

SESSION_HOURS = 9  # of Kaggle
GSM8K_PROBLEMS = 7473  # in its training split
MOST_PROMPTS = 4096  # a step; the search for the largest batch ends there


@dataclass(frozen=True)
class Options:
    """Flags of the command itself; all others are a run's."""

    preset: str = "gemma3-1b"
    """Named configuration that the other flags change."""
    topology: str = "v5e:2x4"
    """Chips to compile for."""
    search: bool = False
    """Also double the prompts per step until they no longer fit."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Row:
    """One program: the compiler's figures, what else is in memory (`Program.resident`), and the
    model's."""

    name: str
    compiled: Compiled
    resident: int
    model_seconds: float
    bound: str

    @property
    def memory(self) -> int:
        """Bytes of a chip at the worst moment."""
        return self.compiled.peak + self.resident


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 if the run does not fit."""
    return cli.guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=Options.preset)
    default = presets.preset(first.parse_known_args(arguments)[0].preset)
    options, run = cli.parse_run(
        arguments,
        Options(),
        default,
        command="plan",
        description="Compile a run for a TPU that is not there, and read off its memory.",
    )
    chip, architecture = roofline.chip_of(options.topology), model_config(run.model.weights)
    jax.config.update("jax_platforms", "cpu")  # the chips planned for are not this machine's
    mesh = meshes.data_mesh(topology.devices(options.topology))
    rows = plan(run, architecture, mesh, chip)
    fits = all(row.memory <= chip.memory for row in rows)
    result = summary(run, rows, chip, mesh.size)
    if options.search:
        result["largest_prompts_per_step"] = largest(run, architecture, mesh, chip) if fits else 0
    print(json.dumps(result) if options.json else table(run, rows, result, chip, options.topology))
    return 0 if fits else 1


def model_config(where: str) -> Gemma3Config:
    """The architecture by its own name, or that of weights at hand."""
    return model.CONFIGS[where] if where in model.CONFIGS else weights.open_source(where).config


def plan(run: RunConfig, architecture: Gemma3Config, mesh: Mesh, chip: Chip) -> list[Row]:
    """Compile each program of a step. Raises UserError where XLA itself finds no room."""
    meshes.check_divisible(
        mesh,
        name="grpo.prompts_per_step / accumulation_steps",
        size=run.grpo.prompts_per_step // run.grpo.accumulation_steps,
    )
    LAYOUTS[run.model.rollout_layout].check(architecture, mesh.size)
    rows = []
    for program in programs.of_step(run, architecture, mesh):
        try:
            read = compiled.compile_and_read(program.lower())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = " ".join(str(error).split())[:200]
            raise UserError(f"{program.name} does not fit: {line}; {_mend(run)}") from error
        work = work_of(program.name, run, architecture, mesh.size)
        seconds = sum(part.seconds(chip) for part in work)
        longest = max(work, key=lambda part: part.seconds(chip))
        rows.append(Row(program.name, read, program.resident, seconds, longest.bound(chip)))
    return rows


def work_of(name: str, run: RunConfig, architecture: Gemma3Config, num_chips: int) -> list[Work]:
    """One chip's share of a program at the full budgets, in parts that follow one another."""
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    P = run.grpo.prompts_per_step / num_chips
    B = P * run.grpo.num_generations
    tokens = {"block_tokens": P * S + B * T, "head_tokens": B * T}
    if name == "rollout":
        shapes = {
            "num_prompts": P,
            "prompt_length": S,
            "slices": num_chips if run.model.rollout_layout == "hybrid" else 1,
        }
        step = roofline.decode_step(architecture, num_rows=B, num_slots=T, **shapes)
        return [
            roofline.prefill(architecture, **shapes),
            Work(T * step.flops, T * step.bytes, T * step.collectives),
        ]
    if name in ("reference", "old"):
        return [roofline.log_probs(architecture, **tokens)]
    frozen = bool(run.model.lora.rank)
    one = roofline.update(architecture, **tokens, remat=run.model.remat, frozen=frozen)
    return [one] * run.grpo.num_iterations


def largest(run: RunConfig, architecture: Gemma3Config, mesh: Mesh, chip: Chip) -> int:
    """The most prompts a step at which all programs fit, by doubling those of `run`, which fits.
    The prompts of a pass stay as they are: more are taken in more passes."""
    while run.grpo.prompts_per_step < MOST_PROMPTS:
        bigger = replace(
            run.grpo,
            prompts_per_step=2 * run.grpo.prompts_per_step,
            accumulation_steps=2 * run.grpo.accumulation_steps,
        )
        doubled = replace(run, grpo=bigger)
        try:
            rows = plan(doubled, architecture, mesh, chip)
        except UserError:
            break
        if any(row.memory > chip.memory for row in rows):
            break
        run = doubled
    return run.grpo.prompts_per_step


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
        "fits": all(row.memory <= chip.memory for row in rows),
    }


def table(run: RunConfig, rows: list[Row], result: dict, chip: Chip, topology_name: str) -> str:
    """What a person reads."""
    lines = [
        f"{run.model.weights} on {topology_name}: {run.grpo.prompts_per_step} prompts x "
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
    over = max(row.memory for row in rows) - chip.memory
    if over > 0:
        lines.append(f"DOES NOT FIT, by {over / 1e9:.2f} GB a chip; {_mend(run)}")
    return "\n".join(lines)


def _mend(run: RunConfig) -> str:
    """Which setting to change, the cheapest first."""
    if not run.model.remat:
        return "set --model.remat"
    return "raise --grpo.accumulation-steps, or set --model.lora.rank 16"


if __name__ == "__main__":
    sys.exit(main())
