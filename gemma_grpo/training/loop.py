"""The loop around a stage's steps: restore, step, record, save, stop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gemma_grpo.devices import processes
from gemma_grpo.errors import InterruptedRunError, UserError
from gemma_grpo.records.metrics import MetricsWriter, Progress
from gemma_grpo.records.saving import CheckpointConfig, Saver
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.state import TrainState


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes (in the primary process alone), and whether it has been asked to stop."""

    run_dir: Path
    writer: MetricsWriter | None
    interrupt: Interrupt
    checkpoint: CheckpointConfig = CheckpointConfig()


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        metrics: for metrics.jsonl and TensorBoard.
        rollouts: a row for each sampled completion; empty where nothing was sampled.
    """

    metrics: dict[str, Any]
    rollouts: list[dict] = field(default_factory=list)


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
    files back to the checkpoint and write the same again. Checkpoints are written while the steps
    go on (`saving.py`); the last one is complete when this returns or raises.

    Args:
        step_fn: (state, step) -> (state, result); a function of its arguments alone, step from 0.

    Raises:
        UserError: from a step, after the steps before it were saved, or from a save.
        InterruptedRunError: a signal came; the step under way was finished and saved.
    """
    checkpoints = files.checkpoint.of_stage(files.run_dir, stage)
    done = processes.broadcast_from_primary(checkpoints.latest) or 0
    if done:
        state, _ = checkpoints.restore(done, like=state)
    saver = Saver(checkpoints, files.checkpoint, every=checkpoint_every, done=done)
    progress = processes.run_on_primary(lambda: Progress(num_steps, stage, done))

    def record(step: int, result: StepResult) -> tuple[int, bool]:
        """The primary process writes; each process returns the signal that it got, or 0, and
        whether a checkpoint is due, which the primary's clock decides."""
        if processes.is_primary():
            if result.rollouts:
                files.writer.write_rollouts(stage, step, result.rollouts)
            files.writer.write(stage, step, result.metrics)
            progress.update(
                reward=result.metrics.get("reward/mean"),
                tokens_per_s=result.metrics.get("tokens_per_s"),
            )
        return files.interrupt.signal_number or 0, saver.is_due(step)

    try:
        for step in range(done, num_steps):
            saver.check()
            try:
                state, result = step_fn(state, step)
            except UserError:  # a reward that fails, say: it did so before the update
                if step > done:
                    saver.save(step, state, {"stage": stage, "step": step})
                raise
            said = processes.gather_from_all(partial(record, step + 1, result))
            stopping, is_due = max(signal for signal, _ in said), said[0][1]
            if stopping or is_due or step + 1 == num_steps:
                host = {"stage": stage, "step": step + 1, "phase": result.metrics.get("phase")}
                saver.save(step + 1, state, host)
            if stopping:
                raise InterruptedRunError(stopping)
    finally:
        processes.run_on_primary(lambda: progress.close())
        saver.wait()
    return state
