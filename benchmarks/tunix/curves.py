"""Rows of `learn` to a summary and a chart. Measures nothing.

python -m benchmarks.tunix.curves rows.jsonl [--chart docs/tunix-learning.png]

A JSON line for each figure and two sides, and one for each reward that both sides reach. As both
sides of a seed see the same problems from the same weights, differences are paired by seed.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

BLOCK = 10  # steps
SHARES = (0.5, 0.75, 0.9)  # of the rise
STYLES = {
    "ours": ("ours", "tab:blue"),
    "ours_stop_untrained": ("ours, stop token left out of the loss as in Tunix", "tab:green"),
    "tunix": ("Tunix", "tab:red"),
}


Sides = dict[str, list[dict]]  # rows of each, by seed

# Of a row; compared between the sides.
FIGURES: dict[str, Callable[[dict], float]] = {
    "reward": lambda row: np.mean(row["reward"]),
    **{
        f"{key}, last quarter of the steps": lambda row, key=key: np.mean(
            row[key][-(len(row[key]) // 4) :]
        )
        for key in ("reward", "accuracy", "format")
    },
    **{
        f"{key}, held out": lambda row, key=key: row["held_out"][key]
        for key in ("accuracy", "pass_at_1", "format_rate")
    },
    "CPU seconds of a step, median": lambda row: np.median(row["cpu"][1:]),
    "CPU seconds of the first step": lambda row: row["cpu"][0],
}


def main(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional], chart: Path | None = None
) -> None:
    """Print the summary; draw the chart.

    Args:
        files: JSON lines of `learn`.
        chart: PNG to write.
    """
    sides = read([json.loads(line) for file in files for line in file.read_text().splitlines()])
    for row in [*summaries(sides), *reached(sides)]:
        print(json.dumps(row))
    if chart:
        draw(sides, chart)


def read(rows: Sequence[dict]) -> Sides:
    """The rows of each side, by seed.

    Raises:
        SystemExit: fewer than two seeds, or a side that lacks one.
    """
    sides: Sides = {}
    for row in sorted(rows, key=lambda row: row.get("seed", 0)):
        if row["benchmark"] == "tunix/learn":
            sides.setdefault(row["side"], []).append(row)
    seeds = {tuple(row["seed"] for row in own) for own in sides.values()}
    if len(seeds) != 1 or len(*seeds) < 2:
        raise SystemExit("curves are compared over the same two seeds or more on each side")
    return sides


def summaries(sides: Sides) -> list[dict]:
    """A row for each figure and two sides: means over seeds, and the difference of the first less
    the second, paired by seed, with its standard error."""
    rows = []
    for (name, one), (other, two) in itertools.combinations(sides.items(), 2):
        for figure, of in FIGURES.items():
            pairs = np.array([(of(a), of(b)) for a, b in zip(one, two, strict=True)])
            differences = pairs[:, 0] - pairs[:, 1]
            error = differences.std(ddof=1) / np.sqrt(len(pairs))
            means = zip((name, other), pairs.mean(axis=0).round(4).tolist(), strict=True)
            row = {"benchmark": "tunix/learn-summary", "figure": figure, "seeds": len(pairs)}
            row |= {"means": dict(means), "difference": round(float(differences.mean()), 4)}
            rows.append(row | {"error": round(float(error), 4)})
    return rows


def reached(sides: Sides) -> list[dict]:
    """A row for each share of the way from the first block's reward to the last block's (of the
    side where that is lowest): the steps, and their CPU seconds, after which the mean over seeds of
    a side's reward, itself a mean over the last block of steps, was first as high."""
    rewards = [mean_of(own, "reward") for own in sides.values()]
    start = np.mean([reward[:BLOCK].mean() for reward in rewards])
    rise = min(reward[-BLOCK:].mean() for reward in rewards) - start
    rows = []
    for target in (start + share * rise for share in SHARES):
        row = {"benchmark": "tunix/learn-reached", "reward": round(float(target), 3)}
        for name, own in sides.items():
            found = np.flatnonzero(running_mean(mean_of(own, "reward"), BLOCK) >= target)
            steps = int(found[0]) + 1 if len(found) else None
            cpu = round(float(mean_of(own, "cpu")[:steps].sum()), 1)
            row[name] = {"steps": steps, "cpu": cpu} if steps else None
        rows.append(row)
    return rows


def mean_of(own: list[dict], key: str) -> np.ndarray:
    """At each step the mean over seeds; of seconds, the first step's, which compiles, are the
    median of the others."""
    values = np.array([row[key] for row in own])
    if key == "cpu":
        values[:, 0] = np.median(values[:, 1:], axis=1)
    return values.mean(axis=0)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """At each step the mean over the last `window` steps, or over all there are."""
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def draw(sides: Sides, path: Path) -> None:
    """Reward by step and by CPU seconds: a thin line a seed, a thick one their mean."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    figure.suptitle("GRPO on gemma3-nano: seeds (thin) and their mean (thick)")
    for name, own in sides.items():
        label, colour = STYLES[name]
        for axes, key in zip(panels, (None, "cpu"), strict=True):
            for rows in ([row] for row in own):
                axes.plot(*curve(rows, key), color=colour, linewidth=0.5, alpha=0.5)
            axes.plot(*curve(own, key), color=colour, linewidth=2, label=label)
            axes.grid(alpha=0.3)
    panels[0].set_xlabel("GRPO step")
    panels[1].set_xlabel("CPU seconds of all threads, compilation apart")
    panels[0].set_ylabel(f"reward, mean over the last {BLOCK} steps")
    panels[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def curve(rows: list[dict], clock: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The time at each step's end, in steps or by a clock, and the running reward."""
    reward = mean_of(rows, "reward")
    times = np.cumsum(mean_of(rows, clock) if clock else np.ones_like(reward))
    return times, running_mean(reward, BLOCK)


if __name__ == "__main__":
    tyro.cli(main)
