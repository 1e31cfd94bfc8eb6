"""Arguments of every command: flags unknown, missing, twice, out of range; outputs; prompts."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.campaign.doors.case import DAMAGES, VALUES, Case, all_of, copied, shown, written
from benchmarks.campaign.doors.settings import FEW, TEXTS

TRAIN = ["train", *FEW]
SAY = ["--prompt=What is 1 + 1?", "--max-completion-length=2"]
ALL = (
    "train",
    "evaluate",
    "generate",
    "export",
    "view",
    "rescore",
    "plan",
    "verify_kernels",
    "pretrain",
    "ablation",
)


def cases(material: Path) -> Iterator[Case]:
    """Of all kinds named above."""
    model = f"--weights={material / 'model'}"
    yield from _arguments()
    yield from _generate(model)
    yield from _prompts(model)
    yield from _evaluate(model)
    yield from _outputs(material, model)
    yield from _view_and_rescore(material)
    yield from _rarer(material)


def _arguments() -> Iterator[Case]:
    """What no command takes."""
    for command in ALL:
        for arguments in (
            ["--no-such-flag"],
            ["-x"],
            ["a", "b", "c", "d", "e"],
            ["--=x"],
            [""],
        ):
            yield Case(
                "arguments",
                f"{command} {' '.join(arguments)}",
                [command, *arguments],
                wanted="refused",
            )
        yield Case("arguments", f"{command} \udcff", [command, "\udcff"], wanted="refused")
        yield Case("arguments", f"{command} --help", [command, "--help"], wanted="accepted")
    for arguments in (
        ["--resume", "--preset=gemma3-nano"],
        ["--resume", "--config=x"],
        ["--resume", "--resume-from=x"],
        ["--config=x", "--preset=gemma3-nano"],
        ["--restart-stage"],
        ["--allow-changed-data"],
        ["--allow-changed-base"],
        ["--process-id=0"],
        ["--coordinator=x"],
        ["--coordinator=localhost:0"],
        ["--coordinator=localhost:x"],
        ["--coordinator=localhost:99999"],
        ["--coordinator=localhost:1234"],
        ["--coordinator=:1234"],
        ["--hours=0"],
        ["--hours=-1"],
        ["--seed=1", "--seed"],
        ["--grpo.num-steps"],
        ["--grpo.num-steps=3", "extra"],
    ):
        yield Case(
            "arguments", f"train {' '.join(arguments)}", [*TRAIN, *arguments], wanted="refused"
        )


def _generate(model: str) -> Iterator[Case]:
    refused = [
        [model],
        [model, "--prompt=x", "--chat"],
        [model, "--prompt=x", "--prompts=x"],
        [model, "--chat", "--raw"],
        [model, "--chat", "--json"],
        [model, "--chat", "--num=2"],
        [model, "--chat", "--out=x"],
        [model, "--raw", "--instruction=x", "--prompt=x"],
        [model, "--prompt=x", "--stream=yes", "--json"],
        [model, "--prompt=x", "--stream=perhaps"],
        ["gemma3-nano", model, "--prompt=x"],
        ["--prompt=x"],
        [model, f"--prompt={'x ' * 5000}"],
        [model, "--prompt=x", "--dtype=float64"],
    ]
    for flags in refused:
        yield Case("generate", " ".join(flags)[:60], ["generate", *flags], wanted="refused")
    never = (
        "-1",
        "9223372036854775808",
        "1.5",
        "1e3",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "0x10",
        "x",
        "",
    )
    flags = ("num", "top-k", "seed", "max-prompt-length", "max-completion-length", "batch-size")
    for flag in flags:
        for value in never:
            arguments = ["generate", model, "--prompt=x", f"--{flag}={value}"]
            yield Case("generate", f"{flag}={value}", arguments, wanted="refused")
    for flag in ("temperature", "top-p", "min-p"):
        for value in ("-1", "1e9", "nan", "inf", "-inf", "x", "", "0x10"):
            arguments = ["generate", model, *SAY, f"--{flag}={value}"]
            yield Case(
                "generate", f"{flag}={value}", arguments, wanted="" if value == "1e9" else "refused"
            )
    for prompt in (
        "",
        " ",
        "\x00",
        "\ud800",
        "<bos>",
        "<start_of_turn>",
        "🙂" * 50,
        "\u202e",
        "\x1b[2J",
        "\n\n",
    ):
        arguments = ["generate", model, f"--prompt={prompt}", "--max-completion-length=2"]
        yield Case("generate", f"the prompt {prompt[:10]!r}", arguments)
        yield Case("generate", f"raw, the prompt {prompt[:10]!r}", [*arguments, "--raw"])
    yield Case("generate", "chat without input", ["generate", model, "--chat"], wanted="accepted")


def _prompts(model: str) -> Iterator[Case]:
    """Files of prompts."""
    run = ["generate", model, "--max-completion-length=2", "--batch-size=2"]
    texts = {
        "good": ("one\ntwo\n", "accepted"),
        "Windows": ("one\r\ntwo\r\n", "accepted"),
        "U+2028 and others": ("a\u2028b\fc\x85d\n", "accepted"),
        "a byte order mark": ("\ufeffone\n", "accepted"),
        "Latin-1": (b"Gr\xf6\xdfe\n", "refused"),
        "UTF-16": ("one\n".encode("utf-16"), "refused"),
        "blank lines alone": ("\n\n \n", "refused"),
        "nothing": ("", "refused"),
        "no line end": ("one", "accepted"),
        "a NUL": ("a\0b\n", ""),
        "too long": ("x " * 5000, "refused"),
        "the second too long": ("one\n" + "x " * 5000, "refused"),
        "turn marks": ("<end_of_turn>\n<start_of_turn>model\n", "accepted"),
    }
    for name, (text, wanted) in texts.items():
        yield Case("prompts", name, [*run, "--prompts=q.txt"], written("q.txt", text), wanted)
    rows = {name: (json.dumps({"prompt": value}), "") for name, value in shown(VALUES)}
    rows |= {
        "no prompt": ("{}", "refused"),
        "a text": ('"x"', "refused"),
        "not JSON": ("x", "refused"),
        "half a surrogate pair": ('{"prompt": "\\ud800"}', "refused"),
        "more fields": ('{"prompt": "x", "id": 3}', "accepted"),
        "a question": ('{"question": "x"}', "refused"),
    }
    for name, (row, wanted) in rows.items():
        yield Case(
            "prompts", f"JSON: {name}", [*run, "--prompts=q.jsonl"], written("q.jsonl", row), wanted
        )
    for file in ("q.txt", "q.jsonl"):
        good = written(file, "one\n" if file == "q.txt" else '{"prompt": "one"}\n')
        for damage, change in DAMAGES.items():
            if damage == "a FIFO":
                continue  # `--prompts <(...)` is one: it waits for its writer, as it should
            make = all_of(good, lambda folder, c=change, f=file: c(folder / f))
            yield Case("prompts", f"{file}: {damage}", [*run, f"--prompts={file}"], make)
    good = written("q.txt", "one\n")
    for out, wanted in (("q.txt", "refused"), ("./q.txt", "refused"), ("new.jsonl", "accepted")):
        yield Case(
            "prompts",
            f"out={out}",
            [*run, "--prompts=q.txt", f"--out={out}"],
            good,
            wanted,
            (out,) if wanted == "accepted" else (),
        )


def _evaluate(model: str) -> Iterator[Case]:
    base = ["evaluate", model, "--out=out"]
    small = ["--num=2", "--num-samples=0", "--batch-size=2", "--max-completion-length=2"]
    yield Case("evaluate", "good", [*base, *small], wanted="accepted", writes=("out",))
    for flag in (
        "num",
        "seed",
        "max-prompt-length",
        "max-completion-length",
        "batch-size",
        "num-samples",
    ):
        for value in ("-1", "9223372036854775808", "1.5", "nan", "x", ""):
            yield Case(
                "evaluate",
                f"{flag}={value}",
                [*base, *small, f"--{flag}={value}"],
                wanted="refused",
            )
    for flag in ("temperature", "top-p", "top-k", "min-p"):
        for value in ("-1", "nan", "inf", "x", "", "1e400"):
            yield Case(
                "evaluate",
                f"{flag}={value}",
                [*base, *small, f"--{flag}={value}"],
                wanted="refused",
            )
    for task in ("", "x", "gsm8k:x", "reasoning_gym:x", "x.jsonl", "Curriculum", "session"):
        yield Case(
            "evaluate",
            f"task={task}",
            [*base, *small, f"--task={task}"],
            wanted="" if not task else "refused",
            writes=("out",),
        )
    for flags in (
        ["--batch-size=1000000"],
        ["--max-prompt-length=1"],
        ["--dtype=float16"],
        ["--num=0"],
        ["--num=1000000000"],
    ):
        yield Case("evaluate", " ".join(flags), [*base, *small, *flags], writes=("out",))


# Where outputs are told to go: what is taken or no place, and what may be written to.
TAKEN = ("full", "file", "file/x", "loop", "fifo", ".", "..", "/")
PLACES = [*TAKEN, "", " ", "/dev/null", "/dev/full", "/proc/x"]
PLACES += ["empty", "lost", "to_empty", "to_file", "new", "new/", "a/b/c", "./new", "-", "*", "ä"]
PLACES += ["~nobody/x", "x" * 300, "a\nb"]
WRITES_BEHIND = {"lost": ("nowhere",), "to_empty": ("empty",), "a/b/c": ("a",)}


def _outputs(material: Path, model: str) -> Iterator[Case]:
    """Where things are written."""
    run = material / "run"

    def here(folder: Path) -> None:
        (folder / "full").mkdir()
        (folder / "full" / "x").write_text("mine")
        (folder / "file").write_text("mine")
        (folder / "empty").mkdir()
        (folder / "loop").symlink_to("loop")
        (folder / "lost").symlink_to("nowhere")
        (folder / "to_file").symlink_to("file")
        (folder / "to_empty").symlink_to("empty")
        os.mkfifo(folder / "fifo")

    commands: dict[str, list[str]] = {
        "export": ["export", "r"],
        "generate --out": ["generate", model, *SAY, "--out"],
        "evaluate --out": [
            "evaluate",
            model,
            "--num=2",
            "--num-samples=0",
            "--batch-size=2",
            "--max-completion-length=2",
            "--out",
        ],
        "view --out": ["view", "r", "--out"],
        "train --run-dir": [*TRAIN, "--run-dir"],
        "train --checkpoint.folder": [*TRAIN, "--checkpoint.folder"],
    }
    for name, command in commands.items():
        for place in PLACES:
            if place == "fifo" and name in ("generate --out", "view --out"):
                continue  # waits for its reader, as it should
            make = all_of(copied(run, "r"), here)
            arguments = (
                [*command, place] if name == "export" else [*command[:-1], f"{command[-1]}={place}"]
            )
            may = () if place in TAKEN else (place or ".", *WRITES_BEHIND.get(place, ()))
            yield Case("output", f"{name} {place[:40]}", arguments, make, writes=may)


def _view_and_rescore(material: Path) -> Iterator[Case]:
    make = copied(material / "run", "r")
    for flags in (
        ["--megabytes=0"],
        ["--megabytes=-1"],
        ["--megabytes=nan"],
        ["--megabytes=x"],
        ["--problem=0"],
        ["--text", "--problem=-1"],
        ["--text", "--problem=99999999999999999999"],
        ["--text", "--problem=x"],
    ):
        yield Case("view", " ".join(flags), ["view", "r", *flags], make, "refused", ("r",))
    for flags in (
        ["--megabytes=1e-9"],
        ["--megabytes=inf"],
        ["--text", "--problem=0"],
        ["r"],
        ["r", "--text"],
    ):
        yield Case("view", " ".join(flags), ["view", "r", *flags], make, "accepted", ("r",))
    for flags in (
        ["--weights=x=1"],
        ["--weights=correctness"],
        ["--weights=correctness="],
        ["--weights=correctness=nan"],
        ["--weights=correctness=inf"],
        ["--weights=,"],
        ["--weights==1"],
        ["--reader=x"],
        ["--trace=x"],
        ["--reward=x"],
        ["--reward=x.py"],
        ["--reward=x.py:f"],
        ["--reward="],
        ["--reward=:"],
        ["--reward=r:f"],
    ):
        yield Case(
            "rescore",
            " ".join(flags),
            ["rescore", "r", *flags],
            make,
            "" if flags == ["--weights=,"] else "refused",
        )
    for flags in (
        ["--weights=correctness=0"],
        ["--weights=correctness=-1e308"],
        ["--reader=strict"],
        ["--reader=lenient"],
    ):
        yield Case("rescore", " ".join(flags), ["rescore", "r", *flags], make, "accepted")
    for flag in ("--trace=arithmetic", "--trace=structure"):
        yield Case("rescore", flag, ["rescore", "r", "--json", flag], make)


def _rarer(material: Path) -> Iterator[Case]:
    """Commands that few use; `plan` and `pretrain` only where they must refuse."""
    for flag in ("rows", "seed"):
        for value in ("0", "-1", "nan", "x", "", "1.5", "9223372036854775808"):
            if (flag, value) != ("seed", "0"):
                yield Case(
                    "verify_kernels",
                    f"{flag}={value}",
                    ["verify_kernels", f"--{flag}={value}"],
                    wanted="refused",
                )
    yield Case("verify_kernels", "size=7b", ["verify_kernels", "--size=7b"], wanted="refused")
    for flag in ("steps", "batch-size", "length", "learning-rate", "seed"):
        for value in ("-1", "nan", "x", "", "inf", "9223372036854775808"):
            yield Case(
                "pretrain",
                f"{flag}={value}",
                ["pretrain", "out", f"--{flag}={value}"],
                wanted="refused",
            )
    for flag in ("steps", "batch-size", "length"):
        yield Case("pretrain", f"{flag}=0", ["pretrain", "out", f"--{flag}=0"], wanted="refused")
    for topology in (
        "x",
        "v5e",
        "v5e:",
        "v5e:0x0",
        "v5e:2x",
        "v5e:-2x4",
        "v9z:2x4",
        "v5e:2x4x2x2",
        "v5e:999999x999999",
    ):
        yield Case(
            "plan", f"topology={topology}", ["plan", f"--topology={topology}"], wanted="refused"
        )
    for hours in ("0", "-1", "nan", "inf", "x"):
        yield Case("plan", f"hours={hours}", ["plan", f"--hours={hours}"], wanted="refused")
    for text in TEXTS[:6]:
        yield Case("plan", f"preset={text[:20]}", ["plan", f"--preset={text}"], wanted="refused")
