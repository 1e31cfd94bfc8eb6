"""Metrics to W&B or trackio, beside the files: the same names, a run there for each stage.

Both packages have the same four functions. A tracker that fails is said once and then left alone:
training does not depend on it. Does not import jax.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from gemma_grpo.errors import UserError, one_line
from gemma_grpo.records.run_dir import CONFIG

TrackerName = Literal["none", "wandb", "trackio"]
PROJECT = "gemma_grpo"
TABLE_EVERY = 10  # steps between two tables of completions
COLUMNS = ("prompt", "answer", "completion", "reward", "advantage", "correctness", "trace")


def require(name: TrackerName) -> None:
    """Raises UserError if the tracker's package is not installed."""
    if name != "none":
        _module(name)


class Tracker:
    """One tracker of a run; a stage is begun with its first metrics."""

    def __init__(self, name: TrackerName, run_dir: Path):
        """Raises UserError as `require`."""
        self._module: Any = None if name == "none" else _module(name)
        self._run_dir, self._stage = run_dir, ""

    def log(self, stage: str, step: int, numbers: Mapping[str, float | int]) -> None:
        """The numbers of a step, counted within its stage."""
        self._try(lambda: self._begun(stage).log(dict(numbers), step=step))

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The completions of each `TABLE_EVERY`th step, and of the first."""
        if step != 1 and step % TABLE_EVERY:
            return

        def write() -> None:
            module = self._begun(stage)
            data = [[row.get(column) for column in COLUMNS] for row in rows]
            table = module.Table(columns=list(COLUMNS), data=data)
            module.log({"rollouts": table}, step=step)

        self._try(write)

    def close(self) -> None:
        """Ends the stage's run there."""
        if self._stage:
            self._stage = ""
            self._try(lambda: self._module.finish())

    def _begun(self, stage: str) -> Any:
        if stage != self._stage:
            self.close()
            path = self._run_dir / CONFIG
            settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            name = f"{self._run_dir.absolute().name}-{stage}"
            self._module.init(project=PROJECT, name=name, config=settings)
            self._stage = stage
        return self._module

    def _try(self, call: Callable[[], None]) -> None:
        if self._module is None:
            return
        try:
            call()
        except Exception as error:
            said = one_line(f"{type(error).__name__}: {error}", 200)
            print(f"warning: {self._module.__name__} failed and is left: {said}", file=sys.stderr)
            self._module = None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--tracker {name}: pip install 'gemma_grpo[{name}]'") from error
