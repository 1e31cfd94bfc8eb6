"""How much time a run has left, and what fits in it."""

import json
import subprocess
import sys
import time

import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.training import deadline
from gemma_grpo.training.deadline import Deadline


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the process's start, as the test sets them."""
    now = [0.0]
    monkeypatch.setattr(deadline, "seconds_since_start", lambda: now[0])
    return now


@pytest.mark.parametrize("hours", [-1.0, 0.0, float("nan"), float("inf")])
def test_hours_must_be_a_number_above_zero(hours):
    with pytest.raises(UserError, match="--hours"):
        Deadline(hours)


def test_without_hours_everything_fits():
    assert Deadline().allows("step", "save", "evaluate")


def test_a_kind_counts_its_longest_and_a_fifth_more_and_the_report(clock):
    session = Deadline(1.0)
    for seconds in (30.0, 100.0, 20.0):
        session.note("step", seconds)
    clock[0] = 3600 - 1.2 * 100 - 10
    assert session.allows("step") and not session.allows("step", "step")
    clock[0] += 0.5
    assert not session.allows("step")
    assert session.allows("evaluate")  # never measured


def test_the_first_checkpoint_is_expected_by_its_bytes_and_a_measured_one_is_not_forgotten(clock):
    session = Deadline(1.0)
    session.note("save", 5.0)
    session.expect_checkpoint(12 * 10**9)
    clock[0] = 3600 - 1.2 * 5 - 10
    assert session.allows("save")
    other = Deadline(1.0)
    other.expect_checkpoint(12 * 10**9)
    assert not other.allows("save")
    clock[0] = 3600 - 1.2 * 120 - 10.5
    assert other.allows("save")
    other.note("save", 5.0)
    clock[0] = 3600 - 1.2 * 5 - 10
    assert other.allows("save")


def test_evaluations_of_earlier_sessions_count(clock, tmp_path):
    (tmp_path / "seconds.json").write_text(json.dumps({"evaluate_base": 50.0, "sft": 900.0}))
    session = Deadline(1.0)
    session.note_earlier_sessions(tmp_path)
    clock[0] = 3600 - 1.2 * 50 - 10
    assert session.allows("evaluate")
    clock[0] += 1
    assert not session.allows("evaluate")


def test_time_counts_from_the_process_s_start():
    program = (
        "import time; time.sleep(1); started = time.monotonic()\n"
        "from gemma_grpo.training import deadline\n"
        "print(deadline.seconds_since_start() - (time.monotonic() - started))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 1.0 <= float(done.stdout) < 60, done.stderr


def test_a_clock_that_is_set_back_does_not_matter(monkeypatch):
    before = deadline.seconds_since_start()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert before <= deadline.seconds_since_start() < before + 60


def test_where_the_system_tells_no_start_time_counts_from_the_import(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(deadline.Path, "read_text", absent)
    assert deadline._age() == 0.0


def test_the_first_snapshot_is_taken_to_last_as_long_as_the_longest_evaluation(monkeypatch):
    monkeypatch.setattr(deadline, "seconds_since_start", lambda: 0.0)
    limit = deadline.Deadline(hours=(deadline.REPORT_SECONDS + 1.2 * 100) / 3600)
    limit.note("evaluate", 101.0)
    limit.expect_snapshot()
    assert not limit.allows("snapshot")
    limit = deadline.Deadline(hours=(deadline.REPORT_SECONDS + 1.2 * 100 + 1e-6) / 3600)
    limit.note("snapshot", 99.0)  # it is known now, whatever evaluations take
    limit.note("evaluate", 1000.0)
    limit.expect_snapshot()
    assert limit.allows("snapshot") and not limit.allows("snapshot", "snapshot")
