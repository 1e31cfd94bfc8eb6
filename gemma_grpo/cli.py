"""What the commands share: flags, device errors, the compilation cache, run folders.

JAX is imported only in the functions that need it, so that --help and a mistyped flag answer fast.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from gemma_grpo import config, errors, presets
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import preflight
from gemma_grpo.errors import UserError, expanded, start
from gemma_grpo.records import files, origin, read

__all__ = ["start"]  # re-exported from `errors`, where commands that import no jax find it

# Settings that may change when a run goes on, by the beginnings of their names: where files are,
# the guard, and the number of CPU devices (sums then run in another order).
_MAY_CHANGE = (
    "model.weights",
    "model.tokenizer",
    "model.cpu_devices",
    "data.source",
    "grpo.teacher",
    "checkpoint.folder",
    "grpo.guard.",
)


# Flags of TRL, Transformers, PEFT, vLLM and of other commands, and what they may be here: those of
# them that the command has are named. RUN and OUT are arguments without a flag.
_OTHER_NAMES = {
    name: ours.split()
    for names, ours in {
        "model model-id model-name model-name-or-path model-path": "--model.weights --weights",
        "data dataset dataset-name source task tasks train-file": "--data.source --task",
        "output output-dir out out-dir save-dir": "--run-dir --out OUT",
        "run run-dir": "--run-dir RUN",
        "checkpoint resume-from-checkpoint": "--resume-from RUN",
        "prompt text question": "--prompt",
        "system system-prompt": "--model.instruction --instruction",
        "max-tokens max-new-tokens max-length max-response-length": (
            "--model.max-completion-length --max-completion-length"
        ),
        "max-model-len max-seq-length": (
            "--model.max-prompt-length --model.max-completion-length "
            "--max-prompt-length --max-completion-length"
        ),
        "n k group-size num-generations num-return-sequences n-samples": (
            "--grpo.num-generations --num-samples --num"
        ),
        "num-samples": "--evaluation.num-samples --sft.own.num-samples --num",
        "num limit num-problems max-samples": "--data.num-train --data.num-test --num",
        "batch-size train-batch-size per-device-train-batch-size": (
            "--grpo.prompts-per-step --sft.batch-size --evaluation.batch-size --batch-size"
        ),
        "micro-batch-size gradient-accumulation-steps": "--grpo.pack-tokens --sft.pack-tokens",
        "step steps max-steps epochs num-epochs num-train-epochs": (
            "--grpo.num-steps --sft.num-steps --steps"
        ),
        "num-iterations ppo-epochs mu": "--grpo.num-iterations",
        "lr learning-rate": (
            "--grpo.optimizer.learning-rate --sft.optimizer.learning-rate --learning-rate"
        ),
        "warmup-ratio warmup-steps": "--grpo.optimizer.warmup --sft.optimizer.warmup",
        "lr-scheduler lr-scheduler-type": "--grpo.optimizer.decay --sft.optimizer.decay",
        "kl-beta kl-coef kl-coeff kl-weight init-kl-coef": "--grpo.loss.beta",
        "clip cliprange clip-range clip-eps epsilon-low": "--grpo.loss.epsilon",
        "loss-type": "--grpo.loss.aggregation",
        "scale-rewards": "--grpo.scale",
        "mask-truncated-completions": "--grpo.loss.mask-truncated",
        "reward-fn reward-funcs reward-model reward-model-path": "--reward",
        "bf16 fp16 precision torch-dtype": "--model.dtype --dtype",
        "lora-r lora-rank use-lora use-peft": "--model.lora.rank",
        "lora-alpha": "--model.lora.alpha",
        "lora-dropout": "--model.lora.dropout",
        "lora-target-modules": "--model.lora.targets",
        "gradient-checkpointing": "--model.remat",
        "tp tensor-parallel-size": "--model.rollout-layout",
        "save-steps save-every": "--grpo.checkpoint-every --sft.checkpoint-every",
        "eval-steps eval-every": "--evaluation.every",
        "logger report-to wandb": "--tracker",
        "do-sample greedy": "--temperature",
    }.items()
    for name in names.split()
}


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors of the disk or a device in the block into a UserError, where it has one line."""
    with errors.user_errors():
        try:
            yield
        except MemoryError as error:
            raise UserError(f"out of memory on the host; {preflight.LESS_MEMORY}") from error
        except RuntimeError as error:
            if line := preflight.explain(str(error)):
                raise UserError(line) from error
            raise


def guarded(command: Callable[[], int]) -> int:
    """As `errors.guarded`, with one line for device errors and for lost processes too."""

    def with_user_errors() -> int:
        with user_errors():
            return command()

    try:
        return errors.guarded(with_user_errors)
    except (RuntimeError, ValueError) as error:  # either, if a collective fails
        import jax

        is_from_jax = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if not (is_from_jax and jax.distributed.is_initialized()):
            raise
        line = " ".join(str(error).split())[:200]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} lost the others "
            f"({line}); start all of them again, with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(3)  # an orderly exit would wait for the lost processes


def require_one_process(command: str) -> None:
    """Raises UserError where the environment names several, as `processes.require_alone`."""
    from gemma_grpo.devices import processes  # which imports jax

    processes.require_alone(command)


def check_tpu() -> None:
    """Initialises JAX. Raises UserError, with the fix, if a TPU is there but cannot be used."""
    import jax

    preflight.check()
    preflight.check_backend(jax.default_backend())


def split_cpu(wanted: int, *batch_sizes: int) -> None:
    """Let JAX see the CPU as `wanted` devices; 0: one per core, reduced until these batch sizes
    divide evenly.

    XLA's CPU backend runs a small model's steps on one core; a rollout on two devices uses two.
    Does not affect TPUs and GPUs. Call it after `processes.join`: with several processes each is
    one device by default. If JAX is initialised already (in a notebook), its devices are used, with
    a warning if another number was wanted.
    """
    import jax

    if not wanted and jax.distributed.is_initialized():
        wanted = 1
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    try:
        jax.config.update("jax_num_cpu_devices", wanted or math.gcd(num_cores, *batch_sizes))
    except RuntimeError:  # JAX is initialised
        present = jax.local_device_count()
        if wanted and jax.default_backend() == "cpu" and present != wanted:
            print(
                f"warning: JAX runs already, with {present} CPU devices: "
                f"model.cpu_devices={wanted} is ignored",
                file=sys.stderr,
            )


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, so that the next run there need not compile them.

    JAX's own variable, JAX_COMPILATION_CACHE_DIR, takes precedence.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.reset_cache()  # JAX fixes the cache at its first compilation (in a notebook)


def cache_for(where: str) -> Path:
    """The folder for compiled programs of a model: beside a run, or the user's cache."""
    from gemma_grpo.weights import assets

    path = expanded(where)
    return path.absolute().parent if (path / "config.yaml").is_file() else assets.cache()


def flag(arguments: Sequence[str], name: str, default: str | None) -> str | None:
    """The value of one flag alone: one that chooses the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name, default=default)
    return vars(parser.parse_known_args(arguments)[0])[name]


def default_run(arguments: Sequence[str], preset: str, others: Sequence[str] = ()) -> RunConfig:
    """The settings where no flag is given: those of --config or --preset, which are read first.

    Args:
        preset: used if neither is given.
        others: further flags given that choose all settings.

    Raises:
        UserError: more than one of them is given, or what they name cannot be read.
    """
    file, named = (flag(arguments, name, None) for name in ("config", "preset"))
    given = {"--config": file, "--preset": named}
    names = [name for name, value in given.items() if value is not None] + [*others]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)}: each chooses all settings; give one of them")
    if file is not None:
        return config.from_yaml(expanded(file))
    return presets.preset(preset if named is None else named)


_UNKNOWN = "Unrecognized options: "  # how tyro begins to say so
_FLAG_TYPES = tyro.constructors.ConstructorRegistry()


@_FLAG_TYPES.primitive_rule
def _path_flag(kind: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Expands a ~ that no shell has, as in --out=~/x or a notebook's list of arguments."""
    if kind.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: expanded(given[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@_FLAG_TYPES.primitive_rule
def _optional_flag(kind: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """X | None is shown as X in help and errors; the word None, its default in help, is None, and
    for a number none too."""
    kinds = typing.get_args(kind.type)
    if kind.type_origin not in (types.UnionType, typing.Union) or kinds[1:] != (types.NoneType,):
        return None
    of_value = tyro.constructors.PrimitiveTypeInfo.make(kinds[0], kind.markers)
    spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(of_value)
    if not isinstance(spec, tyro.constructors.PrimitiveConstructorSpec):
        return spec
    nones = ["None", "none"] if kinds[0] in (int, float) else ["None"]
    return replace(
        spec,
        choices=None if spec.choices is None else (*spec.choices, "None"),
        instance_from_str=lambda g: None if g[0] in nones else spec.instance_from_str(g),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda v: ["None"] if v is None else spec.str_from_instance(v),
    )


@_FLAG_TYPES.struct_rule
def _flags_of_a_dataclass(kind: tyro.constructors.StructTypeInfo) -> Any:
    """As tyro's own rule, with each flag's help wrapped by the terminal alone: tyro keeps a
    docstring's line break unless the next line begins with a letter, at no indentation."""
    if not dataclasses.is_dataclass(kind.type) or _flags_of_a_dataclass in kind.markers:
        return None
    marked = replace(kind, markers=(*kind.markers, _flags_of_a_dataclass))
    spec = tyro.constructors.ConstructorRegistry.get_struct_spec(marked)  # tyro's own rule
    if not isinstance(spec, tyro.constructors.StructConstructorSpec):
        return spec
    fields = [replace(field, helptext=_without_breaks(field.helptext)) for field in spec.fields]
    return replace(spec, fields=tuple(fields))


def _without_breaks(text: Any) -> Any:
    """A help text as one line; one that tyro makes only for --help, as a function, stays one."""
    if callable(text):
        return lambda: _without_breaks(text())
    return None if text is None else " ".join(text.split())


def parse(
    kind: Any,
    arguments: Sequence[str] | None,
    *,
    command: str,
    description: str | None,
    markers: tuple = (tyro.conf.FlagCreatePairsOff,),
) -> Any:
    """The flags as a `kind`: an instance of a dataclass, or the result of a function.

    Args:
        arguments: without the command's name; None takes the process's own.
        command: the module's name, for --help and errors.
        description: what it does, for --help.
        markers: tyro's; by default a flag --x has no --no-x.

    Raises:
        UserError: an unknown flag, or a value of the wrong type, in one line.
    """
    prog = f"python -m gemma_grpo.{command}"
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{argument!r}: not UTF-8; write it in UTF-8") from None
        if argument.startswith("--="):  # tyro takes it for a positional argument
            raise UserError(f"{argument}: names no flag; {prog} --help lists all")
    read = functools.partial(
        tyro.cli,
        kind if isinstance(kind, type) else _later(kind),
        prog=prog,
        description=description,
        config=markers,
        registry=_FLAG_TYPES,
    )
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            given = read(args=arguments)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        fault = _without_frame(message.getvalue())
        if fault.startswith(_UNKNOWN):
            with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
                read(args=["--help"])
            unknown = fault.removeprefix(_UNKNOWN)
            fault = errors.unknown_flags(unknown, text.getvalue(), _OTHER_NAMES)
        raise UserError(f"{fault}; {prog} --help lists all") from None
    if not isinstance(kind, type):
        given = given()  # now that stderr is the user's again
    for part in given if isinstance(given, tuple) else (given,):
        _check_counts(part)
    return given


def _later(function: Callable) -> Callable:
    """A function with the same flags that returns the call instead of making it."""

    @functools.wraps(function)
    def bound(*given: Any, **named: Any) -> Callable[[], Any]:
        return lambda: function(*given, **named)

    return bound


def _check_counts(options: Any) -> None:
    """Raises UserError for an integer flag that does not fit 32 bits."""
    for name, value in config.flat(options).items():
        if isinstance(value, int) and abs(value) > config.LARGEST:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: must be at most {config.LARGEST:,} in size")


def _without_frame(box: str) -> str:
    """One line from the box that tyro prints: its first section, without a terminal's colours."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    lines = [line for line in lines if line]
    if lines[1:2] and lines[1].startswith("---"):  # a terminal without frames: a title, underlined
        lines = lines[2:]
    rules = [place for place, line in enumerate(lines) if line.startswith(("───", "---"))]
    return " ".join(lines[: rules[0] if rules else None]).rstrip(". ")


def parse_run(
    arguments: Sequence[str], options: Any, default: RunConfig, *, command: str, description: str
) -> tuple[Any, RunConfig]:
    """A command's own flags, as a dataclass like `options`, and a run's: every setting is a flag.

    Args:
        options, default: the values where no flag is given.
        command, description: as in `parse`.

    Raises:
        UserError: as `parse`.
    """
    kind = type(options)

    def both(
        options: Any = options, run: Annotated[RunConfig, tyro.conf.arg(name="")] = default
    ) -> tuple[Any, RunConfig]:
        return options, run

    both.__annotations__["options"] = Annotated[kind, tyro.conf.arg(name="")]
    return parse(both, _current(arguments), command=command, description=description, markers=())


def _current(arguments: Sequence[str]) -> list[str]:
    """The arguments, with values of earlier versions (`config.OLD_VALUES`) renamed to today's."""
    current = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        flag, equals, value = argument.rpartition("=")
        field = (flag or before).removeprefix("--").replace("-", "_")
        current.append(f"{flag}{equals}{config.OLD_VALUES.get(field, {}).get(value, value)}")
    return current


def with_rewards(
    run: RunConfig, extra: Sequence[str], rubric: str, judges: Sequence[str]
) -> RunConfig:
    """The run with the rewards of `--reward`, `--rubric` and `--judge` flags added."""
    if not (extra or rubric or judges):
        return run
    before = run.reward
    rubric_config = replace(
        before.rubric,
        file=rubric or before.rubric.file,
        judges=(*before.rubric.judges, *judges),
    )
    reward = replace(before, extra=(*before.extra, *extra), rubric=rubric_config)
    return replace(run, reward=reward)


def with_moved_rewards(
    run: RunConfig, extra: Sequence[str], rubric: str, judges: Sequence[str]
) -> RunConfig:
    """The run with files that have moved: `--reward` and `--judge` replace those of the same names,
    `--rubric` the rubric. Without a weight the old one stays.

    Raises:
        UserError: the run was begun without one of that name.
    """
    before = run.reward
    rubric_config = replace(
        before.rubric,
        file=rubric or before.rubric.file,
        judges=_moved(before.rubric.judges, judges, "--judge"),
    )
    reward = replace(before, extra=_moved(before.extra, extra, "--reward"), rubric=rubric_config)
    return replace(run, reward=reward)


def _moved(before: Sequence[str], given: Sequence[str], flag: str) -> tuple[str, ...]:
    """A run's rewards, FILE:NAME=WEIGHT, with those of the same names replaced by `given`."""
    name_of = lambda spec: spec.rpartition(":")[2].partition("=")[0]
    moved = {name_of(spec): spec for spec in before}
    for spec in given:
        old = moved.get(name_of(spec))
        if old is None:
            known = ", ".join(moved) or "none"
            raise UserError(f"{flag} {spec}: the run was begun without it; its own: {known}")
        weight = old.rpartition(":")[2].partition("=")[1:]
        moved[name_of(spec)] = spec if "=" in spec.rpartition(":")[2] else spec + "".join(weight)
    return tuple(moved.values())


def without_places(run: RunConfig) -> RunConfig:
    """The settings without the folders of rewards, judges and rubric, whose files may move.
    Functions of a Python session, and judges that are models, stay."""
    name = lambda spec: spec.rpartition(":")[2] if ".py:" in spec else spec
    names = lambda specs: tuple(map(name, specs))
    rubric = run.reward.rubric
    rubric = replace(rubric, file=Path(rubric.file).name, judges=names(rubric.judges))
    return replace(run, reward=replace(run.reward, extra=names(run.reward.extra), rubric=rubric))


def one_model(run_or_weights: str, weights: str) -> str:
    """The model that the user named, as the first argument or with `--weights`.

    Raises:
        UserError: neither, or both.
    """
    if bool(run_or_weights) == bool(weights):
        raise UserError(
            "name one model, as the first argument or with --weights: a run directory, "
            "gemma3-nano, gemma3-270m, a folder or a .gguf file"
        )
    return run_or_weights or weights


def config_of(run_dir: Path) -> RunConfig:
    """The settings of a run that is to go on.

    Raises:
        UserError: no run there, one of another version, or settings edited since it began.
    """
    if not (run_dir / "config.yaml").exists():
        near = sorted({*run_dir.glob("*/config.yaml"), *run_dir.parent.glob("*/config.yaml")})
        named = ", ".join(str(path.parent) for path in near[:5])
        raise UserError(f"no run in {run_dir}" + (f"; near it are {named}" if near else ""))
    try:
        run = config.from_yaml(run_dir / "config.yaml")
    except UserError as error:
        raise UserError(
            f"{error}; a run can be resumed by the version of gemma_grpo that began it"
        ) from error
    begun = (files.read_json(run_dir / origin.NAME) or {}).get("config")
    if begun is None:
        return run
    try:
        before = config.from_text(str(begun))
    except UserError as error:
        raise UserError(f"{run_dir / origin.NAME}: {error}; put the file back") from error
    check_unchanged(before, run, f"{run_dir / 'config.yaml'} was edited")
    return run


def check_unchanged(before: RunConfig, after: RunConfig, fault: str) -> None:
    """Raises UserError if settings differ that a run which goes on may not change."""
    changed = config.changed_fields(without_places(before), without_places(after))
    if changed := [line for line in changed if not line.startswith(_MAY_CHANGE)]:
        raise UserError(
            f"{fault} ({', '.join(changed)}): a run goes on with the settings it began with; for "
            "others begin a new one, from its model if you like (export, then --model.weights)"
        )


def trained(run_or_weights: str) -> tuple[RunConfig, Path | None]:
    """The configuration with which to use a run's model, or a base model's weights as they are.

    Returns:
        The configuration, and the trained parameters of the run's last stage, finished or cut short
        by a deadline; None for a base model.

    Raises:
        UserError: a run directory without weights, or of adapters over a base that has changed.
    """
    path = expanded(run_or_weights)
    base = RunConfig()
    if not (path / "config.yaml").is_file():
        return replace(base, model=replace(base.model, weights=run_or_weights)), None
    run = config.from_yaml(path / "config.yaml")
    if run.model.lora.rank:
        from gemma_grpo import weights

        origin.check(path, {"base weights": weights.digest(run.model.weights)})
    return run, read.last_weights(path)
