"""GRPO's settings on nano, one at a time: a JSON line for each row, and the table of the rows.

    python -m benchmarks.study rows WORK [--seeds 0 1 2] [--steps 100] [--levels "beta 0.04"]
    python -m benchmarks.study table WORK/rows.jsonl

A row is GRPO at one level of one factor, from the SFT of its seed, which all levels share: it is
trained once, in WORK/sft-SEED. Rows that WORK/rows.jsonl has already are not run again. In a row
`right` says of each held-out problem whether the greedy answer is right; `cpu` is the seconds of a
step, of all threads, the median; `mixed` and `skipped` are the shares of groups with right and with
wrong completions, and of problems passed over; `curve` is the share of right samples in training,
over each tenth of the steps; `snapshots` has pairs of a step and the greedy accuracy after it, if
any were taken.
"""

import json
import multiprocessing
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional

from benchmarks.timing import about, chosen, read_rows, rounded
from gemma_grpo.evaluation.statistics import paired_difference
from gemma_grpo.presets import GEMMA3_NANO

ROWS, SNAPSHOT = "rows.jsonl", "evaluation/accuracy"
WEIGHTS = [
    f"reward.{end}.{name}"
    for end in ("start", "end")
    for name in ("trace", "confidence", "verbosity", "format")
]
FEW = {"data.num_train": 60, "grpo.curriculum": "none"}  # each is drawn often
PLAIN = {  # what levels change, not nano's own
    "grpo.scale": "group",
    "grpo.temperature": 1.0,
    "grpo.prompts_per_step": 4,
    "grpo.num_generations": 8,
}
RIGHT_ALONE = dict.fromkeys(WEIGHTS, 0.0)


@dataclass(frozen=True)
class Level:
    """Settings of a row beside nano's and `PLAIN`, and the level that it is compared with."""

    settings: dict[str, Any]
    beside: str = "default"


def adapters(rank: int, rate: float) -> Level:
    """All else as it is: alpha is 2 * rank, so that the rank does not change their scale."""
    sizes = {"model.lora.rank": rank, "model.lora.alpha": 2.0 * rank}
    return Level(sizes | {"grpo.optimizer.learning_rate": rate})


LEVELS = {
    "default": Level({}),
    "rate 1e-4": Level({"grpo.optimizer.learning_rate": 1e-4}),
    "rate 2e-4": Level({"grpo.optimizer.learning_rate": 2e-4}),
    "rate 4e-4": Level({"grpo.optimizer.learning_rate": 4e-4}),
    "rate 1e-3": Level({"grpo.optimizer.learning_rate": 1e-3}),
    "scale batch": Level({"grpo.scale": "batch"}),
    "temperature 1.2": Level({"grpo.temperature": 1.2}),
    "temperature 1.2, scale batch": Level({"grpo.temperature": 1.2, "grpo.scale": "batch"}),
    "scale none": Level({"grpo.scale": "none"}),
    "right alone, scale group": Level(RIGHT_ALONE),
    "right alone, scale mean": Level(
        RIGHT_ALONE | {"grpo.scale": "mean"}, "right alone, scale group"
    ),
    "beta 0.04": Level({"grpo.loss.beta": 0.04}),
    "no curriculum": Level({"grpo.curriculum": "none"}),
    "by phases": Level({"grpo.curriculum": "phases"}),
    "60 problems": Level(FEW),
    "60 problems, skip 0.5": Level(FEW | {"grpo.skip_uniform": 0.5}, "60 problems"),
    "8 prompts x 4": Level({"grpo.prompts_per_step": 8, "grpo.num_generations": 4}),
    "2 prompts x 16": Level({"grpo.prompts_per_step": 2, "grpo.num_generations": 16}),
    "rank 16, rate 1e-4": adapters(16, 1e-4),
    "rank 16, rate 1e-3": adapters(16, 1e-3),
    "rank 16, rate 3e-3": adapters(16, 3e-3),
    "rank 4, rate 1e-3": adapters(4, 1e-3),
    "two updates": Level({"grpo.num_iterations": 2}),
    "two updates, epsilon_high 0.2": Level(
        {"grpo.num_iterations": 2, "grpo.loss.epsilon_high": 0.2}, "two updates"
    ),
    "two updates, epsilon_high 0.5": Level(
        {"grpo.num_iterations": 2, "grpo.loss.epsilon_high": 0.5}, "two updates"
    ),
}


@dataclass
class Clock:
    """CPU seconds of this process at the end of each step, and the steps' metrics."""

    cpu: list[float] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)

    def note(self, metrics: dict) -> None:
        """A step is through."""
        self.cpu.append(time.process_time())
        self.steps.append(metrics)

    def snapshots(self) -> list[tuple[int, float]]:
        """Steps after which one was taken, and its accuracy."""
        of_steps = enumerate(self.steps, start=1)
        return [(n, metrics[SNAPSHOT]) for n, metrics in of_steps if SNAPSHOT in metrics]

    def seconds_a_step(self) -> float:
        """The median, without the first step, which compiles, and those that took a snapshot."""
        each = zip(np.diff(self.cpu), self.steps[1:], strict=True)
        return statistics.median(s for s, metrics in each if SNAPSHOT not in metrics)


def rows(
    work: Positional[Path],
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 100,
    levels: tuple[str, ...] = tuple(LEVELS),
) -> None:
    """Runs what WORK/rows.jsonl lacks, all levels of a seed before the next seed.

    Args:
        work: a folder for runs and rows.
        seeds: of SFT, problems and sampling.
        steps: of GRPO.
        levels: names in `LEVELS`.
    """
    out = work / ROWS
    out.parent.mkdir(parents=True, exist_ok=True)
    known = read_rows(out) if out.exists() else []
    done = [(row["level"], row["seed"], row["settings"]) for row in known]
    for seed in seeds:
        for name, level in chosen(levels, LEVELS).items():
            settings = level.settings | {"grpo.num_steps": steps}
            if (name, seed, settings) not in done:
                row = {"benchmark": "study", "level": name, "steps": steps}
                row |= in_child(work, seed, settings, name.replace(" ", "-"))
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def in_child(work: Path, seed: int, settings: dict[str, Any], name: str) -> dict:
    """`one` in a process of its own: devices, caches and memory are those of one run."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(one, work.absolute(), seed, settings, name).result()


def one(work: Path, seed: int, settings: dict[str, Any], name: str) -> dict:
    """GRPO by the settings from the SFT of that seed, in WORK/NAME-SEED, which is removed again."""
    from gemma_grpo import pipeline
    from gemma_grpo.records.metrics import MetricsWriter

    model = sft_model(work, seed)
    run = GEMMA3_NANO.replace({"seed": seed, "stages": "grpo", "model.weights": str(model)})
    run, run_dir = run.replace(PLAIN | settings), work / f"{name}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    start(run, work)
    pipeline.new_run_dir(run_dir, run)
    shutil.copytree(model.parent / "measured", run_dir / "evaluations")
    clock, write = Clock(), MetricsWriter.write

    def note(writer: MetricsWriter, stage: str, step: int, metrics: dict) -> None:
        clock.note(metrics)
        write(writer, stage, step, metrics)

    MetricsWriter.write = note  # type: ignore[method-assign]
    summary = pipeline.execute(run, run_dir, quiet=True)
    measured = summary["stages"]["grpo"]
    correct = [metrics["reward/correctness"] for metrics in clock.steps]
    row = {
        **about(run),
        "model": "gemma3-nano",
        "settings": settings,
        "versions": summary["versions"],
        "sft": rounded(summary["stages"]["base"]),
        "grpo": rounded(measured),
        "over_sft": summary["paired"]["grpo_vs_base"],
        "right": right(run_dir / "evaluations" / "grpo.jsonl"),
        "cpu": round(clock.seconds_a_step(), 3),
        "mixed": mean_of(clock.steps, "mixed_groups") / run.grpo.prompts_per_step,
        "skipped": mean_of(clock.steps, "skipped_problems") / run.grpo.prompts_per_step,
        "curve": [round(float(np.mean(part)), 3) for part in np.array_split(correct, 10)],
        "snapshots": clock.snapshots(),
    }
    shutil.rmtree(run_dir)
    return row


def mean_of(steps: list[dict], metric: str) -> float:
    """Over all steps."""
    return float(np.mean([metrics[metric] for metrics in steps]))


def sft_model(work: Path, seed: int) -> Path:
    """The folder of that seed's model after SFT, made if it is not there; beside it, in `measured`,
    its evaluation, as that of the base of a run from it."""
    from gemma_grpo import api, pipeline

    folder = work / f"sft-{seed}"
    if (folder / "model").is_dir():
        return folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    run = GEMMA3_NANO.replace({"seed": seed, "stages": "sft"})
    start(run, work)
    pipeline.new_run_dir(folder / "run", run)
    pipeline.execute(run, folder / "run", quiet=True)
    (folder / "measured").mkdir()
    for path in (folder / "run" / "evaluations").glob("sft.*"):
        shutil.copy(path, folder / "measured" / f"base{path.suffix}")
    api.load(folder / "run").export(folder / "model")
    return folder / "model"


def start(run: Any, work: Path) -> None:
    """As `train` starts JAX."""
    from gemma_grpo import cli

    cli.split_cpu(run.model.cpu_devices, *run.batch_sizes.values())
    cli.use_compilation_cache(work / "run")


def right(path: Path) -> str:
    """1 for each problem whose greedy answer is right, else 0."""
    rows = [row for row in read_rows(path) if row["greedy"]]
    greedy = sorted(rows, key=lambda row: row["problem"])
    return "".join(str(int(row["correctness"] > 0)) for row in greedy)


def table(path: Positional[Path]) -> None:
    """Prints a Markdown table: means over seeds, and the difference from the level that each is
    compared with, on the same problems from the same SFT."""
    found: dict[str, dict[int, dict]] = {}
    for row in read_rows(path):
        found.setdefault(row["level"], {})[row["seed"]] = row
    print("| level | seeds | greedy | sampled | against | greedy, points | sampled, points | cpu |")
    print("|---|---|---|---|---|---|---|---|")
    for name, by_seed in found.items():
        own = list(by_seed.values())
        mean = lambda key, own=own: 100 * float(np.mean([row["grpo"][key] for row in own]))
        beside = LEVELS[name].beside if name in LEVELS else "default"
        others, differences = found.get(beside, {}), ("", "", "")
        if seeds := sorted(by_seed.keys() & others.keys()) if beside != name else []:
            differences = beside, *compared(by_seed, others, seeds)
        cells = [name, len(own), f"{mean('accuracy'):.1f} %", f"{mean('pass_at_1'):.1f} %"]
        cells += [*differences, f"{np.median([row['cpu'] for row in own]):.2f} s"]
        print(f"| {' | '.join(map(str, cells))} |")


def compared(by_seed: dict, others: dict, seeds: list[int]) -> tuple[str, str]:
    """The greedy difference, with its interval over problems of all seeds together; that of
    samples, and its range over seeds."""
    bits = lambda rows: np.array([bit == "1" for seed in seeds for bit in rows[seed]["right"]])
    greedy = paired_difference(bits(others), bits(by_seed))
    low, high = greedy.ci95
    of_samples = lambda row: 100 * row["grpo"]["pass_at_1"]
    each = [of_samples(by_seed[seed]) - of_samples(others[seed]) for seed in seeds]
    return (
        f"{100 * greedy.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{np.mean(each):+.1f} ({min(each):+.1f} to {max(each):+.1f})",
    )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"rows": rows, "table": table})
