"""SIGKILL at random moments of a run, resumed until it is done: the same bits as without a kill."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.campaign import runs


def kills(folder: Path, number: int, seed: int = 0) -> Iterator[dict]:
    """A line for each kill, and one for all: `same` says whether all runs ended in the same bits.

    The moment is drawn evenly over the CPU seconds of a whole run.
    """
    draw = random.Random(seed)
    log = folder / "log.txt"
    for name in ("warm", "whole"):  # the first compiles
        status, whole = runs.end_of(runs.train(_fresh(folder / name), log))
        assert status == 0, log.read_text()
    wanted = runs.digests(folder / "whole")
    done, same, run_number = 0, True, 0
    while done < number:
        run_dir = folder / f"run-{run_number}"
        run_number += 1
        while True:  # until the run is through
            arguments = _resumed(run_dir) if (run_dir / "config.yaml").exists() else _fresh(run_dir)
            child = runs.train(arguments, log)
            if done < number:
                status = runs.status_of(child, after_cpu=draw.uniform(0.0, whole))
                if status is None:
                    runs.kill(child)
                    done += 1
                    yield {"kill": done, "run": run_number, "at": _progress(run_dir)}
                    continue
            else:
                status = runs.status_of(child)
            if status:
                raise RuntimeError(f"status {status}:\n{log.read_text()[-2000:]}")
            break
        is_same = runs.digests(run_dir) == wanted
        same = same and is_same
        yield {"run": run_number, "same": is_same}
    yield {
        "kills": done,
        "runs": run_number,
        "same": same,
        "tracebacks": runs.has_traceback(log),
        "cpu_seconds_of_a_run": round(whole, 1),
    }


def _fresh(run_dir: Path) -> list[str]:
    return ["--run-dir", str(run_dir), *runs.short(run_dir.parent)]


def _resumed(run_dir: Path) -> list[str]:
    return ["--resume", "--run-dir", str(run_dir)]


def _progress(run_dir: Path) -> str:
    """What was under way, by the files that are there."""
    if not (run_dir / "config.yaml").exists():
        return "before the run's folder"
    if list(run_dir.glob("checkpoints/*/*.tmp")):
        return "while a checkpoint was written"
    if not (run_dir / "evaluations" / "base.json").exists():
        return "before or in the base evaluation"
    for stage in ("sft", "grpo"):
        if not (run_dir / "weights" / f"{stage}.safetensors").exists():
            lines = (
                (run_dir / "metrics.jsonl").read_text().splitlines()
                if (run_dir / "metrics.jsonl").exists()
                else []
            )
            steps = sum(json.loads(line)["stage"] == stage for line in lines)
            return f"in {stage}, {steps} steps on file"
        if not (run_dir / "evaluations" / f"{stage}.json").exists():
            return f"in the evaluation of {stage}"
    return "in the summary"
