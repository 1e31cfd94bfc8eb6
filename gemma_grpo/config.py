"""A run's configuration: every setting with its default, and to and from YAML."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gemma_grpo.errors import UserError
from gemma_grpo.evaluation.evaluator import EvaluationConfig
from gemma_grpo.records.metrics import STAGES
from gemma_grpo.records.trackers import TrackerName
from gemma_grpo.rewards import RewardConfig
from gemma_grpo.runtime import ModelConfig
from gemma_grpo.training.grpo import GRPOConfig
from gemma_grpo.training.sft import SFTConfig

# Values that earlier versions wrote into config.yaml, by field; they are read as those of today.
OLD_VALUES: dict[str, dict[str | bool, str]] = {
    "model.rollout_layout": {"hybrid": "tensor_parallel"},
    "model.remat": {True: "full", False: "none"},
}
# Fields of earlier versions that are read over: how an update was cut, not what it computes.
OLD_FIELDS = {
    *("sft.accumulation_steps", "sft.length_bucket", "sft.packed_sizes"),
    *("grpo.accumulation_steps", "grpo.length_bucket", "grpo.packed_sizes", "grpo.prompt_bucket"),
}


@dataclass(frozen=True)
class DataConfig:
    """Problems to learn from and to be tested on."""

    source: str = "curriculum"
    """curriculum, gsm8k[:PATH], gsm8k-validation[:PATH], reasoning_gym:TASK, a .jsonl, .csv or
    .parquet file, or two of them with a comma between: train,test. PATH may be
    kagglehub:OWNER/DATASET."""
    num_train: int = 2000
    """Problems to learn from; 0 for all of a source that ends."""
    num_test: int = 400
    """Held-out problems; 0 for all of a source that ends."""


@dataclass(frozen=True)
class RunConfig:
    """One run from base model to report."""

    seed: int = 0
    """The random seed of everything: problems, fresh adapters, sampling."""
    stages: str = ",".join(STAGES)
    """sft,grpo or one of them."""
    tracker: TrackerName = "none"
    """Where metrics also go: wandb or trackio (extras of these names)."""
    keep_checkpoints: bool = False
    """Keep the checkpoints (they hold the optimizer state) of a stage whose weights are written."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The problems."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Stage one."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Stage two."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a completion is paid for."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured before and after."""

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be 0 or more")
        if self.stages not in (",".join(STAGES), *STAGES):
            raise UserError(f"stages={self.stages!r}: use sft,grpo or one of them")

    def replace(self, settings: Mapping[str, Any]) -> "RunConfig":
        """A copy with other settings, by the names that the command's flags have:
        `run.replace({"grpo.num_steps": 50, "model.lora.rank": 8})`.

        Raises:
            UserError: no such setting, or a value of the wrong type.
        """
        values = _plain(dataclasses.asdict(self))
        for name, value in settings.items():
            *sections, last = name.split(".")
            section = values
            for inner in sections:
                section = section.get(inner)
                if not isinstance(section, dict):
                    raise UserError(f"there is no setting {name!r}; to_yaml shows all")
            section[last] = _plain(value)
        return _build(RunConfig, values, where="")

    @property
    def stage_list(self) -> list[str]:
        """The stages to run, in order."""
        return self.stages.split(",")


def to_yaml(config: RunConfig) -> str:
    """Every field, so that the file alone repeats the run."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def from_yaml(path: Path) -> RunConfig:
    """The configuration in a file; fields it leaves out keep their defaults.

    Raises:
        UserError: no such file, not YAML, an unknown field, or a value of the wrong type.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return _build(RunConfig, values, where="")
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _build(kind: Any, value: Any, *, where: str) -> Any:
    """`value` from YAML as a `kind`, checked; `where` is the dotted name of the field."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where or 'the file'} must be a mapping of fields to values")
        hints = typing.get_type_hints(kind)
        value = {name: v for name, v in value.items() if f"{where}.{name}" not in OLD_FIELDS}
        if unknown := value.keys() - hints.keys():
            known = ", ".join(hints)
            raise UserError(f"{where or 'top level'} has no field {min(unknown)!r}; it has {known}")
        return kind(
            **{
                name: _build(hints[name], v, where=f"{where}.{name}".lstrip("."))
                for name, v in value.items()
            }
        )
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if isinstance(value, str | bool):
            value = OLD_VALUES.get(where, {}).get(value, value)
        if value in arguments:
            return value
        raise UserError(f"{where} is {value!r}; use one of {', '.join(map(str, arguments))}")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _build(arguments[0], value, where=where)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; use a list")
        return tuple(_build(arguments[0], item, where=where) for item in value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as text
        except ValueError:
            pass
    if type(value) is kind:
        return value
    raise UserError(f"{where} is {value!r}; use a {kind.__name__}")
