"""Rewards of the user's own: functions in Python files, loaded by path, or of a Python session."""

import importlib.util
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma_grpo.errors import UserError, one_line
from gemma_grpo.rewards.components import COMPONENTS
from gemma_grpo.rewards.sample import Reward
from gemma_grpo.rewards.weights import RewardConfig

SESSION = "session:"  # before the name of a function that came from Python, not from a file


@dataclass(frozen=True)
class LoadedRewards:
    """What a completion is paid for, with the functions.

    Attributes:
        config: the weights, and how traces are scored.
        extra: the user's own: name, function, weight.
    """

    config: RewardConfig
    extra: list[tuple[str, Reward, float]] = field(default_factory=list)


def session_specs(
    given: Sequence[Reward] | Mapping[Reward, float],
) -> tuple[tuple[str, ...], dict[str, Reward]]:
    """How a config records functions of a Python session, and the functions by name.

    Args:
        given: functions, of weight 1, or the weight of each.

    Raises:
        UserError: something that cannot be called or has no name, or two of one name.
    """
    weights = given if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
    functions: dict[str, Reward] = {}
    for function in weights:
        name = getattr(function, "__name__", "")
        if not (callable(function) and name.isidentifier()):
            raise UserError(f"reward {one_line(repr(function), 60)} is no named function: use def")
        if name in functions:
            raise UserError(f"two rewards are named {name!r}: rename one of them")
        functions[name] = function
    specs = tuple(f"{SESSION}{f.__name__}={weight!r}" for f, weight in weights.items())
    return specs, functions


def load_extra_rewards(
    specs: Sequence[str], functions: Mapping[str, Reward] | None = None
) -> list[tuple[str, Reward, float]]:
    """(name, function, weight) of each `path/to/file.py:function[=weight]`; the weight is 1 if
    unsaid.

    Args:
        functions: by name, those of a Python session (`session_specs`).

    Raises:
        UserError: a weight that is no finite number, two rewards of one name, a function of a
            session that is not here, or what `load_reward` refuses.
    """
    loaded, taken = [], set(COMPONENTS)
    for spec in specs:
        location, equals, weight = spec.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError as error:
            raise UserError(f"--reward {spec}: {weight!r} is no weight; give a number") from error
        name = location.rpartition(":")[2]
        if not math.isfinite(value):
            raise UserError(f"--reward {spec}: the weight is {value}; give a finite number")
        if name in taken:
            raise UserError(f"--reward {spec}: two rewards are named {name!r}: rename one of them")
        taken.add(name)
        loaded.append((name, _load(location, name, functions or {}), value))
    return loaded


def _load(location: str, name: str, functions: Mapping[str, Reward]) -> Reward:
    if not location.startswith(SESSION):
        return load_reward(location)
    if name not in functions:
        raise UserError(
            f"reward {name!r} was a function of a Python session: go on from Python, with "
            f"gemma_grpo.resume(RUN, rewards=[{name}])"
        )
    return functions[name]


def load_reward(spec: str) -> Reward:
    """The function that "path/to/file.py:function" names. Runs the file once.

    Raises:
        UserError: no ":function", no such file, an error while running it, no such function in it,
            or something that cannot be called.
    """
    file, colon, name = spec.rpartition(":")
    if not (colon and file and name.isidentifier()):
        raise UserError(f"reward {spec!r} names no function: write path/to/file.py:function")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"reward {spec!r}: there is no Python file {file!r}; check the path")
    module = _run_file(path)
    if name not in vars(module):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        has = ", ".join(own) or "no function"
        raise UserError(f"reward {spec!r}: {file} has no {name!r}; it has {has}")
    reward = vars(module)[name]
    if not callable(reward):
        kind = type(reward).__name__
        raise UserError(f"reward {spec!r}: {name!r} is of type {kind}; name a function")
    return reward


def _run_file(path: Path):
    """The module made by running `path`; registered, since dataclasses look their module up."""
    module_name = f"gemma_grpo_reward:{path.resolve()}"
    module_spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(path, error)
        raise UserError(
            f"reward file {path}, line {line}: {type(error).__name__}:"
            f" {one_line(str(error), 120)}; fix the file"
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> int | str:
    """The last line of `path` on the way to `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    return lines[-1] if lines else "?"
