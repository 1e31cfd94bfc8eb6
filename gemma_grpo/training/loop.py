"""The loop around a stage's steps: restore, step, record, save, stop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gemma_grpo.devices import processes
from gemma_grpo.errors import InterruptedRunError, UserError
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.records.metrics import MetricsWriter, Progress
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.state import TrainState


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes (in the primary process alone), and whether it has been asked to stop."""

    run_dir: Path
    writer: MetricsWriter | None
    interrupt: Interrupt

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
    """
    checkpoints = files.checkpoints(stage)
    done = processes.broadcast_from_primary(checkpoints.latest) or 0
    if done:
        state, _ = checkpoints.restore(done, like=state)
    progress = processes.run_on_primary(lambda: Progress(num_steps, stage, done))

    def record(step: int, result: StepResult) -> int:
        """The primary process writes; each process returns the signal that it got, or 0."""
        if processes.is_primary():
            if result.rollouts:
                files.writer.write_rollouts(stage, step, result.rollouts)
            files.writer.write(stage, step, result.metrics)
            progress.update(
                reward=result.metrics.get("reward/mean"),
                tokens_per_s=result.metrics.get("tokens_per_s"),
            )
        return files.interrupt.signal_number or 0

    for step in range(done, num_steps):
        try:
            state, result = step_fn(state, step)
        except UserError:  # a reward that fails, say: it did so before the update
            if step > done:
                checkpoints.save(step, state, {"stage": stage, "step": step})
            raise
        stopping = max(processes.gather_from_all(partial(record, step + 1, result)))
        if stopping or (step + 1) % checkpoint_every == 0 or step + 1 == num_steps:
            host = {"stage": stage, "step": step + 1, "phase": result.metrics.get("phase")}
            checkpoints.save(step + 1, state, host)
        if stopping:
            processes.run_on_primary(lambda: progress.close())
            raise InterruptedRunError(stopping)
    processes.run_on_primary(lambda: progress.close())
    return state
