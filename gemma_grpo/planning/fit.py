"""Will this run fit on those chips, and what does a step cost there?

Compiles the programs of a GRPO step for the mesh's devices. Memory, collectives and the bytes of a
decode step are the compiler's, per chip; FLOPs are those of the program as traced; floors and times
are a roofline model's, from stated formulas (`roofline.py`), at the full token budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_grpo import model, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.kernels import packed_attention
from gemma_grpo.model import Gemma3Config
from gemma_grpo.planning import compiled, programs, roofline, traced
from gemma_grpo.planning.chips import Chip
from gemma_grpo.planning.compiled import Compiled
from gemma_grpo.planning.roofline import Work
from gemma_grpo.runtime import LAYOUTS

MOST_PROMPTS = 4096  # a step; the search for the largest batch ends there


@dataclass(frozen=True)
class Row:
    """One program of a step.

    Attributes:
        compiled: the compiler's figures.
        flops: of its matmuls, as traced, at the full budgets.
        resident: bytes of a chip in memory beside its arguments.
        counted, floor: measured cost and its lower bound, in `unit`: of a rollout the HBM bytes of
            a decode step (the bound leaves out what the compiler keeps on chip from step to step;
            None where the program's text could not be read), else matmul FLOPs.
        model_seconds, bound: by the roofline, and which limit sets them.
    """

    name: str
    compiled: Compiled
    resident: int
    flops: int
    counted: int | float | None
    floor: int | float
    unit: str
    model_seconds: float
    bound: str

    @property
    def memory(self) -> int:
        """Bytes of a chip at the worst moment."""
        return self.compiled.peak + self.resident


def model_config(where: str) -> Gemma3Config:
    """The architecture by its own name, or that of weights at hand."""
    return model.CONFIGS[where] if where in model.CONFIGS else weights.open_source(where).config


def plan(run: RunConfig, architecture: Gemma3Config, mesh: Mesh, chip: Chip) -> list[Row]:
    """Compile each program of a step. Raises UserError where XLA itself finds no room."""
    meshes.check_divisible(mesh, name="grpo.prompts_per_step", size=run.grpo.prompts_per_step)
    LAYOUTS[run.model.rollout_layout].check(architecture, mesh.size)
    return [
        _row(program, run, architecture, mesh, chip)
        for program in programs.of_step(run, architecture, mesh)
    ]


def _row(
    program: programs.Program, run: RunConfig, architecture: Gemma3Config, mesh: Mesh, chip: Chip
) -> Row:
    trace = program.trace()
    try:
        read = compiled.compile_and_read(trace.lower())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{program.name} does not fit: {line}; {fix(run)}") from error
    work = work_of(program.name, run, architecture, mesh.size)
    budget = run.model.max_completion_length
    platform = mesh.devices.flat[0].platform
    how = {"turns": budget} if program.name == "rollout" else packs_of(run, architecture, mesh.size)
    flops = traced.matmul_flops(trace, platform=platform, **how)
    if program.name == "rollout":
        needed = work[-1].bytes / budget - (read.kept_on_chip or 0)
        cost = read.loop_bytes, needed, "HBM bytes a decode step"
    else:
        cost = flops, work[0].flops, "matmul FLOPs"
    longest = max(work, key=lambda part: part.seconds(chip))
    seconds = sum(part.seconds(chip) for part in work)
    return Row(program.name, read, program.resident, flops, *cost, seconds, longest.bound(chip))


def work_of(name: str, run: RunConfig, architecture: Gemma3Config, num_chips: int) -> list[Work]:
    """One chip's share of a program at the full budgets, in parts that follow one another."""
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    P = run.grpo.prompts_per_step / num_chips
    B = P * run.grpo.num_generations
    if name == "rollout":
        shapes = {
            "num_prompts": P,
            "prompt_length": S,
            "shards": num_chips if run.model.rollout_layout == "tensor_parallel" else 1,
        }
        step = roofline.decode_step(architecture, num_rows=B, num_slots=T, **shapes)
        return [
            roofline.prefill(architecture, **shapes),
            Work(T * step.flops, T * step.bytes, T * step.collectives),
        ]
    adapters, _ = model.partition(model.abstract(architecture, run.model.lora)[1])
    sizes = {
        "block_tokens": P * S + B * T,
        "head_tokens": B * T,
        "attended": P * roofline.seen_pairs(architecture, before=0, tokens=S)
        + B * roofline.seen_pairs(architecture, before=S, tokens=T),
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(adapters)),
    }
    if name in ("reference", "old"):
        return [roofline.log_probs(architecture, **sizes)]
    return [roofline.update(architecture, **sizes, remat=run.model.remat)] * run.grpo.num_iterations


def packs_of(run: RunConfig, architecture: Gemma3Config, num_devices: int) -> dict:
    """What a trace of an update does not know, where every row takes its full budget: how many
    packs of each shape a device computes, and the pairs of blocks that attention goes through in
    one (arguments of `traced.matmul_flops`)."""
    return pack_loops(programs.full_packs(run, num_devices), architecture, num_devices)


def pack_loops(
    packs: Sequence[dict[str, np.ndarray]], architecture: Gemma3Config, num_devices: int
) -> dict:
    """`packs_of` of the packs at hand; the pairs are the mean of those that are used."""
    if "count" not in packs[0]:
        one = {name: array[: len(array) // num_devices] for name, array in packs[0].items()}
        return {"steps": mean_pairs(architecture, one)}
    turns, steps = [], []
    for of_shape in packs:
        count, most = int(of_shape["count"][0]), len(of_shape["slots"]) // num_devices
        used = [number for number in range(most * num_devices) if number % most < count]
        pairs = [
            mean_pairs(
                architecture,
                {
                    name: np.array_split(array, most * num_devices)[number]
                    for name, array in of_shape.items()
                    if name != "count"
                },
            )
            for number in used
        ]
        turns.append(count)
        steps.append(float(np.mean(pairs)) if pairs else 0.0)
    return {"turns": turns, "steps": steps}


def mean_pairs(architecture: Gemma3Config, pack: dict[str, np.ndarray]) -> float:
    """Pairs of blocks that packed attention goes through in a layer, the mean of all layers.

    Args:
        pack: one pack's arrays.
    """
    shapes = pack["prompt_mask"].shape, pack["completion_mask"].shape
    rows = model.Rows(*shapes)
    if "slots" in pack:
        rows = model.Packed.of(jnp.asarray(pack["slots"].reshape(-1)), *shapes)
    segments = rows.segments(jnp.asarray(pack["prompt_mask"]), jnp.asarray(pack["completion_mask"]))
    count = lambda window: int(packed_attention.make_block_mask(segments, window=window).count)
    near, far = count(architecture.sliding_window), count(None)
    return near + (far - near) * sum(architecture.is_global) / architecture.num_layers


def largest(run: RunConfig, architecture: Gemma3Config, mesh: Mesh, chip: Chip) -> int:
    """The most prompts a step at which all programs fit, by doubling those of `run`, which fits.
    A pack stays as it is: more prompts are taken in more packs."""
    while run.grpo.prompts_per_step < MOST_PROMPTS:
        bigger = replace(
            run.grpo,
            prompts_per_step=2 * run.grpo.prompts_per_step,
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


def require_room(run: RunConfig, architecture: Gemma3Config, mesh: Mesh, chip: Chip) -> None:
    """Raises UserError if a program of `run` does not fit: by how much, and what to change."""
    for row in plan(run, architecture, mesh, chip):
        if over := excess(row, chip):
            raise UserError(
                f"{row.name} does not fit, by {over / 1e9:.2f} GB a chip; {fix(run)}, or insist "
                "with --ignore-plan"
            )


def excess(row: Row, chip: Chip) -> float:
    """Bytes that a program needs beyond a chip's memory; 0 if it fits."""
    return max(row.memory - chip.memory, 0.0)


def fix(run: RunConfig) -> str:
    """Which setting to change, the cheapest first."""
    if run.model.remat != "full":
        return f"set --model.remat {'dots' if run.model.remat == 'none' else 'full'}"
    least = run.model.max_prompt_length + run.model.max_completion_length
    if not run.grpo.pack_tokens or run.grpo.pack_tokens > least:
        return f"set --grpo.pack-tokens {max(least, run.grpo.pack_tokens // 2)}"
    return "set --model.lora.rank 16, or take fewer --grpo.num-generations"
