"""Each op of `kernels/` against plain XLA, head included: timed, or compiled for a TPU.

python -m benchmarks.kernels [--op fused_sampling] [--size 270m]     timed on the device present
python -m benchmarks.kernels --topology v5e:2x4 [--rows 64]          the TPU compiler's schedule

A row an op and setting. Timed, the two sides take turns (ABAB). Compiled, each is a program for one
chip of the topology; `tpu_schedule.py` says how its bytes and ms are read, and `hbm_mb` whose count
of them it is. `ratio` is plain over ours. Sizes of 16 rows and 512 tokens, or with a topology those
of the ops' `cases.py`.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from benchmarks import kernels_chart
from benchmarks.kernel_sides import OPS, SIDES, Shapes, lowered, sides_of
from benchmarks.search_trips import search_trips
from benchmarks.timing import print_row
from benchmarks.tpu_schedule import Schedule, schedule
from gemma_grpo.errors import UserError
from gemma_grpo.kernels.fused_sampling import cases as sampling_cases
from gemma_grpo.kernels.lm_head_logps import cases as logps_cases
from gemma_grpo.kernels.truncated_sampling.cases import TRUNCATIONS
from gemma_grpo.model import CONFIGS
from gemma_grpo.planning import chips
from gemma_grpo.planning import topology as topologies

SAMPLING = {"nano": sampling_cases.NANO, "270m": sampling_cases.GEMMA3_270M}
SAMPLING["1b"] = sampling_cases.GEMMA3_1B
LOGPS = {"nano": logps_cases.NANO, "270m": logps_cases.GEMMA3_270M, "1b": logps_cases.GEMMA3_1B}


@dataclass(frozen=True)
class Options:
    """What is compared, and where."""

    op: Literal["all", "fused_sampling", "truncated_sampling", "lm_head_logps"] = "all"
    """Which, or all."""
    topology: str = ""
    """Compile for one chip of it, such as v5e:2x4, in place of timing."""
    size: Literal["nano", "270m", "1b"] | None = None
    """Of the model whose head is taken; 270m, or 1b with a topology."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of hidden states and embedding; float32, or bfloat16 with a topology."""
    rows: tuple[int, ...] = ()
    """Of a decode step; one or more."""
    tokens: int = 0
    """Of the log-probs."""
    repeats: int = 5
    """Timed calls of each side, after one that warms up."""
    json: bool = False
    """Print the JSON lines only, without the table behind them."""
    chart: Path | None = None
    """Draw the rows' times into this PNG."""


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Compare the ops with what they replace."""
    topology = options.topology
    size = options.size or ("1b" if topology else "270m")
    dtype = options.dtype or ("bfloat16" if topology else "float32")
    rows = options.rows or (SAMPLING[size].rows if topology else (16,))
    tokens = options.tokens or (LOGPS[size].num_tokens if topology else 512)
    config = CONFIGS[f"gemma3-{size}"]
    made = []
    for name in OPS if options.op == "all" else (options.op,):
        for count in (tokens,) if name == "lm_head_logps" else rows:
            shapes = Shapes(config.vocab_size, config.embed_dim, count, dtype)
            if topology:
                measured = compiled(name, shapes, topology)
            else:
                measured = timed(name, shapes, options.repeats)
            for row in measured:
                row = dict(op=name, size=size, rows=count) | row
                sizes = dict(vocab_size=config.vocab_size, embed_dim=config.embed_dim)
                print_row(benchmark="kernels", dtype=dtype, **sizes, **row)
                made.append(row)
    if not options.json:
        print(table(made))
    if options.chart is not None:
        kernels_chart.draw(made, options.chart, title=_title(topology))


def timed(op: str, shapes: Shapes, repeats: int) -> Iterator[dict]:
    """Median wall clock on the device present, and the compiler's temporaries."""
    V, D, X, dtype = shapes
    keys = jax.random.split(jax.random.key(0), 3)
    embedding_VD = (3 * D**-0.5 * jax.random.normal(keys[0], (V, D))).astype(dtype)
    others = jax.random.split(keys[2], X)
    if op == "lm_head_logps":
        others = jax.random.randint(keys[2], (X,), 0, V)
    arguments = jax.random.normal(keys[1], (X, D), dtype), embedding_VD, others
    for setting, sides in sides_of(op).items():
        programs = [jax.jit(side).lower(*arguments).compile() for side in sides]
        temporaries = [side.memory_analysis().temp_size_in_bytes for side in programs]
        yield _row(setting, interleaved_medians(programs, arguments, repeats), temporaries)


def compiled(op: str, shapes: Shapes, topology: str) -> Iterator[dict]:
    """The TPU compiler's schedule, traffic and memory."""
    chip = chips.chip_of(topology, topologies.devices(topology))
    for setting in sides_of(op):
        trips = []
        if op == "truncated_sampling":
            trips = search_trips(_logits(shapes), TRUNCATIONS[setting])
        read = [
            schedule(lowered, (op, setting, side, shapes, topology), chip, trips=own)
            for side, own in zip(SIDES, (trips, ()), strict=True)
        ]
        if None in read:
            side = SIDES[read.index(None)]
            raise UserError(f"{op}, {setting}, {side}: the TPU's compiler died of its own dump")
        row = _row(setting, [r.seconds for r in read], [r.temporaries for r in read])
        yield row | dict(
            hbm_mb=_each(read, _megabytes),
            peak_mb=_each(read, lambda r: round(r.peak / 1e6, 1)),
            matrix_unit_percent=_each(read, lambda r: round(100 * r.products, 1)),
            longest_ms=_each(read, lambda r: {name: round(s * 1e3, 3) for name, s in r.ops[:4]}),
            search_trips=trips,
            topology=topology,
            libtpu=metadata.version("libtpu"),
        )


def interleaved_medians(
    sides: list[Callable[..., Any]], arguments: tuple[Any, ...], repeats: int
) -> list[float]:
    """Median wall-clock seconds of each, taken in turns."""
    seconds = [[] for _ in sides]
    for _ in range(1 + repeats):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(side(*arguments))
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in seconds]


def table(rows: list[dict]) -> str:
    """The rows in Markdown, ours / plain."""
    columns = ["op", "setting", "rows", "ms", "ratio", "temporaries, MB", "HBM, MB", "% of peak"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        hbm = {side: sum(counts.values()) for side, counts in row.get("hbm_mb", {}).items()}
        both = [row["ms"], row["temporaries_mb"], hbm, row.get("matrix_unit_percent", {})]
        ms, *rest = (" / ".join(f"{value:.4g}" for value in pair.values()) for pair in both)
        lines.append([row["op"], row["setting"], str(row["rows"]), ms, str(row["ratio"]), *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(setting: str, seconds: list[float], temporaries: list[int]) -> dict:
    return dict(
        setting=setting,
        ms=_each(seconds, lambda s: round(s * 1e3, 4)),
        ratio=round(seconds[1] / seconds[0], 2),
        temporaries_mb=_each(temporaries, lambda size: round(size / 1e6, 1)),
    )


def _each(values: list[Any], of: Callable[[Any], Any]) -> dict[str, Any]:
    return {side: of(value) for side, value in zip(SIDES, values, strict=True)}


def _megabytes(read: Schedule) -> dict[str, float]:
    counts = {"layouts": read.hbm_by_layout, "cost_estimate": read.hbm_by_cost_estimate}
    return {how: round(size / 1e6, 1) for how, size in counts.items() if size}


def _logits(shapes: Shapes) -> np.ndarray:
    """Normal with deviation 3, from matmuls: `random.normal` in float32 has ties far out."""
    rng, terms = np.random.default_rng(0), 64
    hidden, embedding = (
        rng.normal(size=(count, terms)).astype(np.float32)
        for count in (shapes.rows, shapes.vocab_size)
    )
    return hidden @ embedding.T * np.float32(3 / terms**0.5)


def _title(topology: str) -> str:
    if topology:
        return f"One chip of {topology}, by the TPU compiler's schedule (nothing was run on it)"
    return f"Median wall clock on {jax.devices()[0].device_kind}"


if __name__ == "__main__":
    tyro.cli(main)
