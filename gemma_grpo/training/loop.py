"""The loop around a stage's steps: restore, step, record, save, stop."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gemma_grpo.devices import processes
from gemma_grpo.errors import InterruptedRunError, UserError
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.records.metrics import MetricsWriter, NotFiniteError
from gemma_grpo.records.progress import Progress
from gemma_grpo.records.tokens import Tokens
from gemma_grpo.records.watch import Watch
from gemma_grpo.training.config import GuardConfig
from gemma_grpo.training.deadline import Deadline, OutOfTimeError
from gemma_grpo.training.guard import CollapsedError, Guard, guard_of
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
        guard: when the stage counts as collapsed; None if it never does.
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
    guard: GuardConfig | None = None
    quiet: bool = False

    def checkpoints(self, stage: str) -> StageCheckpoints:
        """The checkpoints of one stage."""
        return stage_checkpoints(self.run_dir, stage, self.saving)

    def guard_of(self, stage: str, checkpoint_every: int) -> Guard | None:
        """The guard of one stage, which knows the steps on record."""
        if self.guard is None:
            return None
        return guard_of(self.guard, checkpoint_every, self.run_dir, stage)


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
        step_fn: (state, step) -> (state, result), of these and the record alone; step from 0.

    Raises:
        UserError: from a step, after the steps before it were saved.
        InterruptedRunError: a signal came; the step under way was finished and saved.
        OutOfTimeError: another step would not leave time to stop in order; all steps are saved.
        CollapsedError: the guard has seen a collapse; its last good checkpoint is the newest now.
    """
    keeper = _Keeper(stage, num_steps, files, files.checkpoints(stage), Watch(stage))
    state, done = restore(keeper.checkpoints, state)
    keeper.saved_step = done
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
    keeper.guard = processes.run_on_primary(lambda: files.guard_of(stage, checkpoint_every))
    try:
        # A signal may have come within the very step that showed a collapse.
        keeper.require_health(processes.broadcast_from_primary(keeper.seen_collapse))
        for step in range(done, num_steps):
            state = _take_step(keeper, step_fn, state, step)
        keeper.finish(state)
    except (UserError, InterruptedRunError, OutOfTimeError, CollapsedError):
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
    except UserError as error:  # a reward that fails, say: it did so before the update
        keeper.stop(step, state)
        if not step:
            raise
        saved = keeper.checkpoints.stopped.directory / f"{step:06d}"
        raise UserError(
            f"{error}; step {step} is saved ({saved}): --resume goes on, with "
            "--allow-changed-rewards if you change the file of a reward"
        ) from error
    step, phase = step + 1, {"phase": result.metrics.get("phase")}
    keeper.files.deadline.note("step", time.monotonic() - started)
    if keeper.files.snapshots.is_due(step):
        result.metrics.update(keeper.files.snapshots.take(step, state.params))
    said = processes.gather_from_all(partial(keeper.record, step, result))
    signal_number, is_last = max(each.signal_number for each in said), step == keeper.num_steps
    if signal_number or (said[0].out_of_time and not is_last):
        keeper.stop(step, state, **phase)
        if signal_number:
            raise InterruptedRunError(signal_number)
        raise OutOfTimeError(keeper.stage, step, keeper.num_steps, state.params)
    keeper.require_health(said[0].collapse)
    if said[0].is_due and not is_last:
        keeper.save(step, state, **phase)
    return state


def restore(checkpoints: StageCheckpoints, state: TrainState) -> tuple[TrainState, int]:
    """The state of a stage's newest intact checkpoint, placed like `state`, and its step; `state`
    and 0 without one."""
    newest = processes.broadcast_from_primary(checkpoints.newest)
    if newest is None:
        return state, 0
    step = int(newest.name)
    return Checkpoints(newest.parent).restore(step, like=state)[0], step


class Said(NamedTuple):
    """What a process says after a step; but for the signal, the primary's counts.

    Attributes:
        signal_number: of the signal that it got, or 0.
        out_of_time: another step would not leave time to stop in order.
        is_due: a checkpoint is to be written.
        collapse: what the guard has seen, in words, or "".
    """

    signal_number: int
    out_of_time: bool
    is_due: bool
    collapse: str


@dataclass
class _Keeper:
    """Keeps what the steps of one stage leave: records, progress, checkpoints, weights."""

    stage: str
    num_steps: int
    files: RunFiles
    checkpoints: StageCheckpoints
    watch: Watch
    schedule: Schedule | None = None
    progress: Progress | None = None  # in the primary process, as the guard
    guard: Guard | None = None
    saved_step: int = 0

    def is_out_of_time(self, step: int) -> bool:
        """Whether one more step after `step` would not leave time to stop in order."""
        return not self._has_time(step, self.checkpoints.running.is_writing())

    def record(self, step: int, result: StepResult) -> Said:
        """The primary process writes.

        Raises:
            UserError: the save under way has failed; or from the records.
        """
        running = self.checkpoints.running
        running.check()
        if running.seconds is not None:
            self.files.deadline.note("save", running.seconds)
            self.schedule.note_whole(running.seconds)
        if processes.is_primary():
            self._write(step, result)
        # Where a guard goes back to must not depend on the clock.
        is_wanted = self.guard is not None and self.guard.needs_checkpoint(step)
        is_due = is_wanted or self.schedule.is_due(step, is_writing=running.is_writing())
        # A save that begins now may still be under way when time runs out.
        has_time = self._has_time(step, True)
        return Said(
            self.files.interrupt.signal_number or 0,
            self.is_out_of_time(step) or (is_wanted and not has_time),
            is_due and has_time,
            self.seen_collapse(),
        )

    def seen_collapse(self) -> str:
        """What the guard has seen in the last step, in words, or ""."""
        return self.guard.collapse if self.guard is not None else ""

    def require_health(self, collapse: str) -> None:
        """Raises CollapsedError if there was one. Checkpoints later than the last good one are
        deleted then, so that the stage goes on from that."""
        if not collapse:
            return
        self.wait()
        places = self.checkpoints
        go_back = lambda: places.go_back(self.guard.best(places.paths()))
        good = processes.broadcast_from_primary(go_back)
        raise CollapsedError(collapse, self.stage, good, self.num_steps)

    def save(self, step: int, state: TrainState, **host: Any) -> None:
        """Begins to write a checkpoint, which goes on beside the next steps."""
        started = time.monotonic()
        self._keep_good()
        self.checkpoints.running.start(step, state, self._host(step, host))
        self.saved_step = step
        self.schedule.note_begun(step, time.monotonic() - started)

    def stop(self, step: int, state: TrainState, **host: Any) -> None:
        """Writes the checkpoint with which the stage stops early, unless it is there."""
        self.wait()
        running, stopped = self.checkpoints.running, self.checkpoints.stopped
        if step and (step > self.saved_step or stopped is not running):
            started = time.monotonic()
            self._keep_good()
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

    def _write(self, step: int, result: StepResult) -> None:
        """A step's record."""
        if self.guard is not None:
            self.guard.see(step, result.metrics)
        if result.rollouts:
            self.files.writer.write_rollouts(self.stage, step, result.rollouts, result.tokens)
        try:
            self.files.writer.write(self.stage, step, result.metrics)
        except NotFiniteError:
            if not self.seen_collapse():
                raise
        self.progress.update(result.metrics, result.rollouts)
        if line := self.watch.see(step, result.metrics):
            self.progress.say(f"warning: {line}")

    def _keep_good(self) -> None:
        """The next save leaves the checkpoint that the guard would go back to."""
        if self.files.guard is not None:
            self.wait()  # the one under way may be the good one
        if self.guard is not None:
            running = self.checkpoints.running
            running.also_keep = self.guard.best(running.steps())

    def _has_time(self, step: int, is_writing: bool) -> bool:
        """For the step after `step`, and the snapshot that may follow it."""
        snapshot = ("snapshot",) * self.files.snapshots.is_due(step + 1)
        return self.files.deadline.allows(*ONE_MORE_STEP, *("save",) * is_writing, *snapshot)

    def _host(self, step: int, host: dict) -> dict:
        return {"stage": self.stage, "step": step} | host
