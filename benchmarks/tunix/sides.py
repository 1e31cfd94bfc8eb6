"""The two sides' processes: started, given the same weights, called, ended."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from benchmarks.timing import cpus
from benchmarks.tunix import convert, install
from gemma_grpo.config import RunConfig
from gemma_grpo.model import CONFIGS, Params
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.presets import GEMMA3_NANO
from gemma_grpo.training import state as train_state

HERE = Path(__file__).parent
SIDES = ("ours", "tunix")
# What would let one side see the other's libraries.
CLEARED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
# The largest difference allowed: of the logits' spread, and of the gradient's largest entry.
APART = {"float32": 1e-3, "bfloat16": 0.1}


class SideProcess:
    """One side in a process of its own, which `turns.Server` answers for; its output is logged. It
    ends when it is closed, and with this process."""

    def __init__(
        self, name: str, command: list[str], *, folder: Path, cwd: Path, platform: str = "cpu"
    ):
        self.name, self.log = name, folder / f"{name}.log"
        self.connection, its_end = multiprocessing.Pipe()
        environment = {key: value for key, value in os.environ.items() if key not in CLEARED}
        environment |= {
            "JAX_PLATFORMS": platform,
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU's peak is then what was needed
            "JAX_COMPILATION_CACHE_DIR": str(folder / f"{name}.cache"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(its_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[its_end.fileno()],
                env=environment,
                cwd=cwd,
            )
        its_end.close()

    def call(self, request: str, **arguments: object) -> dict:
        """The side's answer, which is also told on the standard error.

        Raises:
            SystemExit: with what the side said, where it fails.
        """
        self.connection.send((request, arguments))
        try:
            kind, answer = self.connection.recv()
        except EOFError:
            raise SystemExit(f"{self.name} has ended at {request!r}; see {self.log}") from None
        if kind == "error":
            raise SystemExit(f"{self.name}, {request}: {answer}; see {self.log}")
        print(f"{self.name}, {request}: {answer}"[:300], file=sys.stderr, flush=True)
        return answer

    def close(self) -> None:
        """Let the process end."""
        self.connection.close()
        self.process.wait()


def start_tunix(script: str, *, folder: Path, platform: str = "cpu") -> SideProcess:
    """Tunix's side; of this repository only `theirs/` is on its path."""
    command = [str(install.check().absolute()), str(HERE / "theirs" / script)]
    return SideProcess("tunix", command, folder=folder, cwd=folder, platform=platform)


class Opener:
    """Opens the sides of one GRPO run, all with the same weights.

    Attributes:
        versions, logits: of each side by name; the logits are of two padded rows.
        device: that the sides run on.
    """

    def __init__(
        self,
        run: RunConfig,
        params: Params,
        folder: Path,
        *,
        stop_ids: Sequence[int] = (),
        platform: str = "cpu",
        micro_batch: int = 1,
    ):
        self.run, self.folder, self.stop_ids = run, folder, list(stop_ids)
        self.platform, self.micro_batch = platform, micro_batch
        self.config = CONFIGS[run.model.weights]
        self.rows = padded_rows(self.config.vocab_size, length=96)
        self.weights = str(folder / "weights.npz")
        np.savez(self.weights, **convert.to_tunix(params))
        self.versions, self.logits, self.device = {}, {}, ""

    def ours(self, *, name: str = "ours", trained_stop: bool = True) -> SideProcess:
        """A side of ours, ready for its first step."""
        command, root = [sys.executable, "-m", "benchmarks.tunix.ours"], HERE.parent.parent
        side = SideProcess(name, command, folder=self.folder, cwd=root, platform=self.platform)
        return self._opened(side, run=self.run, stop_ids=self.stop_ids, trained_stop=trained_stop)

    def tunix(self) -> SideProcess:
        """Tunix's side, ready for its first step."""
        grpo, model = self.run.grpo, self.run.model
        rate = train_state.make_schedule(grpo.optimizer, grpo.num_steps)
        side = start_tunix("worker.py", folder=self.folder, platform=self.platform)
        settings = {
            "shape": asdict(self.config),
            "dtype": model.dtype,
            "num_prompts": grpo.prompts_per_step,
            "generations": grpo.num_generations,
            "prompt_length": model.max_prompt_length,
            "budget": model.max_completion_length,
            "micro_batch": self.micro_batch,
            "learning_rates": [float(rate(step)) for step in range(grpo.num_steps)],
            "stop_ids": self.stop_ids,
            "first_seed": grpo.num_steps * self.run.seed,
        }
        return self._opened(side, settings=settings)

    def apart(self, moments: dict[str, np.ndarray] | None = None) -> dict[str, float]:
        """How far apart ours and Tunix are: in logits, as a share of their spread, and in Adam's
        first moments after a step, if given, as a share of the largest.

        Raises:
            SystemExit: it is not the same model, or not the same update.
        """
        ours, theirs = (self.logits[name][self.rows["mask"]] for name in SIDES)
        far = {"logits_apart": float(np.abs(ours - theirs).max() / theirs.std())}
        if moments:
            ours, theirs = (moments[name] for name in SIDES)
            far["gradient_apart"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not max(far.values()) < APART[self.run.model.dtype]:
            raise SystemExit(f"not the same model or update: {far}")
        return far

    def _opened(self, side: SideProcess, **arguments: object) -> SideProcess:
        opened = side.call("open", weights=self.weights, rows=self.rows, **arguments)
        self.versions[side.name], self.device = opened["versions"], opened["device"]
        self.logits[side.name] = opened["logits"]
        return side


def comparable_run(
    *, seed: int = 0, model: dict[str, object] | None = None, **grpo: object
) -> RunConfig:
    """The nano preset with other settings, and with what Tunix cannot do, or does otherwise, taken
    out."""
    loss = LossConfig(aggregation="sequence_mean", epsilon=0.2, epsilon_high=0.2)
    stage = replace(GEMMA3_NANO.grpo, curriculum="none", scale="group", loss=loss, **grpo)
    settings = replace(GEMMA3_NANO.model, **(model or {}))
    return replace(GEMMA3_NANO, seed=seed, stages="sft", model=settings, grpo=stage)


def padded_rows(vocab_size: int, *, length: int) -> dict[str, np.ndarray]:
    """ids and mask of two rows, one of them padded on the left, to compare logits on."""
    ids = np.random.default_rng(1).integers(1, vocab_size, (2, length), np.int32)
    mask = np.arange(length) >= np.array([[0], [length // 3]])
    return {"ids": np.where(mask, ids, 0), "mask": mask}


def about(run: RunConfig) -> dict:
    """What every row says: the sizes of the run, the machine, and this repository's commit."""
    return {
        "device": cpus(),
        "commit": commit(),
        "model": run.model.weights,
        "dtype": run.model.dtype,
        "prompts": run.grpo.prompts_per_step,
        "generations": run.grpo.num_generations,
        "prompt_length": run.model.max_prompt_length,
        "budget": run.model.max_completion_length,
        "learning_rate": run.grpo.optimizer.learning_rate,
        "seed": run.seed,
    }


def commit() -> str:
    """This repository's, short."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
