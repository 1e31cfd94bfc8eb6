"""A stage under a guard: after a collapse it stops, or goes on from its last good checkpoint at
half the learning rate."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from gemma_grpo.devices import processes
from gemma_grpo.records import metrics, rollbacks, run_dir
from gemma_grpo.records.rollbacks import Rollback
from gemma_grpo.training.config import GuardConfig
from gemma_grpo.training.guard import CollapsedError
from gemma_grpo.training.loop import RunFiles, StepResult, restore, run_steps
from gemma_grpo.training.state import TrainState

StepFn = Callable[[TrainState, int], tuple[TrainState, StepResult]]


def run_guarded(
    stage: str,
    begin: Callable[[float], tuple[StepFn, Callable[[], TrainState]]],
    files: RunFiles,
    guard: GuardConfig,
    *,
    num_steps: int,
    checkpoint_every: int,
) -> TrainState:
    """Take the stage's remaining steps, some of them again after a collapse, and return the state
    after the last.

    Args:
        begin: factor of the learning rate -> (step function of `run_steps`, function that makes the
            stage's first state).

    Raises:
        CollapsedError: the guard stops the stage; holds its last good weights.
        UserError, InterruptedRunError, OutOfTimeError: as `run_steps`.
    """
    files = replace(files, guard=guard if guard.is_on else None)
    steps = {"num_steps": num_steps, "checkpoint_every": checkpoint_every}
    past = processes.broadcast_from_primary(lambda: _past(stage, files))
    while True:
        step_fn, start = begin(past[-1].rate_factor if past else 1.0)
        try:
            return run_steps(stage, step_fn, start(), files, **steps)
        except CollapsedError as error:
            collapse = error.with_traceback(None)  # its frames hold the collapsed state
        if guard.action == "stop" or len(past) >= guard.rollbacks:
            if collapse.step:
                collapse.params = restore(files.checkpoints(stage), start())[0].params
            raise collapse
        go_back = partial(_go_back, collapse, past, files, guard)
        past = processes.broadcast_from_primary(go_back)


def _past(stage: str, files: RunFiles) -> list[Rollback]:
    """The rollbacks up to the checkpoint that the stage goes on from; drops later ones on file."""
    past = rollbacks.read(files.run_dir)
    if not past:
        return []
    newest = files.checkpoints(stage).newest()
    behind = rollbacks.until(past, int(newest.name) if newest else 0)
    if behind != past:
        rollbacks.write(files.run_dir, behind)
    return behind


def _go_back(
    collapse: CollapsedError, past: list[Rollback], files: RunFiles, guard: GuardConfig
) -> list[Rollback]:
    """Records one more rollback, cuts the other records back to its step, and returns all
    rollbacks. The later checkpoints are deleted already: a process killed before the record takes
    the same steps again."""
    stage, to, factor = collapse.stage, collapse.step, 0.5 ** (len(past) + 1)
    at = metrics.last_step(files.run_dir, stage)
    past = [*past, Rollback(collapse.why, at, to, factor)]
    rollbacks.write(files.run_dir, past)
    files.writer.go_back(stage, to)
    run_dir.remove_partial_weights(files.run_dir, stage, to)
    print(
        f"warning: {stage} has collapsed: {collapse.why}; back to step {to}, on with {factor:g} "
        f"times the learning rate (rollback {len(past)} of {guard.rollbacks})",
        file=sys.stderr,
    )
    return past
