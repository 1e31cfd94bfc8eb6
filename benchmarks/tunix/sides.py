"""The two sides' processes: started, given the same weights, called, ended."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.tunix import install, trace
from gemma_grpo import config
from gemma_grpo.config import RunConfig
from gemma_grpo.training import state as train_state

HERE = Path(__file__).parent
SIDES = ("ours", "tunix")
# What would let one side see the other's libraries.
_CLEARED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
# The largest difference allowed: of the logits' spread, and of the gradient's largest entry.
APART = {"float32": 1e-3, "bfloat16": 0.1}
REAL = ("gemma3-nano",)  # weights at hand; others are random, which costs the same


@dataclass(frozen=True)
class Devices:
    """What a side computes on."""

    platform: str = "cpu"
    number: int = 1


class SideProcess:
    """One side in a process of its own.

    `call` sends a request, waits, and repeats the answer on the standard error. It raises
    SystemExit, with what the side said, where it fails.
    """

    def __init__(
        self, name: str, command: list[str], devices: Devices = Devices(), *, log: Path, cwd: Path
    ):
        self.name, self.log = name, log
        environment = {key: value for key, value in os.environ.items() if key not in _CLEARED}
        environment |= {
            "JAX_PLATFORMS": devices.platform,
            "JAX_NUM_CPU_DEVICES": str(devices.number),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU's peak is then what was needed
            "JAX_COMPILATION_CACHE_DIR": str(log.with_suffix(".cache")),
        }
        pipe, errors = subprocess.PIPE, log.open("w")
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment, cwd=cwd
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


def start_theirs(
    environment: Path, devices: Devices = Devices(), *, folder: Path, script: str = "worker.py"
) -> SideProcess:
    """Tunix's side; of this repository only `theirs/` is on its path."""
    command = [str(install.check(environment).absolute()), str(HERE / "theirs" / script)]
    return SideProcess("tunix", command, devices, log=folder / "tunix.log", cwd=folder)


class Opener:
    """Opens the sides of one GRPO run, in `folder`, all with the same weights; `shape` and
    `device` are known once a side of ours is open, `versions` of each that was."""

    def __init__(self, run: RunConfig, folder: Path, *, stop_ids: Sequence[int] = ()):
        self.run, self.folder, self.stop_ids = run, folder, list(stop_ids)
        self.versions: dict[str, dict] = {}
        self.shape: dict = {}
        self.device = ""
        self.config = folder / "sides.yaml"
        self.config.write_text(config.to_yaml(run))

    def ours(
        self,
        devices: Devices = Devices(),
        *,
        name: str = "ours",
        trained: str = "",
        trained_stop: bool = True,
    ) -> SideProcess:
        """A side of ours, ready for its first step; it makes the weights, or reads those that a
        run has `trained`."""
        command = [sys.executable, "-m", "benchmarks.tunix.ours"]
        log, root = self.folder / f"{name}.log", HERE.parent.parent
        side = SideProcess(name, command, devices, log=log, cwd=root)
        model = self.run.model.weights
        file = self.file("weights.npz")
        loaded = side.call("load", name=model, real=model in REAL, out=file, trained=trained)
        self.versions[name] = loaded["versions"] | {"commit": commit()}
        self.shape, self.device = loaded["shape"], loaded["device"]
        np.savez(
            self.file("rows.npz"),
            **trace.padded_rows(vocab_size=self.shape["vocab_size"], length=96),
        )
        self._logits(side)
        side.call("begin", run=str(self.config), stop_ids=self.stop_ids, trained_stop=trained_stop)
        return side

    def theirs(
        self, environment: Path, devices: Devices = Devices(), *, micro_batch: int, remat: str
    ) -> SideProcess:
        """Tunix's side, ready for its first step, with the weights of ours, which is opened before
        it."""
        side = start_theirs(environment, devices, folder=self.folder)
        grpo, model = self.run.grpo, self.run.model
        file = self.file("weights.npz")
        loaded = side.call("load", shape=self.shape, weights=file, remat=remat, dtype=model.dtype)
        self.versions["tunix"] = loaded["versions"]
        self._logits(side)
        rate = train_state.make_schedule(grpo.optimizer, grpo.num_steps)
        side.call(
            "begin",
            num_prompts=grpo.prompts_per_step,
            generations=grpo.num_generations,
            prompt_length=model.max_prompt_length,
            budget=model.max_completion_length,
            micro_batch=micro_batch,
            learning_rates=[float(rate(step)) for step in range(grpo.num_steps)],
            stop_ids=self.stop_ids,
            first_seed=grpo.num_steps * self.run.seed,
        )
        return side

    def logits_apart(self) -> float:
        """How far apart the logits of the padded rows are, as a share of their spread.

        Raises:
            SystemExit: it is not the same model.
        """
        with np.load(self.file("rows.npz")) as rows:
            mask = rows["mask"]
        ours, theirs = (np.load(self.file(f"{name}-logits.npy"))[mask] for name in SIDES)
        return self._checked("logits", float(np.abs(ours - theirs).max() / theirs.std()))

    def gradients_apart(self) -> float:
        """How far apart the first moments both have saved are, as a share of the largest.

        Raises:
            SystemExit: it is not the same update.
        """
        ours, theirs = (np.load(self.file(f"{name}-moment.npy")) for name in SIDES)
        return self._checked("gradient", float(np.abs(ours - theirs).max() / np.abs(theirs).max()))

    def file(self, name: str) -> str:
        """A path in the folder."""
        return str(self.folder / name)

    def _logits(self, side: SideProcess) -> None:
        side.call("logits", rows=self.file("rows.npz"), out=self.file(f"{side.name}-logits.npy"))

    def _checked(self, what: str, far: float) -> float:
        print(f"apart: {what} {far:.1e}", file=sys.stderr)
        if not far < APART[self.run.model.dtype]:
            raise SystemExit(f"the sides differ in their {what}: not the same model or update")
        return far


def processor() -> str:
    """This machine's cores, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}"


def commit() -> str:
    """This repository's, short."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
