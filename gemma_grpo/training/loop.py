"""The loop around a stage's steps: restore, step, record, save, stop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gemma_grpo.devices import processes
from gemma_grpo.errors import InterruptedRunError, UserError
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.records.metrics import MetricsWriter, Progress
from gemma_grpo.records.watch import Watch
from gemma_grpo.training.deadline import Deadline, OutOfTimeError
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.state import TrainState

# What must fit before the deadline for one more step to be taken: the stage's weights are written
# after its checkpoint, which holds them, so the checkpoint's seconds are enough for them.
ONE_MORE_STEP = ("step", "save", "save", "evaluate")


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes (in the primary process alone), and what may ask it to stop."""

    run_dir: Path
    writer: MetricsWriter | None
    interrupt: Interrupt
    deadline: Deadline = field(default_factory=Deadline)

    def checkpoints(self, stage: str) -> Checkpoints:
        """The checkpoints of one stage."""
        return stage_checkpoints(self.run_dir, stage)


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        metrics: for metrics.jsonl and TensorBoard.
        rollouts: a row for each sampled completion; empty where nothing was sampled.
    """

    metrics: dict[str, Any]
    rollouts: list[dict] = field(default_factory=list)


def stage_checkpoints(run_dir: Path, stage: str) -> Checkpoints:
    """The checkpoints of one stage of the run in `run_dir`."""
    return Checkpoints(run_dir / "checkpoints" / stage)


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
    done = processes.broadcast_from_primary(keeper.checkpoints.latest) or 0
    if done:
        state, _ = keeper.checkpoints.restore(done, like=state)
    files.deadline.expect_checkpoint(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    if done < num_steps and processes.broadcast_from_primary(keeper.is_out_of_time):
        raise OutOfTimeError(stage, done, num_steps, state.params)
    keeper.progress = processes.run_on_primary(lambda: Progress(num_steps, stage, done))
    for step in range(done, num_steps):
        started = time.monotonic()
        try:
            state, result = step_fn(state, step)
        except UserError:  # a reward that fails, say: it did so before the update
            if step > done:
                keeper.save(step, state)
            raise
        files.deadline.note("step", time.monotonic() - started)
        said = processes.gather_from_all(partial(keeper.record, step + 1, result))
        signal_number, is_last = max(number for number, _ in said), step + 1 == num_steps
        out_of_time = said[0][1] and not is_last
        if signal_number or out_of_time or is_last or (step + 1) % checkpoint_every == 0:
            keeper.save(step + 1, state, phase=result.metrics.get("phase"))
        if signal_number or out_of_time:
            keeper.close()
        if signal_number:
            raise InterruptedRunError(signal_number)
        if out_of_time:
            raise OutOfTimeError(stage, step + 1, num_steps, state.params)
    keeper.close()
    return state


@dataclass
class _Keeper:
    """Keeps what the steps of one stage leave: records, progress, checkpoints."""

    stage: str
    num_steps: int
    files: RunFiles
    checkpoints: Checkpoints
    watch: Watch
    progress: Progress | None = None  # in the primary process

    def is_out_of_time(self) -> bool:
        """Whether one more step would not leave time to stop in order."""
        return not self.files.deadline.allows(*ONE_MORE_STEP)

    def record(self, step: int, result: StepResult) -> tuple[int, bool]:
        """The primary process writes. Each process returns the signal that it got, or 0, and
        whether it is out of time; of the latter the primary's answer counts."""
        if processes.is_primary():
            if result.rollouts:
                self.files.writer.write_rollouts(self.stage, step, result.rollouts)
            self.files.writer.write(self.stage, step, result.metrics)
            self.progress.update(
                reward=result.metrics.get("reward/mean"),
                tokens_per_s=result.metrics.get("tokens_per_s"),
            )
            for line in self.watch.see(step, result.metrics):
                self.progress.say(f"warning: {line}")
        return self.files.interrupt.signal_number or 0, self.is_out_of_time()

    def save(self, step: int, state: TrainState, **host: Any) -> None:
        """Writes a checkpoint, and notes for the deadline how long that took."""
        started = time.monotonic()
        self.checkpoints.save(step, state, {"stage": self.stage, "step": step} | host)
        self.files.deadline.note("save", time.monotonic() - started)

    def close(self) -> None:
        """Ends the progress bar."""
        processes.run_on_primary(lambda: self.progress.close())
