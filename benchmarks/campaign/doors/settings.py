"""Settings: each as a flag of `train --dry-run` and as a line of a config.yaml; whole files."""

import dataclasses
import functools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.doors.case import DAMAGES, Case, written
from gemma_grpo import config, presets
from gemma_grpo.config import RunConfig

FEW = ["--dry-run", "--data.num-train=40", "--data.num-test=4", "--evaluation.num-samples=0"]
NUMBERS = "-1 0 1 3 1000000 9223372036854775808 1.5 1e3 nan inf -inf 1e400 0x10 1_0 x".split()
TEXTS = ["", " ", "x", ".", "/", "/dev/null", "~nobody/x", "x" * 5000, "ä\u2028", "-1", "gsm8k:"]
TEXTS += ["a,b,c", "x.jsonl", "x.yaml:f", "kagglehub:x", "kagglehub:a/b", "kagglehub:a/b/c/d"]
TEXTS += ["model:", "true", "None", "[1]", "{}", "\x1b[31m", "a\nb", "\udcff", "../..", "*"]
YAML = ["", "null", "true", "-1", "0", "1.5", ".nan", ".inf", "1e400", "x", "[]", "[1, [2]]"]
YAML += ["{}", "{a: 1}", "'1'", "2026-01-01", "!!binary aGk=", "!!set {a}", "0x7fffffffffffffff"]
NEVER = ("nan", "inf", "-inf", "1e400", ".nan", ".inf", "9223372036854775808")  # for most numbers

FILES = {  # a config.yaml, and what must come of it
    "a tab": ("grpo:\n\tnum_steps: 3\n", "refused"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "refused"),
    "a key twice": ("seed: 1\nseed: 2\n", "refused"),
    "a key twice within": ("grpo:\n  num_steps: 1\n  num_steps: 2\n", "refused"),
    "an alias": ("a: &a [1]\nb: *a\n", "refused"),
    "a merge": ("grpo: &g\n  num_steps: 3\nsft:\n  <<: *g\n", "refused"),
    "a Python object": ("seed: !!python/object/apply:os.system ['true']\n", "refused"),
    "a null key": ("null: 1\n", "refused"),
    "a key that is a list": ("[1]: 2\n", "refused"),
    "a key that is a mapping": ("{a: 1}: 2\n", "refused"),
    "a thousand brackets": ("seed: " + "[" * 1000 + "]" * 1000, "refused"),
    "a million brackets": ("seed: " + "[" * 10**6, "refused"),
    "5,000 digits": ("seed: " + "9" * 5000, "refused"),
    "an octal seed": ("seed: 010\n", "accepted"),
    "a sexagesimal seed": ("seed: 1:30\n", ""),
    "nothing": ("", ""),
    "a comment": ("# nothing\n", ""),
    "a list": ("- seed\n", "refused"),
    "a text": ("seed\n", "refused"),
    "a section that is null": ("grpo:\n", "refused"),
    "an unknown section": ("grop:\n  num_steps: 3\n", "refused"),
    "an unknown field": ("grpo:\n  num_step: 3\n", "refused"),
    "a flag's name": ("grpo:\n  num-steps: 3\n", "refused"),
    "a dotted name": ("grpo.num_steps: 3\n", "refused"),
    "a byte order mark": ("\ufeffseed: 1\n", "accepted"),
    "Windows line ends": ("seed: 1\r\ngrpo:\r\n  num_steps: 3\r\n", "accepted"),
    "a vertical tab": ("seed: 1\x0b\n", "refused"),
    "a NUL": ("seed: 1\x00\n", "refused"),
    "half a surrogate pair": ("stages: \ud800\n", "refused"),
    "an unclosed quote": ('stages: "sft\n', "refused"),
    "JSON": ('{"seed": 1, "grpo": {"num_steps": 3}}', "accepted"),
    "an escaped line break": ('model:\n  instruction: "a\\nb"\n', "accepted"),
    "an emoji": ("model:\n  instruction: 🙂\n", "accepted"),
    "an anchor alone": ("seed: &a 1\n", ""),
    "a tag": ("seed: !!int '1'\n", ""),
    "yes as a stage": ("stages: yes\n", "refused"),
    "a stage twice": ("stages: sft,sft\n", "refused"),
    "stages the other way": ("stages: grpo,sft\n", "refused"),
    "no stages": ("stages: ''\n", "refused"),
    "one group": ("grpo:\n  num_generations: 1\n", "refused"),
}


def cases(material: Path) -> Iterator[Case]:
    """Flags, fields and files."""
    for name, values in _flags():
        for value in values:
            flag = f"--{name.replace('_', '-')}={value}"
            number = (
                values[0] == NUMBERS[0]
                and value in NEVER
                and not flag.startswith(
                    (
                        "--hours",
                        "--sft.optimizer.max-grad-norm",
                        "--grpo.optimizer.max-grad-norm",
                    )
                )
            )
            yield Case(
                "flag",
                f"{name}={value[:40]}",
                ["train", *FEW, flag],
                wanted="refused" if number else "",
            )
    for name in fields():
        for value in YAML:
            *sections, last = name.split(".")
            text = "".join(f"{'  ' * depth}{each}:\n" for depth, each in enumerate(sections))
            text += f"{'  ' * len(sections)}{last}: {value}\n"
            yield Case("YAML field", f"{name}: {value}", ["config"], written("config.yaml", text))
    for name, (text, wanted) in FILES.items():
        yield Case("YAML file", name, ["config"], written("config.yaml", text), wanted)
    whole = written("config.yaml", config.to_yaml(RunConfig()))
    for name, damage in DAMAGES.items():
        make = lambda folder, damage=damage: (whole(folder), damage(folder / "config.yaml"))
        yield Case(
            "YAML file",
            f"file: {name}",
            ["train", *FEW[1:], "--config=config.yaml", "--dry-run"],
            make,
        )
    for name in ("", " ", "NANO", "gemma3", "gemma3-nano ", "../x", "nano", *presets.PRESETS):
        yield Case("preset", name, ["train", *FEW, f"--preset={name}"])


def fields(kind: Any = RunConfig, where: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{where}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{name}.")
        else:
            yield name


def _flags() -> Iterator[tuple[str, list[str]]]:
    """Each flag, and values of the kind it takes and of others."""
    for name in fields():
        value = functools.reduce(getattr, name.split("."), RunConfig())
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        yield name, [*NUMBERS, ""] if is_number else TEXTS
    for name in ("preset", "config", "run-dir", "reward", "rubric", "judge", "resume-from"):
        yield name, TEXTS
    for name in ("hours", "num-processes", "process-id"):
        yield name, NUMBERS
