"""W&B and trackio get what the files get, under the same names; a failure does not stop a run."""

import json
import subprocess
import sys
from types import ModuleType

import children
import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records import metrics, trackers
from gemma_grpo.records.metrics import MetricsWriter


class Stub(ModuleType):
    """Stands in for a tracker's package: writes down the calls."""

    def __init__(self, name, fails=False):
        super().__init__(name)
        self.calls, self.fails = [], fails

    def init(self, project, name, config):
        self.calls.append(("init", project, name, config))

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("no network\nat all")
        self.calls.append(("log", values, step))

    def Table(self, columns, data):  # noqa: N802 (theirs)
        return columns, data

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture(params=["wandb", "trackio"])
def stub(request, monkeypatch):
    stub = Stub(request.param)
    monkeypatch.setitem(sys.modules, request.param, stub)
    return stub


def test_a_tracker_gets_the_numbers_of_the_file_in_a_run_for_each_stage(tmp_path, stub):
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 3\n")
    writer = MetricsWriter(run_dir, tracker=stub.__name__)
    writer.write("sft", 1, {"loss": 0.5, "phase": "easy", "kl": None})
    writer.write("grpo", 1, {"reward/mean": 0.25})
    writer.close()
    assert stub.calls == [
        ("init", "gemma_grpo", "mine-sft", {"seed": 3}),
        ("log", {"loss": 0.5}, 1),
        ("finish",),
        ("init", "gemma_grpo", "mine-grpo", {"seed": 3}),
        ("log", {"reward/mean": 0.25}, 1),
        ("finish",),
    ]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss") for line in lines] == [0.5, None]


def test_completions_go_as_a_table_each_tenth_step(tmp_path, stub):
    writer = MetricsWriter(tmp_path, tracker=stub.__name__)
    for step in range(1, 21):
        writer.write_rollouts("grpo", step, [{"completion": f"text {step}", "reward": 0.5}])
    writer.close()
    tables = [(call[2], call[1]["rollouts"]) for call in stub.calls if call[0] == "log"]
    assert [step for step, _ in tables] == [1, 10, 20]
    columns, data = tables[1][1]
    assert dict(zip(columns, data[0], strict=True))["completion"] == "text 10"


def test_evaluations_are_a_run_of_their_own(tmp_path, stub):
    metrics.write_evaluation(tmp_path, "sft", {"accuracy": 0.5}, stub.__name__)
    assert stub.calls[1:] == [("log", {"evaluation/accuracy": 0.5}, 1), ("finish",)]


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Stub("wandb", fails=True))
    writer = MetricsWriter(tmp_path, tracker="wandb")
    for step in (1, 2, 3):
        writer.write("sft", step, {"loss": 0.5})
    writer.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: wandb failed and is left: ConnectionError: no network at all"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--tracker wandb: pip install 'gemma_grpo\[wandb\]'"):
        trackers.require("wandb")
    trackers.require("none")


OFFLINE = """
import sys
from pathlib import Path
from gemma_grpo.records import metrics
name, run = sys.argv[1], Path(sys.argv[2])
writer = metrics.MetricsWriter(run, tracker=name)
writer.write("sft", 1, {"loss": 0.5})
writer.write("grpo", 1, {"reward/mean": 0.25})
writer.write_rollouts("grpo", 1, [{"completion": "a text\\0", "reward": 0.5}])
writer.close()
metrics.write_evaluation(run, "sft", {"accuracy": 0.5}, name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_without_a_network_the_real_trackers_keep_metrics_tables_and_settings(name, tmp_path):
    pytest.importorskip(name, reason=f"pip install -e '.[{name}]'")
    run, kept = tmp_path / "mine", tmp_path / "kept"
    for folder in (run, kept):
        folder.mkdir()
    (run / "config.yaml").write_text("seed: 31415\n")
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(kept), "TRACKIO_DIR": str(kept)}
    command = [sys.executable, "-c", OFFLINE, name, str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=children.ENVIRONMENT | offline, check=True
    )
    assert "failed and is left" not in done.stderr
    found = b"".join(path.read_bytes() for path in kept.rglob("*") if path.is_file())
    for word in ("loss", "reward/mean", "a text", "evaluation/accuracy", "mine-grpo", "31415"):
        assert word.encode() in found, word
