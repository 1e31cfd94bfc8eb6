"""On-policy distillation beside GRPO on nano: accuracy by CPU seconds, from the same SFT.

    python -m gemma_grpo.train --run-dir TEACHER
    python -m benchmarks.distil rows WORK TEACHER [--seeds 1 2] [--rates 3e-4 1e-3]
    python -m benchmarks.distil table WORK/distil.jsonl

The teacher is a default run, of seed 0. A student is the SFT of another seed, which has seen other
problems. Rows are those of `study`, with snapshots on all held-out problems. The table's seconds
are steps times the seconds of a step: rollout, scores and update, no compilation and no evaluation.
"""

import json
from pathlib import Path

import tyro
from tyro.conf import Positional

from benchmarks.study import PLAIN, in_child
from benchmarks.timing import read_rows
from gemma_grpo.presets import GEMMA3_NANO


def rows(
    work: Positional[Path],
    teacher: Positional[Path],
    seeds: tuple[int, ...] = (1, 2),
    rates: tuple[float, ...] = (3e-4, 1e-3),
    steps: int = 40,
) -> None:
    """GRPO's own 200 steps, and distillation at each rate; rows that are there are not run again.

    Args:
        work: a folder for runs and rows.
        teacher: the folder of its run.
        seeds: of the students.
        rates: of learning, at the peak.
        steps: of distillation.
    """
    # GRPO as the preset has it; the study's rows begin from plainer settings.
    own = {name: getattr(GEMMA3_NANO.grpo, name.removeprefix("grpo.")) for name in PLAIN}
    shared = own | {"evaluation.snapshot_problems": 400, "evaluation.every": 20}
    distil = shared | {
        "evaluation.every": 4,
        "grpo.num_steps": steps,
        "grpo.teacher": str(teacher.absolute()),
        "grpo.loss.policy_weight": 0.0,
    }
    levels = {
        f"distil, rate {rate:g}": distil | {"grpo.optimizer.learning_rate": rate} for rate in rates
    }
    levels["grpo"] = shared
    out = work / "distil.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [(row["level"], row["seed"], row["settings"]) for row in read(out)]
    for seed in seeds:
        for name, settings in levels.items():
            if (name, seed, settings) not in done:
                row = {"benchmark": "distil", "level": name}
                row |= in_child(work, seed, settings, name.replace(" ", "-"))
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict]:
    """The rows so far."""
    return read_rows(path) if path.exists() else []


def table(path: Positional[Path]) -> None:
    """Prints a Markdown table: when each student's greedy accuracy was first as high as that with
    which GRPO ends."""
    found = read(path)
    targets = {row["seed"]: row for row in found if row["level"] == "grpo"}
    print("| seed | | greedy: SFT, end | sampled: SFT, end | s a step | as high as GRPO's end | |")
    print("|---|---|---|---|---|---|---|")
    for row in found:
        if (target := targets.get(row["seed"])) is None:
            continue
        wanted = target["grpo"]["accuracy"]
        reached = [step for step, accuracy in row["snapshots"] if accuracy >= wanted]
        when, share = "never", ""
        if reached:
            cpu = reached[0] * row["cpu"]
            when = f"after {reached[0]} steps, {cpu:.0f} s"
            share = f"{cpu / (200 * target['cpu']):.2f} of GRPO's"
        pair = lambda key, row=row: f"{100 * row['sft'][key]:.1f}, {100 * row['grpo'][key]:.1f} %"
        cells = [row["seed"], row["level"], pair("accuracy"), pair("pass_at_1")]
        print(f"| {' | '.join(map(str, [*cells, row['cpu'], when, share]))} |")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"rows": rows, "table": table})
