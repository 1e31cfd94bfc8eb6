"""What a run records while it trains: metrics.jsonl, TensorBoard, rollouts.

Except for times, a run's files are functions of its steps: a resumed run removes what lies beyond
its checkpoint and writes it again. So the caller writes a step's line before it saves the
checkpoint of that step. Does not import jax.
"""

import contextlib
import errno
import io
import json
import math
import operator
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, tokens
from gemma_grpo.records.run_dir import CONFIG, STAGES
from gemma_grpo.records.trackers import Tracker, TrackerName

SAMPLE_CHARS = 2000  # of the completion that TensorBoard shows of a step


class NotFiniteError(UserError):
    """A metric is nan or infinite; the step's line is written."""


class MetricsWriter:
    """Writes one run's `metrics.jsonl`, `tensorboard/<stage>/` and `rollouts/`.

    TensorBoard shows each stage as a run of its own, since each counts its steps from 1; it also
    gets the run's config.yaml and one completion a step, as text.
    """

    def __init__(
        self, run_dir: Path, resume_from: dict | None = None, tracker: TrackerName = "none"
    ):
        """Opens the files of `run_dir`, which is made if it is absent.

        Args:
            resume_from: {"stage", "step"} of the checkpoint that the run goes on from; the files
                are cut back to it. None begins anew: what an earlier run left here is removed.
            tracker: where metrics and completions also go.
        """
        self._tracker = Tracker(tracker, Path(run_dir))
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / "metrics.jsonl"
        self._events: dict[str, _EventFile] = {}
        begin = resume_from or {"stage": STAGES[0], "step": 0}
        with files.write_errors(self._path):
            (self._run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
            self._path.touch()
        self._open(begin["stage"], begin["step"])

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line, and its numbers to TensorBoard.

        Args:
            stage: one of `STAGES`.
            step: from 1, counted within the stage.
            metrics: numbers (Python's, numpy's, jax's scalars), strings, bools; None where a thing
                was not measured.

        Raises:
            NotFiniteError: a metric is nan or infinite; the line is written first, with null in its
                place.
            UserError: the disk is full.
            ValueError: no such stage.
        """
        if stage not in STAGES:
            raise ValueError(f"{stage=} is not one of {STAGES}")
        values = {name: _plain(value) for name, value in metrics.items()}
        line = _json_line({"stage": stage, "step": step} | values)
        _append(self._lines, self._path, line)
        self._write_events(stage, step, values)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                fix = f"lower the learning rate, or look at the steps before it in {self._path}"
                if step == 1:  # measured before its update
                    fix = "the weights that the stage began with are the first to look at"
                raise NotFiniteError(f"{name} is {value} at {stage} step {step}; {fix}")

    def write_rollouts(
        self,
        stage: str,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        drawn: tokens.Tokens | None = None,
    ) -> None:
        """Writes `rollouts/<stage>-<step>.jsonl`, a line for each row, and the tokens of the rows
        beside it (`records.tokens`) if there are any. Each file appears complete or not at all.

        A nan or infinite number within a row becomes null.

        Raises:
            UserError: the disk is full.
        """
        path = self._run_dir / "rollouts" / f"{stage}-{step:06d}.jsonl"
        # Not durable: a sync every step costs milliseconds. After a power cut the last ones may be
        # gone; a resumed run that draws by them says so (`training.draw`).
        if drawn:
            tokens.write(tokens.path_beside(path), drawn, durable=False)
        with files.atomic_write(path, durable=False) as unfinished:
            unfinished.write_bytes(b"".join(_json_line(row) for row in rows))
        if rows:
            self._open_events(stage).write_text(step, "sample", _sample_text(rows[0]))
            self._tracker.table(stage, step, rows)

    def go_back(self, stage: str, step: int) -> None:
        """Cuts the files back to a step that the run goes on from, as when it is resumed there.
        Raises UserError if they cannot be written."""
        self.close()
        self._events = {}
        self._open(stage, step)

    def close(self) -> None:
        """Closes all files; every line is on its way to the disk already."""
        self._lines.close()
        for events in self._events.values():
            events.close()
        self._tracker.close()

    def _open(self, stage: str, step: int) -> None:
        """Cuts the files back to (stage, step), and opens the lines' for more."""
        self._resumed_stage, self._resumed_step = stage, step
        with files.write_errors(self._path):
            truncate_after(self._run_dir, stage, step)
            # Unbuffered: when write returns, the line is with the system, out of a kill's reach.
            self._lines = self._path.open("ab", buffering=0)

    def _write_events(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        self._open_events(stage).write(step, numbers)
        self._tracker.log(stage, step, numbers)

    def _open_events(self, stage: str) -> "_EventFile":
        """The stage's event file; a new one begins with the run's settings."""
        if stage not in self._events:
            after = self._resumed_step if stage == self._resumed_stage else 0
            directory = self._run_dir / "tensorboard" / stage
            with files.write_errors(directory):
                self._events[stage] = _EventFile(directory, after)
            settings = self._run_dir / CONFIG
            if settings.is_file() and not after:
                self._events[stage].write_text(0, "config", settings.read_text(encoding="utf-8"))
        return self._events[stage]


class _EventFile:
    """A TensorBoard event file, by tensorboardX's messages but not its writer.

    That one hands events to a queue, which a kill empties, and syncs the disk at each flush (3 ms);
    one event a number costs 5 ms a step more. Here a step is one event, written on the spot.
    """

    def __init__(self, directory: Path, after: int):
        """`after` > 0 makes TensorBoard forget what older files there say of later steps."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard wants "tfevents" in the name, and reads the files of a directory by name.
        self._path = directory / f"events.out.tfevents.{time.time_ns()}"
        self._file = self._path.open("xb", buffering=0)
        self._write_event(Event(file_version="brain.Event:2"))
        if after:
            start = SessionLog(status=SessionLog.START)
            self._write_event(Event(step=after + 1, session_log=start))

    def write(self, step: int, numbers: Mapping[str, int | float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=v) for name, v in numbers.items()]
        self._write_event(Event(step=step, summary=Summary(value=values)))

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Text that TensorBoard shows as it stands: four spaces make it code in Markdown."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboardX.proto.tensor_pb2 import TensorProto
        from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

        code = "\n".join(f"    {line}" for line in text.splitlines())
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[code.encode("utf-8", "replace")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=plugin, tensor=tensor)
        self._write_event(Event(step=step, summary=Summary(value=[value])))

    def close(self) -> None:
        self._file.close()

    def _write_event(self, event: Any) -> None:
        """One TFRecord: length, its check sum, event, its check sum."""
        from tensorboardX.record_writer import masked_crc32c

        event.wall_time = time.time()
        body = event.SerializeToString()
        length = struct.pack("<Q", len(body))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, body))
        _append(self._file, self._path, b"".join([length, next(sums), body, next(sums)]))


def write_evaluation(
    run_dir: Path, name: str, figures: Mapping[str, Any], tracker: TrackerName = "none"
) -> None:
    """The numbers of an evaluation to TensorBoard and the tracker, as the run "evaluation": the
    base model is its step 0, the stages are 1 and 2.

    Raises:
        UserError: the disk is full.
    """
    step = next((n for n, stage in enumerate(STAGES, start=1) if name.startswith(stage)), 0)
    numbers = evaluation_numbers(figures)
    directory = run_dir / "tensorboard" / "evaluation"
    with files.write_errors(directory):
        events = _EventFile(directory, after=0)
        try:
            events.write(step, numbers)
        finally:
            events.close()
    board = Tracker(tracker, run_dir)
    board.log("evaluation", step, numbers)
    board.close()


def evaluation_numbers(figures: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of an evaluation as metrics: `evaluation/accuracy` and so on."""
    return {f"evaluation/{key}": v for key, v in figures.items() if isinstance(v, int | float)}


def truncate_after(run_dir: Path, stage: str, step: int) -> None:
    """Removes what a run wrote beyond (stage, step), and a last line torn by a kill.

    Metrics lines, rollouts, snapshots (evaluations named by a step) and later stages' TensorBoard
    folders are removed. Events of `stage`
    itself stay in their file; the next file begins with a purge step, which makes TensorBoard drop
    them.

    Raises:
        UserError: a complete line of metrics.jsonl is not one of ours.
    """
    last = (STAGES.index(stage), step)
    path = run_dir / "metrics.jsonl"
    kept_bytes, reached = 0, None
    for number, line in enumerate(files.read_bytes(path).splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            values = json.loads(line)
            position = (STAGES.index(values["stage"]), operator.index(values["step"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number} is no metrics line; delete it") from error
        if position > last:
            break
        kept_bytes, reached = kept_bytes + len(line), position
    if step and reached != last:
        print(f"warning: {path} lacks lines before {stage} step {step}", file=sys.stderr)
    os.truncate(path, kept_bytes)
    of_a_step = rf"({'|'.join(STAGES)})-(?:step-)?(\d+)\.(?:jsonl|npz|json)(\.tmp)?"
    for folder in ("rollouts", "evaluations"):
        for written in (run_dir / folder).glob("*-*"):
            match = re.fullmatch(of_a_step, written.name)
            if match and (match[3] or (STAGES.index(match[1]), int(match[2])) > last):
                written.unlink()
    for later in STAGES[last[0] + (step > 0) :]:
        shutil.rmtree(run_dir / "tensorboard" / later, ignore_errors=True)


def last_step(run_dir: Path, stage: str) -> int:
    """The last step of a stage that a run has recorded; 0 if none. Torn lines are skipped."""
    path = run_dir / "metrics.jsonl"
    last = 0
    for line in files.read_bytes(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            if values["stage"] == stage:
                last = max(last, values["step"])
    return last


def _sample_text(row: Mapping[str, Any]) -> str:
    """A rollout's row, to read."""
    numbers = (f"{name} {v:.3g}" for name, v in row.items() if isinstance(v, float))
    asked, text = row.get("prompt", ""), str(row.get("completion", ""))[:SAMPLE_CHARS]
    return f"{asked}\n\n{text}\n\n{', '.join(numbers)}"


def _plain(value: Any) -> Any:
    """A scalar of numpy or jax as Python's own; Python's own values as they are."""
    if isinstance(value, str | int | float | list | tuple | dict | None):
        return value
    return np.asarray(value).item()


def _json_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(_json_value(values), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _json_value(value: Any) -> Any:
    """`value` as JSON has it: plain scalars, and null for nan and infinities."""
    if isinstance(value, Mapping):
        return {name: _json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    value = _plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(file: io.RawIOBase, path: Path, data: bytes) -> None:
    with files.write_errors(path):
        if file.write(data) != len(data):  # a disk that fills up within a line takes a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
