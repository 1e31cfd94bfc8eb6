"""One GRPO step, ours against Tunix's: rollout, update, the whole; turns alternate. `cpu` and `gpu`
are the ways to start it; knows no device.

Both sides hold the same weights (their logits are compared first, and the first gradient after the
first step) and run the same frozen batch (`trace.py`): P prompts x G completions, beta 0, mu 1, no
old log-probs, the same AdamW. Rollouts sample at temperature 1 to the whole budget, with no stop
token, for neither side drops a row that has ended while another goes on, and one row of the trace
takes it all; the update is then on the trace's completions at the trace's lengths. That also takes
two of Tunix's ways out of the comparison: that it leaves EOS out of the loss, and that its key is
the same every step (it is given another seed each step).

Each side is a process of its own; while one runs, the other waits. One row a side and part;
`first_` is of the first step, which compiles. `wall` and `cpu` (of all threads) are seconds,
medians over the rounds (`_all` has each); `peak` is the most bytes resident in the part, its
weights and optimizer included, and `device_peak` the most that a GPU has held until the part's end.
`ratio` is Tunix over ours.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.tunix import install, trace
from benchmarks.tunix.sides import SideProcess, start_ours, start_theirs
from gemma_grpo.model import Remat

PARTS = ("rollout", "update", "step")
# Of the logits' spread, and of the gradient's largest entry.
APART = {"float32": 1e-3, "bfloat16": 0.1}
REAL = ("gemma3-nano",)  # weights at hand; others are random, which costs the same
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Options:
    """Sizes, and each side's settings."""

    model: str = "gemma3-nano"
    """Architecture; gemma3-nano has its own weights, others random ones."""
    rounds: int = 5
    """Timed steps of each side, after one that compiles and one that warms up."""
    dtype: str = "float32"
    """Computed in: float32 or bfloat16, in which Tunix keeps its weights and moments too; ours are
    float32."""
    rows: int = 32
    """B = P * G, at most 64."""
    generations: int = 8
    """G, of each of the B / G prompts."""
    prompt_length: int = 128
    """S, tokens."""
    budget: int = 128
    """T, tokens."""
    pack_tokens: int = 1024
    """Of our update (grpo.pack_tokens); 0 computes all padded rows at once."""
    remat: Remat = "none"
    """Of ours (model.remat)."""
    devices: int = 1
    """Devices that ours is split over."""
    tunix_micro_batch: int = 1
    """Prompts of a pass of Tunix's update (train_micro_batch_size)."""
    tunix_remat: str = "NONE"
    """NONE, BLOCK or DECODER (remat_config)."""
    tunix_devices: int = 1
    """Devices that Tunix is split over (its fsdp axis)."""
    apart: bool = False
    """Hold one side in memory at a time, where there is no room for two."""
    environment: Path = field(default_factory=install.default_folder)
    """Folder of Tunix's environment."""


def run(options: Options, *, platform: str) -> None:
    """Take both sides through whole GRPO steps in turn on devices of `platform`, and print."""
    with tempfile.TemporaryDirectory() as name:
        pair = Pair(options, platform, Path(name))
        take = take_turns_apart if options.apart else take_turns
        first, steps, agreement = take(pair, options.rounds)
    described = {
        "benchmark": f"tunix/{platform}",
        "model": options.model,
        "dtype": options.dtype,
        "device": processor() if platform == "cpu" else pair.device,
        "prompts": len(pair.batch["prompt_ids"]),
        "generations": options.generations,
        "prompt_length": options.prompt_length,
        "budget": options.budget,
        "completion_tokens": int(pair.batch["lengths"].sum()),
        "rounds": options.rounds,
        "one_side_in_memory": options.apart,
        **agreement,
    }
    for row in rows_of(first, steps, pair.batch["completion_ids"].size):
        print(json.dumps(described | row | pair.settings(row["side"])), flush=True)


class Pair:
    """Both sides as they are opened: the weights and the batch that they share, in `folder`."""

    def __init__(self, options: Options, platform: str, folder: Path):
        self.options, self.platform, self.folder = options, platform, folder
        self.device = ""
        self.versions: dict[str, dict] = {}
        self.batch: dict[str, np.ndarray] = {}
        self._shape: dict = {}

    def ours(self) -> SideProcess:
        """Our side, ready for its steps; it makes the weights."""
        options = self.options
        side = start_ours(self.platform, devices=options.devices, folder=self.folder)
        real = options.model in REAL
        loaded = side.call("load", name=options.model, real=real, out=self._file("weights.npz"))
        self.versions["ours"] = loaded["versions"] | {"commit": commit()}
        self._shape, self.device = loaded["shape"], loaded["device"]
        vocab_size = self._shape["vocab_size"]
        self.batch = trace.make_trace(
            vocab_size=vocab_size,
            rows=options.rows,
            generations=options.generations,
            prompt_length=options.prompt_length,
            budget=options.budget,
        )
        np.savez(self._file("trace.npz"), **self.batch)
        np.savez(self._file("rows.npz"), **trace.padded_rows(vocab_size=vocab_size, length=96))
        return self._prepared(
            side,
            pack_tokens=options.pack_tokens,
            dtype=options.dtype,
            remat=options.remat,
        )

    def theirs(self) -> SideProcess:
        """Tunix's side, ready for its steps, with the weights of ours."""
        options = self.options
        side = start_theirs(
            options.environment,
            self.platform,
            devices=options.tunix_devices,
            folder=self.folder,
        )
        loaded = side.call(
            "load",
            shape=self._shape,
            weights=self._file("weights.npz"),
            remat=options.tunix_remat,
            dtype=options.dtype,
        )
        self.versions["tunix"] = loaded["versions"]
        return self._prepared(side, micro_batch=options.tunix_micro_batch)

    def settings(self, side: str) -> dict:
        """What is said of a side in its rows."""
        options = self.options
        chosen = {
            "ours": {
                "pack_tokens": options.pack_tokens,
                "remat": options.remat,
                "devices": options.devices,
            },
            "tunix": {
                "train_micro_batch_size": options.tunix_micro_batch,
                "remat": options.tunix_remat,
                "devices": options.tunix_devices,
            },
        }
        return {"settings": chosen[side], "versions": self.versions[side]}

    def _prepared(self, side: SideProcess, **settings: object) -> SideProcess:
        side.call("logits", rows=self._file("rows.npz"), out=self._file(f"{side.name}-logits.npy"))
        side.call(
            "prepare",
            trace=self._file("trace.npz"),
            generations=self.options.generations,
            learning_rate=LEARNING_RATE,
            **settings,
        )
        return side

    def _file(self, name: str) -> str:
        return str(self.folder / name)


Steps = dict[str, list[dict]]


def take_turns(pair: Pair, rounds: int) -> tuple[dict[str, dict], Steps, dict[str, float]]:
    """A B A B ..., both sides in memory; one step of each to compile, one to warm up, and then
    those that count. Returns the first steps, those that count, and how far apart the two are."""
    sides = [pair.ours(), pair.theirs()]
    first = {side.name: _first_step(side, pair.folder) for side in sides}
    agreement = compare(pair.folder, apart=APART[pair.options.dtype])
    steps: Steps = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            steps[side.name].append(side.call("step", number=1 + number))
    for side in sides:
        side.close()
    return first, {name: taken[1:] for name, taken in steps.items()}, agreement


def take_turns_apart(pair: Pair, rounds: int) -> tuple[dict[str, dict], Steps, dict[str, float]]:
    """The same with one side in memory at a time, for models of which there is no room for two:
    in each round each side starts anew, compiles (after the first round from a cache), and takes
    one step that counts."""
    first: dict[str, dict] = {}
    steps: Steps = {"ours": [], "tunix": []}
    agreement: dict[str, float] = {}
    for _ in range(rounds):
        for opened in (pair.ours, pair.theirs):
            side = opened()
            first.setdefault(side.name, _first_step(side, pair.folder))
            steps[side.name].append(side.call("step", number=1))
            side.close()
        agreement = agreement or compare(pair.folder, apart=APART[pair.options.dtype])
    return first, steps, agreement


def _first_step(side: SideProcess, folder: Path) -> dict:
    step = side.call("step", number=0)
    side.call("moment", out=str(folder / f"{side.name}-moment.npy"))
    return step


def compare(folder: Path, *, apart: float) -> dict[str, float]:
    """How far apart the two are: the logits of padded rows, as a share of their spread, and Adam's
    first moments of the final norm after one step, as a share of the largest.

    Raises:
        SystemExit: it is not the same model, or not the same update.
    """
    far = logits_apart(folder, apart=apart)
    ours, theirs = (np.load(folder / f"{name}-moment.npy") for name in ("ours", "tunix"))
    gradient_apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"apart: gradient {gradient_apart:.1e}", file=sys.stderr)
    if not gradient_apart < apart:
        raise SystemExit("the first gradients differ: not the same update")
    return {"logits_apart": far, "gradient_apart": gradient_apart}


def logits_apart(folder: Path, *, apart: float) -> float:
    """How far apart both sides' logits of the padded rows are, as a share of their spread.

    Raises:
        SystemExit: it is not the same model.
    """
    with np.load(folder / "rows.npz") as rows:
        mask = rows["mask"]
    ours, theirs = (np.load(folder / f"{name}-logits.npy")[mask] for name in ("ours", "tunix"))
    far = float(np.abs(ours - theirs).max() / theirs.std())
    print(f"apart: logits {far:.1e}", file=sys.stderr)
    if not far < apart:
        raise SystemExit("the logits differ: not the same model")
    return far


def rows_of(first: dict[str, dict], turns: dict[str, list[dict]], sampled: int) -> list[dict]:
    """The table: a row a part and side; `sampled` tokens are drawn in a rollout."""
    rows = []
    for part in PARTS:
        walls = {name: [turn[part]["wall"] for turn in taken] for name, taken in turns.items()}
        cpus = {name: [turn[part]["cpu"] for turn in taken] for name, taken in turns.items()}
        wall = {name: statistics.median(seconds) for name, seconds in walls.items()}
        cpu = {name: statistics.median(seconds) for name, seconds in cpus.items()}
        for name, taken in turns.items():
            row = {
                "side": name,
                "part": part,
                "wall": round(wall[name], 4),
                "wall_all": [round(seconds, 4) for seconds in walls[name]],
                "cpu": round(cpu[name], 4),
                "cpu_all": [round(seconds, 4) for seconds in cpus[name]],
                "ratio": round(wall["tunix"] / wall[name], 2),
                "cpu_ratio": round(cpu["tunix"] / cpu[name], 2),
                "first_wall": round(first[name][part]["wall"], 2),
                "first_cpu": round(first[name][part]["cpu"], 2),
            }
            if part == "rollout":
                row["tokens_per_s"] = round(sampled / wall[name], 1)
            if part != "step":
                for key in ("peak", "device_peak"):
                    if taken[0][part].get(key):
                        row[key] = max(turn[part][key] for turn in taken)
            rows.append(row)
    return rows


def processor() -> str:
    """The machine's cores, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}"


def commit() -> str:
    """This repository's, short."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
