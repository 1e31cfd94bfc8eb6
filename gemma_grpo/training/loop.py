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

# What must fit before the deadline for one more step to be taken. The second "save" bounds the time
# for the stage's weights: a checkpoint holds these and more.
ONE_MORE_STEP = ("step", "save", "save", "evaluate")


@dataclass(frozen=True)
class Snapshots:
    """Measurements between the steps of a stage; training is the same without them.

    Attributes:
        every: steps from one to the next; 0 takes none.
        take: (step, params) -> metrics for the step's record; writes its own files.
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
        write_weights: writes the parameters that a finished stage has trained.
        snapshots: of GRPO.
        guard: when the stage counts as collapsed; None if it never does.
        quiet: print only warnings.
    """

    run_dir: Path
    writer: MetricsWriter | None
    interrupt: Interrupt
    deadline: Deadline = field(default_factory=Deadline)
    saving: CheckpointConfig = field(default_factory=CheckpointConfig)
    keep_last: bool = False
    write_weights: Callable[[Any], None] = lambda params: None
    snapshots: Snapshots = Snapshots()
    guard: GuardConfig | None = None
    quiet: bool = False

    def checkpoints(self, stage: str) -> StageCheckpoints:
        """The checkpoints of one stage."""
        return stage_checkpoints(self.run_dir, stage, self.saving)

    def guard_of(self, stage: str, checkpoint_every: int) -> Guard | None:
        """The guard of one stage, which has seen the steps on record; None without a guard."""
        if self.guard is None:
            return None
        return guard_of(self.guard, checkpoint_every, self.run_dir, stage)


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        metrics: for metrics.jsonl and TensorBoard.
        rollouts: a row for each sampled completion; empty if nothing was sampled.
        tokens: those of the same completions; see `records.tokens`.
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

    The stage starts from its last intact checkpoint, or else from `state`. A step's record is
    written before its checkpoint, so that a resumed run can cut its files back to the checkpoint
    and write the same again.

    Args:
        step_fn: (state, step) -> (state, result), a function of these and the record alone; step
            from 0.

    Raises:
        UserError: from a step, after the steps before it were saved.
        InterruptedRunError: a signal came; the step under way was finished and saved.
        OutOfTimeError: another step would not leave time to stop in order; all steps are saved.
        CollapsedError: the guard saw a collapse; the last good checkpoint is the newest now.
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
    processes.run_on_primary(keeper.checkpoints.consolidate)
    keeper.schedule = Schedule(
        files.saving, checkpoint_every, step=done, num_steps=num_steps, num_bytes=num_bytes
    )
    keeper.progress = processes.run_on_primary(
        lambda: Progress(num_steps, stage, done, quiet=files.quiet)
    )
    keeper.guard = processes.run_on_primary(lambda: files.guard_of(stage, checkpoint_every))
    try:
        # The last session may have been stopped by a signal in the step that showed a collapse.
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
    except UserError as error:  # such as a reward that fails, which is before the update
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
    reports = processes.gather_from_all(partial(keeper.record, step, result))
    primary, is_last = reports[0], step == keeper.num_steps
    signal_number = max(report.signal_number for report in reports)
    if signal_number or (primary.out_of_time and not is_last):
        keeper.stop(step, state, **phase)
        if signal_number:
            raise InterruptedRunError(signal_number)
        raise OutOfTimeError(keeper.stage, step, keeper.num_steps, state.params)
    keeper.require_health(primary.collapse)
    if primary.is_due and not is_last:
        keeper.save(step, state, **phase)
    return state


def restore(checkpoints: StageCheckpoints, state: TrainState) -> tuple[TrainState, int]:
    """The state of a stage's newest intact checkpoint, sharded like `state`, and its step; `state`
    and 0 if there is none."""
    newest = processes.broadcast_from_primary(checkpoints.newest)
    if newest is None:
        return state, 0
    step = int(newest.name)
    return Checkpoints(newest.parent).restore(step, like=state)[0], step


class StepReport(NamedTuple):
    """What each process reports after a step. A signal counts from any process, the rest from the
    primary alone.

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
    """Writes what the steps of one stage leave: records, progress, checkpoints, weights."""

    stage: str
    num_steps: int
    files: RunFiles
    checkpoints: StageCheckpoints
    watch: Watch
    schedule: Schedule | None = None
    progress: Progress | None = None  # like the guard, in the primary process only
    guard: Guard | None = None
    saved_step: int = 0

    def is_out_of_time(self, step: int) -> bool:
        """Whether one more step after `step` would not leave time to stop in order."""
        return not self._has_time(step, is_writing=self.checkpoints.running.is_writing())

    def record(self, step: int, result: StepResult) -> StepReport:
        """Writes the step's record in the primary process, and decides what follows the step.

        Raises:
            UserError: the save under way has failed, or the record cannot be written.
        """
        running = self.checkpoints.running
        running.check()
        if running.seconds is not None:
            self.files.deadline.note("save", running.seconds)
            self.schedule.note_written(running.seconds)
        if processes.is_primary():
            self._write(step, result)
        # Where a guard goes back to must not depend on the clock.
        for_guard = self.guard is not None and self.guard.needs_checkpoint(step)
        is_due = for_guard or self.schedule.is_due(step, is_writing=running.is_writing())
        # A save that begins now may still be under way when time runs out.
        has_time = self._has_time(step, is_writing=True)
        return StepReport(
            self.files.interrupt.signal_number or 0,
            self.is_out_of_time(step) or (for_guard and not has_time),
            is_due and has_time,
            self.seen_collapse(),
        )

    def seen_collapse(self) -> str:
        """What the guard has seen in the last step, in words, or ""."""
        return self.guard.collapse if self.guard is not None else ""

    def require_health(self, collapse: str) -> None:
        """Raises CollapsedError if `collapse` says something, and deletes the checkpoints after the
        last good one, so that the stage goes on from that."""
        if not collapse:
            return
        self.wait()
        checkpoints = self.checkpoints
        go_back = lambda: checkpoints.go_back(self.guard.best(checkpoints.paths()))
        good_step = processes.broadcast_from_primary(go_back)
        raise CollapsedError(collapse, self.stage, good_step, self.num_steps)

    def save(self, step: int, state: TrainState, **host: Any) -> None:
        """Begins to write a checkpoint; the writing goes on during the next steps."""
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
        """Writes the stage's weights; if that fails, saves its state.

        Raises:
            UserError: the weights cannot be written.
            InterruptedRunError: a signal came meanwhile.
        """
        if self.files.keep_last and self.saved_step < self.num_steps:
            self.save(self.num_steps, state)
        try:
            self.files.write_weights(state.params)
        except UserError:
            self.stop(self.num_steps, state)
            raise
        signals = processes.gather_from_all(lambda: self.files.interrupt.signal_number or 0)
        if signal_number := max(signals):
            raise InterruptedRunError(signal_number)

    def wait(self) -> None:
        """Waits for the checkpoint under way. Raises UserError if it cannot be written."""
        self.checkpoints.running.wait()

    def close(self) -> None:
        """Ends the progress bar, then `wait`."""
        processes.run_on_primary(lambda: self.progress.close())
        self.wait()

    def _write(self, step: int, result: StepResult) -> None:
        """Writes a step's record and shows its progress."""
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
        """Makes the next save keep the checkpoint that the guard would go back to."""
        if self.files.guard is not None:
            self.wait()  # the one under way may be the good one
        if self.guard is not None:
            running = self.checkpoints.running
            running.also_keep = self.guard.best(running.steps())

    def _has_time(self, step: int, *, is_writing: bool) -> bool:
        """Whether there is time for the step after `step`, a snapshot if one follows it, and the
        end of the save under way (`is_writing`)."""
        kinds = list(ONE_MORE_STEP)
        if is_writing:
            kinds.append("save")
        if self.files.snapshots.is_due(step + 1):
            kinds.append("snapshot")
        return self.files.deadline.allows(*kinds)

    def _host(self, step: int, host: dict) -> dict:
        """The part of a checkpoint that is not arrays."""
        return {"stage": self.stage, "step": step} | host
