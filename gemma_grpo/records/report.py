"""What a run looks like afterwards: curves.png from metrics.jsonl, and the before/after table.

Does not import jax.
"""

import json
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, rollbacks
from gemma_grpo.records.read import is_number

PHASES = ("easy", "medium", "hard")
WEIGHTS = ("correctness", "trace", "confidence", "verbosity")
BLUE, GREEN, PURPLE, ORANGE, GREY = "#2458a6", "#2e8b57", "#7d55b0", "#d0742a", "#777777"
WEIGHT_COLORS = (GREEN, PURPLE, BLUE, GREY)  # as in the panels of accuracy and trace


def plot_curves(run_dir: Path, note: str = "") -> Path:
    """Draws `curves.png` in a run directory from its `metrics.jsonl`; returns the picture's path.

    `note`, such as "unfinished", goes behind the title.

    Raises:
        UserError: there is no metrics.jsonl, a line of it is none, or the disk is full.
    """
    figure = curves_figure(_read_lines(run_dir / "metrics.jsonl"))
    if note:
        figure.suptitle(f"{figure.get_suptitle()} ({note})")
    path = run_dir / "curves.png"
    with files.atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=100)
    return path


def curves_figure(lines: list[dict]) -> Any:
    """The matplotlib Figure of metrics lines, in six panels over the GRPO step.

    Loss (below the SFT loss, if there was SFT), reward, accuracy and trace score (with the
    snapshots of held-out problems, if any), reward weights, problems by difficulty (of earlier
    versions' runs the curriculum's phase). Points are steps as measured, lines their running mean,
    and the legend says so. A panel whose metric is in no line says "not measured".
    """
    # Figure by itself: no pyplot, so no global state and no display to look for.
    from matplotlib.figure import Figure

    sft = [line for line in lines if line["stage"] == "sft"]
    grpo = [line for line in lines if line["stage"] == "grpo"]
    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle("Learning curves: means over the completions sampled at each training step")
    grid = figure.add_gridspec(2, 3)
    if sft:
        halves = grid[0, 0].subgridspec(2, 1)
        above, below = halves[0], halves[1]
        _draw_metric(figure.add_subplot(above), sft, "loss", "SFT loss (nats a token)", ORANGE)
        _draw_metric(figure.add_subplot(below), grpo, "loss", "GRPO loss", BLUE)
    else:
        _draw_metric(figure.add_subplot(grid[0, 0]), grpo, "loss", "GRPO loss", BLUE)
    _draw_metric(figure.add_subplot(grid[0, 1]), grpo, "reward/mean", "Reward", BLUE)
    for place, name, title, color, held_out in (
        (grid[0, 2], "reward/correctness", "Accuracy", GREEN, "evaluation/accuracy"),
        (grid[1, 0], "reward/trace", "Trace score", PURPLE, "evaluation/trace_score"),
    ):
        axes = figure.add_subplot(place)
        _draw_snapshots(axes, grpo, held_out)
        _draw_metric(axes, grpo, name, title, color)
    _draw_weights(figure.add_subplot(grid[1, 1]), grpo)
    draw = _draw_difficulties if any("share/easy" in line for line in grpo) else _draw_phase
    draw(figure.add_subplot(grid[1, 2]), grpo)
    return figure


def before_after_table(summary: Mapping[str, Any]) -> str:
    """The stages of summary.json as an aligned table, and paired differences below it.

    Args:
        summary: "stages": {name: {"accuracy", "accuracy_ci95": [low, high], "format_rate",
            "trace_score", "true_steps", "reward", "n"}}, shares in 0..1, and of a run with rewards
            of the user's own "own_rewards": {name: mean}. Optionally "paired":
            {name, such as "grpo_vs_sft": the fields of `statistics.PairedDifference`}. What is
            absent or no number shows as "-". "rollbacks": those of `records.rollbacks`; anything
            else there is left out.
    """
    stages = {k: stage for k, stage in summary["stages"].items() if isinstance(stage, Mapping)}
    own = list(dict.fromkeys(name for stage in stages.values() for name in _own_rewards(stage)))
    names = ["stage", "accuracy", "95 % interval", "format", "trace", "true steps", *own]
    rows = [[*names, "reward", "n"]]
    rows += [_stage_row(name, stage, own) for name, stage in stages.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for name, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    if isinstance(pairs := summary.get("paired"), Mapping) and pairs:
        lines += ["", "accuracy, same problems before and after:"]
        lines += [f"  {name}: {describe_pair(pair)}" for name, pair in pairs.items()]
    with suppress(ValueError):
        for each in rollbacks.of_rows(summary.get("rollbacks", [])):
            rate = f"with {each.rate_factor:g} times the learning rate"
            lines += ["", f"went back from step {each.at} to {each.to}, {rate}: {each.why}"]
    return "\n".join(lines)


def describe_pair(pair: Any) -> str:
    """The fields of a `statistics.PairedDifference` in words; "-" where they are none."""
    fields = pair if isinstance(pair, Mapping) else {}
    low, high = _interval(fields.get("ci95"))
    names = ("difference", "gained", "lost", "n", "p_value")
    if low is None or not all(is_number(fields.get(name)) for name in names):
        return "-"
    difference, gained, lost, n, p_value = (fields[name] for name in names)
    return (
        f"{100 * difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}); "
        f"{gained} problems gained, {lost} lost of {n}; exact McNemar p = {p_value:.2g}"
    )


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the up to window - 1 values before it; no value looks ahead."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _read_lines(path: Path) -> list[dict]:
    """The complete lines of metrics.jsonl; a run still writing may be within its last."""
    try:
        text = files.read_bytes(path).decode()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: is {path.parent} a run directory?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: not UTF-8; put back a copy, or delete it") from error
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            _ = values["stage"], operator.index(values["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number} is no metrics line; delete it") from error
        lines.append(values)
    return lines


def _series(lines: list[dict], name: str) -> tuple[list[int], np.ndarray]:
    """Steps and values of one metric, where it was measured."""
    measured = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in measured], np.array([value for _, value in measured], np.float64)


def _draw_metric(axes: Any, lines: list[dict], name: str, title: str, color: str) -> None:
    axes.set(title=title, xlabel=_step_label(lines), ylabel=name)
    steps, values = _series(lines, name)
    window = max(1, len(steps) // 20)
    if window == 1:
        axes.plot(steps, values, "o-", color=color, markersize=4, label="each step")
    else:
        axes.plot(steps, values, "o", color=color, markersize=2.5, alpha=0.35, label="each step")
        label = f"mean of the last {window} steps"
        axes.plot(steps, running_mean(values, window), color=color, linewidth=2, label=label)
    _finish(axes, measured=bool(steps))


def _draw_snapshots(axes: Any, lines: list[dict], name: str) -> None:
    """The snapshots of a few held-out problems, if there are any."""
    steps, values = _series(lines, name)
    if steps:
        label = "held-out problems, greedy"
        axes.plot(steps, values, "s-", color=ORANGE, markersize=5, linewidth=1, label=label)


def _draw_weights(axes: Any, lines: list[dict]) -> None:
    axes.set(title="Reward weights", xlabel=_step_label(lines), ylabel="weight")
    series = {name: _series(lines, f"weight/{name}") for name in WEIGHTS}
    for (name, (steps, values)), color in zip(series.items(), WEIGHT_COLORS, strict=True):
        if steps:
            axes.plot(steps, values, color=color, linewidth=2, marker=_marker(steps), label=name)
    _finish(axes, measured=any(steps for steps, _ in series.values()))


def _draw_difficulties(axes: Any, lines: list[dict]) -> None:
    """Where a curriculum goes. A step has few problems, so that single steps would say little."""
    series = {name: _series(lines, f"share/{name}") for name in PHASES}
    window = max(1, max(len(steps) for steps, _ in series.values()) // 20)
    of_steps = f", mean of the last {window} steps" if window > 1 else ""
    axes.set(title="Problems by difficulty", xlabel=_step_label(lines), ylabel=f"share{of_steps}")
    for (name, (steps, values)), color in zip(series.items(), (GREEN, BLUE, PURPLE), strict=True):
        style = {"color": color, "linewidth": 2, "marker": _marker(steps)}
        axes.plot(steps, running_mean(values, window), label=name, **style)
    axes.set_ylim(-0.05, 1.05)
    _finish(axes, measured=True)


def _draw_phase(axes: Any, lines: list[dict]) -> None:
    axes.set(title="Curriculum phase", xlabel=_step_label(lines), ylabel="phase")
    phases = {line["step"]: line["phase"] for line in lines if line.get("phase") is not None}
    names = list(dict.fromkeys([*PHASES, *phases.values()]))  # the known ones first, in order
    levels = [names.index(phase) for phase in phases.values()]
    style = {"drawstyle": "steps-post", "linewidth": 2, "marker": _marker(levels)}
    axes.plot(list(phases), levels, color=ORANGE, label="phase of the step's prompts", **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.3, len(names) - 0.7)
    _finish(axes, measured=bool(phases))


def _marker(steps: list) -> str | None:
    """A line through a single point has no length: it needs a dot to be seen."""
    return "o" if len(steps) == 1 else None


def _finish(axes: Any, *, measured: bool) -> None:
    """Legend, grid and whole steps; or a note in an empty panel."""
    if measured:
        axes.legend(loc="best", ncols=2, fontsize="small", framealpha=0.6)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        low, high = axes.get_xlim()
        if high - low < 1:  # a single step
            axes.set_xlim(low - 1, high + 1)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])


def _step_label(lines: list[dict]) -> str:
    return "SFT step" if lines and lines[0]["stage"] == "sft" else "GRPO step"


def _own_rewards(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    found = stage.get("own_rewards")
    return found if isinstance(found, Mapping) else {}


def _stage_row(name: str, stage: Mapping[str, Any], own: Sequence[str]) -> list[str]:
    low, high = _interval(stage.get("accuracy_ci95"))
    interval = "-" if low is None else f"{_percent(low)} to {_percent(high)}"
    n = stage.get("n")
    return [
        name,
        _percent(stage.get("accuracy")),
        interval,
        _percent(stage.get("format_rate")),
        _decimal(stage.get("trace_score")),
        _percent(stage.get("true_steps")),
        *(_decimal(_own_rewards(stage).get(each)) for each in own),
        _decimal(stage.get("reward")),
        str(n) if is_number(n) else "-",
    ]


def _interval(value: Any) -> tuple[Any, Any]:
    """Its two ends; None and None of what is none."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    return tuple(value) if is_pair else (None, None)


def _percent(share: Any) -> str:
    return f"{100 * share:.1f} %" if is_number(share) else "-"


def _decimal(value: Any) -> str:
    return f"{value:.3f}" if is_number(value) else "-"
