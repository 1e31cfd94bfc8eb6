"""Wrong and odd settings, each as a flag of `train --dry-run` and as a line of a config.yaml: one
line that says what is wrong, or all checks passed; never a traceback, a hang or another status."""

import contextlib
import dataclasses
import functools
import io
import random
import time
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gemma_grpo import config, pipeline, train
from gemma_grpo.config import RunConfig
from gemma_grpo.errors import UserError

FEW = ["--dry-run", "--data.num-train=40", "--data.num-test=4", "--evaluation.num-samples=0"]
NUMBERS = "-1 0 1 3 1000000 9223372036854775808 1.5 1e3 nan inf -inf 1e400 0x10 1_0 x".split()
TEXTS = ["", " ", "x", ".", "/", "/dev/null", "~nobody/x", "x" * 5000, "ä\u2028", "-1", "gsm8k:"]
TEXTS += ["a,b,c", "x.jsonl", "x.yaml:f", "kagglehub:x", "model:", "true", "None", "[1]", "{}"]
YAML = ["", "null", "true", "-1", "0", "1.5", ".nan", ".inf", "1e400", "x", "[]", "[1, [2]]"]
YAML += ["{}", "{a: 1}", "'1'", "2026-01-01", "!!binary aGk=", "!!set {a}", "0x7fffffffffffffff"]
SLOW = 30.0  # seconds; longer is a hang


def inputs(folder: Path, number: int, seed: int = 0) -> Iterator[dict]:
    """A line for each input that did not hold, and one for all."""
    flags = [(name, value) for name, values in _flags() for value in values]
    lines = [(name, value) for name in _fields() for value in YAML]
    chosen = [("flag", *each) for each in flags] + [("yaml", *each) for each in lines]
    random.Random(seed).shuffle(chosen)
    counts: Counter = Counter()
    seconds, slowest = 0.0, ""
    with contextlib.chdir(folder), _models_kept():
        for door, name, value in chosen[:number]:
            began = time.process_time()
            what, said = _by_flag(name, value) if door == "flag" else _by_yaml(name, value)
            took = time.process_time() - began
            if took > seconds:
                seconds, slowest = took, f"{door} {name}={value[:40]}"
            if took > SLOW:
                what = "hung"
            counts[what] += 1
            if what not in ("one line", "accepted"):
                yield {"door": door, "name": name, "value": value[:80], "what": what, "said": said}
    held = counts["one line"] + counts["accepted"]
    slow = {"slowest": slowest, "cpu_seconds": round(seconds, 2)}
    yield {"inputs": sum(counts.values()), "of": len(chosen), "held": held, **counts, **slow}


def _fields(kind: Any = RunConfig, where: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{where}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{name}.")
        else:
            yield name


def _flags() -> Iterator[tuple[str, list[str]]]:
    """Each flag, and values of the kind it takes and of others."""
    for name in _fields():
        value = functools.reduce(getattr, name.split("."), RunConfig())
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        yield name, [*NUMBERS, ""] if is_number else TEXTS
    for name in ("preset", "config", "run-dir", "reward", "rubric", "judge", "resume-from"):
        yield name, TEXTS
    for name in ("hours", "num-processes", "process-id"):
        yield name, NUMBERS


def _by_flag(name: str, value: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = train.main([*FEW, f"--{name.replace('_', '-')}={value}"])
    except BaseException as error:
        return "traceback", repr(error)[:200]
    return _judged(status, err.getvalue())


def _judged(status: int, said: str) -> tuple[str, str]:
    errors = [line for line in said.splitlines() if not line.startswith("warning: ")]
    if status == 0:
        return "accepted", ""
    if status == 2 and len(errors) == 1 and errors[0].startswith("error: "):
        return "one line", errors[0]
    return f"status {status}, {len(errors)} lines", said[:200]


def _by_yaml(name: str, value: str) -> tuple[str, str]:
    *sections, last = name.split(".")
    text = "".join(f"{'  ' * depth}{each}:\n" for depth, each in enumerate(sections))
    text += f"{'  ' * len(sections)}{last}: {value}\n"
    try:
        run = config.from_text(text)
        yaml.safe_load(config.to_yaml(run))
    except UserError as error:
        return ("one line" if "\n" not in str(error) else "several lines"), str(error)
    except BaseException as error:
        return "traceback", repr(error)[:200]
    return "accepted", ""


@contextlib.contextmanager
def _models_kept() -> Iterator[None]:
    """Loads each model once, however many inputs name it."""
    load = pipeline.load_model
    pipeline.load_model = functools.lru_cache(4)(load)
    try:
        yield
    finally:
        pipeline.load_model = load
