"""A run through its command line: what it writes, how it resumes, how it refuses.

Real processes on one layer of the embedded model, a few steps each; they share one compilation
cache. A rehearsal on eight devices, of two layers, is in `test_rehearsal.py`.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import children
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import all_tensors, copy_of, save_as_one

from gemma_grpo import api, cli, config, model, pipeline, rewards, train, weights
from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.errors import UserError
from gemma_grpo.planning import disk, programs
from gemma_grpo.records import evaluations, lock, tokens
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.records.metric_notes import note
from gemma_grpo.runtime import ModelConfig
from gemma_grpo.training import deadline, guard
from gemma_grpo.training.config import SFTConfig
from gemma_grpo.training.grpo import GRPOConfig
from gemma_grpo.training.saving import CheckpointConfig

SMALL = [
    "--sft.num-steps", "4", "--sft.batch-size", "4", "--sft.checkpoint-every", "2",
    "--grpo.num-steps", "4", "--grpo.prompts-per-step", "2", "--grpo.num-generations", "4",
    "--grpo.checkpoint-every", "2", "--grpo.loss.beta", "0.01", "--grpo.num-iterations", "2",
    "--grpo.curriculum", "pass_rate", "--grpo.skip-uniform", "0.9",  # by what went before
    "--data.num-train", "8", "--data.num-test", "8",
    "--evaluation.batch-size", "8", "--evaluation.num-samples", "0",
]  # fmt: skip
TIMES = ("time/", "tokens_per_s")


def command(*arguments, before=""):
    """A training process, on a machine of its own as far as JAX can tell: one CPU device."""
    return children.Forked(f"{before}\n{children.TRAIN}", *arguments, stderr=subprocess.STDOUT)


def finish(*arguments, before=""):
    process = command(*arguments, before=before)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def small(one_layer):
    """Flags of a small run."""
    return ["--model.weights", one_layer, *SMALL]


@pytest.fixture(scope="module")
def full_run(runs, small):
    """A run by the command itself that nothing interrupted, with its checkpoints; beside it are the
    most bytes that its folder held while it ran, in `peak.json`, and what it said, in `said.txt`.
    """
    run_dir, peak, ended = runs / "full", [0], threading.Event()

    def watch():
        while not ended.wait(0.01):
            peak[0] = max(peak[0], size_of(run_dir))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        arguments = ["--run-dir", str(run_dir), *small, "--keep-checkpoints"]
        done = subprocess.run(
            [sys.executable, "-m", "gemma_grpo.train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=children.ENVIRONMENT,
            timeout=900,
        )
    finally:
        ended.set()
        watcher.join()
    assert done.returncode == 0, done.stdout
    (runs / "said.txt").write_text(done.stdout)
    (runs / "peak.json").write_text(json.dumps(max(peak[0], size_of(run_dir))))
    return run_dir


def size_of(folder):
    """Bytes of the files below, while they come and go."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(path, name))
    return total


def test_a_run_holds_no_more_on_disk_than_its_plan_says_and_not_far_less(runs, full_run):
    run = config.from_yaml(full_run / "config.yaml")
    planned = disk.of_run(run, programs.model_config(run.model.weights)).run_folder
    peak = json.loads((runs / "peak.json").read_text())
    assert peak <= planned <= 1.5 * peak


def metrics_without_times(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(TIMES)}
        for line in lines
    ]


def assert_same_run(run_dir, other):
    for stage in ("sft", "grpo"):
        weights = f"weights/{stage}.safetensors"
        assert (run_dir / weights).read_bytes() == (other / weights).read_bytes()
    assert metrics_without_times(run_dir) == metrics_without_times(other)
    names = sorted(path.name for path in (other / "rollouts").iterdir())
    assert sorted(path.name for path in (run_dir / "rollouts").iterdir()) == names
    for name in names:
        assert (run_dir / "rollouts" / name).read_bytes() == (
            other / "rollouts" / name
        ).read_bytes()


def test_a_run_leaves_everything_it_promises(full_run):
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "curves.png"):
        assert (full_run / name).stat().st_size > 0
    assert sorted(path.name for path in (full_run / "checkpoints").iterdir()) == ["grpo", "sft"]
    assert list((full_run / "tensorboard").rglob("*events*"))
    summary = json.loads((full_run / "summary.json").read_text())
    assert list(summary["stages"]) == ["base", "sft", "grpo"]
    for stage in summary["stages"].values():
        wanted = {"accuracy", "accuracy_ci95", "format_rate", "trace_score", "reward", "n"}
        assert wanted <= stage.keys() and stage["n"] == 8
    assert {"weights", "seed", "device", "seconds", "paired"} <= summary.keys()
    seconds = summary["seconds"]
    assert 0 < seconds["compile"] < sum(seconds.values()) - seconds["compile"]
    rows = (full_run / "rollouts" / "grpo-000003.jsonl").read_text().splitlines()
    assert len(rows) == 2 * 4
    components = {"correctness", "trace", "confidence", "verbosity", "format", "reward"}
    assert components <= json.loads(rows[0]).keys()


def test_the_tokens_of_every_completion_are_on_file_within_half_of_its_bytes(full_run):
    of_rollouts = sorted((full_run / "rollouts").glob("*.jsonl"))
    of_stages = sorted((full_run / "evaluations").glob("*.jsonl"))
    assert len(of_rollouts) == 4 and len(of_stages) == 3
    bytes_ = {".jsonl": 0, ".npz": 0}
    for path in of_rollouts + of_stages:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        of_rows = tokens.read(tokens.path_beside(path))
        assert len(of_rows) == len(rows)
        for row, each in zip(rows, of_rows, strict=True):
            assert len(each["token_ids"]) == row["num_tokens"]
            assert each["characters"].sum() == len(row["completion"])
            assert (each["logps"] <= 0).all() and each["token_ids"].max() < 512
            if "logp" in row:  # of an evaluation: their sum, kept apart
                total = each["logps"].sum(dtype=np.float64)
                assert total == pytest.approx(row["logp"], rel=2e-3, abs=2e-3)
            assert ("gaps" in each) == (path in of_rollouts)
        bytes_[".jsonl"] += path.stat().st_size
        with zipfile.ZipFile(path.with_suffix(".npz")) as archive:
            bytes_[".npz"] += sum(each.compress_size for each in archive.infolist())
    assert bytes_[".npz"] <= 0.5 * bytes_[".jsonl"]
    steps = [line for line in metrics_without_times(full_run) if line["stage"] == "grpo"]
    for path, line in zip(of_rollouts, steps, strict=True):
        gaps = np.concatenate([each["gaps"] for each in tokens.read(tokens.path_beside(path))])
        mean = np.abs(gaps.astype(np.float64)).mean()
        assert mean == pytest.approx(line["logp_gap/mean"], abs=2**-25)  # half of float16's least


def test_quiet_is_the_end_alone_which_says_where_the_pictures_are_and_what_is_next(full_run):
    status, output = finish("--run-dir", str(full_run), "--resume", "--quiet")
    assert status == 0, output
    lines = output.splitlines()
    assert lines[0].startswith("stage  accuracy")
    assert lines[-3:] == [
        f"curves:           {full_run}/curves.png",
        f"the model:        python -m gemma_grpo.export {full_run} OUT",
        f"every completion: python -m gemma_grpo.view {full_run}",
    ]


def test_a_run_says_what_it_does_and_logs_the_learning_rate(runs, full_run):
    said = (runs / "said.txt").read_text()
    words = ["loading ", "measuring base on 8 problems", "sft: begins when"]
    places = [said.index(word) for word in [*words, "sft 4/4", "measuring sft", "grpo 1/4"]]
    assert places == sorted(places)
    assert all(line["learning_rate"] > 0 for line in metrics_without_times(full_run)[:-1])


def test_the_table_s_reward_is_by_the_run_s_end_weights_and_own_rewards(runs, full_run):
    """What the base model wrote, paid by hand: greedy rows, each with its components."""
    rows = [
        json.loads(line)
        for line in (full_run / "evaluations" / "base.jsonl").read_text().splitlines()
    ]
    greedy = [row for row in rows if row["greedy"]]
    end = config.from_yaml(full_run / "config.yaml").reward.end.named()
    totals = [sum(end[name] * row[name] for name in end) for row in greedy]
    assert [row["reward"] for row in greedy] == pytest.approx(totals)
    summary = json.loads((full_run / "summary.json").read_text())
    assert summary["stages"]["base"]["reward"] == pytest.approx(np.mean(totals))


# A reward that fails on some completions, of training steps and of snapshots.
FAILS = """
def fails(sample):
    if not sample.stopped and sample.prompt.startswith(("What", "Tom")):
        raise ValueError("cut off")
    return 1.0
"""


def test_snapshots_change_no_weight_compile_nothing_and_survive_a_kill_and_a_reward_that_fails(
    runs, full_run, small
):
    run_dir = runs / "snapshots"
    logged = "import jax; jax.config.update('jax_log_compiles', True)"
    (runs / "fails.py").write_text(FAILS)
    every = ["--evaluation.every", "1", "--evaluation.snapshot-problems", "3"]
    every += ["--reward", f"{runs / 'fails.py'}:fails=0"]
    process = command("--run-dir", str(run_dir), *small, *every, before=logged)
    wait_for_lines(process, run_dir / "metrics.jsonl", 4 + 3)  # of SFT; into GRPO
    process.kill()
    first, _ = process.communicate()
    assert len(list((run_dir / "evaluations").glob("grpo-step-*.json"))) >= 3
    status, second = finish("--run-dir", str(run_dir), "--resume", before=logged)
    assert status == 0, second
    assert "Compiling " in first  # so it would be said
    for said, begin, end in (
        (first, "\ngrpo 2/4", "\nmeasuring grpo"),
        (second, "\ngrpo 3/4", "\ngrpo 4/4"),  # its base evaluation is on file: compiled before
    ):
        compiled = [
            line
            for line in said.partition(begin)[2].partition(end)[0].splitlines()
            if "Compiling " in line
        ]
        assert begin in said and not compiled, compiled
    names = [f"grpo-step-{step:06d}" for step in range(1, 5)]
    for stage in ("sft", "grpo"):
        weights = f"weights/{stage}.safetensors"
        assert (run_dir / weights).read_bytes() == (full_run / weights).read_bytes()
    lines = metrics_without_times(run_dir)
    own = lambda name: name.startswith("evaluation/") or name.endswith("/fails")
    bare = [{k: v for k, v in line.items() if not own(k)} for line in lines]
    assert bare == metrics_without_times(full_run)
    folder = run_dir / "evaluations"
    assert sorted(path.stem for path in folder.glob("*-step-*.json")) == names
    greedy = [json.loads(line) for line in (folder / "grpo.jsonl").read_text().splitlines()]
    for name, line in zip(names, lines[4:], strict=True):
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["n"] == 3 and result["accuracy"] == line["evaluation/accuracy"]
        rows = [json.loads(row) for row in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert [row["problem"] for row in rows] == [0, 1, 2]
        assert [row["fails"] for row in rows] == [fails_or_none(row) for row in rows]
        missing = [row["fails"] for row in rows].count(None)
        assert line["evaluation/missing/fails"] == missing == 1
        assert len(tokens.read(folder / f"{name}.npz")) == 3
    assert [row["completion"] for row in rows] == [row["completion"] for row in greedy[:3]]
    assert sum(line["missing/fails"] for line in lines[4:]) > 0
    assert "warning: reward 'fails' raised ValueError: cut off (fails.py:4) on row" in first


def fails_or_none(row):
    fails = not row["stopped"] and row["prompt"].startswith(("What", "Tom"))
    return None if fails else 1.0


def test_every_step_logs_a_sampler_trainer_gap_within_tolerance(full_run):
    steps = [line for line in metrics_without_times(full_run) if line["stage"] == "grpo"]
    assert len(steps) == 4
    assert all(line["logp_gap/mean"] < 1e-5 for line in steps)


def test_every_metric_that_is_logged_is_explained(full_run):
    for line in metrics_without_times(full_run):
        assert not [name for name in line.keys() - {"stage", "step"} if not note(name)]


def test_the_weights_anneal_and_problems_by_pass_rate_have_no_phases(full_run):
    steps = [line for line in metrics_without_times(full_run) if line["stage"] == "grpo"]
    assert (steps[0]["weight/trace"], steps[-1]["weight/trace"]) == (0.45, 0.25)
    assert (steps[0]["weight/correctness"], steps[-1]["weight/correctness"]) == (0.40, 0.60)
    assert [line["phase"] for line in steps] == ["all"] * 4


@pytest.mark.parametrize(
    "steps",
    [(2, 6), pytest.param((1, 2, 3, 4, 5), marks=pytest.mark.slow)],
    ids=["in each stage", "five times"],
)
def test_a_run_killed_again_and_again_ends_in_the_same_bits(runs, small, full_run, steps):
    """Kills -9 at random moments after these steps, each later than the one before."""
    run_dir, rng, lines_before = runs / f"killed-{len(steps)}", random.Random(5), 0
    arguments = ["--run-dir", str(run_dir), *small]
    for step in steps:
        process, metrics = command(*arguments), run_dir / "metrics.jsonl"
        lines_before = wait_for_lines(process, metrics, max(step, lines_before + 1))
        time.sleep(rng.uniform(0, 1.0))  # into a step, a checkpoint, an evaluation
        process.kill()
        process.communicate()
        arguments = ["--run-dir", str(run_dir), "--resume"]
    status, output = finish(*arguments)
    assert status == 0, output
    assert_same_run(run_dir, full_run)
    assert list((run_dir / "checkpoints").iterdir()) == []  # the weights are written


def wait_for_lines(process, metrics, num):
    """Waits until a running process has written `num` lines; returns how many there are."""
    wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= num)
    return metrics.read_bytes().count(b"\n")


def wait_for(process, condition):
    """Waits until that holds, or a running process is through."""
    deadline = time.monotonic() + 600
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# SIGINT is sent to a run of `test_api.py` too.
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_first_and_resume_goes_on_to_the_same_bits(runs, small, full_run, number):
    run_dir = runs / f"signal-{number}"
    process = command("--run-dir", str(run_dir), *small)
    metrics = run_dir / "metrics.jsonl"
    wait_for_lines(process, metrics, 5)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    if process.returncode:  # it may have been at its last step
        assert process.returncode == 128 + number
        assert "everything is saved" in output and "Traceback" not in output
        steps = len(metrics.read_text().splitlines()) - 4
        assert (run_dir / "checkpoints" / "grpo" / f"{steps:06d}").is_dir()
    status, output = finish("--run-dir", str(run_dir), "--resume")
    assert status == 0, output
    assert_same_run(run_dir, full_run)


def test_a_damaged_checkpoint_is_passed_over(runs, full_run):
    run_dir = runs / "damaged"
    subprocess.run(["cp", "-r", str(full_run), str(run_dir)], check=True)
    for name in ("weights/grpo.safetensors", "evaluations/grpo.json", "summary.json"):
        (run_dir / name).unlink()
    newest = run_dir / "checkpoints" / "grpo" / "000004"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=os.path.getsize)
    victim.write_bytes(victim.read_bytes()[:-7])
    status, output = finish("--run-dir", str(run_dir), "--resume")
    assert status == 0 and "damaged" in output
    assert_same_run(run_dir, full_run)


FAILING_REWARD = """
calls = 0
def fussy(sample):
    global calls
    calls += 1
    return 1 / (calls <= {calls})
"""


def test_a_reward_that_fails_loses_no_step_and_the_run_goes_on_once_it_is_fixed(runs, small):
    reward, run_dir = runs / "fussy.py", runs / "fussy"
    reward.write_text(FAILING_REWARD.format(calls=2 * 8))  # on all 8 completions of the third step
    arguments = [*small, "--stages", "grpo", "--grpo.checkpoint-every", "100"]
    arguments += ["--grpo.curriculum", "phases", "--grpo.loss.beta", "0"]
    arguments += ["--grpo.num-iterations", "1"]  # fewer programs
    status, output = finish(
        "--run-dir", str(run_dir), *arguments, "--reward", f"{reward}:fussy=0.1"
    )
    error = output.strip().splitlines()[-1]
    assert status == 2 and error.startswith("error: all 8 completions") and "fussy" in error
    saved = run_dir / "checkpoints" / "grpo" / "000002"
    assert f"; step 2 is saved ({saved}): --resume goes on" in error
    assert "Traceback" not in output
    assert [path.name for path in (run_dir / "checkpoints" / "grpo").iterdir()] == ["000002"]
    reward.write_text(FAILING_REWARD.format(calls=10**9))
    status, output = finish("--run-dir", str(run_dir), "--resume", "--allow-changed-rewards")
    assert status == 0, output
    lines = metrics_without_times(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["reward/fussy"] == 1.0
    assert [line["phase"] for line in lines] == ["easy", "easy", "medium", "hard"]
    assert lines[0]["share/easy"] == 1 and lines[0]["skipped_problems"] == 0


@pytest.mark.slow  # `test_rehearsal.py` has them on eight devices
def test_adapters_go_through_both_stages_on_two_devices_and_checkpoints_go_after_them(runs, small):
    arguments = ["--model.lora.rank", "2", "--model.cpu-devices", "2"]
    status, output = finish("--run-dir", str(runs / "adapters"), *small, *arguments)
    assert status == 0, output
    lines = metrics_without_times(runs / "adapters")
    assert [line["stage"] for line in lines] == ["sft"] * 4 + ["grpo"] * 4
    assert list((runs / "adapters" / "checkpoints").iterdir()) == []


# --- deadlines, sessions, copies, locks ----------------------------------------------------------

# A clock that tells the hours by the steps taken: an hour each, so that a run of H hours stops
# after the same step on any machine.
AN_HOUR_A_STEP = """
import sys
from pathlib import Path
from gemma_grpo.training import deadline
def hours():
    lines = Path(sys.argv[2]) / "metrics.jsonl"  # of --run-dir
    return 3600 * len(lines.read_text().splitlines()) if lines.exists() else 0
deadline.seconds_since_start = hours
note = deadline.Deadline.note
deadline.Deadline.note = lambda self, kind, seconds: note(
    self, kind, 3600 if kind == "step" else seconds
)
"""


@pytest.fixture(scope="module")
def cut_run(runs, full_run):
    """A run by the whole one's config that its deadline stopped after the third GRPO step: a
    checkpoint falls on no third."""
    arguments = ["--run-dir", str(runs / "cut"), "--hours", "7.5"]
    arguments += ["--config", str(full_run / "config.yaml")]
    status, output = finish(*arguments, before=AN_HOUR_A_STEP)
    assert status == 75 and "Traceback" not in output, output
    assert "grpo step 3 of 4; --resume goes on" in output
    return runs / "cut"


def test_a_deadline_leaves_a_measured_marked_and_usable_run(cut_run):
    summary = json.loads((cut_run / "summary.json").read_text())
    assert summary["unfinished"] == {"stage": "grpo", "step": 3, "num_steps": 4}
    assert list(summary["stages"]) == ["base", "sft", "grpo-step-000003"]
    assert summary["stages"]["grpo-step-000003"]["n"] == 8
    assert (cut_run / "curves.png").stat().st_size > 0
    assert (cut_run / "checkpoints" / "grpo" / "000003").is_dir()
    _, trained = cli.trained(str(cut_run))
    assert trained == cut_run / "weights" / "grpo-step-000003.safetensors" and trained.is_file()


def read_only_copy(run_dir, target):
    """As an attached output is: without a right to write, elsewhere."""
    shutil.copytree(run_dir, target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return target


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def continued(runs, cut_run):
    """What a read-only copy of the cut run has gone on to; the copy must not have changed."""
    source = read_only_copy(cut_run, runs / "mount" / "attached")
    before = listing(source)
    status, output = finish("--resume-from", str(source), "--run-dir", str(runs / "continued"))
    assert status == 0, output
    assert listing(source) == before
    return runs / "continued"


def test_a_read_only_copy_of_a_cut_run_goes_on_to_the_same_bits(continued, full_run):
    assert_same_run(continued, full_run)
    summary = json.loads((continued / "summary.json").read_text())
    assert summary["unfinished"] is None and list(summary["stages"]) == ["base", "sft", "grpo"]
    names = sorted(path.name for path in (continued / "weights").iterdir())
    assert names == ["grpo.safetensors", "sft.safetensors"]


def test_a_run_is_repeated_by_its_own_config(continued, full_run):
    assert config.from_yaml(continued / "config.yaml") == config.from_yaml(full_run / "config.yaml")
    assert_same_run(continued, full_run)  # of which it had no more than the config


# --- a guard of a run that is paid for a letter, at a rate that takes the KL above 2 --------------

LETTERS = "def letters(sample): return min(1.0, sample.completion.count('e') / 20)"
DESTRUCTIVE = [
    "--stages", "grpo", "--grpo.num-steps", "5", "--grpo.checkpoint-every", "1",
    "--grpo.num-iterations", "1", "--grpo.temperature", "4", "--grpo.optimizer.warmup", "0",
    "--grpo.optimizer.decay", "constant", "--grpo.optimizer.learning-rate", "0.2",
    "--grpo.guard.max-kl", "2", "--grpo.guard.patience", "2",
    "--grpo.scale", "group",  # with it half the rate destroys no more
]  # fmt: skip


@pytest.fixture(scope="module")
def destructive(runs, small):
    """Flags of a run that a guard has to deal with."""
    (runs / "letters.py").write_text(LETTERS)
    return [*small, *DESTRUCTIVE, "--reward", f"{runs / 'letters.py'}:letters=1"]


@pytest.fixture(scope="module")
def rolled_back(runs, destructive):
    """A run that its guard took back, which nothing else interrupted; what it said."""
    guard = ["--grpo.guard.action", "rollback"]
    status, output = finish("--run-dir", str(runs / "rolled-back"), *destructive, *guard)
    assert status == 0, output
    return runs / "rolled-back", output


@pytest.fixture(scope="module")
def stopped(runs, destructive):
    """A run that its guard stopped; what it said."""
    guard = ["--grpo.guard.action", "stop"]
    status, output = finish("--run-dir", str(runs / "stopped"), *destructive, *guard)
    assert status == train.COLLAPSED == 76, output
    return runs / "stopped", output


def test_a_destructive_rate_stops_the_run_in_a_line_with_a_good_and_measured_model(stopped):
    run_dir, output = stopped
    line = output.splitlines()[-1]
    assert line.startswith("stopped by the guard: grpo has collapsed: kl was above 2 in steps 4 to")
    assert "grpo step 2 of 5 is kept; --resume-from" in line and "Traceback" not in output
    summary = json.loads((run_dir / "summary.json").read_text())
    unfinished = summary["unfinished"]
    assert unfinished.pop("collapse") in line
    assert unfinished == {"stage": "grpo", "step": 2, "num_steps": 5}
    assert list(summary["stages"]) == ["base", "grpo-step-000002"] and summary["rollbacks"] == []
    assert [path.name for path in (run_dir / "checkpoints/grpo").iterdir()] == ["000002"]
    _, trained = cli.trained(str(run_dir))
    assert trained == run_dir / "weights" / "grpo-step-000002.safetensors" and trained.is_file()


def test_a_destructive_rate_is_halved_from_the_last_good_checkpoint_on(rolled_back, stopped):
    run_dir, output = rolled_back
    (noted,) = json.loads((run_dir / "rollbacks.json").read_text())
    assert (noted["to"], noted["rate_factor"]) == (2, 0.5)
    assert output.count("has collapsed") == 1
    assert f"went back from step {noted['at']} to 2, with 0.5 times the learning rate" in output
    steps, stopped_steps = metrics_without_times(run_dir), metrics_without_times(stopped[0])
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    rates = [line["learning_rate"] for line in steps]
    np.testing.assert_allclose(rates, [0.2, 0.2, 0.1, 0.1, 0.1], rtol=1e-6)
    # The same weights draw the same completions; after an update at another rate they do not.
    same = [a["kl"] == b["kl"] for a, b in zip(steps, stopped_steps, strict=False)]
    assert same[:4] == [True, True, True, False]
    assert len(list((run_dir / "rollouts").glob("*.jsonl"))) == 5
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["unfinished"] is None and summary["rollbacks"] == [noted]


def test_a_stopped_run_goes_on_with_another_guard_and_after_a_kill_to_the_same_bits(
    runs, stopped, rolled_back
):
    run_dir = runs / "stopped-on"
    source = read_only_copy(stopped[0], runs / "mount" / "stopped")
    arguments = ["--resume-from", str(source), "--run-dir", str(run_dir)]
    process = command(*arguments, "--grpo.guard.action", "rollback")
    wait_for(process, (run_dir / "rollbacks.json").exists)
    process.kill()
    process.communicate()
    status, output = finish("--run-dir", str(run_dir), "--resume")
    assert status == 0, output
    weights = "weights/grpo.safetensors"
    assert (run_dir / weights).read_bytes() == (rolled_back[0] / weights).read_bytes()
    assert metrics_without_times(run_dir) == metrics_without_times(rolled_back[0])
    for name in ["rollbacks.json", *(f"rollouts/grpo-{n:06d}.jsonl" for n in range(1, 6))]:
        assert (run_dir / name).read_bytes() == (rolled_back[0] / name).read_bytes()


@pytest.mark.slow  # so does the run that a signal stopped, and at each border `test_rehearsal.py`'s
def test_a_cut_run_resumes_in_its_place_to_the_same_bits(runs, cut_run, full_run):
    run_dir = shutil.copytree(cut_run, runs / "cut-again")
    status, output = finish("--run-dir", str(run_dir), "--resume")
    assert status == 0, output
    assert_same_run(run_dir, full_run)


def test_no_time_at_all_is_one_line_and_a_folder_that_resumes(capsys, tmp_path):
    run_dir = tmp_path / "run"
    assert train.main(["--run-dir", str(run_dir), "--hours", "0.001", *SMALL]) == 75
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        "stopped for --hours 0.001: before the evaluation of base; --resume goes on"
    )
    assert json.loads((run_dir / "summary.json").read_text())["stages"] == {}
    assert train.main(["--run-dir", str(run_dir), "--resume", "--hours", "0.001"]) == 75


def test_an_evaluation_that_was_never_timed_looks_at_the_clock(capsys, tmp_path, monkeypatch):
    """The time is up as the first batch begins: nothing is sampled."""
    run_dir, measuring = tmp_path / "run", []
    monkeypatch.setattr(pipeline._Session, "_say", lambda _, line: measuring.append(line))
    hours = lambda: 3600.0 if "measuring base on 8 problems" in measuring else 0.0
    monkeypatch.setattr(deadline, "seconds_since_start", hours)
    greedy_only = ["--evaluation.num-samples", "0", "--grpo.prompts-per-step", "8"]
    few = [*SMALL, "--sft.batch-size", "8", *greedy_only]
    assert train.main(["--run-dir", str(run_dir), "--hours", "1", *few]) == 75
    assert "before the evaluation of base; --resume goes on" in capsys.readouterr().err
    assert not (run_dir / "evaluations").exists()


@pytest.mark.parametrize("hours", ["-1", "0", "nan", "inf"])
def test_hours_that_are_no_session_are_refused(capsys, tmp_path, hours):
    line = says(capsys, "--run-dir", str(tmp_path / "run"), f"--hours={hours}")
    assert "--hours" in line and not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused_to_a_second_resume(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(config.to_yaml(config.RunConfig()))
    with lock.hold(tmp_path):
        assert train.main(["--resume", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"in use by process {os.getpid()}" in error


def test_a_config_of_another_version_says_so(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("grpo: {future_setting: 1}")
    assert train.main(["--resume", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "future_setting" in error and "version" in error


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--seed", "3"], "seed 0 -> 3"),
        (["--model.lora.rank", "2"], "model.lora.rank 0 -> 2"),
        (["--resume"], "give one of them"),
    ],
)
def test_resume_from_takes_no_setting_but_moved_files(capsys, tmp_path, arguments, named):
    (tmp_path / "config.yaml").write_text(config.to_yaml(config.RunConfig()))
    new = tmp_path / "new"
    assert train.main(["--resume-from", str(tmp_path), "--run-dir", str(new), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error and not new.exists()


def test_resume_in_place_changes_no_guard_and_says_what_does(capsys, tmp_path):
    begun_run(tmp_path / "run")
    there = ["--resume", "--run-dir", str(tmp_path / "run"), "--grpo.guard.action", "stop"]
    line = says_alone(capsys, *there)
    assert "grpo.guard.action none -> stop: only --resume-from" in line


def test_resume_from_takes_moved_files(capsys, tmp_path, monkeypatch):
    source, new = tmp_path / "old", tmp_path / "new"
    source.mkdir()
    (source / "config.yaml").write_text(config.to_yaml(config.RunConfig()))
    moved = ["--model.weights", "elsewhere", "--data.source", "moved.jsonl", "--ignore-plan"]
    taken = []
    monkeypatch.setattr(train, "_require_disk", lambda *_: None)  # which reads the weights' sizes
    monkeypatch.setattr(pipeline, "load_task", lambda run, given: taken.append(run) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--resume-from", str(source), "--run-dir", str(new), *moved])
    run = config.from_yaml(new / "config.yaml")
    assert run == taken[0] and (run.model.weights, run.data.source) == ("elsewhere", "moved.jsonl")


def test_two_runs_of_the_same_second_get_different_folders(tmp_path):
    assert [run_dirs.unused(tmp_path / "nano").name for _ in range(3)] == [
        "nano",
        "nano-2",
        "nano-3",
    ]


IN_A_NOTEBOOK = """
import sys, threading
import jax
jax.numpy.zeros(1).block_until_ready()
from gemma_grpo import train
status = []
thread = threading.Thread(target=lambda: status.append(train.main(sys.argv[1:])))
thread.start()
thread.join()
sys.exit(*status)
"""


def test_a_run_in_a_thread_of_a_process_that_uses_jax_takes_the_devices_there(runs, small):
    arguments = ["--run-dir", str(runs / "notebook"), *small, "--stages", "sft"]
    process = children.Forked(IN_A_NOTEBOOK, *arguments, "--model.cpu-devices", "2")
    _, warned = process.communicate(timeout=900)
    assert process.returncode == 0, warned
    assert "JAX runs already, with 1 CPU devices: model.cpu_devices=2 is ignored" in warned
    assert "not in the main thread" in warned
    summary = json.loads((runs / "notebook" / "summary.json").read_text())
    assert summary["device"].startswith("1 x cpu") and list(summary["stages"]) == ["base", "sft"]


# --- bad input: one line with the fix, nothing written ------------------------------------------


def says(capsys, *arguments):
    """The one line that the command prints on stderr before it leaves with status 2."""
    few = ["--data.num-train", "20", "--data.num-test", "8"]
    assert train.main([*few, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def says_alone(capsys, *arguments):
    """`says`, without flags of its own."""
    assert train.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture(autouse=True)
def devices_stay_as_they_are(monkeypatch):
    """The command sets the number of CPU devices, which this process has fixed already."""
    monkeypatch.setattr(cli, "split_cpu", lambda *sizes: None)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--preset", "gemma4"], "gemma3-nano"),
        (["--model.tokenizer", "nowhere.model"], "nowhere.model"),
        (["--model.weights", "nowhere"], "nowhere"),
        (["--model.lora.rank", "4", "--model.lora.targets", "lm_head"], "lm_head"),
        (["--model.lora.rank", "-1"], "rank=-1"),
        (["--model.max-prompt-length", "9"], "max_prompt_length"),
        (["--model.max-completion-length", "9"], "max_completion_length"),
        (["--grpo.num-generations", "1"], "--grpo.num-generations 1 leaves"),
        (["--grpo.prompts-per-step", "3"], "multiple of 8"),
        (["--grpo.scale", "mean"], "every weight of reward.start and reward.end but correctness"),
        (["--data.source", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--grpo.teacher", "nowhere"], "grpo.teacher: weights nowhere: no such folder"),
        (["--grpo.loss.policy-weight", "0"], "name a --grpo.teacher"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--reward", "nowhere.py:f"], "nowhere.py"),
        (["--stages", "grpo,sft"], "stages"),
        (["--seed", "-1"], "seed"),
        (["--seed", "x"], "--seed"),
        (["--grpo.temperature", "inf"], "temperature=inf must be above 0"),
        (["--model.lora.rank", "2", "--model.lora.alpha", "inf"], "model.lora.alpha=inf"),
        (["--grpo.loss.epsilon-high", "nan"], "epsilon"),
        (["--grpo.num-step", "4"], "perhaps you meant --grpo.num-steps"),
        (["--grpo.num-step=4"], "perhaps you meant --grpo.num-steps"),
        (["--lr", "1e-4"], "--lr; perhaps you meant --grpo.optimizer.learning-rate or --sft."),
        (["--system_prompt=Think."], "--system-prompt; perhaps you meant --model.instruction"),
        (["--model.rollout-layout", "hybri"], "'tensor_parallel'"),
        (["--model.remat", "some"], "'dots'"),
        (["--grpo.guard.action", "retry"], "'rollback'"),
        (["--grpo.guard.patience", "0"], "grpo.guard: patience=0"),
        (
            ["--grpo.guard.action", "stop", "--grpo.checkpoint-every", "0"],
            "checkpoint-every above 0",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(capsys, tmp_path, arguments, named):
    run_dir = tmp_path / "run"
    line = says(capsys, "--dry-run", "--run-dir", str(run_dir), *arguments)
    assert named in line and not run_dir.exists()


def test_an_empty_data_set_is_named(capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in says(
        capsys, "--dry-run", "--data.source", str(tmp_path / "empty.jsonl")
    )


def test_a_directory_that_is_there_is_not_written_over(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    line = says(capsys, "--run-dir", str(tmp_path))
    assert "--resume" in line and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def begun_run(folder, **settings):
    """A run folder as a run has it that has just begun."""
    run = config.RunConfig(**settings)
    pipeline.new_run_dir(folder, run)
    return run


def test_a_flag_at_resume_is_compared_with_the_run_and_not_with_the_preset(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "execute", None)
    of_a_preset = str(config.RunConfig().grpo.num_steps)
    begun_run(tmp_path / "run", grpo=GRPOConfig(num_steps=4))
    line = says_alone(
        capsys, "--resume", "--run-dir", str(tmp_path / "run"), "--grpo.num-steps", of_a_preset
    )
    assert f"grpo.num_steps 4 -> {of_a_preset}" in line and "export" in line
    line = says_alone(capsys, "--resume", "--run-dir", str(tmp_path / "run"), "--preset", "x")
    assert "--preset and --resume" in line


def test_a_config_edited_since_the_run_began_is_refused_by_field(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "execute", None)
    run = begun_run(tmp_path / "run")
    edited = dataclasses.replace(run, seed=7, model=ModelConfig(dtype="bfloat16"))
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(edited))
    line = says_alone(capsys, "--resume", "--run-dir", str(tmp_path / "run"))
    assert "was edited (seed 0 -> 7, model.dtype float32 -> bfloat16)" in line


def test_a_run_that_could_not_start_leaves_no_folder(capsys, tmp_path):
    run_dir = tmp_path / "run"
    assert train.main(["--run-dir", str(run_dir), "--data.source", "nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.endswith("\nerror: no such file: nowhere.jsonl\n")
    assert not run_dir.exists()


def test_a_dry_run_notices_a_folder_that_is_there(capsys, tmp_path):
    (tmp_path / "mine.txt").touch()
    assert "is there already" in says(capsys, "--dry-run", "--run-dir", str(tmp_path))


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--config", ""], "config"),
        (["--preset", ""], "unknown preset ''"),
        (["--run-dir", "/"], "/ is there already"),
        (["--grpo.temperature", "1e-30"], "from 1e-6 to 1e6"),
        (["--config", "x.yaml", "--preset", "gemma3-nano"], "--config and --preset"),
        (["--config", "x.yaml", "--resume"], "--config and --resume"),
    ],
)
def test_what_chooses_all_settings_is_given_once_and_not_empty(capsys, arguments, named):
    assert named in says_alone(capsys, *arguments)


def test_a_checkpoint_s_header_is_read_once_for_a_run(monkeypatch):
    opened, open_source = [], weights.open_source
    monkeypatch.setattr(weights, "open_source", lambda at: opened.append(at) or open_source(at))
    pipeline.load_task(config.RunConfig(data=config.DataConfig(num_train=20, num_test=8)))
    assert opened == [weights.NANO]


def test_data_changed_since_the_run_began_is_refused_by_what_changed(tmp_path):
    run = begun_run(tmp_path / "run", data=config.DataConfig(num_train=20, num_test=8))
    begun = pipeline.load_task(run)
    pipeline._check_origin(run, tmp_path / "run", pipeline._digests(run, begun))
    pipeline._check_origin(run, tmp_path / "run", pipeline._digests(run, begun))
    changed = dataclasses.replace(begun, test=begun.test[1:])
    with pytest.raises(UserError, match="its held-out problems are not what the run began with"):
        pipeline._check_origin(run, tmp_path / "run", pipeline._digests(run, changed))


@pytest.mark.parametrize(
    "what, kind, removed",
    [
        ("train", "data", set()),
        ("test", "data", {"base.json", "sft.json"}),
        ("base", "base", {"base.json"}),
        ("base of adapters", "base", {"base.json", "sft.json"}),
    ],
)
def test_what_changed_on_purpose_is_allowed_by_its_own_flag_and_measured_again(
    tmp_path, monkeypatch, what, kind, removed
):
    run_dir = tmp_path / "run"
    lora = model.LoRAConfig(rank=2) if what == "base of adapters" else model.NO_LORA
    data = config.DataConfig(num_train=20, num_test=8)
    run = begun_run(run_dir, data=data, model=ModelConfig(lora=lora))
    task = pipeline.load_task(run)
    pipeline._check_origin(run, run_dir, pipeline._digests(run, task))
    (run_dir / "evaluations").mkdir()
    for name in ("base.json", "base.jsonl", "sft.json"):
        (run_dir / "evaluations" / name).touch()
    if kind == "base":
        monkeypatch.setattr(weights, "digest", lambda where: "another")
    else:
        task = dataclasses.replace(task, **{what: getattr(task, what)[1:]})
    other = ({"data", "base"} - {kind}).pop()
    with pytest.raises(UserError, match=f"or go on all the same with --allow-changed-{kind}$"):
        pipeline._check_origin(run, run_dir, pipeline._digests(run, task), [other])
    pipeline._check_origin(run, run_dir, pipeline._digests(run, task), [kind])
    left = {path.name for path in (run_dir / "evaluations").iterdir()}
    assert left == {"base.json", "base.jsonl", "sft.json"} - removed
    pipeline._check_origin(
        run, run_dir, pipeline._digests(run, task)
    )  # what was allowed is what the run has now


def test_a_changed_file_of_an_own_reward_or_judge_is_refused_by_name_and_allowed_by_its_flag(
    tmp_path,
):
    mine, asks, rubric = tmp_path / "mine.py", tmp_path / "asks.py", tmp_path / "rubric.yaml"
    mine.write_text("def half(sample):\n    return 0.5\n")
    asks.write_text("def yes(questions):\n    return [True] * len(questions)\n")
    rubric.write_text("arithmetic: [Is it right?]\n")
    run_dir, data = tmp_path / "run", config.DataConfig(num_train=20, num_test=8)
    rubrics = rewards.RubricConfig(str(rubric), (f"{asks}:yes=0",))
    reward = rewards.RewardConfig(extra=(f"{mine}:half=2",), rubric=rubrics)
    run = begun_run(run_dir, data=data, reward=reward)
    # A run of a version that noted no files of rewards goes on, and notes them.
    task = pipeline.load_task(begun_run(tmp_path / "other", data=data))
    pipeline._check_origin(run, run_dir, pipeline._digests(run, task))
    (run_dir / "evaluations").mkdir()
    for path, name, left in (
        (asks, "judge yes", True),
        (rubric, "rubric", True),
        (mine, "reward half", False),
    ):
        (run_dir / "evaluations" / "base.json").touch()
        path.write_text(path.read_text() + "# another\n")
        digests = pipeline._digests(run, task)
        said = f"its {name} are not .* go on all the same with --allow-changed-rewards$"
        with pytest.raises(UserError, match=said):
            pipeline._check_origin(run, run_dir, digests, ["data", "base"])
        pipeline._check_origin(run, run_dir, digests, ["rewards"])
        assert (run_dir / "evaluations" / "base.json").exists() == left
        pipeline._check_origin(run, run_dir, digests)


def test_a_changed_module_that_a_reward_imports_from_its_folder_is_refused_by_name(
    tmp_path, monkeypatch
):
    mine, pack = tmp_path / "mine.py", tmp_path / "pack_of_mine"
    pack.mkdir()
    for name in ("words_of_mine.py", "not_imported.py", "pack_of_mine/__init__.py"):
        (tmp_path / name).write_text("HALF = 0.5\n")
    mine.write_text(
        "import json\nimport jax\nfrom gemma_grpo import api\nimport pack_of_mine\n"
        "from words_of_mine import HALF\ndef half(sample):\n    return HALF\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run_dir, data = tmp_path / "run", config.DataConfig(num_train=20, num_test=8)
    run = begun_run(run_dir, data=data, reward=rewards.RewardConfig(extra=(f"{mine}:half",)))
    task = pipeline.load_task(run)
    digests = pipeline._digests(run, task)
    assert [name for name in digests if "half" in name] == [
        "reward half", "reward half's pack_of_mine/__init__.py", "reward half's words_of_mine.py",
    ]  # fmt: skip
    pipeline._check_origin(run, run_dir, digests)
    (tmp_path / "words_of_mine.py").write_text("HALF = 0.25\n")
    said = "its reward half's words_of_mine.py are not .* with --allow-changed-rewards$"
    with pytest.raises(UserError, match=said):
        pipeline._check_origin(run, run_dir, pipeline._digests(run, task))
    pipeline._check_origin(run, run_dir, pipeline._digests(run, task), ["rewards"])


def test_other_weights_of_a_judge_are_refused_by_name(tmp_path):
    judge = copy_of("text", tmp_path / "sage")
    run_dir, data = tmp_path / "run", config.DataConfig(num_train=20, num_test=8)
    task = pipeline.load_task(begun_run(tmp_path / "other", data=data))
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text("arithmetic: [Is it right?]\n")
    rubrics = rewards.RubricConfig(str(rubric), (f"model:{judge}=0.5",))
    run = begun_run(run_dir, data=data, reward=rewards.RewardConfig(rubric=rubrics))
    pipeline._check_origin(run, run_dir, pipeline._digests(run, task))
    tensors = all_tensors(judge)
    save_as_one(judge, {name: -tensor for name, tensor in tensors.items()})
    said = "its judge sage are not .* go on all the same with --allow-changed-rewards$"
    with pytest.raises(UserError, match=said):
        pipeline._check_origin(run, run_dir, pipeline._digests(run, task))


def test_a_folder_without_a_run_is_named_with_the_runs_below_and_beside_it(tmp_path, capsys):
    begun_run(tmp_path / "out" / "below")
    begun_run(tmp_path / "beside")
    line = says_alone(capsys, "--resume-from", str(tmp_path / "out"))
    near = f"{tmp_path / 'beside'}, {tmp_path / 'out' / 'below'}"
    assert line == f"error: no run in {tmp_path / 'out'}; near it are {near}\n"
    alone = tmp_path / "a" / "b"
    assert says_alone(capsys, "--resume-from", str(alone)) == f"error: no run in {alone}\n"
    (tmp_path / "beside" / "config.yaml").write_text("sea: 1")
    line = says_alone(capsys, "--resume-from", str(tmp_path / "beside"))
    assert "a run can be resumed by the version" in line


@pytest.mark.parametrize("resume", ["--resume", "--resume-from"])
def test_a_reward_that_moved_is_named_where_it_is_now_by_the_name_that_it_has(
    tmp_path, monkeypatch, capsys, resume
):
    executed = []
    monkeypatch.setattr(pipeline, "execute", lambda run, *_, **__: executed.append(run) or 1 / 0)
    own = rewards.RewardConfig(extra=("mine.py:half=2", "mine.py:other", "session:ours"))
    begun_run(tmp_path / "run", reward=own)
    flags = [resume, "--run-dir", str(tmp_path / "run")]
    if resume == "--resume-from":
        flags = [resume, str(tmp_path / "run"), "--run-dir", str(tmp_path / "next")]
    refused = says_alone(capsys, *flags, "--reward", "d/mine.py:third")
    assert "the run was begun without it; its own: half, other, ours" in refused
    assert "reward.extra" in says_alone(capsys, *flags, "--reward", "d/mine.py:half=3")
    assert "reward.extra" in says_alone(capsys, *flags, "--reward", "d/mine.py:ours")
    with pytest.raises(ZeroDivisionError):
        train.main([*flags, "--reward", "d/mine.py:half", "--reward", "d=1/mine.py:other"])
    assert executed[0].reward.extra == ("d/mine.py:half=2", "d=1/mine.py:other", "session:ours")


@pytest.mark.parametrize("what", ["train", "base"])
@pytest.mark.parametrize("has_begun", [False, True])
def test_demonstrations_of_what_changed_are_sampled_again_unless_sft_has_begun_with_them(
    tmp_path, monkeypatch, capsys, what, has_begun
):
    run_dir, sampled = tmp_path / "run", tmp_path / "run" / "demonstrations.json"
    sft = SFTConfig(demonstrations="own")
    run = begun_run(run_dir, data=config.DataConfig(num_train=20, num_test=8), sft=sft)
    task = pipeline.load_task(run)
    pipeline._check_origin(run, run_dir, pipeline._digests(run, task))
    sampled.write_text("{}")
    if has_begun:
        (run_dir / "checkpoints" / "sft" / "000001").mkdir(parents=True)
        monkeypatch.setattr(pipeline.StageCheckpoints, "newest", lambda _: Path("000001"))
    if what == "base":
        monkeypatch.setattr(weights, "digest", lambda where: "another")
    else:
        task = dataclasses.replace(task, train=task.train[1:])
    pipeline._check_origin(run, run_dir, pipeline._digests(run, task), ["data", "base"])
    assert sampled.exists() == has_begun
    assert ("sampled before the change" in capsys.readouterr().err) == has_begun


def test_a_collapse_is_told_as_one_where_no_time_is_left_to_measure_its_weights(tmp_path):
    begun_run(tmp_path / "run")
    session = pipeline._Session(
        config.RunConfig(), tmp_path / "run", deadline.Deadline(), pipeline.NOTHING_GIVEN
    )
    collapse = guard.CollapsedError("kl was above 10", "grpo", 2, 6, params={})
    measured = []

    def evaluate(name, params):
        measured.append(name)
        raise deadline.OutOfTimeError(name, None, None)

    with mock.patch.object(pipeline._Session, "_write_weights"):
        session._keep_partial(collapse, evaluate)  # raises nothing: the caller raises the collapse
    assert measured == ["grpo-step-000002"]


def test_a_change_is_allowed_to_a_run_that_goes_on_alone(capsys):
    assert "go with --resume" in says_alone(capsys, "--allow-changed-data", "--dry-run")


def test_a_relative_path_that_is_lost_says_where_the_run_was_begun(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    begun_run(tmp_path / "run", data=config.DataConfig(source="mine.jsonl"))
    resume = ["--resume", "--run-dir", str(tmp_path / "run")]
    assert train.main(resume) == 2 and "begun in" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert train.main(resume) == 2
    said = capsys.readouterr().err
    assert f"no such file: mine.jsonl; the run was begun in {tmp_path / 'here'}" in said


def test_a_damaged_evaluation_is_said_and_made_again_and_a_whole_one_is_read(tmp_path, capsys):
    path, lines_path = tmp_path / "sft.json", tmp_path / "sft.jsonl"
    result, rows = {"n": 2, "accuracy": 0.5}, [{"greedy": True}, {"greedy": True}]
    drawn = {name: np.zeros(0, int) for name in ("num_tokens", "token_ids", "characters")}
    drawn |= {name: np.zeros(0) for name in ("logps", "gaps")}
    evaluations.write(tmp_path, "sft", result, rows, drawn)
    whole, lines = path.read_text(), lines_path.read_text()
    assert evaluations.read_back(tmp_path, "sft") == (result, rows)
    damages = ["", "[1]", whole[:20], '{"n": 2, "accuracy": 0.5}']
    damages += [whole.replace(*change) for change in (("0.5", "0.6"), ("sha256", "sha257"))]
    for damaged in damages:
        path.write_text(damaged)
        assert evaluations.read_back(tmp_path, "sft") is None, damaged
        assert capsys.readouterr().err.count("is damaged: passed over") == 1
    path.write_text(whole)
    for damaged in ("", lines[:-5], lines.split("\n")[0] + "\n", "1\n2\n", lines + "{}\n"):
        lines_path.write_text(damaged)
        assert evaluations.read_back(tmp_path, "sft") is None, damaged
        assert capsys.readouterr().err.count("is damaged: passed over") == 1
    lines_path.unlink()
    assert evaluations.read_back(tmp_path, "sft") is None
    assert evaluations.read_back(tmp_path, "base") is None and "base" not in capsys.readouterr().err


def test_resume_without_a_run_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume"]) == 2
    assert "--run-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, named",
    [
        ("seed: [", "not YAML"),
        ("seed: five", "seed"),
        ("grpo: {steps: 5}", "steps"),
        ("grpo: {loss: {objective: ppo}}", "grpo.loss.objective"),
        ("model: {rollout_layout: hybri}", "tensor_parallel"),
        ("model: {remat: 1}", "none, dots, full"),
        ("- seed", "mapping"),
        ("seed: 1\nseed: 2", "seed stands there twice"),
        ("grpo: {num_steps: 1, num_steps: 2}", "num_steps stands there twice"),
        ("stages: &a sft\nmodel: {instruction: *a}", "aliases are not read"),
        ("? [1, 2]\n: 3", "name must be text"),
        ("1: 2\nseed: 3", "no field 1"),
        ("~: 2\nseed: 3", "no field None"),
        ("[" * 1000, "cannot be read"),
        ("seed: " + "9" * 5000, "cannot be read"),
        ("seed: !!bool x", "cannot be read"),
        ("seed: !!int ''", "cannot be read"),
        ("seed: !!timestamp x", "cannot be read"),
        ("grpo:\n  temperature: 1" + "0" * 400, "grpo.temperature is 1000"),
    ],
)
def test_a_wrong_config_file_is_named_with_its_field(capsys, tmp_path, text, named):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    line = says(capsys, "--dry-run", "--config", str(path))
    assert named in line and "run.yaml" in line


def test_a_config_that_is_no_utf_8_file_is_one_line(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("model: {instruction: Größe}".encode("latin-1"))
    assert "not UTF-8" in says_alone(capsys, "--dry-run", "--config", str(path))
    path.unlink()
    os.mkfifo(path)
    assert "not a file" in says_alone(capsys, "--dry-run", "--config", str(path))
    assert "is a directory" in says_alone(capsys, "--config", str(tmp_path)).lower()


def test_a_config_survives_yaml(tmp_path):
    run = config.RunConfig(seed=7)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(run))
    assert config.from_yaml(path) == run


def test_the_clip_widths_of_an_earlier_config_are_kept_and_none_is_the_objectives_own(tmp_path):
    path = tmp_path / "config.yaml"
    gspo = "level: sequence, aggregation: sequence_mean"
    path.write_text(f"grpo: {{loss: {{{gspo}, epsilon: 0.2, epsilon_high: 0.28}}}}\n")
    assert config.from_yaml(path).grpo.loss.widths == (0.2, 0.28)
    path.write_text(f"grpo: {{loss: {{{gspo}, epsilon: null}}}}\n")
    assert config.from_yaml(path).grpo.loss.widths == (3e-4, 4e-4)


@pytest.mark.parametrize(
    "old, now",
    [
        ("model: {rollout_layout: hybrid}", {"model.rollout_layout": "tensor_parallel"}),
        ("model: {remat: true}", {"model.remat": "full"}),
        ("model: {remat: false}", {"model.remat": "none"}),
        ("grpo: {curriculum: true}", {"grpo.curriculum": "phases"}),
        ("grpo: {curriculum: false}", {"grpo.curriculum": "none"}),
    ],
)
def test_a_config_of_an_earlier_version_means_what_it_meant(tmp_path, old, now):
    path = tmp_path / "config.yaml"
    path.write_text(f"{old}\n")
    assert config.from_yaml(path) == config.RunConfig().replace(now)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.rollout-layout", "hybrid"],
        ["--model.rollout-layout=hybrid"],
        ["--model.rollout_layout", "hybrid"],
    ],
)
def test_the_old_name_of_the_tensor_parallel_layout_is_read_on_the_command_line(arguments):
    parsed = cli.parse_run(
        ["--model.instruction", "hybrid", *arguments],
        train.Options(),
        config.RunConfig(),
        command="train",
        description="",
    )
    assert parsed[1].model == ModelConfig(instruction="hybrid", rollout_layout="tensor_parallel")


def test_a_config_of_the_time_before_packs_is_read_without_its_fields(tmp_path):
    path = tmp_path / "config.yaml"
    old = "sft: {length_bucket: 32, packed_sizes: 1}\ngrpo: {accumulation_steps: 2, num_steps: 7}\n"
    path.write_text(old)
    assert config.from_yaml(path) == config.RunConfig(
        grpo=replace(config.GRPOConfig(), num_steps=7)
    )


# --- a folder for the checkpoints alone ----------------------------------------------------------


def stopped_run(run_dir, folder, *, steps=5, saved=None):
    """What a run with a folder of its own for checkpoints has on disk in its first stage."""
    settings = config.RunConfig(checkpoint=CheckpointConfig(folder=str(folder)))
    pipeline.new_run_dir(run_dir, settings)
    lines = [json.dumps({"stage": "sft", "step": step + 1}) + "\n" for step in range(steps)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    if saved:
        saved = run_dir / "checkpoints" if saved == "run" else folder
        Checkpoints(saved / "sft").save(5, {"w": jnp.arange(3.0)}, {})
    return settings


def test_a_folder_that_holds_another_runs_checkpoints_is_refused(tmp_path):
    stopped_run(tmp_path / "a", tmp_path / "ck", saved="folder")
    with pytest.raises(UserError, match=f"holds the checkpoints of {tmp_path}/a; name another"):
        stopped_run(tmp_path / "b", tmp_path / "ck")
    assert not (tmp_path / "b" / "config.yaml").exists()
    shutil.rmtree(tmp_path / "a")  # and begun anew: what was saved is of another run all the same
    with pytest.raises(UserError, match="name another"):
        stopped_run(tmp_path / "a", tmp_path / "ck")
    stopped_run(tmp_path / "c", tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    stopped_run(tmp_path / "d", tmp_path / "other")


def test_steps_whose_checkpoints_are_gone_are_not_taken_again_unasked(tmp_path):
    run = stopped_run(tmp_path / "run", tmp_path / "ck", saved="folder")
    pipeline.resume_run_dir(tmp_path / "run", run, restart_stage=False)
    shutil.rmtree(tmp_path / "ck")
    with pytest.raises(UserError, match=r"ck, which is gone; .*\(5 were taken\) with --restart-"):
        pipeline.resume_run_dir(tmp_path / "run", run, restart_stage=False)
    pipeline.resume_run_dir(tmp_path / "run", run, restart_stage=True)
    assert run_dirs.owner(tmp_path / "ck") == tmp_path / "run"


def test_a_run_whose_folder_went_to_another_says_whose_it_is(tmp_path):
    run = stopped_run(tmp_path / "run", tmp_path / "ck")
    stopped_run(tmp_path / "other", tmp_path / "ck")
    with pytest.raises(UserError, match=f"now holds those of {tmp_path}/other"):
        pipeline.resume_run_dir(tmp_path / "run", run, restart_stage=False)


def test_a_run_that_took_no_step_needs_no_folder_and_one_that_stopped_has_its_own(tmp_path):
    for saved, steps in ((None, 0), ("run", 5)):
        run = stopped_run(tmp_path / f"{steps}", tmp_path / f"ck-{steps}", steps=steps, saved=saved)
        shutil.rmtree(tmp_path / f"ck-{steps}")
        pipeline.resume_run_dir(tmp_path / f"{steps}", run, restart_stage=False)


@pytest.mark.parametrize("saved", ["run", "folder"])
def test_a_copy_takes_the_checkpoint_from_where_it_lies_to_its_own_folder(tmp_path, saved):
    run = stopped_run(tmp_path / "run", tmp_path / "ck", saved=saved)
    here = replace(run, checkpoint=CheckpointConfig(folder=str(tmp_path / "new-ck")))
    pipeline.copy_run_dir(tmp_path / "run", tmp_path / "new", here, restart_stage=False)
    assert Checkpoints(tmp_path / "new-ck" / "sft").latest() == 5
    assert not (tmp_path / "new" / "checkpoints").exists()
    if saved == "folder":  # of the same machine: the two runs may not share one
        with pytest.raises(UserError, match="name another --checkpoint.folder"):
            pipeline.copy_run_dir(tmp_path / "run", tmp_path / "b", run, restart_stage=False)


def test_a_copy_without_its_checkpoints_is_refused_unless_the_stage_may_begin_again(tmp_path):
    run = stopped_run(tmp_path / "run", tmp_path / "ck", saved="folder")
    mounted = (tmp_path / "run").rename(tmp_path / "mounted")  # and another session's /tmp
    shutil.rmtree(tmp_path / "ck")
    with pytest.raises(UserError, match="ck, which is gone"):
        pipeline.copy_run_dir(mounted, tmp_path / "new", run, restart_stage=False)
    pipeline.copy_run_dir(mounted, tmp_path / "new", run, restart_stage=True)
    assert run_dirs.owner(tmp_path / "ck") == tmp_path / "new"


def test_a_copy_that_was_cut_short_begins_again_beside_its_own_checkpoints(tmp_path):
    run = stopped_run(tmp_path / "run", tmp_path / "ck", saved="folder")
    here = replace(run, checkpoint=CheckpointConfig(folder=str(tmp_path / "new-ck")))
    pipeline.copy_run_dir(tmp_path / "run", tmp_path / "new", here, restart_stage=False)
    (tmp_path / "new" / run_dirs.CONFIG).rename(tmp_path / "new" / run_dirs.COPYING)
    pipeline.copy_run_dir(tmp_path / "run", tmp_path / "new", here, restart_stage=False)
    assert Checkpoints(tmp_path / "new-ck" / "sft").latest() == 5


@pytest.mark.parametrize("name", ["a[1]", "what?"])
def test_checkpoints_go_to_no_folder_that_they_could_not_be_read_back_from(tmp_path, name):
    with pytest.raises(UserError, match="its path holds"):
        run_dirs.claim_checkpoints(tmp_path / name, tmp_path / "run")
    run = stopped_run(tmp_path / "run", tmp_path / "ck", saved="run")
    renamed = (tmp_path / "run").rename(tmp_path / name)
    with pytest.raises(UserError, match="its path holds"):
        pipeline.resume_run_dir(renamed, run, restart_stage=True)


def test_files_of_another_kind_in_the_checkpoints_place_are_left_alone(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match="sft is there already"):
        run_dirs.claim_checkpoints(tmp_path, tmp_path / "run")
    assert (tmp_path / "sft" / "train.jsonl").read_text() == "{}"


def test_two_runs_at_a_time_do_not_share_a_folder_for_checkpoints(capsys, tmp_path):
    folder = tmp_path / "ck"
    with run_dirs.hold_checkpoints(str(folder), is_new=True):
        run_dirs.claim_checkpoints(folder, tmp_path / "first")
        line = says(
            capsys, "--run-dir", str(tmp_path / "second"), "--checkpoint.folder", str(folder)
        )
    assert "ck is in use" in line and "name another --checkpoint.folder" in line
    assert run_dirs.owner(folder) == tmp_path / "first"


@pytest.mark.parametrize("inside", [".", "ck", "../link"])
def test_a_folder_for_checkpoints_within_the_runs_own_is_refused_before_anything_is_made(
    capsys, tmp_path, inside
):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    folder = os.path.normpath(tmp_path / "run" / inside)
    line = says(capsys, "--run-dir", str(tmp_path / "run"), "--checkpoint.folder", folder)
    assert f"--checkpoint.folder {folder} is in the run's own folder" in line
    run = config.RunConfig(checkpoint=CheckpointConfig(folder=folder))
    with pytest.raises(UserError, match="is in the run's own folder"):
        api.fit(run, run_dir=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_folder_for_checkpoints_beside_the_runs_own_is_apart(tmp_path):
    for folder in ("", str(tmp_path / "run-ck"), str(tmp_path)):
        run_dirs.require_apart(folder, tmp_path / "run")


def test_a_snapshot_where_a_stage_was_stopped_is_not_paired_with_all_problems(tmp_path):
    run, folder = config.RunConfig(), tmp_path / "evaluations"
    none = {name: np.zeros(0, int) for name in ("num_tokens", "token_ids", "characters")}
    none |= {name: np.zeros(0) for name in ("logps", "gaps")}
    for name, n in (("base", 6), ("grpo-step-000001", 2)):
        rows = [{"greedy": True}] * n
        evaluations.write(folder, name, {"n": n, "accuracy": 0.5}, rows, none)
    summary = pipeline._summarize(run, ["base", "grpo-step-000001"], tmp_path, None)
    assert list(summary["stages"]) == ["base"] and summary["paired"] == {}


def test_weights_of_steps_after_the_last_good_one_are_removed(tmp_path):
    names = [run_dirs.partial_name("grpo", step) for step in (5, 20, 120)] + ["sft", "grpo"]
    (tmp_path / "weights").mkdir()
    left = lambda: sorted(path.stem for path in (tmp_path / "weights").iterdir())
    for name in names:
        (tmp_path / "weights" / f"{name}.safetensors").touch()
    run_dirs.remove_partial_weights(tmp_path, "grpo", 20)
    assert left() == sorted(set(names) - {"grpo-step-000120"})
    run_dirs.remove_partial_weights(tmp_path, "grpo")
    assert left() == ["grpo", "sft"]


def test_a_file_in_the_place_of_the_checkpoints_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = says(
        capsys, "--run-dir", str(tmp_path / "run"), "--checkpoint.folder", str(tmp_path / "file")
    )
    assert "cannot write" in line and "name another --checkpoint.folder" in line


def test_a_disk_too_small_for_the_run_is_one_line_before_anything_is_made(
    capsys, tmp_path, monkeypatch
):
    usage = shutil._ntuple_diskusage(10**12, 0, 10**6)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    for arguments in ([], ["--dry-run"]):
        line = says(capsys, "--run-dir", str(tmp_path / "run"), *arguments)
        assert "too small for the run" in line and not (tmp_path / "run").exists()


def test_problems_of_named_difficulties_alone_are_learnt_from_and_held_out():
    run = config.RunConfig().replace({"data.difficulties": "hard, easy", "data.num_train": 6})
    rows = [Problem(f"q {n}", "1", None, DIFFICULTIES[n % 3]) for n in range(90)]
    for given in (pipeline.NOTHING_GIVEN, pipeline.Given(problems=rows)):
        train, test = given.load_problems(run)
        for side in (train, test):
            assert {problem.difficulty for problem in side} == {"easy", "hard"}
        assert len(train) == 6


@pytest.mark.parametrize("wrong", ["", "easy,", "easy medium", "Easy"])
def test_difficulties_that_are_none_are_refused(wrong):
    with pytest.raises(UserError, match="data: difficulties=.*easy,medium,hard"):
        config.RunConfig().replace({"data.difficulties": wrong})
