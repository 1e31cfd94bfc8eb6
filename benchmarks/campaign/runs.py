"""A run of seconds, in a child forked from a process that has imported everything but started no
device; what it left, as digests without times."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.campaign import models

SHORT = (
    "--data.num-train 60 --data.num-test 6 --model.cpu-devices 1 "
    "--sft.num-steps 3 --sft.batch-size 4 --sft.checkpoint-every 1 "
    "--grpo.num-steps 3 --grpo.prompts-per-step 4 --grpo.num-generations 4 "
    "--grpo.checkpoint-every 1 --evaluation.batch-size 4 --evaluation.num-samples 0"
).split()
MODEL = "model"  # beside the runs
TIMES = ("time/", "tokens_per_s")  # the beginnings of metrics that no two runs share


def short(folder: Path) -> list[str]:
    """The flags of a run of all stages, of one layer of the embedded model, which is written to
    `folder` when it is not there."""
    if not (folder / MODEL).exists():
        models.cut_nano(folder / MODEL)
    return [*SHORT, "--model.weights", str(folder / MODEL)]


def fork(work: Callable[[], int], log: Path) -> int:
    """Starts a child that ends with `work`'s status, its output added to `log`; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        status = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def train(arguments: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Starts the training command in a child; its id."""
    from gemma_grpo import pipeline  # noqa: F401  (imported once, for all children)
    from gemma_grpo import train as command

    def work() -> int:
        before()
        return command.main(list(arguments))

    return fork(work, log)


def status_of(
    child: int, *, within: float | None = None, after_cpu: float | None = None
) -> int | None:
    """How a child ended (-9 for a kill), once it did; None if it runs on `within` seconds from now,
    or once it has taken `after_cpu` CPU seconds, which a busy machine does not stretch."""
    deadline = None if within is None else time.monotonic() + within
    while True:
        ended, how = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(how)
        if deadline is not None and time.monotonic() > deadline:
            return None
        if after_cpu is not None and cpu_seconds(child) >= after_cpu:
            return None
        time.sleep(0.02)


def cpu_seconds(child: int) -> float:
    """What a process has taken so far, of all its threads."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def end_of(child: int) -> tuple[int, float]:
    """A child's status, and the CPU seconds that it has taken."""
    _, how, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(how), used.ru_utime + used.ru_stime


def kill(child: int) -> None:
    """SIGKILL, and waits for its end, if it has not ended before."""
    try:
        os.kill(child, signal.SIGKILL)
        status_of(child)
    except (ChildProcessError, ProcessLookupError):
        pass


def digests(run_dir: Path) -> dict[str, str]:
    """sha256 of all that a run is repeated by: weights, metrics and completions, without times."""
    found = {}
    for path in sorted((run_dir / "weights").glob("*.safetensors")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
    found["metrics.jsonl"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    for folder in ("evaluations", "rollouts"):
        for path in sorted((run_dir / folder).glob("*.json*")):
            found[f"{folder}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def has_traceback(log: Path) -> bool:
    """Whether a command has said a Python traceback."""
    return log.exists() and b"Traceback (most recent call last)" in log.read_bytes()
