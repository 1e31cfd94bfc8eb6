"""A guarded stage of one array: where it stops or goes back to, what is left, how it resumes.

The learning rate is 4: each step adds that to the weight, and the KL is the weight before the step.
Steps 1 to 5 have the KL 0, 4, 8, 12, 16. The limit is 10, the patience 2: step 5 is a collapse.
"""

import json
import math
import os
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_grpo.errors import InterruptedRunError, UserError
from gemma_grpo.records import rollbacks
from gemma_grpo.records.metrics import MetricsWriter, NotFiniteError
from gemma_grpo.records.rollbacks import Rollback
from gemma_grpo.training import rollback, saving
from gemma_grpo.training.config import CheckpointConfig, GuardConfig
from gemma_grpo.training.deadline import Deadline, OutOfTimeError
from gemma_grpo.training.guard import CollapsedError
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.loop import RunFiles, Snapshots, StepResult
from gemma_grpo.training.state import TrainState

RATE = 4.0
ROLLBACK = GuardConfig(action="rollback", patience=2, max_kl=10.0)
STOP = GuardConfig(action="stop", patience=2, max_kl=10.0)


class Killed(BaseException):
    """The process is gone: nothing more is done."""


def steps_at(factor, before=lambda number: None):
    """The step function at this share of the rate; `before` is called with each step's number."""

    def step(state, number):
        before(number + 1)
        weight = float(state.params["w"])
        moved = TrainState({"w": jnp.float32(weight + factor * RATE)}, (), state.num_updates + 1)
        metrics = {"loss": 0.0, "kl": weight, "learning_rate": factor * RATE}
        return moved, StepResult(metrics, [{"completion": f"{weight:g}", "reward": 1.0}])

    return step


def fresh():
    return TrainState({"w": jnp.float32(0)}, (), jnp.int32(0))


def train(run_dir, guard=ROLLBACK, *, before=lambda number: None, steps=6, **settings):
    """A session of the stage; returns the weight after its last step."""
    settings = {"interrupt": Interrupt(), "every": 2} | settings
    every, interrupt = settings.pop("every"), settings.pop("interrupt")
    files = RunFiles(run_dir, None, interrupt, **settings)
    newest = files.checkpoints("grpo").newest()
    begin = {"stage": "grpo", "step": int(newest.name) if newest else 0}
    files = RunFiles(run_dir, MetricsWriter(run_dir, begin), interrupt, **settings)
    try:
        state = rollback.run_guarded(
            "grpo",
            lambda factor: (steps_at(factor, before), fresh),
            files,
            guard,
            num_steps=steps,
            checkpoint_every=every,
        )
    finally:
        files.writer.close()
    return float(state.params["w"])


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


WHY = "kl was above 10 in steps {} to {} (last {})"
# At half the rate steps 3 to 6 have the KL 8, 10, 12, 14; at a quarter 8, 9, 10, 11: no collapse.
WANTED = [
    Rollback(WHY.format(4, 5, 16), at=5, to=2, rate_factor=0.5),
    Rollback(WHY.format(5, 6, 14), at=6, to=2, rate_factor=0.25),
]
WANTED_KL, WANTED_RATES = [0, 4, 8, 9, 10, 11], [4, 4, 1, 1, 1, 1]


def assert_wanted(run_dir, weight):
    """What the stage leaves, by the arithmetic above."""
    assert weight == 12
    assert rollbacks.read(run_dir) == WANTED
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert [line["kl"] for line in lines(run_dir)] == WANTED_KL
    assert [line["learning_rate"] for line in lines(run_dir)] == WANTED_RATES
    texts = [path.read_text() for path in sorted((run_dir / "rollouts").glob("*.jsonl"))]
    assert [json.loads(text)["completion"] for text in texts] == [f"{kl}" for kl in WANTED_KL]


def test_a_collapse_goes_back_to_the_last_good_checkpoint_with_half_the_rate(tmp_path, capsys):
    assert_wanted(tmp_path, train(tmp_path))
    said = capsys.readouterr().err
    assert (
        f"warning: grpo has collapsed: {WANTED[0].why}; back to step 2, on with 0.5 times" in said
    )
    assert "(rollback 2 of 3)" in said


def test_a_rollback_removes_the_partial_weights_of_steps_after_it(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for step in (2, 4):
        (folder / f"grpo-step-{step:06d}.safetensors").touch()
    train(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["grpo-step-000002.safetensors"]


def test_the_collapse_that_is_one_too_many_stops_with_the_last_good_weights(tmp_path):
    guard = GuardConfig(action="rollback", patience=2, max_kl=10.0, rollbacks=1)
    with pytest.raises(CollapsedError) as stop:
        train(tmp_path, guard)
    assert (stop.value.why, stop.value.step, stop.value.num_steps) == (WANTED[1].why, 2, 6)
    assert float(stop.value.params["w"]) == 8
    assert rollbacks.read(tmp_path) == WANTED[:1]


def test_a_stop_leaves_the_last_good_checkpoint_as_the_newest_and_what_was_seen(tmp_path):
    with pytest.raises(CollapsedError, match="kl was above 10 in steps 4 to 5") as stop:
        train(tmp_path, STOP)
    assert (stop.value.step, float(stop.value.params["w"])) == (2, 8)
    assert saved(tmp_path / "checkpoints/grpo") == ["000002"]
    assert [line["kl"] for line in lines(tmp_path)] == [0, 4, 8, 12, 16]
    assert rollbacks.read(tmp_path) == []
    with pytest.raises(CollapsedError, match="in steps 4 to 5"):  # as it began it goes on
        train(tmp_path, STOP)
    assert train(tmp_path, GuardConfig()) == 24  # none looks on
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_before_the_first_good_checkpoint_it_goes_back_to_the_beginning(tmp_path):
    """Only step 4 would have a checkpoint. Half the rate has the KL 0, 2, 4, 6, 8, 10."""
    assert train(tmp_path, every=4) == 12
    assert rollbacks.read(tmp_path) == [Rollback(WHY.format(4, 5, 16), at=5, to=0, rate_factor=0.5)]
    assert [line["kl"] for line in lines(tmp_path)] == [0, 2, 4, 6, 8, 10]
    assert [line["learning_rate"] for line in lines(tmp_path)] == [2] * 6


def test_without_any_good_checkpoint_a_stop_has_no_weights_to_leave(tmp_path):
    with pytest.raises(CollapsedError) as stop:
        train(tmp_path, STOP, every=4)
    assert (stop.value.step, stop.value.params) == (0, None)
    assert saved(tmp_path / "checkpoints/grpo") == []


def test_a_collapse_in_the_last_step_counts(tmp_path):
    with pytest.raises(CollapsedError):
        train(tmp_path, STOP, steps=5)


def test_a_guard_that_is_off_changes_nothing(tmp_path):
    assert train(tmp_path, GuardConfig(patience=2, max_kl=10.0)) == 24
    assert not (tmp_path / "rollbacks.json").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_the_good_checkpoint_is_kept_whatever_is_saved_after_it(tmp_path, keep):
    most = 0

    def before(number):
        nonlocal most
        folder = tmp_path / "checkpoints/grpo"
        most = max(most, len(list(folder.glob("*/SHA256SUMS"))))

    assert_wanted(tmp_path, train(tmp_path, before=before, saving=CheckpointConfig(keep=keep)))
    assert most <= keep + 1


def test_where_a_guard_may_go_back_to_is_saved_whatever_share_of_the_time_it_takes(
    tmp_path, monkeypatch
):
    """A run that was put off here and not there would go back to another step."""
    monkeypatch.setattr(saving.Schedule, "is_due", lambda *_, **__: False)
    assert_wanted(tmp_path, train(tmp_path))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_nan_is_gone_back_from_at_once_and_without_a_guard_ends_the_run(
    tmp_path, monkeypatch, name
):
    of_rate = steps_at

    def steps(factor, before):
        def step(state, number):
            state, result = of_rate(factor, before)(state, number)
            if factor == 1 and number == 3:
                result.metrics[name] = math.nan
            return state, result

        return step

    monkeypatch.setitem(globals(), "steps_at", steps)
    with pytest.raises(NotFiniteError, match=f"{name} is nan at grpo step 4"):
        train(tmp_path / "a", GuardConfig())
    guard = GuardConfig(action="rollback", max_kl=100.0)
    assert train(tmp_path / "b", guard) == 2 * 4 + 4 * 2
    (noted,) = rollbacks.read(tmp_path / "b")
    assert (noted.why, noted.at, noted.to) == (f"{name} was not finite in step 4", 4, 2)


def test_snapshots_after_the_step_gone_back_to_are_gone_and_taken_again(tmp_path):
    folder = tmp_path / "evaluations"
    folder.mkdir()

    def take(step, params):
        (folder / f"grpo-step-{step:06d}.json").write_text(f"{float(params['w']):g}")
        return {"evaluation/accuracy": 0.5}

    seen = []
    snapshots = Snapshots(1, take)
    train(tmp_path, before=lambda number: seen.append(saved(folder)), snapshots=snapshots)
    names = [f"grpo-step-{step:06d}.json" for step in range(1, 7)]
    assert seen[5] == names[:2]  # the sixth step taken is the third again
    assert saved(folder) == names
    assert [float((folder / name).read_text()) for name in names] == [4, 8, 9, 10, 11, 12]


# --- stopped and resumed -------------------------------------------------------------------------

ALL_STEPS = 5 + 4 + 4  # before the first collapse, before the second, to the end


def killed_before(count):
    """Ends the process before the step that is the `count`th to be taken, from 1. The save under
    way is whole by then: a thread of this process would go on where a killed one's does not."""
    taken = 0

    def before(number):
        nonlocal taken
        taken += 1
        if taken == count:
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint"):
                    thread.join()
            raise Killed

    return before


@pytest.mark.parametrize("count", range(3, ALL_STEPS + 1, 2))
def test_a_run_killed_before_any_step_ends_in_the_same_bits(tmp_path, count):
    with pytest.raises(Killed):
        train(tmp_path, before=killed_before(count))
    assert_wanted(tmp_path, train(tmp_path))


@pytest.mark.parametrize(
    "count, folder", [*((n, "") for n in range(1, ALL_STEPS)), (5, "scratch"), (7, "scratch")]
)
def test_a_signal_in_any_step_ends_in_the_same_bits(tmp_path, count, folder):
    """What is saved for it lies between the checkpoints that are gone back to, or after a collapse
    has begun to show."""
    taken, interrupt = 0, Interrupt()

    def before(number):
        nonlocal taken
        taken += 1
        if taken == count:
            interrupt._note(15, None)

    saving = CheckpointConfig(keep=1, folder=str(tmp_path / folder) if folder else "")
    run_dir = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        train(run_dir, before=before, interrupt=interrupt, saving=saving)
    assert_wanted(run_dir, train(run_dir, saving=saving))


class Stopping(Deadline):
    """Has no time for one more step after the `count`th question."""

    def __init__(self, count):
        super().__init__()
        self.left_to_ask = count

    def allows(self, *kinds):
        self.left_to_ask -= 1
        return self.left_to_ask > 0


@pytest.mark.parametrize("count", range(2, 26, 5))
def test_a_deadline_anywhere_ends_in_the_same_bits(tmp_path, count):
    with pytest.raises(OutOfTimeError):
        train(tmp_path, deadline=Stopping(count))
    assert_wanted(tmp_path, train(tmp_path))


def test_without_time_for_a_save_that_a_guard_needs_the_run_stops_there(tmp_path):
    class NoSaveBeside(Deadline):
        def allows(self, *kinds):
            return kinds.count("save") < 3  # one is being written

    with pytest.raises(OutOfTimeError) as stop:
        train(tmp_path, deadline=NoSaveBeside())
    assert stop.value.step == 2 and saved(tmp_path / "checkpoints/grpo") == ["000002"]
    assert_wanted(tmp_path, train(tmp_path))


@pytest.mark.parametrize("when", ["before the note", "after the note"])
def test_a_process_killed_within_a_rollback_ends_in_the_same_bits(tmp_path, monkeypatch, when):
    write = rollbacks.write

    def killing(run_dir, past):
        if when == "after the note":
            write(run_dir, past)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(rollbacks, "write", killing)
        with pytest.raises(Killed):
            train(tmp_path)
    assert len(lines(tmp_path)) == 5
    assert_wanted(tmp_path, train(tmp_path))


def test_with_the_checkpoint_gone_back_to_lost_the_time_before_it_is_taken_again(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, before=killed_before(7))  # after the first rollback
    assert rollbacks.read(tmp_path) == WANTED[:1]
    assert saved(tmp_path / "checkpoints/grpo") == ["000002"]
    shutil.rmtree(tmp_path / "checkpoints/grpo/000002")
    assert_wanted(tmp_path, train(tmp_path))


def test_a_rollback_that_no_longer_lies_behind_is_struck_from_the_record(tmp_path, monkeypatch):
    """Else a later session, beyond the step gone back to, would take its lower rate."""
    first, second = (Rollback("", to + 3, to, 1 / to) for to in (2, 6))
    rollbacks.write(tmp_path, [first, second])
    monkeypatch.setattr(saving.StageCheckpoints, "newest", lambda _: Path("000004"))
    assert rollback._past("grpo", RunFiles(tmp_path, None, Interrupt())) == [first]
    assert rollbacks.read(tmp_path) == [first]


def test_a_damaged_record_stops_the_run_in_one_line(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, before=killed_before(8))
    names = "why", "at", "to", "rate_factor"
    of = lambda *values: json.dumps([dict(zip(names, ("why", *values), strict=True))])
    wrong = of(2, 4, 0.5), of(4, -1, 0.5), of("4", 2, 0.5), of(4, 2, "half"), of(4, 2, None)
    for text in ("[{", "[1]", '[{"at": 1}]', "3", "true", "[" * 10**5, '{"a": 1}', *wrong):
        (tmp_path / rollbacks.NAME).write_text(text)
        with pytest.raises(UserError, match="rollbacks.json is damaged; put back a copy") as caught:
            train(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / rollbacks.NAME).unlink()
    os.mkfifo(tmp_path / rollbacks.NAME)
    with pytest.raises(UserError, match="rollbacks.json is damaged"):
        train(tmp_path)


def test_rollbacks_to_later_steps_than_the_one_gone_on_from_do_not_lie_behind():
    to = lambda *steps: [Rollback("", step + 3, step, 0.5) for step in steps]
    assert rollbacks.until(to(40, 60), 60) == to(40, 60)
    assert rollbacks.until(to(40, 60), 50) == to(40)
    assert rollbacks.until(to(40, 60), 30) == []
    assert rollbacks.until(to(40, 20), 20) == to(40, 20)
    assert rollbacks.until(to(40, 20), 10) == []
    assert rollbacks.until([], 0) == []


def test_the_record_is_json_that_says_what_was_seen(tmp_path):
    train(tmp_path)
    rows = json.loads((tmp_path / rollbacks.NAME).read_text())
    assert rows[0] == {"why": WANTED[0].why, "at": 5, "to": 2, "rate_factor": 0.5}
    np.testing.assert_array_equal([row["rate_factor"] for row in rows], [0.5, 0.25])


def test_the_record_is_replaced_whole_by_the_next_one(tmp_path):
    first, second = WANTED
    rollbacks.write(tmp_path, [first])
    os.link(tmp_path / rollbacks.NAME, tmp_path / "old")
    before = (tmp_path / "old").read_text()
    rollbacks.write(tmp_path, [first, second])
    assert (tmp_path / "old").read_text() == before  # what a kill would have left, to the end
    assert rollbacks.read(tmp_path) == [first, second]
