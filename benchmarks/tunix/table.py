"""JSON lines of the benchmarks here to a Markdown table and a bar chart. Measures nothing.

python -m benchmarks.tunix.table rows.jsonl [more.jsonl] [--chart tunix.png] [--page tunix.md]

A line of the table has a figure of both sides and Tunix's over ours, or ours over Tunix's where
more is better and the line says so; every row given is in it, those that Tunix wins too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

GB, TERA = 1e9, 1e12
FIRST = "first step, compilation included, CPU time"
LARGEST = "sequences that fit an update (remat full, DECODER), ours / Tunix"
LAYOUT = "tensor_parallel"  # called hybrid in rows before 2026-11-26
MARKERS = "<!-- table -->", "<!-- /table -->"


STEP = "4 x 8, 128+128, CPU"
CHIP = "gemma3-1b, v5e compiler, a chip's share of 64 sequences"
DECODE = "decode (ours tensor_parallel, Tunix weights replicated)"
UPDATE = "update (ours remat full; Tunix fsdp 8 x tp 1, remat DECODER)"
COUNTED = "gemma3-1b, a step of 64 sequences, counted"
# What the picture shows, of the table's lines: title -> label and line.
PICTURED = {
    "nano on CPU": (
        ("step, CPU time", (f"gemma3-nano, {STEP}", "step, CPU time")),
        ("first step, with compilation", (f"gemma3-nano, {STEP}", FIRST)),
    ),
    "270M on CPU": (
        ("rollout, CPU time", (f"gemma3-270m, {STEP}", "rollout, CPU time")),
        ("update, CPU time", (f"gemma3-270m, {STEP}", "update, CPU time")),
        ("update, peak memory", (f"gemma3-270m, {STEP}", "update, peak memory")),
    ),
    "1B for v5e-8, by the compiler": (
        ("HBM bytes of a decode step", (CHIP, f"{DECODE}: HBM of a step")),
        ("update, peak memory of a chip", (CHIP, f"{UPDATE}: peak")),
        ("update, CPU time to compile", (CHIP, f"{UPDATE}: CPU time to compile")),
        ("sequences that fit an update", ("gemma3-1b, v5e compiler, eight chips", LARGEST)),
        ("matmuls of a step", (COUNTED, "matmuls of the step, on 8 chips, remat")),
    ),
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
    about = [f"| {setting.replace(': ', ' | ', 1)} |" for setting in settings(rows)]
    said = "\n".join([markdown(lines), "", "| side | versions and settings |", "|---|---|", *about])
    print(said)
    if page:
        text = page.read_text()
        before, after = text.split(MARKERS[0])[0], text.split(MARKERS[1])[1]
        page.write_text(f"{before}{MARKERS[0]}\n{said}\n{MARKERS[1]}{after}")
    if chart:
        draw(lines, chart)


def lines_of(rows: list[dict]) -> list[Line]:
    """The table's lines."""
    return step_lines(rows) + v5e_lines(rows) + largest_lines(rows) + flops_lines(rows)


def step_lines(rows: list[dict]) -> list[Line]:
    """Wall and CPU seconds of each part, peaks, first steps."""
    found = [row for row in rows if row["benchmark"] in ("tunix/cpu", "tunix/cuda")]
    runs: dict[tuple, dict] = {}
    for row in found:
        shape = f"{row['prompts']} x {row['generations']}, {row['prompt_length']}+{row['budget']}"
        device = "CPU" if row["benchmark"] == "tunix/cpu" else row["device"]
        group = f"{row['model']}, {shape}, {device}"
        runs.setdefault((group, row["part"]), {})[row["side"]] = row
    lines = []
    for (group, part), sides in runs.items():
        ours, theirs = sides["ours"], sides["tunix"]
        for key, what, unit in (
            ("wall", f"{part}, wall", "s"),
            ("cpu", f"{part}, CPU time", "s"),
            ("first_cpu", f"first {part}, compilation included, CPU time", "s"),
            ("peak", f"{part}, peak memory", "GB"),
            ("device_peak", f"{part}, peak memory of the device", "GB"),
        ):
            if key in ours:
                scale = GB if unit == "GB" else 1
                lines.append(_line(group, what, ours[key] / scale, theirs[key] / scale, unit))
    return lines


def v5e_lines(rows: list[dict]) -> list[Line]:
    """Each of our cases against each of Tunix's of the same program. Our rollout is one program,
    which stands against Tunix's prefill and its decode loop, each for itself."""
    found = [row for row in rows if row["benchmark"] == "tunix/v5e" and row["fits"]]
    ours = [row for row in found if row["side"] == "ours"]
    theirs = [row for row in found if row["side"] == "tunix"]
    lines = []
    for own in ours:
        programs = ("decode", "prefill") if own["program"] == "decode" else (own["program"],)
        for row in (row for row in theirs if row["program"] in programs):
            mesh = f"fsdp {row['fsdp']} x tp {row['tp']}"
            mesh = "weights replicated" if row["replicated"] else mesh
            mesh += "" if row["remat"].upper() == "NONE" else f", remat {row['remat']}"
            mesh += "" if row["sequences"] == own["sequences"] else f", {row['sequences']} rows"
            layout = (
                f"ours {own['layout'].replace('hybrid', LAYOUT)}, "
                if own["program"] == "decode"
                else ""
            )
            if own["program"] == "update":
                packed = "packed to the trace, " if own.get("packed") else ""
                layout = f"ours {packed}remat {own['remat']}; "
            group = f"{row['model']}, v5e compiler, a chip's share of {own['sequences']} sequences"
            name = f"{row['program']} ({layout}Tunix {mesh})"
            lines += _compiled_lines(group, name, own, row)
    return lines


def _compiled_lines(group: str, name: str, own: dict, row: dict) -> list[Line]:
    lines = []
    if "step_bytes" in row:
        own_bytes, their_bytes = own["step_bytes"] / GB, row["step_bytes"] / GB
        lines.append(_line(group, f"{name}: HBM of a step", own_bytes, their_bytes, "GB"))
        counts = own["step_collectives"], row["step_collectives"]
        ratio = counts[1] / counts[0] if counts[0] else float("inf")
        lines.append(Line(group, f"{name}: collectives of a step", *map(str, counts), ratio))
    lines.append(_line(group, f"{name}: peak", own["peak"] / GB, row["peak"] / GB, "GB"))
    seconds = own["compile_cpu"], row["compile_cpu"]
    lines.append(_line(group, f"{name}: CPU time to compile", *seconds, "s"))
    return lines


def largest_lines(rows: list[dict]) -> list[Line]:
    """The largest batch of each of our cases against each of Tunix's."""
    found = [row for row in rows if row["benchmark"] == "tunix/largest"]
    return [
        Line(
            f"{own['model']}, v5e compiler, eight chips",
            f"sequences that fit an update (remat {own['remat']}, {row['remat']}), ours / Tunix",
            str(own["sequences"]),
            str(row["sequences"]),
            own["sequences"] / row["sequences"],
        )
        for own in found
        if own["side"] == "ours"
        for row in found
        if row["side"] == "tunix"
    ]


def flops_lines(rows: list[dict]) -> list[Line]:
    """Matmuls of a step."""
    return [
        _line(
            f"{row['model']}, a step of {row['sequences']} sequences, counted",
            f"matmuls of the {row['part']}, {row['case'].replace('hybrid', LAYOUT)}",
            row["ours"] / TERA,
            row["tunix"] / TERA,
            "TFLOP",
        )
        for row in rows
        if row["benchmark"] == "tunix/flops"
    ]


def _line(group: str, what: str, ours: float, theirs: float, unit: str) -> Line:
    shown = (f"{value:.3g} {unit}" for value in (ours, theirs))
    return Line(group, what, *shown, theirs / ours)


def settings(rows: list[dict]) -> list[str]:
    """Versions and settings of each side, each once."""
    said = {}
    for row in rows:
        about = row.get("versions", {}) | row.get("settings", {})
        if about:
            said[f"{row['side']}: " + ", ".join(f"{k} {v}" for k, v in about.items())] = None
    return list(said)


def markdown(lines: list[Line]) -> str:
    """The table."""
    text = ["| | ours | Tunix | Tunix / ours |", "|---|---|---|---|"]
    group = None
    for line in lines:
        if line.group != group:
            group = line.group
            text.append(f"| **{group}** | | | |")
        ratio = "none against some" if line.ratio == float("inf") else f"{line.ratio:.2f}"
        text.append(f"| {line.what} | {line.ours} | {line.tunix} | {ratio} |")
    return "\n".join(text)


def draw(lines: list[Line], path: Path) -> None:
    """Bars of the ratios of PICTURED, on a log scale; red where Tunix's figure is the better."""
    found = {(line.group, line.what): line for line in lines}
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    places, names, place = [], [], 0.0
    for title, rows in PICTURED.items():
        shown = [(label, found[key]) for label, key in rows if key in found]
        if not shown:
            continue
        axes.text(
            -0.01,
            place,
            title,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            weight="bold",
        )
        for label, line in shown:
            place += 1
            colour = "tab:blue" if line.ratio >= 1 else "tab:red"
            axes.barh(place, line.ratio - 1, left=1, color=colour, height=0.7)
            figures = f"{line.ratio:.2f}×   {line.ours} / {line.tunix}"
            end = max(line.ratio, 1.0) * 1.05
            axes.text(end, place, figures, va="center", fontsize=9)
            places.append(place)
            names.append(label)
        place += 1.4
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(place - 0.6, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 24)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times better (log scale); labels: ours / Tunix; red: Tunix is better")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle("Beside Google's Tunix: how many times better ours is, with both figures")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    tyro.cli(main)
