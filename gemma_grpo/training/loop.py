"""The loop around a stage's steps: restore, step, record, save, stop."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gemma_grpo.devices import processes
from gemma_grpo.errors import InterruptedRunError, UserError
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.records.metrics import MetricsWriter
from gemma_grpo.records.progress import Progress
from gemma_grpo.records.tokens import Tokens
from gemma_grpo.records.watch import Watch
from gemma_grpo.training.deadline import Deadline, OutOfTimeError
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.saving import (
    CheckpointConfig,
    Schedule,
    StageCheckpoints,
    stage_checkpoints,
)
from gemma_grpo.training.state import TrainState

# What must fit before the deadline for one more step to be taken: the stage's weights are written
# after its checkpoint, which holds them, so the checkpoint's seconds are enough for them.
ONE_MORE_STEP = ("step", "save", "save", "evaluate")


@dataclass(frozen=True)
class Snapshots:
    """Measurements between the steps of a stage, which change nothing of it.

    Attributes:
        every: steps from one to the next; 0 takes none.
        take: (step, params) -> its metrics; keeps the rest itself.
    """

    every: int = 0
    take: Callable[[int, Any], Mapping[str, Any]] = lambda step, params: {}

    def is_due(self, step: int) -> bool:
        """Whether one is taken after `step`."""
        return self.every > 0 and step % self.every == 0


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes (in the primary process alone), and what may ask it to stop.

    Attributes:
        saving: when checkpoints are written, and where.
        keep_last: write one after a stage's last step too.
        leave: takes what a stage has trained after its last step, and writes that.
        snapshots: of GRPO.
        quiet: print warnings alone.
    """

    run_dir: Path
    writer: MetricsWriter | None
    interrupt: Interrupt
    deadline: Deadline = field(default_factory=Deadline)
    saving: CheckpointConfig = field(default_factory=CheckpointConfig)
    keep_last: bool = False
    leave: Callable[[Any], None] = lambda params: None
    snapshots: Snapshots = Snapshots()
    quiet: bool = False

    def checkpoints(self, stage: str) -> StageCheckpoints:
        """The checkpoints of one stage."""
        return stage_checkpoints(self.run_dir, stage, self.saving)


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        metrics: for metrics.jsonl and TensorBoard.
        rollouts: a row for each sampled completion; empty where nothing was sampled.
        tokens: of the same completions; see `records.tokens`.
    """

    metrics: dict[str, Any]
    rollouts: list[dict] = field(default_factory=list)
    tokens: Tokens = field(default_factory=dict)


def run_steps(
    stage: str,
    step_fn: Callable[[TrainState, int], tuple[TrainState, StepResult]],
    state: TrainState,
    files: RunFiles,
    *,
    num_steps: int,
    checkpoint_every: int,
) -> TrainState:
    """Take the stage's remaining steps and return the state after the last.

    The state comes from the stage's last intact checkpoint if there is one, else it is `state`. A
    step's record is written before the checkpoint of that step, so that a resumed run can cut its
    files back to the checkpoint and write the same again.

    Args:
        step_fn: (state, step) -> (state, result); a function of its arguments alone, step from 0.

    Raises:
        UserError: from a step, after the steps before it were saved.
        InterruptedRunError: a signal came; the step under way was finished and saved.
        OutOfTimeError: another step would not leave time to stop in order; all steps are saved.
    """
    keeper = _Keeper(stage, num_steps, files, files.checkpoints(stage), Watch(stage))
    state, done = keeper.restore(state)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    files.deadline.expect_checkpoint(num_bytes)
    files.deadline.expect_snapshot()
    is_out_of_time = partial(keeper.is_out_of_time, done)
    if done < num_steps and processes.broadcast_from_primary(is_out_of_time):
        raise OutOfTimeError(stage, done, num_steps, state.params)
    processes.run_on_primary(keeper.checkpoints.bring_together)
    keeper.schedule = Schedule(
        files.saving, checkpoint_every, step=done, num_steps=num_steps, num_bytes=num_bytes
    )
    keeper.progress = processes.run_on_primary(
        lambda: Progress(num_steps, stage, done, quiet=files.quiet)
    )
    try:
        for step in range(done, num_steps):
            state = _take_step(keeper, step_fn, state, step)
        keeper.finish(state)
    except (UserError, InterruptedRunError, OutOfTimeError):
        keeper.close()
        raise
    keeper.close()
    return state


def _take_step(
    keeper: "_Keeper",
    step_fn: Callable[[TrainState, int], tuple[TrainState, StepResult]],
    state: TrainState,
    step: int,
) -> TrainState:
    """One step, its record, and a checkpoint if one is due. Raises as `run_steps`."""
    started = time.monotonic()
    try:
        state, result = step_fn(state, step)
    except UserError:  # a reward that fails, say: it did so before the update
        keeper.stop(step, state)
        raise
    step, phase = step + 1, {"phase": result.metrics.get("phase")}
    keeper.files.deadline.note("step", time.monotonic() - started)
    if keeper.files.snapshots.is_due(step):
        result.metrics.update(keeper.files.snapshots.take(step, state.params))
    said = processes.gather_from_all(partial(keeper.record, step, result))
    signal_number, is_last = max(number for number, _, _ in said), step == keeper.num_steps
    _, out_of_time, is_due = said[0]
    if signal_number or (out_of_time and not is_last):
        keeper.stop(step, state, **phase)
        if signal_number:
            raise InterruptedRunError(signal_number)
        raise OutOfTimeError(keeper.stage, step, keeper.num_steps, state.params)
    if is_due and not is_last:
        keeper.save(step, state, **phase)
    return state


@dataclass
class _Keeper:
    """Keeps what the steps of one stage leave: records, progress, checkpoints, weights."""

    stage: str
    num_steps: int
    files: RunFiles
    checkpoints: StageCheckpoints
    watch: Watch
    schedule: Schedule | None = None
    progress: Progress | None = None  # in the primary process
    saved_step: int = 0

    def restore(self, state: TrainState) -> tuple[TrainState, int]:
        """The state of the stage's last intact checkpoint, and its step; `state` and 0 without."""
        newest = processes.broadcast_from_primary(self.checkpoints.newest)
        if newest is not None:
            self.saved_step = int(newest.name)
            state, _ = Checkpoints(newest.parent).restore(self.saved_step, like=state)
        return state, self.saved_step

    def is_out_of_time(self, step: int) -> bool:
        """Whether one more step after `step` would not leave time to stop in order."""
        return not self._has_time(step, self.checkpoints.running.is_writing())

    def record(self, step: int, result: StepResult) -> tuple[int, bool, bool]:
        """The primary process writes. Each process returns the signal that it got, or 0, whether it
        is out of time, and whether a checkpoint is due; of the latter two the primary's answers
        count.

        Raises:
            UserError: the save under way has failed; or from the records.
        """
        running = self.checkpoints.running
        running.check()
        if running.seconds is not None:
            self.files.deadline.note("save", running.seconds)
            self.schedule.note_whole(running.seconds)
        if processes.is_primary():
            if result.rollouts:
                self.files.writer.write_rollouts(self.stage, step, result.rollouts, result.tokens)
            self.files.writer.write(self.stage, step, result.metrics)
            self.progress.update(result.metrics, result.rollouts)
            for line in self.watch.see(step, result.metrics):
                self.progress.say(f"warning: {line}")
        is_due = self.schedule.is_due(step, is_writing=running.is_writing())
        # A save that begins now may still be under way when time runs out.
        is_due = is_due and self._has_time(step, True)
        return self.files.interrupt.signal_number or 0, self.is_out_of_time(step), is_due

    def save(self, step: int, state: TrainState, **host: Any) -> None:
        """Begins to write a checkpoint, which goes on beside the next steps."""
        started = time.monotonic()
        self.checkpoints.running.start(step, state, self._host(step, host))
        self.saved_step = step
        self.schedule.note_begun(step, time.monotonic() - started)

    def stop(self, step: int, state: TrainState, **host: Any) -> None:
        """Writes the checkpoint with which the stage stops early, unless it is there."""
        self.wait()
        running, stopped = self.checkpoints.running, self.checkpoints.stopped
        if step and (step > self.saved_step or stopped is not running):
            started = time.monotonic()
            stopped.save(step, state, self._host(step, host))
            self.saved_step = step
            self.files.deadline.note("save", time.monotonic() - started)

    def finish(self, state: TrainState) -> None:
        """Leaves what the stage has trained. If that cannot be written, its state is saved.

        Raises:
            InterruptedRunError: a signal came meanwhile.
        """
        if self.files.keep_last and self.saved_step < self.num_steps:
            self.save(self.num_steps, state)
        try:
            self.files.leave(state.params)
        except UserError:
            self.stop(self.num_steps, state)
            raise
        said = processes.gather_from_all(lambda: self.files.interrupt.signal_number or 0)
        if signal_number := max(said):
            raise InterruptedRunError(signal_number)

    def wait(self) -> None:
        """Waits for the checkpoint under way. Raises UserError if it cannot be written."""
        self.checkpoints.running.wait()

    def close(self) -> None:
        """Ends the progress bar, and waits as `wait`."""
        processes.run_on_primary(lambda: self.progress.close())
        self.wait()

    def _has_time(self, step: int, is_writing: bool) -> bool:
        """For the step after `step`, and the snapshot that may follow it."""
        snapshot = ("snapshot",) * self.files.snapshots.is_due(step + 1)
        return self.files.deadline.allows(*ONE_MORE_STEP, *("save",) * is_writing, *snapshot)

    def _host(self, step: int, host: dict) -> dict:
        return {"stage": self.stage, "step": step} | host
