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
import tempfile
from pathlib import Path

import numpy as np
import tyro

from benchmarks.tunix import install, trace
from benchmarks.tunix.sides import SideProcess, start_ours, start_theirs

PARTS = ("rollout", "update", "step")
LOGITS_APART = 1e-3  # of the logits' spread, float32 on both sides
GRADIENTS_APART = 1e-3  # of the largest entry
REAL = ("gemma3-nano",)  # weights at hand; others are random, which costs the same
LEARNING_RATE = 1e-6


def main(
    model: str = "gemma3-nano",
    rounds: int = 5,
    prompt_length: int = 128,
    budget: int = 128,
    passes: int = 1,
    remat: bool = False,
    devices: int = 1,
    tunix_micro_batch: int = 1,
    tunix_remat: str = "NONE",
    tunix_devices: int = 1,
    environment: Path | None = None,
) -> None:
    """Take both sides through whole GRPO steps in turn.

    Args:
        model: architecture; gemma3-nano with its own weights, others with random ones.
        rounds: timed steps of each side, after one that compiles and one that warms up.
        prompt_length: S, tokens.
        budget: T, tokens.
        passes: of our update (accumulation_steps).
        remat: of ours.
        devices: CPU devices that ours is split over.
        tunix_micro_batch: prompts of a pass of Tunix's update (train_micro_batch_size).
        tunix_remat: NONE, BLOCK or DECODER (remat_config).
        tunix_devices: CPU devices that Tunix is split over (its fsdp axis).
        environment: folder of Tunix's environment.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = start_ours(devices=devices, folder=folder)
        theirs = start_theirs(
            environment or install.default_folder(), devices=tunix_devices, folder=folder
        )
        weights = folder / "weights.npz"
        loaded = ours.call("load", name=model, real=model in REAL, out=str(weights))
        their_versions = theirs.call(
            "load", shape=loaded["shape"], weights=str(weights), remat=tunix_remat
        )
        vocab_size = loaded["shape"]["vocab_size"]
        agreement = {"logits_apart": compare_logits(ours, theirs, vocab_size, folder)}
        batch = trace.make_trace(vocab_size=vocab_size, prompt_length=prompt_length, budget=budget)
        shared = {
            "trace": trace.save(folder / "trace.npz", batch),
            "generations": len(trace.LENGTHS_PG[0]),
            "learning_rate": LEARNING_RATE,
        }
        ours.call("prepare", **shared, passes=passes, remat=remat)
        theirs.call("prepare", **shared, micro_batch=tunix_micro_batch)
        first = {side.name: side.call("step", number=0) for side in (ours, theirs)}
        agreement["gradient_apart"] = compare_moments(ours, theirs, folder)
        turns = take_turns(ours, theirs, rounds)
        ours.close()
        theirs.close()
    described = {
        "benchmark": "tunix/cpu",
        "model": model,
        "dtype": "float32",
        "device": _processor(),
        "prompts": len(trace.LENGTHS_PG),
        "generations": len(trace.LENGTHS_PG[0]),
        "prompt_length": prompt_length,
        "budget": budget,
        "completion_tokens": int(batch["lengths"].sum()),
        "rounds": rounds,
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
    versions = {"ours": loaded["versions"] | {"commit": _commit()}, "tunix": their_versions}
    sampled = batch["completion_ids"].size
    for row in rows_of(first, turns, sampled):
        side = row["side"]
        named = described | row | {"settings": settings[side], "versions": versions[side]}
        print(json.dumps(named), flush=True)


def compare_logits(ours: SideProcess, theirs: SideProcess, vocab_size: int, folder: Path) -> float:
    """Largest difference of the two models' logits on padded rows, as a share of their standard
    deviation. Raises SystemExit where they are not the same model."""
    rows = trace.padded_rows(vocab_size=vocab_size, num_rows=4, length=96)
    path = trace.save(folder / "rows.npz", rows)
    apart = _apart(ours, theirs, folder, "logits", rows=path, where=rows["mask"], scale=np.std)
    if not apart < LOGITS_APART:
        raise SystemExit(f"the logits differ by {apart:.1e} of their spread: not the same model")
    return apart


def compare_moments(ours: SideProcess, theirs: SideProcess, folder: Path) -> float:
    """Largest difference of Adam's first moments of the final norm after one step, as a share of
    the largest entry. Raises SystemExit where the two did not follow the same gradient."""
    apart = _apart(ours, theirs, folder, "moment", where=..., scale=lambda x: np.abs(x).max())
    if not apart < GRADIENTS_APART:
        raise SystemExit(f"the first gradients differ by {apart:.1e}: not the same update")
    return apart


def _apart(ours, theirs, folder, call, *, where, scale, **arguments) -> float:
    """Both sides write an array; how far apart they are."""
    found = {}
    for side in (ours, theirs):
        path = folder / f"{side.name}.npy"
        side.call(call, out=str(path), **arguments)
        found[side.name] = np.load(path)[where]
        path.unlink()
    difference = np.abs(found["ours"] - found["tunix"]).max()
    return float(difference / scale(found["tunix"]))


def take_turns(ours: SideProcess, theirs: SideProcess, rounds: int) -> dict[str, list[dict]]:
    """A B A B ..., the first of each to warm up and left out."""
    turns = {"ours": [], "tunix": []}
    for number in range(rounds + 1):
        for side in (ours, theirs):
            turns[side.name].append(side.call("step", number=1 + number))
    return {name: taken[1:] for name, taken in turns.items()}


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
