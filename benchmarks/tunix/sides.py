"""A side's process, as the benchmark holds it: start, call, end. Knows nothing measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.tunix import install

HERE = Path(__file__).parent
# What would let one side see the other's libraries, or let either look for a TPU.
_CLEARED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class SideProcess:
    """One side in a process of its own.

    `call` sends a request, waits, and repeats the answer on the standard error. It raises
    SystemExit, with what the side said, where it fails.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        platform: str = "cpu",
        *,
        devices: int,
        log: Path,
        cwd: Path,
    ):
        self.name, self.log = name, log
        environment = {key: value for key, value in os.environ.items() if key not in _CLEARED}
        environment |= {
            "JAX_PLATFORMS": platform,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU's peak is then what was needed
            "JAX_COMPILATION_CACHE_DIR": str(log.with_suffix(".cache")),
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
            cwd=cwd,
        )

    def call(self, request: str, **arguments: object) -> dict:
        """The side's answer."""
        self.process.stdin.write(json.dumps({"call": request, "with": arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended at {request!r}; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"{self.name}, {request}: {answer['error']}; see {self.log}")
        print(f"{self.name}, {request}: {line.strip()}"[:400], file=sys.stderr, flush=True)
        return answer["answer"]

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def start_ours(
    platform: str, *, devices: int, folder: Path, module: str = "ours", name: str = "ours"
) -> SideProcess:
    """Our side; it runs from the repository's root."""
    command = [sys.executable, "-m", f"benchmarks.tunix.{module}"]
    log = folder / f"{name}.log"
    root = HERE.parent.parent
    return SideProcess(name, command, platform, devices=devices, log=log, cwd=root)


def start_theirs(
    environment: Path,
    platform: str = "cpu",
    *,
    devices: int,
    folder: Path,
    script: str = "worker.py",
) -> SideProcess:
    """Tunix's side; of this repository only `theirs/` is on its path."""
    python = install.check(environment)
    command = [str(python.absolute()), str(HERE / "theirs" / script)]
    log = folder / "tunix.log"
    return SideProcess("tunix", command, platform, devices=devices, log=log, cwd=folder)
