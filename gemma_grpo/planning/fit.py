"""Will this run fit on those chips, and what does each of its programs cost there?

Compiles a run's programs for the mesh's devices. Memory, collectives and the bytes of a decode step
are the compiler's, per chip; FLOPs are those of the program as traced; floors are from stated
formulas (`roofline.py`), at the full token budgets. Times are a roofline model's: the FLOPs as
traced and the bytes of the formulas at the chip's published limits, so that they are bounds from
below.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_grpo import model
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.evaluation.config import evaluation_prompts
from gemma_grpo.kernels import lm_head_logps, packed_attention
from gemma_grpo.model import Gemma3Config
from gemma_grpo.planning import batches, compiled, programs, roofline, traced
from gemma_grpo.planning.ahead import Ahead
from gemma_grpo.planning.chips import Chip
from gemma_grpo.planning.compiled import Compiled
from gemma_grpo.planning.programs import Program, SpecialIds
from gemma_grpo.planning.roofline import Work
from gemma_grpo.runtime import LAYOUTS

MOST_PROMPTS = 4096  # a step; the search for the largest batch ends there


@dataclass(frozen=True)
class Row:
    """One program of a run.

    Attributes:
        compiled: the compiler's figures.
        resident: bytes of a chip in memory beside its arguments.
        flops: of its matmuls, as traced, at the full budgets.
        counted, floor: measured cost and its lower bound, in `unit`: of a rollout the HBM bytes of
            a decode step (the bound leaves out what the compiler keeps on chip from step to step;
            None where the program's text could not be read), of a copy all HBM bytes, else matmul
            FLOPs.
        model_seconds, bound: of one call at the full budgets, and which limit sets them.
        likely_seconds: of one call at the lengths of `batches.completion_lengths`.
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
    likely_seconds: float

    @property
    def memory(self) -> int:
        """Bytes of a chip at the worst moment."""
        return self.compiled.peak + self.resident


def plan(
    run: RunConfig,
    architecture: Gemma3Config,
    mesh: Mesh,
    chip: Chip,
    ids: SpecialIds = programs.GEMMA_IDS,
    stages: Sequence[str] | None = None,
) -> list[Row]:
    """Compile each program of a run, or of the `stages` that are left of it, and say on stderr
    which. Raises UserError where its settings do not divide over the devices, or XLA itself finds
    no room."""
    found = _programs(run, architecture, mesh, ids, stages)
    return [_row(program, run, architecture, mesh, chip) for program in _told(found)]


def _programs(
    run: RunConfig,
    architecture: Gemma3Config,
    mesh: Mesh,
    ids: SpecialIds,
    stages: Sequence[str] | None,
) -> list[Program]:
    """`programs.of_run`. Raises UserError where the settings do not divide over the devices."""
    for name, number in run.batch_sizes.items():
        meshes.check_divisible(mesh, name=name, size=number)
    LAYOUTS[run.model.rollout_layout].check(architecture, mesh.size)
    return programs.of_run(run, architecture, mesh, ids, stages)


def _told(found: Sequence[Program]) -> Iterator[Program]:
    """These, with a line on stderr before each."""
    for number, program in enumerate(found, start=1):
        line = f"compiling {program.name} ({number} of {len(found)})"
        print(line, file=sys.stderr, flush=True)
        yield program


def _row(
    program: Program, run: RunConfig, architecture: Gemma3Config, mesh: Mesh, chip: Chip
) -> Row:
    if program.teacher is not None:  # it has no adapters
        architecture = program.teacher
        run = replace(run, model=replace(run.model, lora=model.NO_LORA))
    trace = program.trace()
    try:
        read = compiled.compile_and_read(trace.lower())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = " ".join(str(error).split())[:200]
        advice = fix(run, program.name, mesh.size)
        raise UserError(f"{program.name} does not fit: {line}; {advice}") from error
    budget, platform = run.model.max_completion_length, mesh.devices.flat[0].platform
    needed = full = work_of(program, run, architecture, mesh.size)
    likely, flops = work_of(program, run, architecture, mesh.size, "likely"), 0
    if program.kind == "copy":
        moved = sum(found.count for found in read.collectives or [])
        full = likely = [Work(0, 2 * read.arguments, moved)]  # read, and written
        cost = read.hbm_bytes, read.arguments, "HBM bytes"
    elif program.kind == "rollout":
        flops = traced.matmul_flops(trace, platform=platform, turns=budget)
        floor = needed[-1].bytes / budget - (read.kept_on_chip or 0)
        cost = read.loop_bytes, floor, "HBM bytes a decode step"
    else:
        flops, likely_flops = (
            traced.matmul_flops(
                trace, platform=platform, **packs_of(program, run, architecture, mesh.size, lengths)
            )
            for lengths in ("full", "likely")
        )
        cost = flops, needed[0].flops, "matmul FLOPs"
        full, likely = [replace(needed[0], flops=flops)], [replace(likely[0], flops=likely_flops)]
    longest = max(full, key=lambda part: part.seconds(chip))
    return Row(
        program.name,
        read,
        program.resident,
        flops,
        *cost,
        model_seconds=sum(part.seconds(chip) for part in full),
        bound=longest.bound(chip),
        likely_seconds=sum(part.seconds(chip) for part in likely),
    )


def work_of(
    program: Program,
    run: RunConfig,
    architecture: Gemma3Config,
    num_chips: int,
    lengths: batches.Lengths = "full",
) -> list[Work]:
    """One chip's share of what a program must do, in parts that follow one another; nothing of a
    copy. Of updates and scores it is that of the full budgets."""
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    P = program.size[0] / num_chips
    B = P * program.size[1]
    if program.kind == "rollout":
        prompt_ids = program.arguments[1]
        shapes = {
            "num_prompts": P,
            "prompt_length": prompt_ids.shape[1],
            "shards": num_chips if run.model.rollout_layout == "tensor_parallel" else 1,
        }
        turns = T  # until the last row has ended
        if lengths == "likely":
            turns = int(batches.completion_lengths(round(B * num_chips), T).max())
        step = roofline.decode_step(architecture, num_rows=B, num_slots=T, **shapes)
        return [
            roofline.prefill(architecture, **shapes),
            Work(turns * step.flops, turns * step.bytes, turns * step.collectives),
        ]
    if program.kind == "copy":
        return []
    adapters, _ = model.partition(model.abstract(architecture, run.model.lora)[1])
    sizes = {
        "block_tokens": P * S + B * T,
        "head_tokens": B * T,
        "attended": P * roofline.seen_pairs(architecture, before=0, tokens=S)
        + B * roofline.seen_pairs(architecture, before=S, tokens=T),
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(adapters)),
    }
    if program.kind == "score":
        return [roofline.log_probs(architecture, **sizes)]
    return [roofline.update(architecture, **sizes, remat=run.model.remat)]


def packs_of(
    program: Program,
    run: RunConfig,
    architecture: Gemma3Config,
    num_devices: int,
    lengths: batches.Lengths = "full",
) -> dict:
    """What the trace of an update or a score does not know: how many packs of each shape a device
    computes, the pairs of blocks that attention goes through in one, and how many rows the head
    takes of each (arguments of `traced.matmul_flops`)."""
    packs = batches.packs(run, program.stage, num_devices, lengths)
    return pack_loops(packs, architecture, num_devices)


def pack_loops(
    packs: Sequence[dict[str, np.ndarray]], architecture: Gemma3Config, num_devices: int
) -> dict:
    """`packs_of` of the packs at hand; the pairs are the mean of those that are used."""
    if "count" not in packs[0]:
        one = {name: array[: len(array) // num_devices] for name, array in packs[0].items()}
        return {"steps": mean_pairs(architecture, one)}
    turns, steps, branches = [], [], []
    for of_shape in packs:
        count, most = int(of_shape["count"][0]), len(of_shape["slots"]) // num_devices
        sizes = lm_head_logps.sizes_of(of_shape["slots"].shape[1], architecture.vocab_size)
        packs_of_shape = {
            name: array.reshape(most * num_devices, -1, *array.shape[1:])
            for name, array in of_shape.items()
            if name != "count"
        }
        used = [n for n in range(most * num_devices) if n % most < count]
        pairs = [
            mean_pairs(architecture, {name: each[n] for name, each in packs_of_shape.items()})
            for n in used
        ]
        completions = packs_of_shape["completion_mask"].sum(axis=(1, 2))[used]
        turns.append(count)
        steps.append(float(np.mean(pairs)) if pairs else 0.0)
        branches.append(np.searchsorted(sizes, completions).tolist())
    return {"turns": turns, "steps": steps, "branches": branches}


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
        bigger = replace(run.grpo, prompts_per_step=2 * run.grpo.prompts_per_step)
        doubled = replace(run, grpo=bigger)
        try:
            found = programs.of_step(doubled, architecture, mesh)
            rows = [_row(program, doubled, architecture, mesh, chip) for program in found]
        except UserError:
            break
        if any(row.memory > chip.memory for row in rows):
            break
        run = doubled
    return run.grpo.prompts_per_step


def require_room(run: RunConfig, mesh: Mesh, chip: Chip, stages: Sequence[str]) -> None:
    """Raises UserError if a program that `run` needs for the `stages` that are left does not fit:
    by how much, and what to change. The programs are compiled side by side; the run finds them in
    memory, and a later one in the compilation cache."""
    architecture, ids = programs.model_of(run.model)
    found = _programs(run, architecture, mesh, ids, stages)
    with Ahead() as ahead:
        if jax.process_count() == 1:  # the compilers of several may wait for one another
            ahead.start(found)
        for program in _told(found):
            ahead.wait([program.name])
            row = _row(program, run, architecture, mesh, chip)
            if over := excess(row, chip):
                raise UserError(
                    f"{row.name} does not fit, by {over / 1e9:.2f} GB a chip; "
                    f"{fix(run, row.name, mesh.size)}, or insist with --ignore-plan"
                )


def excess(row: Row, chip: Chip) -> float:
    """Bytes that a program needs beyond a chip's memory; 0 if it fits."""
    return max(row.memory - chip.memory, 0.0)


def fix(run: RunConfig, program: str, num_devices: int) -> str:
    """Which setting to change where this program does not fit, the cheapest first."""
    if program in ("greedy", "sampled"):
        half = replace(run.evaluation, batch_size=run.evaluation.batch_size // 2)
        if (prompts := evaluation_prompts(half)) and not prompts % num_devices:
            return f"set --evaluation.batch-size {half.batch_size}"
        return "take fewer --evaluation.num-samples"
    if program == "own":
        return "take fewer --sft.own.num-samples, or a smaller --sft.own.batch-size"
    if program == "rollout":
        if run.grpo.prompts_per_step > num_devices:
            return "take fewer --grpo.prompts-per-step"
        return "take fewer --grpo.num-generations"
    if program in ("state", "reshard"):
        return "take more chips" if run.model.lora.rank else "set --model.lora.rank 16"
    stage, config = ("sft", run.sft) if program.startswith("sft") else ("grpo", run.grpo)
    if program.endswith("update") and run.model.remat != "full":
        return f"set --model.remat {'dots' if run.model.remat == 'none' else 'full'}"
    least = run.model.max_prompt_length + run.model.max_completion_length
    if not config.pack_tokens or config.pack_tokens > least:
        return f"set --{stage}.pack-tokens {max(least, config.pack_tokens // 2)}"
    if not run.model.lora.rank:
        return "set --model.lora.rank 16"
    return "take more chips, or a smaller --model.max-completion-length"
