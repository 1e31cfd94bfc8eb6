"""Inputs at every door (`doors/`): one line that says what is wrong, or what was meant is done;
never a traceback, a hang, another status, a file of the user's changed, or something half-made.

Most are met in one process, as a notebook would, each in a new folder of its own; a process that
crashed or hung is replaced, and the next input goes on in a new one. Models are loaded once.
"""

import functools
import hashlib
import json
import os
import random
import resource
import select
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaign import models, runs
from benchmarks.campaign.doors import case as cases_of
from benchmarks.campaign.doors import (
    commands,
    problems,
    rewards,
    run_folders,
    settings,
    weight_files,
)
from benchmarks.campaign.doors.case import Case
from gemma_grpo.records import run_dir

DOORS = (settings, problems, weight_files, run_folders, rewards, commands)
SLOW = 30.0  # CPU seconds; longer is a hang
IDLE = 60.0  # seconds in which a worker does nothing at all: it waits for what never comes
LARGE = 1024  # MB that one input may add to the process
HELD = ("one line", "accepted")
NOTES = ("warning: ", "run directory: ", "loading ", "measuring ", "waiting for ")


def inputs(folder: Path, number: int, seed: int = 0) -> Iterator[dict]:
    """A line for each input that did not hold, and one for all."""
    material = folder / "material"
    make_material(material)
    every = [case for door in DOORS for case in door.cases(material)]
    random.Random(seed).shuffle(every)
    chosen = every[:number] if number else every
    counts: Counter = Counter()
    slowest, largest = (0.0, ""), (0, "")
    for case, found in zip(chosen, met(chosen, folder), strict=True):
        counts[found["what"]] += 1
        counts[f"{found['what']}: {case.door}"] += 1
        name = f"{case.door}: {case.name}"
        slowest = max(slowest, (found.get("cpu_seconds", 0.0), name))
        largest = max(largest, (found.get("mb", 0), name))
        if found["what"] not in HELD or os.environ.get("CAMPAIGN_ALL"):
            yield {"door": case.door, "input": case.name, **found}
    held = sum(counts[what] for what in HELD)
    yield {"inputs": len(chosen), "of": len(every), "held": held, "slowest": slowest} | {
        "largest_mb": largest,
        **dict(sorted(counts.items())),
    }


def make_material(folder: Path) -> None:
    """What cases copy and spoil: a model, a GGUF file, a finished run, one cut short, one of
    adapters. Trained in children."""
    folder.mkdir()
    models.cut_nano(folder / "model")
    log = folder / "log.txt"
    base = [*runs.SHORT, "--model.weights", str(folder / "model")]
    adapters = ["--model.lora.rank", "2", "--stages", "sft", "--sft.num-steps", "1"]
    for arguments in (
        ["--run-dir", str(folder / "run"), *base],
        ["--run-dir", str(folder / "lora"), *base, *adapters],
    ):
        assert runs.status_of(runs.train(arguments, log)) == 0, log.read_text()
    child = runs.train(["--run-dir", str(folder / "cut"), *base, "--keep-checkpoints"], log)
    while len(list((folder / "cut").glob("checkpoints/grpo/[0-9]*"))) < 2:
        if runs.status_of(child, within=0.05) is not None:
            raise RuntimeError(log.read_text())
    runs.kill(child)

    def gguf() -> int:
        return weight_files.write_gguf(folder / "nano.gguf")

    assert runs.status_of(runs.fork(gguf, log)) == 0, log.read_text()


@dataclass
class _Worker:
    """A child that meets cases, and the pipe by which it tells what came of each."""

    child: int
    pipe: int
    said: bytes = b""

    def line(self, within: float) -> dict | None:
        """Its next line; None if it says none in time; EOFError if it has ended."""
        while b"\n" not in self.said:
            ready, _, _ = select.select([self.pipe], [], [], within)
            if not ready:
                return None
            got = os.read(self.pipe, 1 << 16)
            if not got:
                raise EOFError
            self.said += got
        line, _, self.said = self.said.partition(b"\n")
        return json.loads(line)


def met(chosen: list[Case], folder: Path) -> Iterator[dict]:
    """What came of each case, in order."""
    done = 0
    while done < len(chosen):
        worker = _start(chosen[done:], folder, done)
        try:
            while done < len(chosen):
                found = _next(worker)
                yield found
                done += 1
                if found["what"].startswith("hung"):
                    break
        except EOFError:
            status = runs.status_of(worker.child)
            yield {"what": "crashed", "said": f"status {status}"}
            done += 1
        runs.kill(worker.child)
        os.close(worker.pipe)


def _next(worker: _Worker) -> dict:
    """What came of the case that the worker is at, or that it hangs."""
    before = last = runs.cpu_seconds(worker.child)
    moved = time.monotonic()
    while True:
        if found := worker.line(within=1.0):
            return found
        now = runs.cpu_seconds(worker.child)
        if now > last:
            last, moved = now, time.monotonic()
        if now - before > 2 * SLOW:
            return {"what": "hung", "said": f"{2 * SLOW:.0f} CPU seconds"}
        if time.monotonic() - moved > IDLE:
            return {"what": "hung", "said": f"waits, idle for {IDLE:.0f} s"}


def _start(chosen: list[Case], folder: Path, first: int) -> _Worker:
    ours, theirs = os.pipe()

    def work() -> int:
        os.close(ours)
        os.environ["GEMMA_GRPO_CACHE"] = str(folder / "cache")
        _keep_models()
        for number, case in enumerate(chosen, start=first):
            found = _meet(case, folder / f"{number:05d}")
            os.write(theirs, json.dumps(found).encode() + b"\n")
        return 0

    child = runs.fork(work, folder / "worker.txt")
    os.close(theirs)
    return _Worker(child, ours)


def _meet(case: Case, folder: Path) -> dict:
    """Makes the case's files, runs its command among them, and judges what came of it."""
    folder.mkdir()
    case.make(folder)
    before, log = contents(folder), folder.with_suffix(".txt")
    began, mb = time.process_time(), _peak_mb()
    os.chdir(folder)
    error = ""
    try:
        with cases_of.into(log):
            status = case.run(folder)
    except BaseException as raised:
        status, error = -1, f"{type(raised).__name__}: {raised!s:.200}"
    took, more = time.process_time() - began, _peak_mb() - mb
    os.chdir("/")
    said = log.read_text(errors="backslashreplace")
    found = {"what": judged(case, status, said), "said": error or last_line(said)}
    if took > SLOW:
        found["what"] = "hung"
    if more > LARGE and case.door != "preset":  # which may name a model of a gigabyte
        found["what"] = "too large"
    if changed := changes(case, before, contents(folder), found["what"]):
        found |= {"what": "changed files", "said": f"{changed[:5]} after {found['said']}"}
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink()
    return found | {"status": status, "cpu_seconds": round(took, 2), "mb": more}


def judged(case: Case, status: int, said: str) -> str:
    """One of `HELD`, or what is wrong with how a command ended."""
    lines = [line for line in said.split("\n") if line and not line.startswith(NOTES)]
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback (most recent call last)" in said or status == -1:
        return "traceback"
    if status == 130 and lines == ["stopped by SIGINT"]:
        return "one line"
    if status == 0:
        return "accepted" if case.wanted != "refused" else "accepted, which is wrong"
    if status == 2 and len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) < 2000:
        return "one line" if case.wanted != "accepted" else "refused, which is wrong"
    return f"status {status}, {len(lines)} lines"


def last_line(said: str) -> str:
    """What was said last, cut short."""
    return (said.strip().split("\n") or [""])[-1][:300]


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file by its path; of what is no file, its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        is_file = stat.S_ISREG(mode)
        digest = (
            hashlib.sha256(path.read_bytes()).hexdigest() if is_file else str(stat.S_IFMT(mode))
        )
        found[str(path.relative_to(folder))] = digest
    return found


def changes(case: Case, before: dict, after: dict, what: str) -> list[str]:
    """Files that were changed or removed, or left by a command that refused, though they are not
    among what the case may write."""
    may = lambda path: (  # compiled programs are kept, whatever comes of the command
        {"__pycache__", run_dir.CACHE} & set(Path(path).parts)
        or any(
            path == place.rstrip("/") or path.startswith(f"{place.rstrip('/')}/")
            for place in case.writes
        )
    )
    changed = [path for path in before if after.get(path) != before[path]]
    if what == "one line":
        changed += [path for path in after if path not in before]
    return [path for path in changed if not may(path)]


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _keep_models() -> None:
    """Loads the embedded model once, however many inputs name it."""
    from gemma_grpo import pipeline

    load = pipeline.load_model
    kept = functools.lru_cache(4)(load)
    pipeline.load_model = lambda settings, **rest: (
        kept(settings, **rest) if settings.weights == "gemma3-nano" else load(settings, **rest)
    )
