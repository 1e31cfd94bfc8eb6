"""JSON lines of the benchmarks here to a Markdown table and a bar chart. Measures nothing.

python -m benchmarks.tunix.table rows.jsonl [more.jsonl] [--chart tunix.png] [--page tunix.md]

A line of the table has a figure of both sides and Tunix's over ours, or ours over Tunix's where
more is better and the line says so; every row given is in it, those that Tunix wins too.
"""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from benchmarks.tunix.cases import FIGURES

SCALES = {"s": 1, "GB": 1e9, "TFLOP": 1e12}
MARKERS = "<!-- table -->", "<!-- /table -->"

_DECODE = "decode (ours tensor_parallel, Tunix weights replicated)"
_UPDATE = "update (ours packed to the trace, remat full; Tunix fsdp 8 x tp 1, remat DECODER)"
_FIT = "sequences that fit an update (remat full, DECODER), ours / Tunix"
_COUNTED = "matmuls of the step, on 8 chips, short prompts, remat"
# What the picture shows, of the table's lines: (model and where) -> label -> line.
PICTURED = {
    ("gemma3-nano", "on CPU"): {
        "step, CPU time": "step, CPU time",
        "first step, with compilation": "first step, compilation included, CPU time",
    },
    ("gemma3-270m", "on CPU"): {
        line: line for line in ("rollout, CPU time", "update, CPU time", "update, peak memory")
    },
    ("gemma3-1b", "for v5e-8, by the compiler"): {
        "HBM bytes of a decode step": f"{_DECODE}: HBM of a step",
        "update, peak memory of a chip": f"{_UPDATE}: peak",
        "update, CPU time to compile": f"{_UPDATE}: CPU time to compile",
        "sequences that fit an update": _FIT,
        "matmuls of a step, short prompts": _COUNTED,
    },
}


@dataclass(frozen=True)
class Line:
    """One figure of both sides; `ratio` is above 1 where ours is the better."""

    group: str
    what: str
    ours: str
    tunix: str
    ratio: float


def main(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    chart: Path | None = None,
    page: Path | None = None,
) -> None:
    """Print the table; draw the chart; write the table into a page.

    Args:
        files: JSON lines of the benchmarks.
        chart: PNG to write: the rows of PICTURED.
        page: Markdown file that has the table between <!-- table --> and <!-- /table -->.
    """
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    lines = lines_of(rows)
    said = "\n".join([*markdown(lines), "", *settings(rows)])
    print(said)
    if page:
        start, end = MARKERS
        text = page.read_text()
        before, after = text.split(start)[0], text.split(end)[1]
        page.write_text(f"{before}{start}\n{said}\n{end}{after}")
    if chart:
        draw(lines, chart)


def lines_of(rows: list[dict]) -> list[Line]:
    """The table's lines: each row of ours against each row of Tunix's that is of the same."""
    ours = [row for row in rows if row["side"] == "ours"]
    lines = []
    for own in itertools.chain.from_iterable(map(standing_for, ours)):
        compared = FIGURES[own["benchmark"]]
        for other in (row for row in rows if row["side"] == "tunix"):
            if any(own[key] != other.get(key) for key in ("benchmark", *compared.same)):
                continue
            words = {"own": own, "other": other}
            if own["benchmark"] == "tunix/v5e":
                words["name"] = f"{own['program']} ({setting(own)}{setting(other)})"
            for what, (key, unit) in compared.figures.items():
                if key in own and key in other:
                    named = compared.group.format(**words), what.format(**words)
                    lines.append(line_of(*named, own[key], other[key], unit))
    return lines


def standing_for(own: dict) -> list[dict]:
    """A row of ours, twice where it is of our decoding: that has its prefill in it."""
    is_both = own["benchmark"] == "tunix/v5e" and own["program"] == "decode"
    return [own, own | {"program": "prefill"}] if is_both else [own]


def setting(row: dict) -> str:
    """A program's settings, those of its side that matter to it."""
    if row["side"] == "tunix":
        mesh = "weights replicated" if row["replicated"] else f"fsdp {row['fsdp']} x tp {row['tp']}"
        return f"Tunix {mesh}" + ("" if row["remat"] == "NONE" else f", remat {row['remat']}")
    if row["program"] == "update":
        packed = "packed to the trace, " if row["pack_tokens"] else ""
        return f"ours {packed}remat {row['remat']}; "
    return "" if row["program"] == "logps" else f"ours {row['layout']}, "


def line_of(group: str, what: str, ours: float, theirs: float, unit: str) -> Line:
    """The figures with their unit, and their ratio."""
    show = lambda value: f"{value / SCALES[unit]:.3g} {unit}" if unit else str(value)
    better, worse = (theirs, ours) if not what.endswith("ours / Tunix") else (ours, theirs)
    return Line(group, what, show(ours), show(theirs), better / worse if worse else math.inf)


def settings(rows: list[dict]) -> list[str]:
    """A table of each side's versions and settings, each once."""
    said = {}
    for row in rows:
        about = row.get("versions", {}) | row.get("settings", {})
        if about and "commit" in row and row["side"] == "ours":
            about |= {"commit": row["commit"]}
        if about:
            said[f"| {row['side']} | {', '.join(f'{k} {v}' for k, v in about.items())} |"] = None
    return ["| side | versions and settings |", "|---|---|", *said]


def markdown(lines: list[Line]) -> list[str]:
    """The table."""
    text = ["| | ours | Tunix | Tunix / ours |", "|---|---|---|---|"]
    for group, of_group in itertools.groupby(lines, key=lambda line: line.group):
        text.append(f"| **{group}** | | | |")
        for line in of_group:
            ratio = "none against some" if line.ratio == math.inf else f"{line.ratio:.2f}"
            text.append(f"| {line.what} | {line.ours} | {line.tunix} | {ratio} |")
    return text


def draw(lines: list[Line], path: Path) -> None:
    """Bars of the ratios of PICTURED, on a log scale; red where Tunix's figure is the better."""
    found = {(line.group.split(",")[0], line.what): line for line in lines}
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    names, places, place = [], [], 0.0
    for (model, where), rows in PICTURED.items():
        names.append(rf"$\bf{{{model}}}$ {where}")
        places.append(place)
        for label, what in rows.items():
            if not (line := found.get((model, what))):
                continue
            place += 1
            names.append(label)
            places.append(place)
            colour = "tab:blue" if line.ratio >= 1 else "tab:red"
            axes.barh(place, line.ratio - 1, left=1, color=colour, height=0.7)
            figures = f"{line.ratio:.2f}×   {line.ours} / {line.tunix}"
            axes.text(max(line.ratio, 1) * 1.05, place, figures, va="center", fontsize=9)
        place += 1.4
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(place - 0.6, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 24)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times better (log scale); labels: ours / Tunix; red: Tunix is better")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Beside Google's Tunix: how many times better ours is, with both figures")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    tyro.cli(main)
