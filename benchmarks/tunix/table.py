"""JSON lines of the benchmarks here to a Markdown table and a bar chart. Measures nothing.

python -m benchmarks.tunix.table rows.jsonl [more.jsonl] [--chart tunix.png] [--page tunix.md]

A line of the table has a figure of both sides and Tunix's over ours, or ours over Tunix's where
more is better and the line says so; every row given is in it, those that Tunix wins too.
"""

import itertools
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import tyro
from matplotlib.figure import Figure
from tyro.conf import Positional

from benchmarks.timing import read_rows

SCALES = {"s": 1, "GB": 1e9, "TFLOP": 1e12}
MARKERS = "<!-- table -->", "<!-- /table -->"
STEP_SAME = "model dtype prompts generations prompt_length budget part"
STEP_GROUP = "{model}, {prompts} x {generations}, {prompt_length}+{budget}, "
STEP_LINES = {
    "{part}, wall": ("wall", "s"),
    "{part}, CPU time": ("cpu", "s"),
    "first {part}, compilation included, CPU time": ("first_cpu", "s"),
    "{part}, peak memory": ("peak", "GB"),
    "{part}, peak memory of the device": ("device_peak", "GB"),
}
FIT = "sequences that fit one pass of an update (remat {remat}, {theirs[remat]}), ours / Tunix"
# Benchmark -> in which its rows agree that stand against each other; the group of its lines; line
# -> key in a row and unit. Words in braces are of a row of ours, `theirs` is the one against it and
# `name` a program with its settings. Less is better, but where a line ends in "ours / Tunix".
COMPARED = {
    "tunix/cpu": (STEP_SAME, STEP_GROUP + "CPU", STEP_LINES),
    "tunix/cuda": (STEP_SAME, STEP_GROUP + "{device}", STEP_LINES),
    "tunix/v5e": (
        "model program sequences",
        "{model}, v5e compiler, a chip's share of {sequences} sequences",
        {
            "{name}: HBM of a step": ("step_bytes", "GB"),
            "{name}: collectives of a step": ("step_collectives", ""),
            "{name}: peak": ("peak", "GB"),
            "{name}: CPU time to compile": ("compile_cpu", "s"),
        },
    ),
    "tunix/largest": ("model", "{model}, v5e compiler, eight chips", {FIT: ("sequences", "")}),
    "tunix/flops": (
        "model case part",
        "{model}, a step of {sequences} sequences, counted",
        {"matmuls of the {part}, {case}": ("flops", "TFLOP")},
    ),
}
UPDATE = "update (ours {}remat full; Tunix fsdp 8 x tp 1, remat DECODER)"
ONE_PASS, IN_PACKS = UPDATE.format(""), UPDATE.format("in packs of 3072, ")
PICTURED = (  # lines of the table, each after its model
    "gemma3-nano, step, CPU time",
    "gemma3-nano, first step, compilation included, CPU time",
    "gemma3-270m, rollout, CPU time",
    "gemma3-270m, update, CPU time",
    "gemma3-270m, update, peak memory",
    "gemma3-1b, decode (ours tensor_parallel, Tunix weights replicated): HBM of a step",
    f"gemma3-1b, {ONE_PASS}: peak",
    f"gemma3-1b, {IN_PACKS}: CPU time to compile",
    "gemma3-1b, " + FIT.format(remat="full", theirs={"remat": "DECODER"}),
    "gemma3-1b, matmuls of the step, on 8 chips, short prompts, as preset",
)


class Line(NamedTuple):
    """One figure of both sides; `ratio` is above 1 where ours is the better."""

    group: str
    what: str
    ours: str
    tunix: str
    ratio: float


def main(
    files: Positional[tuple[Path, ...]], chart: Path | None = None, page: Path | None = None
) -> None:
    """Print the table of JSON lines; draw the lines of PICTURED into a PNG `chart`; write the table
    into a Markdown `page` that has it between <!-- table --> and <!-- /table -->."""
    rows = read_rows(*files)
    lines = lines_of(rows)
    said = "\n".join([*markdown(lines), "", *settings(rows)])
    print(said)
    if page:
        start, end = MARKERS
        before, _, rest = page.read_text().partition(start)
        page.write_text(f"{before}{start}\n{said}\n{end}{rest.partition(end)[2]}")
    if chart:
        draw(lines, chart)


def lines_of(rows: list[dict]) -> list[Line]:
    """The table's lines: each row of ours against each row of Tunix's that is of the same."""
    ours, lines = [], []
    for row in (row for row in rows if row["side"] == "ours"):
        ours.append(row)
        if row.get("program") == "decode":  # with us the prefill too
            ours.append(row | {"program": "prefill"})
    for own, other in itertools.product(ours, (row for row in rows if row["side"] == "tunix")):
        same, group, figures = COMPARED[own["benchmark"]]
        if any(own[key] != other.get(key) for key in ("benchmark", *same.split())):
            continue
        words = own | {"theirs": other, "name": ""}
        if "program" in own:
            words["name"] = f"{own['program']} ({setting(own)}{setting(other)})"
        for what, (key, unit) in figures.items():
            if key in own and key in other:
                named = group.format(**words), what.format(**words)
                lines.append(line_of(*named, own[key], other[key], unit))
    return lines


def setting(row: dict) -> str:
    """A program's settings, those of its side that matter to it."""
    if row["side"] == "tunix":
        mesh = "weights replicated" if row["replicated"] else f"fsdp {row['fsdp']} x tp {row['tp']}"
        return f"Tunix {mesh}" + ("" if row["remat"] == "NONE" else f", remat {row['remat']}")
    if row["program"] == "update":
        packed = f"in packs of {row['pack_tokens']}, " if row["pack_tokens"] else ""
        return f"ours {packed}remat {row['remat']}; "
    return "" if row["program"] == "logps" else f"ours {row['layout']}, "


def line_of(group: str, what: str, ours: float, theirs: float, unit: str) -> Line:
    """The figures with their unit, and their ratio."""
    show = lambda value: f"{value / SCALES[unit]:.3g} {unit}" if unit else str(value)
    better, worse = (ours, theirs) if what.endswith("ours / Tunix") else (theirs, ours)
    return Line(group, what, show(ours), show(theirs), better / worse if worse else math.inf)


def settings(rows: list[dict]) -> list[str]:
    """A table of each side's versions and settings, each once."""
    said = ["| side | versions and settings |", "|---|---|"]
    for row in rows:
        about = row.get("versions", {}) | row.get("settings", {})
        if about and "commit" in row and row["side"] == "ours":
            about |= {"commit": row["commit"]}
        if about:
            said.append(f"| {row['side']} | {', '.join(f'{k} {v}' for k, v in about.items())} |")
    return list(dict.fromkeys(said))


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
    found = {f"{line.group.split(',')[0]}, {line.what}": line for line in lines}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    for name in (name for name in PICTURED if name in found):
        label, line = textwrap.fill(name, 60), found[name]
        colour = "tab:blue" if line.ratio >= 1 else "tab:red"
        axes.barh(label, line.ratio - 1, left=1, color=colour, height=0.7)
        figures = f"{line.ratio:.2f}×   {line.ours} / {line.tunix}"
        axes.text(max(line.ratio, 1) * 1.05, label, figures, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set(xlim=(0.7, 36), xlabel="times better (log scale)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    figure.suptitle(
        "Beside Google's Tunix, with both figures, ours / Tunix; red where Tunix is better\n"
        "nano and 270M on CPU; 1B for a v5e-8, as its compiler says"
    )
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    tyro.cli(main)
