"""Rows of `learn` to a summary and a chart. Measures nothing.

python -m benchmarks.tunix.curves rows.jsonl [--chart docs/tunix-learning.png]

The summary has a JSON line for each of our sides against Tunix. Rewards are compared in blocks of
steps: `difference` is ours less Tunix's, the mean over seeds, and `seed_std` is what one seed is
from another (ddof 1, the two sides' variances averaged). As both sides of a seed see the same
problems from the same weights, the difference of a seed is less noisy than that:
`mean_difference` is over all steps, with the standard error of its mean over seeds.

`target` is nine tenths of the way from the first block's reward to the last block's, of the side
where that is lowest; `to_target` has the steps and seconds after which the mean over seeds of a
side's reward, itself a mean over the last block of steps, was first as high. A first step compiles
and so counts as the median of the others.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

BLOCK = 10  # steps
TUNIX = "tunix"
STYLES = {
    "ours": ("ours", "tab:blue"),
    "ours_stop_untrained": ("ours, stop token left out of the loss as in Tunix", "tab:green"),
    TUNIX: ("Tunix", "tab:red"),
}


@dataclass(frozen=True)
class Curves:
    """A side's runs, [seeds, steps] each; the seconds are of a step."""

    reward: np.ndarray
    cpu: np.ndarray
    wall: np.ndarray
    first_cpu: float
    accuracy: list[float]

    @property
    def running(self) -> np.ndarray:
        """The reward's mean over seeds and the last block of steps."""
        return running_mean(self.reward.mean(axis=0), BLOCK)


def main(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional], chart: Path | None = None
) -> None:
    """Print the summary; draw the chart.

    Args:
        files: JSON lines of `learn`.
        chart: PNG to write.
    """
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    curves = read(rows)
    for row in summaries(curves):
        print(json.dumps(row))
    if chart:
        draw(curves, chart)


def read(rows: Sequence[dict]) -> dict[str, Curves]:
    """The rows of each side, by seed."""
    found = [row for row in rows if row["benchmark"] == "tunix/learn"]
    curves = {}
    for name in dict.fromkeys(row["side"] for row in found):
        own = sorted((row for row in found if row["side"] == name), key=lambda row: row["seed"])
        curves[name] = Curves(
            reward=np.array([row["reward"] for row in own]),
            cpu=np.array([without_first(row["cpu"]) for row in own]),
            wall=np.array([without_first(row["wall"]) for row in own]),
            first_cpu=float(np.mean([row["cpu"][0] for row in own])),
            accuracy=[row["held_out"]["accuracy"] for row in own],
        )
    return curves


def summaries(curves: dict[str, Curves]) -> list[dict]:
    """A row for each of our sides against Tunix.

    Raises:
        SystemExit: fewer than two seeds, or a side that lacks one.
    """
    seeds = {len(side.reward) for side in curves.values()}
    if len(seeds) > 1 or min(seeds) < 2:
        raise SystemExit("curves are compared over the same two seeds or more on each side")
    target = target_of([side.reward for side in curves.values()], BLOCK)
    return [_against(name, curves[name], curves[TUNIX], target) for name in curves if name != TUNIX]


def _against(name: str, ours: Curves, theirs: Curves, target: float) -> dict:
    sides = {name: ours, TUNIX: theirs}
    blocks = {key: block_means(side.reward, BLOCK) for key, side in sides.items()}
    difference = (blocks[name] - blocks[TUNIX]).mean(axis=0)
    std = np.sqrt(np.mean([blocks[key].var(axis=0, ddof=1) for key in sides], axis=0))
    mean, error = mean_and_error((ours.reward - theirs.reward).mean(axis=1))
    gained, gained_error = mean_and_error(np.subtract(ours.accuracy, theirs.accuracy))
    total = ours.cpu.mean(axis=0).sum()
    return {
        "benchmark": "tunix/learn-summary",
        "side": name,
        "seeds": len(ours.reward),
        "block": BLOCK,
        "difference": np.round(difference, 3).tolist(),
        "seed_std": np.round(std, 3).tolist(),
        "blocks_within_seed_std": f"{int((np.abs(difference) <= std).sum())} of {len(std)}",
        "mean_difference": round(mean, 4),
        "mean_difference_error": round(error, 4),
        "last_reward": {key: round(float(side.running[-1]), 3) for key, side in sides.items()},
        "held_out_accuracy": {
            key: round(float(np.mean(side.accuracy)), 4) for key, side in sides.items()
        },
        "held_out_difference": round(gained, 4),
        "held_out_difference_error": round(gained_error, 4),
        "target": round(target, 3),
        "to_target": {key: _to_target(side, target) for key, side in sides.items()},
        "when_ours_ends": {
            "cpu": round(float(total), 1),
            "reward": {
                key: round(float(side.running[_steps_within(side.cpu, total) - 1]), 3)
                for key, side in sides.items()
            },
        },
        "step": {
            key: {
                "cpu": round(float(np.median(side.cpu)), 3),
                "wall": round(float(np.median(side.wall)), 3),
                "first_cpu": round(side.first_cpu, 1),
            }
            for key, side in sides.items()
        },
    }


def _to_target(side: Curves, target: float) -> dict[str, float] | None:
    steps = steps_to(side.running, target)
    if steps is None:
        return None
    spent = {"cpu": side.cpu, "wall": side.wall}
    seconds = {key: round(float(each.mean(axis=0)[:steps].sum()), 1) for key, each in spent.items()}
    return {"steps": steps} | seconds


def _steps_within(seconds: np.ndarray, total: float) -> int:
    """Whole steps that end within the seconds, at least one; a hair is for rounding."""
    ends = np.cumsum(seconds.mean(axis=0))
    return max(1, int((ends <= total + 1e-9).sum()))


def block_means(values: np.ndarray, size: int) -> np.ndarray:
    """Means of so many steps after another, along the last axis; the last block may be shorter."""
    starts = range(0, values.shape[-1], size)
    return np.stack([values[..., start : start + size].mean(axis=-1) for start in starts], axis=-1)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """At each step the mean over the last so many, or over as many as there are."""
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def steps_to(values: np.ndarray, target: float) -> int | None:
    """How many steps it takes until a value is as high as the target; None if none is."""
    reached = np.flatnonzero(values >= target)
    return int(reached[0]) + 1 if len(reached) else None


def target_of(rewards: Sequence[np.ndarray], size: int) -> float:
    """Nine tenths of the way up from the sides' first block to the lowest of their last blocks."""
    blocks = [block_means(reward, size).mean(axis=0) for reward in rewards]
    start, end = np.mean([block[0] for block in blocks]), min(block[-1] for block in blocks)
    return float(start + 0.9 * (end - start))


def without_first(seconds: Sequence[float]) -> list[float]:
    """The seconds of steps, with the median of the others as the first, which compiles."""
    return [float(np.median(seconds[1:])), *seconds[1:]]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and the standard error of it."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def draw(curves: dict[str, Curves], path: Path) -> None:
    """Reward by step and by CPU seconds: a thin line a seed, a thick one their mean."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for name, side in curves.items():
        label, colour = STYLES[name]
        for axes, clocks in zip(panels, (np.ones_like(side.cpu), side.cpu), strict=True):
            for reward, clock in zip(side.reward, clocks, strict=True):
                smooth = running_mean(reward, BLOCK)
                axes.plot(np.cumsum(clock), smooth, color=colour, linewidth=0.5, alpha=0.5)
            mean = np.cumsum(clocks.mean(axis=0))
            axes.plot(mean, side.running, color=colour, linewidth=2, label=label)
    panels[0].set_xlabel("GRPO step")
    panels[1].set_xlabel("CPU seconds of all threads, compilation apart")
    panels[0].set_ylabel(f"reward, mean over the last {BLOCK} steps")
    panels[0].legend(loc="lower right", fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
