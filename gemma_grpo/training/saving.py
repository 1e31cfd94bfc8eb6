"""When a run saves its state, and where: as often as its settings ask and its own save times
allow."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.records import metrics
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.training.config import CheckpointConfig
from gemma_grpo.training.deadline import DISK_BYTES_PER_SECOND

SMALL = 10**8  # bytes; a state below this is saved whenever it is due, however busy the machine is
HOST_BYTES_PER_SECOND = 1e9  # device to host, assumed until a save was measured


class Schedule:
    """Decides after which steps of a stage a checkpoint is written, by this process's clock."""

    def __init__(
        self, config: CheckpointConfig, every: int, *, step: int, num_steps: int, num_bytes: int
    ):
        """Args:
        every: steps between checkpoints; 0 saves none by steps.
        step: the one that the stage goes on from, which is saved.
        num_steps: of the stage.
        num_bytes: size of a checkpoint, to estimate the first one's time.
        """
        self._config, self._every, self._num_steps = config, every, num_steps
        self._first_step = self._saved_step = step
        self._began = self._saved_at = time.monotonic()
        self._stalled = 0.0  # seconds in which training stood still for saving
        self._is_small = num_bytes < SMALL
        self._last_stall = num_bytes / HOST_BYTES_PER_SECOND  # the same, for the last save alone
        self._write_seconds = num_bytes / DISK_BYTES_PER_SECOND  # from begin to end of a save

    def is_due(self, step: int, *, is_writing: bool) -> bool:
        """Whether to save after `step`; `is_writing`: the last save is still under way. A save that
        is put off stays due."""
        minutes, now = self._config.minutes, time.monotonic()
        by_steps = self._every and step // self._every > self._saved_step // self._every
        by_time = minutes and now - self._saved_at >= 60 * minutes
        if not (by_steps or by_time):
            return False
        passed = now - self._began
        step_seconds = (passed - self._stalled) / (step - self._first_step)
        stalled_then, passed_then = self._stalled + self._last_stall, passed + self._last_stall
        return self._is_small or (
            not is_writing
            and stalled_then <= self._config.share * passed_then
            # Else the stage's weights would wait for it, and with them it is superfluous.
            and self._write_seconds <= step_seconds * (self._num_steps - step)
        )

    def note_begun(self, step: int, seconds: float) -> None:
        """Records that a save of `step` was begun, which stalled training for `seconds`."""
        self._saved_step, self._saved_at = step, time.monotonic()
        self._last_stall, self._stalled = seconds, self._stalled + seconds

    def note_written(self, seconds: float) -> None:
        """Records that the last save was complete `seconds` after it was begun."""
        self._write_seconds = seconds


@dataclass(frozen=True)
class StageCheckpoints:
    """The checkpoints of one stage.

    Attributes:
        running: those that a running stage writes.
        stopped: the one with which it stops early, in the run's own folder; the same as `running`
            unless `CheckpointConfig.folder` is set.
    """

    running: Checkpoints
    stopped: Checkpoints

    def newest(self) -> Path | None:
        """The newest intact checkpoint of both.

        Raises:
            UserError: there are some, and all are damaged.
        """
        found, damaged = [], None
        for checkpoints in self._both():
            try:
                if (step := checkpoints.latest()) is not None:
                    found.append((step, checkpoints.directory / f"{step:06d}"))
            except UserError as error:
                damaged = error
        if damaged and not found:
            raise damaged
        return max(found)[1] if found else None

    def paths(self) -> dict[int, Path]:
        """The finished checkpoints of both by step, damaged ones included."""
        both = self._both()
        return {step: each.directory / f"{step:06d}" for each in both for step in each.steps()}

    def go_back(self, step: int) -> int:
        """Deletes those later than `step`; returns the step of the newest intact one that is left,
        or 0. Raises UserError if all are damaged."""
        for checkpoints in self._both():
            checkpoints.drop_after(step)
        newest = self.newest()
        return int(newest.name) if newest else 0

    def consolidate(self) -> None:
        """Moves the newest checkpoint to `running` and empties `stopped`, so that the run's own
        folder has room for the next.

        Raises:
            UserError: the disk is full, or cannot be written or read; the original stays.
        """
        if self.stopped is not self.running and self.stopped.steps():
            newest = self.newest()
            if newest is not None and newest.parent != self.running.directory:
                self.running.take(newest)
            self.stopped.remove()

    def remove(self) -> None:
        """Deletes all."""
        for checkpoints in self._both():
            checkpoints.remove()

    def _both(self) -> tuple[Checkpoints, ...]:
        return (self.running,) if self.stopped is self.running else (self.running, self.stopped)


def stage_checkpoints(run_dir: Path, stage: str, config: CheckpointConfig) -> StageCheckpoints:
    """The checkpoints of one stage of the run in `run_dir`."""
    stopped = Checkpoints(run_dir / "checkpoints" / stage, config.keep)
    if not config.folder:
        return StageCheckpoints(stopped, stopped)
    return StageCheckpoints(Checkpoints(Path(config.folder) / stage, config.keep), stopped)


def as_found(run_dir: Path, config: CheckpointConfig) -> CheckpointConfig:
    """The settings with which a run's checkpoints are found: without `folder` if that does not
    exist or belongs to another run."""
    is_there = config.folder and run_dirs.owner(Path(config.folder)) == run_dir.absolute()
    return config if is_there else replace(config, folder="")


def claim_folder(run_dir: Path, config: CheckpointConfig) -> None:
    """Claims the checkpoints' own folder, if the settings name one, for a new run.
    Raises UserError if it holds checkpoints, or cannot be written."""
    if config.folder:
        run_dirs.claim_checkpoints(Path(config.folder), run_dir)


def require_folder(
    run_dir: Path, config: CheckpointConfig, stages: Sequence[str], *, restart_stage: bool
) -> None:
    """Raises UserError if the checkpoints' own folder is lost and steps with it, unless
    `restart_stage`."""
    here = as_found(run_dir, config)
    if not config.folder or here.folder or restart_stage:
        return
    for stage in stages:
        if (run_dir / "weights" / f"{stage}.safetensors").exists():
            continue
        steps = metrics.last_step(run_dir, stage)
        if not steps or stage_checkpoints(run_dir, stage, here).running.steps():
            continue
        there = "is gone"
        if owner := run_dirs.owner(Path(config.folder)):
            there = f"now holds those of {owner} (if that was this run, correct {run_dirs.OWNER})"
        raise UserError(
            f"{run_dir}: its checkpoints were in {config.folder}, which {there}; put them back, or "
            f"take {stage} again from its first step ({steps} were taken) with --restart-stage"
        )
