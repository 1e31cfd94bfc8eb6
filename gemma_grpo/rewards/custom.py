"""Rewards of the user's own: functions in Python files, loaded by path."""

import importlib.util
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gemma_grpo.errors import UserError, one_line
from gemma_grpo.rewards.components import COMPONENTS
from gemma_grpo.rewards.sample import Reward


def load_extra_rewards(specs: Sequence[str]) -> list[tuple[str, Reward, float]]:
    """(name, function, weight) of each `path/to/file.py:function[=weight]`; the weight is 1 if
    unsaid.

    Raises:
        UserError: a weight that is no finite number, two rewards of one name, or what `load_reward`
            refuses.
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
        loaded.append((name, load_reward(location), value))
    return loaded


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
