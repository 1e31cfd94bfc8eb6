"""Rows of `learn` to a summary and a chart. Measures nothing.

python -m benchmarks.tunix.curves rows.jsonl [--chart docs/tunix-learning.png]

A JSON line for each figure and two sides, and one for each reward that both sides reach. As both
sides of a seed see the same problems from the same weights, differences are paired by seed.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from tyro.conf import Positional

from benchmarks.timing import read_rows
from gemma_grpo.records.report import running_mean

BLOCK = 10  # steps
SHARES = (0.5, 0.75, 0.9)  # of the rise
STYLES = {
    "ours": ("ours", "tab:blue"),
    "ours_stop_untrained": ("ours, stop token left out of the loss as in Tunix", "tab:green"),
    "tunix": ("Tunix", "tab:red"),
}
Sides = dict[str, list[dict]]  # rows of each, by seed


def figures(row: dict) -> dict[str, float]:
    """What is compared of a row."""
    quarter = len(row["reward"]) // 4
    learned = ("reward", "accuracy", "format")
    held_out = ("accuracy", "pass_at_1", "format_rate")
    return {
        "reward": np.mean(row["reward"]),
        **{f"{key}, last quarter of the steps": np.mean(row[key][-quarter:]) for key in learned},
        **{f"{key}, held out": row["held_out"][key] for key in held_out},
        "CPU seconds of a step, median": np.median(row["cpu"][1:]),
        "CPU seconds of the first step": row["cpu"][0],
    }


def main(files: Positional[tuple[Path, ...]], chart: Path | None = None) -> None:
    """Print the summary of JSON lines of `learn`; draw it into a PNG `chart`."""
    sides = read(read_rows(*files))
    for row in [*summaries(sides), *reached(sides)]:
        print(json.dumps(row))
    if chart:
        draw(sides, chart)


def read(rows: Sequence[dict]) -> Sides:
    """The rows of each side, by seed. Exits where there are fewer than two, or a side lacks one."""
    rows = sorted((r for r in rows if r["benchmark"] == "tunix/learn"), key=lambda r: r["seed"])
    sides = {row["side"]: [own for own in rows if own["side"] == row["side"]] for row in rows}
    seeds = {tuple(row["seed"] for row in own) for own in sides.values()}
    if len(seeds) != 1 or len(*seeds) < 2:
        raise SystemExit("curves are compared over the same two seeds or more on each side")
    return sides


def summaries(sides: Sides) -> list[dict]:
    """A row for each figure and two sides: means over seeds, and the difference of the first less
    the second, paired by seed, with its standard error."""
    rows, of = [], {name: [figures(row) for row in own] for name, own in sides.items()}
    for one, other in itertools.combinations(sides, 2):
        for figure in of[one][0]:
            pairs = np.array([[row[figure] for row in of[name]] for name in (one, other)])
            differences, means = pairs[0] - pairs[1], pairs.mean(axis=1).round(4).tolist()
            error = differences.std(ddof=1) / np.sqrt(len(differences))
            row = {"benchmark": "tunix/learn-summary", "figure": figure, "seeds": len(differences)}
            row |= {"means": {one: means[0], other: means[1]}}
            row |= {"difference": round(float(differences.mean()), 4)}
            rows.append(row | {"error": round(float(error), 4)})
    return rows


def reached(sides: Sides) -> list[dict]:
    """A row for each share of the way from the first block's reward to the last block's (of the
    side where that is lowest): the steps and CPU seconds after which each side's reward, itself a
    mean over the last block of steps, was first as high."""
    curves = {name: curve(own) for name, own in sides.items()}
    start = np.mean([reward[:BLOCK][-1] for reward, _ in curves.values()])
    rise = min(reward[-1] for reward, _ in curves.values()) - start
    rows = []
    for target in (start + share * rise for share in SHARES):
        row = {"benchmark": "tunix/learn-reached", "reward": round(float(target), 3)}
        for name, (reward, seconds) in curves.items():
            first = int(np.argmax(reward >= target))
            said = {"steps": first + 1, "cpu": round(float(seconds[first]), 1)}
            row[name] = said if reward[first] >= target else None
        rows.append(row)
    return rows


def curve(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The running reward after each step and the CPU seconds until then, means over the rows. The
    first step, which compiles, counts as the median of the others."""
    cpu = np.array([row["cpu"] for row in rows])
    cpu[:, 0] = np.median(cpu[:, 1:], axis=1)
    reward = np.mean([row["reward"] for row in rows], axis=0)
    return running_mean(reward, BLOCK), cpu.mean(axis=0).cumsum()


def draw(sides: Sides, path: Path) -> None:
    """Reward by step and by CPU seconds: a thin line a seed, a thick one their mean."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle("GRPO on gemma3-nano: seeds (thin) and their mean (thick)")
    by_step, by_cpu = figure.subplots(1, 2, sharey=True)
    for name, own in sides.items():
        label, colour = STYLES[name]
        seeds = [([row], {"linewidth": 0.5, "alpha": 0.5}) for row in own]
        for rows, style in [*seeds, (own, {"linewidth": 2, "label": label})]:
            reward, seconds = curve(rows)
            by_step.plot(range(1, len(reward) + 1), reward, color=colour, **style)
            by_cpu.plot(seconds, reward, color=colour, **style)
    by_step.set(xlabel="GRPO step", ylabel=f"reward, mean over the last {BLOCK} steps")
    by_step.legend(loc="lower right", fontsize=8)
    by_cpu.set_xlabel("CPU seconds of all threads, compilation apart")
    for axes in (by_step, by_cpu):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
