"""One GRPO step on CPU, ours against Tunix's: rollout, update, the whole; turns alternate.

python -m benchmarks.tunix.cpu [--model gemma3-nano | gemma3-270m] [--rounds 3]
needs the environment of `python -m benchmarks.tunix.install`

Both sides hold the same float32 weights (their logits are compared first, and the first gradient
after the first step) and run the same frozen batch (`trace.py`): 4 prompts x 8 completions, beta 0,
mu 1, no old log-probs, the same AdamW. Rollouts sample at temperature 1 to the whole budget, with
no stop token, for neither side drops a row that has ended while another goes on, and one row of the
trace takes it all; the update is then on the trace's completions at the trace's lengths. That also
takes two of Tunix's ways out of the comparison: that it leaves EOS out of the loss, and that its
key is the same every step (it is given another seed each step).

Each side is a process of its own; while one runs, the other waits. One row a side and part, and one
for the first step, which compiles. `wall` and `cpu` (of all threads) are seconds, medians over the
rounds, `peak` is the most bytes resident in the part, its weights and optimizer included.
`ratio` is Tunix over ours.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro

from benchmarks.tunix import install, trace
from benchmarks.tunix.sides import SideProcess, start_ours, start_theirs

PARTS = ("rollout", "update", "step")
LOGITS_APART = 1e-3  # of the logits' spread, float32 on both sides
GRADIENT_APART = 1e-3  # of the largest entry
REAL = ("gemma3-nano",)  # weights at hand; others are random, which costs the same
LEARNING_RATE = 1e-6


def main(
    model: str = "gemma3-nano",
    rounds: int = 5,
    generations: int = 8,
    prompt_length: int = 128,
    budget: int = 128,
    passes: int = 1,
    remat: bool = False,
    devices: int = 1,
    tunix_micro_batch: int = 1,
    tunix_remat: str = "NONE",
    tunix_devices: int = 1,
    apart: bool = False,
    environment: Path | None = None,
) -> None:
    """Take both sides through whole GRPO steps in turn.

    Args:
        model: architecture; gemma3-nano with its own weights, others with random ones.
        rounds: timed steps of each side, after one that compiles and one that warms up.
        generations: G, of each of the 32 / G prompts.
        prompt_length: S, tokens.
        budget: T, tokens.
        passes: of our update (accumulation_steps).
        remat: of ours.
        devices: CPU devices that ours is split over.
        tunix_micro_batch: prompts of a pass of Tunix's update (train_micro_batch_size).
        tunix_remat: NONE, BLOCK or DECODER (remat_config).
        tunix_devices: CPU devices that Tunix is split over (its fsdp axis).
        apart: hold one side in memory at a time.
        environment: folder of Tunix's environment.
    """
    environment = environment or install.default_folder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, rows = str(folder / "weights.npz"), str(folder / "rows.npz")
        shared = {
            "trace": str(folder / "trace.npz"),
            "generations": generations,
            "learning_rate": LEARNING_RATE,
        }
        loaded: dict[str, dict] = {}
        batch: dict[str, np.ndarray] = {}

        def open_ours() -> SideProcess:
            side = start_ours(devices=devices, folder=folder)
            loaded["ours"] = side.call("load", name=model, real=model in REAL, out=weights)
            vocab_size = loaded["ours"]["shape"]["vocab_size"]
            batch.update(
                trace.make_trace(
                    vocab_size=vocab_size,
                    generations=generations,
                    prompt_length=prompt_length,
                    budget=budget,
                )
            )
            np.savez(shared["trace"], **batch)
            np.savez(rows, **trace.padded_rows(vocab_size=vocab_size, length=96))
            side.call("logits", rows=rows, out=str(folder / "ours-logits.npy"))
            side.call("prepare", **shared, passes=passes, remat=remat)
            return side

        def open_theirs() -> SideProcess:
            side = start_theirs(environment, devices=tunix_devices, folder=folder)
            shape = loaded["ours"]["shape"]
            loaded["tunix"] = side.call("load", shape=shape, weights=weights, remat=tunix_remat)
            side.call("logits", rows=rows, out=str(folder / "tunix-logits.npy"))
            side.call("prepare", **shared, micro_batch=tunix_micro_batch)
            return side

        take = take_turns_apart if apart else take_turns
        first, turns, agreement = take(open_ours, open_theirs, rounds, folder)
    described = {
        "benchmark": "tunix/cpu",
        "model": model,
        "dtype": "float32",
        "device": _processor(),
        "prompts": len(batch["prompt_ids"]),
        "generations": generations,
        "prompt_length": prompt_length,
        "budget": budget,
        "completion_tokens": int(batch["lengths"].sum()),
        "rounds": rounds,
        "one_side_in_memory": apart,
        **agreement,
    }
    settings = {
        "ours": {"passes": passes, "remat": remat, "devices": devices},
        "tunix": {
            "train_micro_batch_size": tunix_micro_batch,
            "remat": tunix_remat,
            "devices": tunix_devices,
        },
    }
    versions = {name: side["versions"] for name, side in loaded.items()}
    versions["ours"] |= {"commit": _commit()}
    sampled = batch["completion_ids"].size
    for row in rows_of(first, turns, sampled):
        side = row["side"]
        named = described | row | {"settings": settings[side], "versions": versions[side]}
        print(json.dumps(named), flush=True)


Opener = Callable[[], SideProcess]
Steps = dict[str, list[dict]]


def take_turns(
    open_ours: Opener, open_theirs: Opener, rounds: int, folder: Path
) -> tuple[dict[str, dict], Steps, dict[str, float]]:
    """A B A B ..., both sides in memory; one step of each to compile, one to warm up, and then
    those that count. Returns the first steps, those that count, and how far apart the sides are."""
    sides = [open_ours(), open_theirs()]
    first = {side.name: _first_step(side, folder) for side in sides}
    agreement = compare(folder)
    steps: Steps = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            steps[side.name].append(side.call("step", number=1 + number))
    for side in sides:
        side.close()
    return first, {name: taken[1:] for name, taken in steps.items()}, agreement


def take_turns_apart(
    open_ours: Opener, open_theirs: Opener, rounds: int, folder: Path
) -> tuple[dict[str, dict], Steps, dict[str, float]]:
    """The same with one side in memory at a time, for models of which there is no room for two:
    in each round each side starts anew, compiles (after the first round from a cache), and takes
    one step that counts."""
    first: dict[str, dict] = {}
    steps: Steps = {"ours": [], "tunix": []}
    agreement: dict[str, float] = {}
    for _ in range(rounds):
        for opened in (open_ours, open_theirs):
            side = opened()
            first.setdefault(side.name, _first_step(side, folder))
            steps[side.name].append(side.call("step", number=1))
            side.close()
        agreement = agreement or compare(folder)
    return first, steps, agreement


def _first_step(side: SideProcess, folder: Path) -> dict:
    step = side.call("step", number=0)
    side.call("moment", out=str(folder / f"{side.name}-moment.npy"))
    return step


def compare(folder: Path) -> dict[str, float]:
    """How far apart the two are: the logits of padded rows, as a share of their spread, and Adam's
    first moments of the final norm after one step, as a share of the largest.

    Raises:
        SystemExit: it is not the same model, or not the same update.
    """
    with np.load(folder / "rows.npz") as rows:
        mask = rows["mask"]
    ours, theirs = (np.load(folder / f"{name}-logits.npy")[mask] for name in ("ours", "tunix"))
    logits_apart = float(np.abs(ours - theirs).max() / theirs.std())
    ours, theirs = (np.load(folder / f"{name}-moment.npy") for name in ("ours", "tunix"))
    gradient_apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"apart: logits {logits_apart:.1e}, gradient {gradient_apart:.1e}", file=sys.stderr)
    if not logits_apart < LOGITS_APART:
        raise SystemExit("the logits differ: not the same model")
    if not gradient_apart < GRADIENT_APART:
        raise SystemExit("the first gradients differ: not the same update")
    return {"logits_apart": logits_apart, "gradient_apart": gradient_apart}


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
                "ratio": round(wall["tunix"] / wall[name], 2),
                "cpu_ratio": round(cpu["tunix"] / cpu[name], 2),
                "first_wall": round(first[name][part]["wall"], 2),
                "first_cpu": round(first[name][part]["cpu"], 2),
            }
            if part == "rollout":
                row["tokens_per_s"] = round(sampled / wall[name], 1)
            if part != "step":
                row["peak"] = max(turn[part]["peak"] for turn in taken)
            rows.append(row)
    return rows


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    tyro.cli(main)
