"""Rewards of the user's own: functions in Python files, loaded by path, or of a Python session."""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma_grpo.errors import UserError, described, one_line, shown
from gemma_grpo.rewards.components import COMPONENTS
from gemma_grpo.rewards.sample import Reward
from gemma_grpo.rewards.weights import RewardConfig

SESSION = "session:"  # before the name of a function that came from Python, not from a file
_OF_FILE = "gemma_grpo_reward:"  # before the path of a file, in its module's name

# What else rollouts, evaluations and metrics (reward/mean) say under a name of its own.
COLUMNS = frozenset(
    "group problem sample greedy prompt answer difficulty domain completion num_tokens stopped "
    "logp strict_answer lenient_answer lenient_correctness reward advantage mean std".split()
)


@dataclass(frozen=True)
class GivenRewards:
    """What a completion is paid for, before files are loaded.

    Attributes:
        config: the weights, how traces are scored, and where the user's own rewards are.
        functions: those of a Python session, by name.
    """

    config: RewardConfig
    functions: Mapping[str, Reward] = field(default_factory=dict)


def session_specs(
    given: Sequence[Reward] | Mapping[Reward, float],
) -> tuple[tuple[str, ...], dict[str, Reward]]:
    """How a config records functions of a Python session, and the functions by name.

    Args:
        given: functions, of weight 1, or the weight of each.

    Raises:
        UserError: no list, something that cannot be called or has no name, two of one name, or a
            weight that is no number.
    """
    if callable(given) or not isinstance(given, Iterable):
        raise UserError("rewards: give a list of functions, or a dict of their weights")
    pairs = given.items() if isinstance(given, Mapping) else [(each, 1.0) for each in given]
    functions: dict[str, Reward] = {}
    for function, weight in pairs:
        name = getattr(function, "__name__", "")
        if not (callable(function) and name.isidentifier()):
            raise UserError(f"reward {one_line(repr(function), 60)} is no named function: use def")
        if name in functions:
            raise UserError(f"two rewards are named {name!r}: rename one of them")
        try:
            float(weight)
        except (TypeError, ValueError):
            raise UserError(
                f"reward {name}: its weight is {shown(weight)}: give a number"
            ) from None
        functions[name] = function
    specs = tuple(f"{SESSION}{f.__name__}={float(weight)!r}" for f, weight in pairs)
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
            session that is not here or takes no one sample, or what `load_reward` refuses.
    """
    loaded, taken = [], set(COMPONENTS)
    for spec in specs:
        location, weight = split_weight(spec, "--reward")
        name = location.rpartition(":")[2]
        take_name(name, taken, f"--reward {spec}")
        loaded.append((name, _load(location, name, functions or {}), weight))
    return loaded


def split_weight(spec: str, flag: str) -> tuple[str, float]:
    """The location and the weight of "location:name=weight", 1 if unsaid; the path may hold
    both signs.

    Raises:
        UserError: a weight that is no finite number; `flag` is what it was given to.
    """
    head, colon, tail = spec.rpartition(":")
    name, equals, weight = tail.partition("=")
    try:
        value = float(weight) if equals else 1.0
    except ValueError as error:
        raise UserError(f"{flag} {spec}: {weight!r} is no weight; give a number") from error
    if not math.isfinite(value):
        raise UserError(f"{flag} {spec}: the weight is {value}; give a finite number")
    return f"{head}{colon}{name}", value


def take_name(name: str, taken: set[str], where: str) -> None:
    """Adds a reward's name to those taken. Raises UserError if it is one of them."""
    if name in COLUMNS:
        raise UserError(f"{where}: the records have a column {name!r} already: rename the function")
    if name in taken:
        raise UserError(f"{where}: two rewards are named {name!r}: rename one of them")
    taken.add(name)


def _load(location: str, name: str, functions: Mapping[str, Reward]) -> Reward:
    if not location.startswith(SESSION):
        return load_reward(location)
    if name not in functions:
        raise UserError(
            f"reward {name!r} was a function of a Python session: go on from Python, with "
            f"gemma_grpo.resume(RUN, rewards=[{name}])"
        )
    _require_one_argument(functions[name], name)
    return functions[name]


def load_reward(spec: str) -> Reward:
    """The reward that "path/to/file.py:function" names. Raises as `load_function`, and UserError
    for a function that does not take one sample, or is an `async def`."""
    function = load_function(spec, what="reward")
    _require_one_argument(function, spec)
    return function


def _require_one_argument(reward: Callable[..., Any], named: str) -> None:
    """Raises UserError for a function that cannot be called with one sample, or all of a step, as
    far as its signature tells."""
    if inspect.iscoroutinefunction(reward):
        raise UserError(f"reward {named!r} is an async def, which nothing awaits: use def")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # built in, without one
        return
    is_batch = getattr(reward, "takes_batch", False)
    is_of_trl = not is_batch and next(iter(signature.parameters), "") in ("completions", "prompts")
    try:
        signature.bind(None)
    except TypeError:
        pass
    else:
        if not is_of_trl:
            return
    raise UserError(
        f"reward {named!r} has the parameters {signature}: a reward takes one gemma_grpo.Sample; "
        "use @batch_reward for all of a step at once"
    )


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that "path/to/file.py:function" names. Runs the file once.

    Args:
        what: it is, for messages: "reward" or "judge".

    Raises:
        UserError: no ":function", no such file, an error while running it, no such function in it,
            or something that cannot be called.
    """
    file, colon, name = spec.rpartition(":")
    if not (colon and file and name.isidentifier()):
        raise UserError(
            f"{what} {spec!r} names no function: write path/to/file.py:function"
            + ("=WEIGHT" if what == "reward" else "")
        )
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{what} {spec!r}: there is no Python file {file!r}; check the path")
    module = _run_file(path, what)
    if name not in vars(module):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        has = ", ".join(own) or "no function"
        raise UserError(f"{what} {spec!r}: {file} has no {name!r}; it has {has}")
    function = vars(module)[name]
    if not callable(function):
        kind = type(function).__name__
        raise UserError(f"{what} {spec!r}: {name!r} is of type {kind}; name a function")
    return function


def modules_beside(file: Path) -> dict[str, Path]:
    """The imported modules whose files are in a reward file's folder or below, by relative path;
    without installed packages, this one and the running script."""
    folder, found = file.resolve().parent, {}
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        is_ours = name.startswith(("gemma_grpo.", _OF_FILE)) or name in ("gemma_grpo", "__main__")
        is_pythons = name.partition(".")[0] in sys.stdlib_module_names
        if is_ours or is_pythons or {"site-packages", "dist-packages"} & {*path.parts}:
            continue
        path = path.resolve()
        if path.is_file() and path.is_relative_to(folder):
            found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _run_file(path: Path, what: str) -> ModuleType:
    """The module made by running `path`; registered, since dataclasses look their module up."""
    module_name = f"{_OF_FILE}{path.resolve()}"
    module_spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert module_spec is not None and module_spec.loader is not None  # of a .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except KeyboardInterrupt:  # a notebook's stop button
        raise
    except BaseException as error:
        del sys.modules[module_name]
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(path, error)
        fix = "fix the file"
        if isinstance(error, ModuleNotFoundError) and _lies_beside(path, error.name):
            fix = f"{error.name} lies beside it: set PYTHONPATH={path.resolve().parent}"
        raise UserError(f"{what} file {path}, line {line}: {described(error)}; {fix}") from error
    return module


def _lies_beside(path: Path, module: str | None) -> bool:
    beside = path.resolve().parent / (module or "").partition(".")[0]
    return bool(module) and (beside.is_dir() or beside.with_suffix(".py").is_file())


def _line_in(path: Path, error: BaseException) -> int | str:
    """The last line of `path` on the way to `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    return lines[-1] or "?" if lines else "?"
