"""One of four processes killed or stopped at random moments: the others end in time and say so, and
all of them started again go on to the same bits."""

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.campaign import runs
from gemma_grpo.devices.processes import HEARTBEAT_TIMEOUT

NUMBER = 4
IN_TIME = HEARTBEAT_TIMEOUT + 60  # seconds; for the others to end


def processes(folder: Path, number: int, seed: int = 0) -> Iterator[dict]:
    """A line for each process lost, and one for all.

    The moment is drawn evenly over the CPU seconds that a process of the job takes.
    """
    draw, log = random.Random(seed), folder / "log.txt"
    for name in ("warm", "whole"):  # the first compiles
        job = _job(folder / name, runs.short(folder), log)
        ends = [runs.end_of(child) for child in job]
        assert [status for status, _ in ends] == [0] * NUMBER, log.read_text()
    wanted, same, in_time = runs.digests(folder / "whole"), 0, 0
    for lost in range(number):
        run_dir, one_log = folder / f"run-{lost}", folder / f"log-{lost}.txt"
        job = _job(run_dir, runs.short(folder), one_log)
        which = draw.randrange(NUMBER)
        how = (signal.SIGKILL, signal.SIGSTOP)[lost % 2]
        at = draw.uniform(0.0, 1.0) * ends[which][1]
        if runs.status_of(job[which], after_cpu=at) is None:
            os.kill(job[which], how)
        began = time.monotonic()
        others = [child for place, child in enumerate(job) if place != which]
        statuses = [runs.status_of(child, within=IN_TIME) for child in others]
        took = time.monotonic() - began
        for child, status in zip(others, statuses, strict=True):
            if status is None:
                runs.kill(child)
        runs.kill(job[which])
        in_time += None not in statuses
        begun = (run_dir / "config.yaml").exists()
        job = _job(run_dir, ["--resume"] if begun else runs.short(folder), one_log)
        again = [runs.status_of(child) for child in job]
        is_same = again == [0] * NUMBER and runs.digests(run_dir) == wanted
        same += is_same
        line = {"process": which, "by": how.name, "at": round(at, 1), "others": statuses}
        line |= {"seconds": round(took), "said": _said(one_log)}
        yield line | {"again": again, "same": is_same}
    yield {"lost": number, "others_ended_in_time": in_time, "same": same}


def _job(run_dir: Path, arguments: list[str], log: Path) -> list[int]:
    """Four children with one run; their ids."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    common = ["--run-dir", str(run_dir), *arguments]
    common += ["--coordinator", address, "--num-processes", str(NUMBER)]
    return [runs.train([*common, "--process-id", str(place)], log) for place in range(NUMBER)]


def _said(log: Path) -> str:
    """The first line of an error."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line[:200] for line in lines if line.startswith("error: ")), "")
