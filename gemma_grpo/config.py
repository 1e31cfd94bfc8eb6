"""A run's configuration: every setting with its default, and to and from YAML."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gemma_grpo.data.problem import DIFFICULTIES
from gemma_grpo.errors import UNREADABLE, UserError, expanded, one_line
from gemma_grpo.evaluation.config import RunEvaluationConfig, evaluation_prompts
from gemma_grpo.model import LoRAConfig as LoRAConfig  # for presets, with all other settings
from gemma_grpo.model import ModelConfig, check_seed
from gemma_grpo.records import files
from gemma_grpo.records.metrics import STAGES
from gemma_grpo.records.trackers import TrackerName
from gemma_grpo.rewards import RewardConfig
from gemma_grpo.training.config import CheckpointConfig, GRPOConfig, SFTConfig
from gemma_grpo.training.config import OptimizerConfig as OptimizerConfig  # all settings

# Values that earlier versions wrote into config.yaml, by field, and today's names for them.
OLD_VALUES: dict[str, dict[str | bool, str]] = {
    "model.rollout_layout": {"hybrid": "tensor_parallel"},
    "model.remat": {True: "full", False: "none"},
    "grpo.curriculum": {True: "phases", False: "none"},
}
# Fields of earlier versions that are ignored: they cut an update into parts, to the same result.
OLD_FIELDS = {
    *("sft.accumulation_steps", "sft.length_bucket", "sft.packed_sizes"),
    *("grpo.accumulation_steps", "grpo.length_bucket", "grpo.packed_sizes", "grpo.prompt_bucket"),
}
LARGEST, LARGEST_FLOAT = 2**31 - 1, 1e9  # of any setting, in size: JAX's integers have 32 bits


@dataclass(frozen=True)
class DataConfig:
    """The training and the held-out problems."""

    source: str = "curriculum"
    """curriculum, gsm8k[:PATH], gsm8k-validation[:PATH], reasoning_gym:TASK, a .jsonl, .csv or
    .parquet file, or two of them with a comma between: train,test. PATH may be
    kagglehub:OWNER/DATASET."""
    num_train: int = 2000
    """Training problems; 0: all of a finite source."""
    num_test: int = 400
    """Held-out problems; 0: all of a finite source."""
    difficulties: str = ",".join(DIFFICULTIES)
    """Only problems of these difficulties are used, for training and held out."""

    def __post_init__(self) -> None:
        if not set(self._named) <= set(DIFFICULTIES):
            raise UserError(
                f"data: difficulties={self.difficulties!r}: name some of "
                f"{','.join(DIFFICULTIES)}, with commas between"
            )

    @property
    def difficulty_list(self) -> tuple[str, ...]:
        """The difficulties, the easiest first."""
        return tuple(name for name in DIFFICULTIES if name in self._named)

    @property
    def _named(self) -> list[str]:
        return [name.strip() for name in self.difficulties.split(",")]


@dataclass(frozen=True)
class RunConfig:
    """One run from base model to report.

    Its sections: `model` (`model.lora`), `data`, `sft` (`sft.optimizer`, `sft.own`), `grpo`
    (`grpo.optimizer`, `grpo.loss`, `grpo.guard`), `reward` (`reward.start`, `reward.end`,
    `reward.rubric`), `evaluation` and `checkpoint`; beside them `seed`, `stages`, `tracker`,
    `keep_checkpoints` and `weights_dtype`. `replace` takes their settings by dotted names, such as
    `grpo.num_steps`; print one for all of them.
    """

    seed: int = 0
    """The random seed of everything: problems, fresh adapters, sampling."""
    stages: str = ",".join(STAGES)
    """sft,grpo, or only one of them."""
    tracker: TrackerName = "none"
    """Also send the metrics to wandb or trackio (extras of these names)."""
    keep_checkpoints: bool = False
    """Keep the checkpoints (they hold the optimizer state) of a stage whose weights are written."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that a stage leaves. bfloat16 halves the files, but the next stage then
    starts from rounded weights, and a model computed in bfloat16 changes only after many small
    steps."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When training states are saved, and where."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The problems."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Stage one: SFT."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Stage two: GRPO."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What completions are rewarded for."""
    evaluation: RunEvaluationConfig = field(default_factory=RunEvaluationConfig)
    """What is measured before and after each stage, and during GRPO."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_sizes(self)
        if self.stages not in (",".join(STAGES), *STAGES):
            raise UserError(f"stages={self.stages!r}: use sft,grpo or one of them")
        if self.grpo.scale == "mean" and not self.reward.is_binary:
            raise UserError(
                "--grpo.scale mean is for a reward that is right or nothing: set every weight of "
                "reward.start and reward.end but correctness to 0, or use --grpo.scale group"
            )

    def replace(self, settings: Mapping[str, Any]) -> "RunConfig":
        """A copy with other settings, named as the command's flags are:
        `run.replace({"grpo.num_steps": 50, "model.lora.rank": 8})`.

        Raises:
            UserError: no such setting, or a value of the wrong type.
        """
        values = _plain(dataclasses.asdict(self))
        for name, value in settings.items():
            if not isinstance(name, str):
                raise UserError(f"there is no setting {name!r}; print(run) shows all")
            *sections, last = name.replace("-", "_").split(".")
            section = values
            for inner in sections:
                section = section.get(inner)
                if not isinstance(section, dict):
                    raise UserError(f"there is no setting {name!r}; print(run) shows all")
            if isinstance(section.get(last), dict) and isinstance(value, Mapping):
                example = f"{name}.{next(iter(value), next(iter(section[last])))}"
                raise UserError(f"{name} is a section: name its settings, such as {example}")
            section[last] = _plain(value)
        changed: RunConfig = _build(RunConfig, values, where="")
        return changed

    @property
    def stage_list(self) -> list[str]:
        """The stages to run, in order."""
        return self.stages.split(",")

    @property
    def samples_demonstrations(self) -> bool:
        """Whether stage one imitates the model's own answers."""
        return "sft" in self.stage_list and self.sft.demonstrations == "own"

    @property
    def has_teacher(self) -> bool:
        """Whether GRPO distils a teacher."""
        return bool(self.grpo.teacher) and "grpo" in self.stage_list

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Prompts per batch, for each kind of batch that must divide over the devices, by field."""
        sizes = {"evaluation.batch_size / num_samples": evaluation_prompts(self.evaluation)}
        if "sft" in self.stage_list and not self.sft.pack_tokens:
            sizes["sft.batch_size"] = self.sft.batch_size
        if self.samples_demonstrations:
            sizes["sft.own.batch_size / num_samples"] = self.sft.own.prompts
        if "grpo" in self.stage_list:
            sizes["grpo.prompts_per_step"] = self.grpo.prompts_per_step
        return sizes


def check_sizes(settings: Any) -> None:
    """Raises UserError for a number in a dataclass, or one nested in it, that is NaN or too large
    in size."""
    for name, value in flat(settings).items():
        most = LARGEST_FLOAT if isinstance(value, float) else LARGEST
        if name.endswith("max_grad_norm") and value == math.inf:
            continue
        if isinstance(value, int | float) and not abs(value) <= most:  # true for NaN too
            raise UserError(f"{name}={value}: must be a number of at most {most:,} in size")


@dataclass(frozen=True)
class _Need:
    """A condition without which some settings have no effect.

    Attributes:
        fields: beginnings of the settings' dotted names.
        is_met: whether a run meets it.
        fix: how to meet it.
    """

    fields: tuple[str, ...]
    is_met: Callable[[RunConfig], bool]
    fix: str


_NEEDS = (  # of a setting's conditions the first that fails is reported
    _Need(("sft.",), lambda run: "sft" in run.stage_list, "add sft to stages"),
    _Need(
        ("grpo.", "reward.start.", "evaluation.every", "evaluation.snapshot_problems"),
        lambda run: "grpo" in run.stage_list,
        "add grpo to stages",
    ),
    _Need(("sft.own.",), lambda run: run.samples_demonstrations, "set sft.demonstrations to own"),
    _Need(
        ("sft.own.shots_length",), lambda run: run.sft.own.shots > 0, "set sft.own.shots above 0"
    ),
    _Need(
        ("sft.optimizer.final_rate",),
        lambda run: run.sft.optimizer.decay != "constant",
        "set sft.optimizer.decay to linear or cosine",
    ),
    _Need(
        ("grpo.optimizer.final_rate",),
        lambda run: run.grpo.optimizer.decay != "constant",
        "set grpo.optimizer.decay to linear or cosine",
    ),
    _Need(("grpo.loss.distill_weight",), lambda run: run.has_teacher, "name a grpo.teacher"),
    _Need(
        ("grpo.loss.kl_estimator",),
        lambda run: run.has_teacher or run.grpo.loss.beta > 0,
        "set grpo.loss.beta above 0, or name a grpo.teacher",
    ),
    _Need(
        ("grpo.loss.tis_level",),
        lambda run: run.grpo.loss.tis_cap is not None,
        "set grpo.loss.tis_cap",
    ),
    _Need(
        ("grpo.loss.epsilon",),  # and epsilon_high
        lambda run: run.grpo.num_iterations > 1,
        "set grpo.num_iterations above 1 (in one update on a rollout every ratio is 1)",
    ),
    _Need(
        tuple(f"grpo.guard.{name}" for name in ("patience", "rollbacks", "min_", "max_")),
        lambda run: run.grpo.guard.is_on,
        "set grpo.guard.action to stop or rollback",
    ),
    _Need(
        ("grpo.guard.rollbacks",),
        lambda run: run.grpo.guard.action == "rollback",
        "set grpo.guard.action to rollback",
    ),
    _Need(("grpo.guard.max_kl",), lambda run: run.grpo.loss.beta > 0, "set grpo.loss.beta above 0"),
    _Need(
        ("evaluation.temperature", "evaluation.top_", "evaluation.min_p"),
        lambda run: run.evaluation.num_samples > 0,
        "set evaluation.num_samples above 0",
    ),
    _Need(
        ("evaluation.snapshot_problems",),
        lambda run: run.evaluation.every > 0,
        "set evaluation.every above 0",
    ),
    _Need(
        tuple(f"model.lora.{name}" for name in ("alpha", "targets", "dropout")),
        lambda run: run.model.lora.rank > 0,
        "set model.lora.rank above 0",
    ),
    _Need(
        tuple(f"reward.rubric.{name}" for name in ("timeout", "parallel", "per_call", "question")),
        lambda run: bool(run.reward.rubric.judges),
        "give a rubric and a judge",
    ),
)


def without_effect(before: RunConfig, after: RunConfig) -> list[str]:
    """A line, with the fix, for changed settings that have no effect on the run."""
    old = flat(before)
    changed = [name for name, value in flat(after).items() if value != old[name]]
    lines = []
    for need in _NEEDS:
        if need.is_met(after):
            continue
        idle = [name for name in changed if name.startswith(need.fields)]
        changed = [name for name in changed if name not in idle]
        if idle:
            verb, them = ("has", "it") if len(idle) == 1 else ("have", "them")
            lines.append(f"{', '.join(idle)} {verb} no effect: {need.fix}, or leave {them} out")
    return lines


def to_yaml(config: RunConfig) -> str:
    """YAML with every field, so that the file alone reproduces the run."""
    text: str = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    return text


def from_yaml(path: Path) -> RunConfig:
    """The configuration in a file; fields it leaves out keep their defaults.

    Raises:
        UserError: no such file, not YAML, an unknown field, or a value of the wrong type.
    """
    try:
        if files.is_stream(path):
            raise UserError("not a file")
        if (path / "config.yaml").is_file():
            raise UserError("a folder; name the config.yaml in it")
        return from_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not UTF-8; save the file as UTF-8") from error
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error


def from_text(text: str) -> RunConfig:
    """The configuration in a YAML text. Raises UserError as `from_yaml`."""
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"not YAML ({one_line(str(error), 300)})") from error
    except UNREADABLE as error:
        raise UserError(f"YAML that cannot be read ({one_line(str(error), 100)})") from error
    config: RunConfig = _build(RunConfig, values, where="")
    return config


def teacher_model(run: RunConfig) -> ModelConfig:
    """The model of a run's teacher: that of the run that grpo.teacher names, or else a base model.
    Raises UserError for a config.yaml that cannot be read."""
    path = expanded(run.grpo.teacher) / "config.yaml"
    return from_yaml(path).model if path.is_file() else ModelConfig(weights=run.grpo.teacher)


def changed_fields(before: RunConfig, after: RunConfig) -> list[str]:
    """The fields in which two configurations differ, as "grpo.num_steps 60 -> 200"."""
    old, new = flat(before), flat(after)
    return [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """The values of a dataclass and of those nested in it, by dotted field names."""
    if not dataclasses.is_dataclass(value):
        return {where: value}
    values: dict[str, Any] = {}
    for each in dataclasses.fields(value):
        values |= flat(getattr(value, each.name), f"{where}.{each.name}".lstrip("."))
    return values


class _Loader(yaml.SafeLoader):
    """Reads plain YAML: no aliases, which can expand without end, and no duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        if not all(isinstance(name, str) for name in names):
            raise yaml.YAMLError("a field's name must be text")
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"field {min(twice)} stands there twice")
        return super().construct_mapping(node, deep)


def _plain(value: Any) -> Any:
    """The value with its tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _build(kind: Any, value: Any, *, where: str) -> Any:
    """`value` from YAML as a `kind`, checked; `where` is the dotted name of the field."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where or 'the file'} must be a mapping of fields to values")
        if odd := [name for name in value if not isinstance(name, str)]:
            raise UserError(f"{where or 'top level'} has no field {odd[0]!r}")
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
        except (ValueError, OverflowError):
            pass
    if type(value) is kind:
        return value
    article = "an" if kind is int else "a"
    raise UserError(f"{where} is {value!r}; use {article} {kind.__name__}")
