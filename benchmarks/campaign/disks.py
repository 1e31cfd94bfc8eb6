"""A disk that is full, read-only or errs once, at each kind of file that a run writes.

One line names the file, and with a sound disk again the run goes on to the same bits.

The faults come from `fault.c`, preloaded into the children; it needs a C compiler and glibc, and no
right to mount anything.
"""

import ctypes
import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.campaign import runs

KINDS = {  # a part of the path: the kind of file
    "config.yaml": "settings",
    "origin.json": "origin",
    "metrics.jsonl": "metrics",
    "seconds.json": "seconds",
    "evaluations/": "evaluation",
    "rollouts/": "rollouts",
    "tensorboard/": "TensorBoard",
    "checkpoints/": "checkpoint",
    "weights/": "weights",
    "summary.json": "summary",
    "curves.png": "curves",
}
FAULTS = {"full": (errno.ENOSPC, 1), "read-only": (errno.EROFS, 1), "errs once": (errno.EIO, 0)}


def disks(folder: Path, number: int, seed: int = 0) -> Iterator[dict]:
    """A line for each fault, and one for all. Starts itself again with the shim preloaded."""
    if "CAMPAIGN_SHIM" in os.environ:
        yield from _disks(folder, number, seed)
        return
    shim, source = folder / "fault.so", Path(__file__).with_name("fault.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    env = os.environ | {"CAMPAIGN_SHIM": str(shim), "LD_PRELOAD": str(shim)}
    command = [sys.executable, "-m", "benchmarks.campaign", "disks"]
    command += ["--number", str(number), "--seed", str(seed)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode:
        raise RuntimeError(f"the child ended with {child.returncode}")


def _disks(folder: Path, number: int, seed: int) -> Iterator[dict]:
    draw, shim = random.Random(seed), ctypes.CDLL(os.environ["CAMPAIGN_SHIM"])
    log = folder / "log.txt"
    whole = folder / "whole"
    assert runs.status_of(runs.train(["--run-dir", str(whole), *runs.short(folder)], log)) == 0
    wanted, same, lines_said = runs.digests(whole), 0, 0
    for fault in range(number):
        part = list(KINDS)[fault % len(KINDS)]
        what = list(FAULTS)[fault // len(KINDS) % len(FAULTS)]
        run_dir, log = folder / f"run-{fault}", folder / f"log-{fault}.txt"
        error, lasting = FAULTS[what]
        after = draw.randrange(6)

        def arm(part: str = f"run-{fault}/{part}", after: int = after, e=error, to=lasting) -> None:
            shim.fault_arm(part.encode(), ctypes.c_long(after), e, to)

        status = runs.status_of(
            runs.train(["--run-dir", str(run_dir), *runs.short(folder)], log, before=arm)
        )
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        is_line = status == 0 or (status == 2 and len(said) == 1)
        lines_said += is_line and not runs.has_traceback(log)
        begun = (run_dir / "config.yaml").exists()
        again = ["--resume"] if begun else runs.short(folder)
        if status and runs.status_of(runs.train(["--run-dir", str(run_dir), *again], log)):
            is_same = False
        else:
            is_same = runs.digests(run_dir) == wanted
        same += is_same
        line = {"file": KINDS[part], "disk": what, "after": after, "status": status}
        yield line | {"said": (said or [""])[0][:200], "one_line": is_line, "same": is_same}
    yield {"faults": number, "one_line": lines_said, "same": same}
