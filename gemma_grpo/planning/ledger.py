"""What a whole run takes: seconds of everything, bytes over the host bus, host memory.

Each line says what it rests on. Counted: from the arrays and programs of the run itself. Modelled:
a chip's work at its published limits, or bytes at an assumed speed of the disk. Measured: on the
host that plans. Not in it: installing, the host's own work in a step (encoding, scoring, packing),
and what a fresh process compiles of single operations.
"""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from gemma_grpo import model
from gemma_grpo.config import RunConfig
from gemma_grpo.model import Gemma3Config
from gemma_grpo.planning import batches, programs
from gemma_grpo.planning import disk as disks
from gemma_grpo.planning.fit import Row
from gemma_grpo.training.deadline import DISK_BYTES_PER_SECOND, REPORT_SECONDS, Deadline
from gemma_grpo.training.saving import HOST_BYTES_PER_SECOND, SMALL

FLOAT32, BFLOAT16 = 4, 2  # bytes
OF_GRPO_STEPS = ("GRPO steps", "GRPO snapshots", "GRPO checkpoints")  # lines that grow with them

Basis = Literal["counted", "modelled", "measured"]
Number = int | float


@dataclass(frozen=True)
class Line:
    """One entry.

    Attributes:
        likely, most: at the lengths of `batches.completion_lengths`, and at full lengths; seconds
            or bytes.
        note: what it is made of.
    """

    name: str
    likely: Number
    most: Number
    basis: Basis
    note: str


@dataclass(frozen=True)
class Ledger:
    """A run's lines.

    Attributes:
        seconds: in the order in which they pass.
        bus: bytes between the host and all devices, of a step and of a batch of evaluation.
        host: bytes of the host's memory; the largest counts, not the sum.
        disk: of its files, in bytes.
        step: a GRPO step's seconds, its share of checkpoints and snapshots included; 0 without
            GRPO.
        before: the seconds of all lines but those of the GRPO steps (`OF_GRPO_STEPS`).
    """

    seconds: list[Line]
    bus: list[Line]
    host: list[Line]
    disk: disks.Disk
    step: Line
    before: Line

    def hours(self) -> tuple[Number, Number]:
        """That the whole run takes: likely, and at the most."""
        likely = sum(line.likely for line in self.seconds) / 3600
        return likely, sum(line.most for line in self.seconds) / 3600

    def steps_in(self, hours: Number) -> tuple[Number, Number]:
        """GRPO steps that `hours` hold beside all else of the run, likely and at full lengths; NaN
        where the chip's speed is not known."""
        return tuple(
            _steps(3600 * hours - before, step)
            for before, step in (
                (self.before.likely, self.step.likely),
                (self.before.most, self.step.most),
            )
        )


def check_hours(hours: Number) -> None:
    """Raises UserError for what is no number above 0."""
    Deadline(hours)


def _steps(seconds: Number, each: Number) -> Number:
    if math.isnan(seconds + each) or not each:
        return math.nan
    return max(0, math.floor(seconds / each))


def of_run(run: RunConfig, config: Gemma3Config, rows: Sequence[Row], num_devices: int) -> Ledger:
    """The ledger of a run whose programs are `rows` (`fit.plan`)."""
    _, everything = parameters(run, config)
    teacher = programs.teacher_of(run)
    of_teacher = 0 if teacher is None else _size(teacher)
    files, calls = disks.of_run(run, config), {row.name: row for row in rows}
    step = _of_step(run, calls) if "grpo" in run.stage_list else Line("", 0, 0, "modelled", "")
    lines = [
        _disk("loading", BFLOAT16 * (everything + of_teacher), "the weights, in bfloat16"),
        _compilation(rows),
        _evaluation("base", run, calls, num_devices),
    ]
    for stage in run.stage_list:
        name, number = stage.upper(), _settings(run, stage).num_steps
        if stage == "sft":
            lines += _own(run, calls)
            call = calls["sft update"]
            each = Line("", call.likely_seconds, call.model_seconds, "modelled", "")
        else:
            each = step
        steps = _times(f"{name} steps", number, each)
        lines += [
            steps,
            *_snapshots(stage, run, calls, num_devices),
            _saving(run, stage, steps, files.checkpoint),
            _disk(f"{name} weights", 2 * files.weights, "written and read back"),
            _evaluation(name, run, calls, num_devices),
        ]
    lines += [
        Line("report", REPORT_SECONDS, REPORT_SECONDS, "modelled", "an assumption"),
        _disk("export", (BFLOAT16 + FLOAT32) * everything, "read, and written in float32"),
    ]
    of_steps = [line for line in lines if line.name in OF_GRPO_STEPS]
    each = _sum("GRPO step", of_steps, 1 / run.grpo.num_steps)
    rest = _sum("all else", [line for line in lines if line not in of_steps])
    bus = bus_lines(run, num_devices)
    return Ledger(lines, bus, _host_lines(run, config, files.checkpoint), files, each, rest)


def parameters(run: RunConfig, config: Gemma3Config) -> tuple[int, int]:
    """How many are trained, and how many the model has, without adapters."""
    adapter, base = model.partition(model.abstract(config, run.model.lora)[1])
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    return count(adapter if run.model.lora.rank else base), count(base)


def _size(config: Gemma3Config) -> int:
    """Parameters of an architecture."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract(config)[1]))


def bus_lines(run: RunConfig, num_devices: int) -> list[Line]:
    """Bytes that pass between the host and all devices together, beside scalars and keys. Weights
    do not: the sampler's are made on the devices."""
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    prompt, slot = S * (4 + 1), T * (4 + 1 + 4)  # ids and mask; ids, mask and log-probs
    lines = []

    def note(name: str, up: int, down: int, what: str) -> None:
        lines.append(Line(f"{name}, to the devices", up, up, "counted", what))
        if down:
            lines.append(Line(f"{name}, from them", down, down, "counted", ""))

    packs = {
        stage: sum(
            array.nbytes
            for of_shape in batches.packs(run, stage, num_devices)
            for array in of_shape.values()
        )
        for stage in run.stage_list
    }
    if "sft" in packs:
        note("an SFT step", packs["sft"], 0, "packs")
    if "grpo" in packs:
        P, G = batches.size(run, "grpo")
        # Of the rollout and one value for each row; then the trainer's log-probs.
        up, down = P * prompt + 4 * P * G + packs["grpo"], P * G * (slot + 1 + 4 + 4 * T)
        note("a GRPO step", up, down, "prompts, rewards, packs; rollouts, advantages, log-probs")
    B = batches.evaluation_prompts(run, num_devices)["greedy"]
    note("a greedy batch", B * prompt, B * (slot + 1), "prompts; completions")
    return lines


def _settings(run: RunConfig, stage: str):
    return run.sft if stage == "sft" else run.grpo


def _of_step(run: RunConfig, calls: dict[str, Row]) -> Line:
    """Seconds of a GRPO step. Rounds of resampling count at the most."""
    beside: tuple[str, ...] = ("reshard", "advantages", "reference", "teacher", "old")
    times = {name: 1 for name in beside if name in calls}
    times |= {"rollout": 1, "update": run.grpo.num_iterations}
    likely = sum(number * calls[name].likely_seconds for name, number in times.items())
    times["rollout"] += run.grpo.resample_rounds
    most = sum(number * calls[name].model_seconds for name, number in times.items())
    return Line("GRPO step", likely, most, "modelled", ", ".join(times))


def _evaluation(name: str, run: RunConfig, calls: dict[str, Row], num_devices: int) -> Line:
    problems, prompts = batches.held_out(run.data), batches.evaluation_prompts(run, num_devices)
    times = {kind: -(-problems // size) for kind, size in prompts.items()}
    likely = sum(number * calls[kind].likely_seconds for kind, number in times.items())
    most = sum(number * calls[kind].model_seconds for kind, number in times.items())
    note = f"{problems} problems, {sum(times.values())} batches"
    return Line(f"{name} evaluation", likely, most, "modelled", note)


def _own(run: RunConfig, calls: dict[str, Row]) -> Sequence[Line]:
    """Of own demonstrations, if they are sampled."""
    if not run.samples_demonstrations:
        return []
    problems, call = disks.asked_problems(run), calls["own"]
    number = -(-problems // run.sft.own.prompts)
    likely, most = number * call.likely_seconds, number * call.model_seconds
    note = f"{problems} problems x {run.sft.own.num_samples}, {number} batches"
    return [Line("own demonstrations", likely, most, "modelled", note)]


def _snapshots(
    stage: str, run: RunConfig, calls: dict[str, Row], num_devices: int
) -> Sequence[Line]:
    """Of GRPO, if any are taken: batches of the greedy evaluation, which they fill in part."""
    number = batches.snapshots(run)
    if stage != "grpo" or not number:
        return []
    prompts = batches.evaluation_prompts(run, num_devices)["greedy"]
    problems = min(run.evaluation.snapshot_problems, batches.held_out(run.data))
    of_each, greedy = -(-problems // prompts), calls["greedy"]
    likely, most = (
        number * of_each * seconds for seconds in (greedy.likely_seconds, greedy.model_seconds)
    )
    note = f"{number} of {problems} problems, {of_each} batches each"
    return [Line("GRPO snapshots", likely, most, "modelled", note)]


def _times(name: str, number: int, each: Line) -> Line:
    note = f"{number} of {each.likely:.3g} s, at full lengths {each.most:.3g} s"
    if math.isnan(each.most):
        note = f"{number}, how long each takes is unknown"
    return Line(name, number * each.likely, number * each.most, "modelled", note)


def _saving(run: RunConfig, stage: str, steps: Line, num_bytes: int) -> Line:
    """That training stands still to save: the state's way to the host, within the share that is
    allowed; it is written while training goes on."""
    saving, every = run.checkpoint, _settings(run, stage).checkpoint_every
    by_steps = (_settings(run, stage).num_steps - 1) // every if every else 0
    each = num_bytes / HOST_BYTES_PER_SECOND

    def still(seconds: Number) -> Number:
        by_time = seconds // (60 * saving.minutes) if saving.minutes else 0
        due = each * max(by_steps, by_time)
        return due if num_bytes < SMALL else min(due, saving.share * seconds)

    note = f"at most {saving.share:.0%}, each {num_bytes / 1e9:.3g} GB at 1 GB/s to the host"
    name = f"{stage.upper()} checkpoints"
    return Line(name, still(steps.likely), still(steps.most), "modelled", note)


def _compilation(rows: Sequence[Row]) -> Line:
    seconds = sum(row.compiled.compile_seconds for row in rows)
    cpu = sum(row.compiled.compile_cpu_seconds for row in rows)
    note = f"{len(rows)} programs, {cpu:.0f} CPU s; from the cache, less"
    return Line("compilation", seconds, seconds, "measured", note)


def _disk(name: str, num_bytes: int, what: str) -> Line:
    seconds = num_bytes / DISK_BYTES_PER_SECOND
    note = f"{what}, {num_bytes / 1e9:.3g} GB at {DISK_BYTES_PER_SECOND / 1e6:.0f} MB/s"
    return Line(name, seconds, seconds, "modelled", note)


def _host_lines(run: RunConfig, config: Gemma3Config, checkpoint: int) -> list[Line]:
    in_float32 = not run.model.lora.rank or run.model.dtype == "float32"
    itemsize = FLOAT32 if in_float32 else BFLOAT16
    largest = itemsize * config.vocab_size * config.embed_dim
    if teacher := programs.teacher_of(run):
        of_teacher = jnp.dtype(run.model.dtype).itemsize * teacher.vocab_size * teacher.embed_dim
        largest = max(largest, of_teacher)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        Line("compiling", resident, resident, "measured", "this process at its most"),
        Line("loading", largest, largest, "counted", "the largest array, beside the process"),
        Line("a checkpoint", checkpoint, checkpoint, "counted", "on its way to disk"),
    ]


def _sum(name: str, lines: Sequence[Line], times: float = 1.0) -> Line:
    likely, most = (sum(getattr(line, side) for line in lines) for side in ("likely", "most"))
    return Line(name, times * likely, times * most, "modelled", "")
