"""The rows of `benchmarks.kernels` as a bar chart."""

from collections.abc import Sequence
from pathlib import Path

BLUE, GREY = "#2458a6", "#b5b5b5"


def draw(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """A pair of bars a row, milliseconds on a logarithmic axis, written as PNG."""
    # Figure by itself: no pyplot, so no global state and no display to look for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(rows)))
    for side, offset, color in (("ours", -0.2, BLUE), ("plain", 0.2, GREY)):
        ms = [row["ms"][side] for row in rows]
        name = {"ours": "kernels/", "plain": "plain XLA"}[side]
        bars = axes.barh([p + offset for p in places], ms, 0.4, color=color, label=name)
        axes.bar_label(bars, [f"{value:.3g} ms" for value in ms], padding=3, fontsize=8)
    names = [
        f"{row['op']}, {row['setting']}\n{row['rows']} rows, {row['ratio']:.3g} times as fast"
        for row in rows
    ]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=2.5 * max(max(row["ms"].values()) for row in rows))
    axes.set_xlabel("milliseconds, logarithmic")
    axes.set_title(title)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=100)
