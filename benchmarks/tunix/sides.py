"""The two sides' processes: started, given the same weights, called, ended."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.timing import about
from benchmarks.tunix import install
from gemma_grpo import weights
from gemma_grpo.config import RunConfig
from gemma_grpo.model import CONFIGS, Params
from gemma_grpo.presets import GEMMA3_NANO
from gemma_grpo.training.state import learning_rates

HERE = Path(__file__).parent
SIDES = ("ours", "tunix")
# What would let one side see the other's libraries.
CLEARED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
# The difference allowed: rms of the logits as a share of their spread, and the gradient's largest
# as a share of its largest entry.
APART = {"float32": 1e-3, "bfloat16": 0.1}
# The nano preset without what Tunix cannot do or does otherwise.
COMPARABLE = GEMMA3_NANO.replace(
    {
        "stages": "sft",
        "grpo.curriculum": "none",
        "grpo.scale": "group",
        "grpo.temperature": 1.0,
        "grpo.loss.aggregation": "sequence_mean",
        "grpo.loss.epsilon": 0.2,
        "grpo.loss.epsilon_high": 0.2,
    }
)


class SideProcess:
    """One side in a process of its own, which `turns.Server` answers for; its output is logged. It
    ends when it is closed, and with this process."""

    def __init__(self, name: str, command: list, *, folder: Path, cwd: Path, platform: str = "cpu"):
        self.name, self.log = name, folder / f"{name}.log"
        self.connection, its_end = multiprocessing.Pipe()
        environment = {key: value for key, value in os.environ.items() if key not in CLEARED} | {
            "JAX_PLATFORMS": platform,
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU's peak is then what was needed
            "JAX_COMPILATION_CACHE_DIR": str(folder / f"{name}.cache"),
        }
        fd = its_end.fileno()
        how = {"cwd": cwd, "env": environment, "pass_fds": [fd], "stdin": subprocess.DEVNULL}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, str(fd)], stdout=log, stderr=log, **how)
        its_end.close()

    def call(self, request: str, **arguments: object) -> dict:
        """The side's answer, which is also told on the standard error. Exits with the end of the
        side's log where it has failed."""
        try:
            self.connection.send((request, arguments))
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.wait()
            said = self.log.read_text()[-2000:]
            raise SystemExit(f"{self.name} has ended at {request!r}; its log:\n{said}") from None
        print(f"{self.name}, {request}: {answer}"[:300], file=sys.stderr, flush=True)
        return answer

    def learned(self, like: Params) -> Params:
        """Its weights in the end, as parameters of ours; it is closed then."""
        path = self.log.with_suffix(".safetensors")
        self.call("save", out=str(path))
        self.close()
        return weights.load(path, like)

    def close(self) -> None:
        """Let the process end."""
        self.connection.close()
        self.process.wait()


def start(name: str, folder: Path, platform: str = "cpu") -> SideProcess:
    """A side's process. Of this repository only `theirs/` is on the path of the side "tunix"."""
    if name == "tunix":
        command, cwd = [install.check(), HERE / "theirs" / "side.py"], folder
    else:
        command, cwd = [sys.executable, "-m", "benchmarks.tunix.ours"], HERE.parents[1]
    return SideProcess(name, command, folder=folder, cwd=cwd, platform=platform)


class Opener:
    """Opens the sides of one GRPO run, all with the same weights. `opened` has of each side by name
    its `versions`, the `logits` of two padded rows and, of ours, the `device`."""

    def __init__(
        self,
        run: RunConfig,
        params: Params,
        *,
        stop_ids: Sequence[int] = (),
        platform: str = "cpu",
        micro_batch: int = 1,
    ):
        self.run, self.platform, self.opened = run, platform, {}
        self.temporary, config = tempfile.TemporaryDirectory(), CONFIGS[run.model.weights]
        self.folder = Path(self.temporary.name)
        hf_weights, tensors = self.folder / "weights", weights.hf_tensors(params, config)
        weights.write_folder(hf_weights, tensors, config, dtype=np.float32, tokenizer=None)
        self.rows = padded_rows(config.vocab_size, length=96)
        self.settings = about(run) | {
            "folder": str(hf_weights),
            "rows": self.rows,
            "stop_ids": list(stop_ids),
            "shape": asdict(config),
            "micro_batch": micro_batch,
            "learning_rates": learning_rates(run.grpo.optimizer, run.grpo.num_steps),
        }

    def open(self, name: str) -> SideProcess:
        """The side "ours", "ours_stop_untrained" or "tunix", ready for its first step."""
        side = start(name, self.folder, self.platform)
        own = {} if name == "tunix" else {"run": self.run, "trained_stop": name == "ours"}
        self.opened[name] = side.call("open", **self.settings, **own)
        return side

    def apart(self, moments: dict[str, np.ndarray] | None = None) -> dict[str, float]:
        """How far apart ours and Tunix are: in logits, root mean square as a share of their spread,
        and in Adam's first moments after a step, if given, as a share of the largest. Exits where
        it is not the same model or update."""
        ours, theirs = (self.opened[name]["logits"][self.rows["mask"]] for name in SIDES)
        far = {"logits_apart": float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())}
        if moments:
            ours, theirs = (moments[name] for name in SIDES)
            far["gradient_apart"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not max(far.values()) < APART[self.run.model.dtype]:
            raise SystemExit(f"not the same model or update: {far}")
        return far


def padded_rows(vocab_size: int, *, length: int) -> dict[str, np.ndarray]:
    """ids and mask of two rows, one of them padded on the left, to compare logits on."""
    ids = np.random.default_rng(1).integers(1, vocab_size, (2, length), np.int32)
    mask = np.arange(length) >= np.array([[0], [length // 3]])
    return {"ids": np.where(mask, ids, 0), "mask": mask}
