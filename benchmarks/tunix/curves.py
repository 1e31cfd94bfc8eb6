"""Rows of `learn` to a summary and a chart. Measures nothing.

python -m benchmarks.tunix.curves rows.jsonl [--chart docs/tunix-learning.png]

The summary has a JSON line for each two sides. Rewards are compared in blocks of steps:
`difference` is `side` less `against`, the mean over seeds, and `seed_std` is what one seed is from
another (ddof 1, the two sides' variances averaged). As both sides of a seed see the same problems
from the same weights, the difference of a seed is less noisy than that: `mean_difference` is over
all steps, with the standard error of its mean over seeds. `last_quarter` has means over the last
quarter of the steps.

`reached` has, for some shares of the way from the first block's reward to the last block's (of the
side where that is lowest), the steps and seconds after which the mean over seeds of a side's
reward, itself a mean over the last block of steps, was first as high. A first step compiles and so
counts as the median of the others.
"""

import itertools
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
SHARES = (0.5, 0.75, 0.9)  # of the rise
DRAWN, HELD_OUT = ("reward", "accuracy", "format"), ("accuracy", "pass_at_1", "format_rate")
STYLES = {
    "ours": ("ours", "tab:blue"),
    "ours_stop_untrained": ("ours, stop token left out of the loss as in Tunix", "tab:green"),
    "tunix": ("Tunix", "tab:red"),
}


@dataclass(frozen=True)
class Curves:
    """A side's runs, one a seed.

    Attributes:
        drawn: of a step's completions, [seeds, steps] each.
        cpu, wall: seconds of a step, [seeds, steps].
        first_cpu: of the first step, which compiles.
        held_out: what its weights are measured at in the end, [seeds] each.
    """

    drawn: dict[str, np.ndarray]
    cpu: np.ndarray
    wall: np.ndarray
    first_cpu: float
    held_out: dict[str, np.ndarray]

    @property
    def reward(self) -> np.ndarray:
        """[seeds, steps]."""
        return self.drawn["reward"]

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
            drawn={key: np.array([row[key] for row in own]) for key in DRAWN},
            cpu=np.array([without_first(row["cpu"]) for row in own]),
            wall=np.array([without_first(row["wall"]) for row in own]),
            first_cpu=float(np.mean([row["cpu"][0] for row in own])),
            held_out={key: np.array([row["held_out"][key] for row in own]) for key in HELD_OUT},
        )
    return curves


def summaries(curves: dict[str, Curves]) -> list[dict]:
    """A row for each two sides.

    Raises:
        SystemExit: fewer than two seeds, or a side that lacks one.
    """
    seeds = {len(side.reward) for side in curves.values()}
    if len(seeds) > 1 or min(seeds) < 2:
        raise SystemExit("curves are compared over the same two seeds or more on each side")
    rewards = [side.reward for side in curves.values()]
    targets = [target_of(rewards, BLOCK, share) for share in SHARES]
    pairs = itertools.combinations(curves, 2)
    return [_compared({name: curves[name] for name in pair}, targets) for pair in pairs]


def _compared(pair: dict[str, Curves], targets: list[float]) -> dict:
    name, other = pair
    one, two = pair.values()
    blocks = [block_means(side.reward, BLOCK) for side in (one, two)]
    difference = (blocks[0] - blocks[1]).mean(axis=0)
    std = np.sqrt(np.mean([block.var(axis=0, ddof=1) for block in blocks], axis=0))
    of_each = lambda figure: {key: figure(side) for key, side in pair.items()}
    last = slice(-(one.reward.shape[1] // 4), None)
    total = one.cpu.mean(axis=0).sum()
    return {
        "benchmark": "tunix/learn-summary",
        "side": name,
        "against": other,
        "seeds": len(one.reward),
        "block": BLOCK,
        "difference": np.round(difference, 3).tolist(),
        "seed_std": np.round(std, 3).tolist(),
        "blocks_within_seed_std": f"{int((np.abs(difference) <= std).sum())} of {len(std)}",
        "mean_difference": mean_and_error((one.reward - two.reward).mean(axis=1)),
        "last_quarter": {
            key: of_each(lambda side, key=key: round(float(side.drawn[key][:, last].mean()), 4))
            | {
                "difference": mean_and_error(
                    (one.drawn[key] - two.drawn[key])[:, last].mean(axis=1)
                )
            }
            for key in DRAWN
        },
        "held_out": {
            key: of_each(lambda side, key=key: round(float(side.held_out[key].mean()), 4))
            | {"difference": mean_and_error(one.held_out[key] - two.held_out[key])}
            for key in HELD_OUT
        },
        "reached": [
            {"reward": round(target, 3)}
            | of_each(lambda side, target=target: _to_target(side, target))
            for target in targets
        ],
        "when_side_ends": {
            "cpu": round(float(total), 1),
            "reward": of_each(
                lambda side: round(float(side.running[_steps_within(side.cpu, total) - 1]), 3)
            ),
        },
        "step": of_each(
            lambda side: {
                "cpu": round(float(np.median(side.cpu)), 3),
                "wall": round(float(np.median(side.wall)), 3),
                "first_cpu": round(side.first_cpu, 1),
            }
        ),
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
    """Means of blocks of `size` steps, along the last axis; the last block may be shorter."""
    starts = range(0, values.shape[-1], size)
    return np.stack([values[..., start : start + size].mean(axis=-1) for start in starts], axis=-1)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """At each step the mean over the last `window` steps, or over all there are."""
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def steps_to(values: np.ndarray, target: float) -> int | None:
    """How many steps it takes until a value is as high as the target; None if none is."""
    reached = np.flatnonzero(values >= target)
    return int(reached[0]) + 1 if len(reached) else None


def target_of(rewards: Sequence[np.ndarray], size: int, share: float) -> float:
    """A share of the way up from the sides' first block to the lowest of their last blocks."""
    blocks = [block_means(reward, size).mean(axis=0) for reward in rewards]
    start, end = np.mean([block[0] for block in blocks]), min(block[-1] for block in blocks)
    return float(start + share * (end - start))


def without_first(seconds: Sequence[float]) -> list[float]:
    """The seconds of steps, with the median of the others as the first, which compiles."""
    return [float(np.median(seconds[1:])), *seconds[1:]]


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """The mean over seeds, and the standard error of it."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return {"mean": round(float(np.mean(values)), 4), "error": round(float(error), 4)}


def draw(curves: dict[str, Curves], path: Path) -> None:
    """Reward by step and by CPU seconds: a thin line a seed, a thick one their mean."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    num_seeds = len(next(iter(curves.values())).reward)
    figure.suptitle(f"GRPO on gemma3-nano: {num_seeds} seeds (thin) and their mean (thick)")
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
