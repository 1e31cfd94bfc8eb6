"""Run folders with one file damaged, or one field of it, and the commands that read them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.doors.case import DAMAGES, VALUES, Case, copied, shown

COMMANDS = {
    "view": ["view", "r"],
    "view --text": ["view", "r", "--text"],
    "view --problem": ["view", "r", "--text", "--problem=0"],
    "rescore": ["rescore", "r"],
    "rescore --json": ["rescore", "r", "--json", "--reader=strict"],
    "export": ["export", "r", "out"],
    "export --stage": ["export", "r", "out", "--stage=sft"],
    "resume": ["train", "--resume", "--run-dir=r"],
    "resume-from": ["train", "--resume-from=r", "--run-dir=new"],
    "generate": ["generate", "r", "--prompt=x", "--max-completion-length=2"],
    "evaluate": ["evaluate", "r", "--num=2", "--num-samples=0", "--batch-size=2", "--out=out"],
}
WRITERS, STREAMS = ("resume",), ("a FIFO", "the null device")
READERS = {  # of each file, the commands that read it
    "config.yaml": tuple(COMMANDS),
    "origin.json": ("resume", "resume-from", "export"),
    "metrics.jsonl": ("view", "view --text", "resume"),
    "seconds.json": ("view", "resume"),
    "summary.json": ("view", "view --text", "export", "resume"),
    "evaluations/grpo.json": ("view", "view --text", "rescore", "export", "resume"),
    "evaluations/grpo.jsonl": ("view", "view --problem", "rescore", "export", "resume"),
    "evaluations/grpo.npz": ("view", "rescore"),
    "rollouts/grpo-000002.jsonl": ("view", "rescore --json", "resume"),
    "rollouts/grpo-000002.npz": ("view", "rescore"),
    "weights/sft.safetensors": ("export --stage", "resume"),
    "weights/grpo.safetensors": ("export", "generate", "evaluate", "resume", "resume-from"),
    "curves.png": ("view", "resume"),
}


def cases(material: Path) -> Iterator[Case]:
    """Files, fields of rows, fields of objects, arguments."""
    run = material / "run"
    for name, command in COMMANDS.items():
        yield _case("good", name, copied(run, "r"), "accepted")
        nothing = lambda folder: (folder / "r").mkdir()
        yield _case("an empty folder", name, nothing, "refused")
        yield Case("run", f"{name}: no folder", command, wanted="refused")
        file = lambda folder: (folder / "r").write_text("x")
        yield _case("a file", name, file, "refused")
    for file, commands in READERS.items():
        for command in commands:
            for damage, change in DAMAGES.items():
                if command in WRITERS and damage in STREAMS:
                    continue  # what is written there goes through it, to whoever reads
                make = copied(run, "r", lambda r, c=change, f=file: c(r / f))
                yield _case(f"{file}: {damage}", command, make)
    yield from _rows(run)
    yield from _objects(run)
    yield from _checkpoints(material)
    yield from _adapters(material)


def _case(name: str, command: str, make: Callable[[Path], None], wanted: str = "") -> Case:
    return Case("run", f"{command}: {name}", COMMANDS[command], make, wanted, ("r", "new", "out"))


def _edit_rows(file: str, field: str, value: Any) -> Callable[[Path], None]:
    """Sets a field of a file's second row."""

    def change(run: Path) -> None:
        lines = (run / file).read_text().split("\n")
        lines[1] = json.dumps(json.loads(lines[1]) | {field: value})
        (run / file).write_text("\n".join(lines))

    return change


def _rows(run: Path) -> Iterator[Case]:
    readers = {
        "evaluations/grpo.jsonl": (
            "view",
            "view --text",
            "view --problem",
            "rescore",
            "rescore --json",
        ),
        "rollouts/grpo-000002.jsonl": ("view", "rescore", "rescore --json"),
        "metrics.jsonl": ("view", "view --text"),
    }
    for file, commands in readers.items():
        fields = json.loads((run / file).read_text().split("\n")[1])
        if file == "metrics.jsonl":
            fields = {
                name: fields[name]
                for name in ("stage", "step", "loss", "time/step_s")
                if name in fields
            }
        for field in fields:
            for name, value in shown(VALUES):
                for command in commands:
                    make = copied(run, "r", _edit_rows(file, field, value))
                    yield _case(f"{file}, {field} {name}", command, make)


def _objects(run: Path) -> Iterator[Case]:
    """Fields of JSON objects."""
    readers = {
        "summary.json": ("view", "view --text", "export"),
        "evaluations/grpo.json": ("view", "view --text", "export"),
        "seconds.json": ("view", "resume"),
        "origin.json": ("resume", "export"),
    }
    for file, commands in readers.items():
        for field in json.loads((run / file).read_text()):
            for name, value in shown(VALUES):

                def change(r: Path, file=file, field=field, value=value) -> None:
                    content = json.loads((r / file).read_text()) | {field: value}
                    (r / file).write_text(json.dumps(content))

                for command in commands:
                    yield _case(f"{file}, {field} {name}", command, copied(run, "r", change))


def _checkpoints(material: Path) -> Iterator[Case]:
    """A stage that was cut short: its checkpoints damaged, then `--resume`."""
    cut, resume = material / "cut", ["train", "--resume", "--run-dir=r"]
    yield Case("checkpoint", "good", resume, copied(cut, "r"), "accepted", ("r",))
    steps = sorted((cut / "checkpoints").glob("*/[0-9]*"))
    newest = steps[-1].relative_to(cut)
    files = [path for path in sorted((cut / newest).rglob("*")) if path.is_file()]
    for path in files:
        for damage in ("missing", "empty", "cut in half", "zeros", "another text", "a folder"):
            place = path.relative_to(cut)
            make = copied(cut, "r", lambda r, p=place, d=damage: DAMAGES[d](r / p))
            yield Case("checkpoint", f"{place}: {damage}", resume, make, writes=("r",))
    renames: dict[str, Callable[[Path], Any]] = {
        "another step": lambda r: (r / newest).rename((r / newest).with_name("000009")),
        "no number": lambda r: (r / newest).rename((r / newest).with_name("x")),
        "a copy of a later step": lambda r: __import__("shutil").copytree(
            r / newest, (r / newest).with_name("000007")
        ),
        "all gone": lambda r: __import__("shutil").rmtree(r / "checkpoints"),
        "one gone": lambda r: __import__("shutil").rmtree(r / newest),
    }
    for name, change in renames.items():
        yield Case("checkpoint", name, resume, copied(cut, "r", change), writes=("r",))


def _adapters(material: Path) -> Iterator[Case]:
    """A run of adapters, its base changed, and its export."""
    run, model = material / "lora", material / "model"
    export = ["export", "r", "out", "--adapter"]
    yield Case("adapters", "good", export, copied(run, "r"), "accepted", ("out",))
    yield Case("adapters", "merged", export[:-1], copied(run, "r"), "accepted", ("out",))
    yield Case(
        "adapters", "of a run of all weights", export, copied(material / "run", "r"), "refused"
    )
    for file in ("config.yaml", "origin.json", "weights/sft.safetensors"):
        for damage, change in DAMAGES.items():
            make = copied(run, "r", lambda r, c=change, f=file: c(r / f))
            yield Case("adapters", f"{file}: {damage}", export, make, writes=("out",))
    for damage in ("cut in half", "missing", "a byte more", "zeros"):

        def change(r: Path, damage=damage) -> None:
            import shutil

            shutil.copytree(model, r.parent / "m")
            DAMAGES[damage](r.parent / "m" / "model.safetensors")
            config = (r / "config.yaml").read_text()
            (r / "config.yaml").write_text(config.replace(str(model), str(r.parent / "m")))

        make = copied(run, "r", change)
        yield Case("adapters", f"the base: {damage}", export, make, "refused", ("out",))
