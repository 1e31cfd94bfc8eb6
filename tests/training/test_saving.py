"""When a state is saved, where it lies, and what a save that fails beside the training does."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_grpo.errors import InterruptedRunError, UserError
from gemma_grpo.records import checkpoint
from gemma_grpo.records.metrics import MetricsWriter
from gemma_grpo.records.watch import Watch
from gemma_grpo.training import loop, saving
from gemma_grpo.training.deadline import Deadline, OutOfTimeError
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.loop import RunFiles, Snapshots, StepResult, run_steps
from gemma_grpo.training.saving import CheckpointConfig, Schedule, stage_checkpoints
from gemma_grpo.training.state import TrainState


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as the test sets them."""
    now = [100.0]
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"minutes": -1.0}, "minutes=-1.0"),
        ({"minutes": float("nan")}, "minutes=nan"),
        ({"minutes": float("inf")}, "minutes=inf"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.5}, "share=1.5"),
        ({"share": float("nan")}, "share=nan"),
        ({"keep": 0}, "keep=0"),
        ({"folder": "relative"}, "folder='relative' must be an absolute path"),
    ],
)
def test_settings_without_sense_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        CheckpointConfig(**settings)


def test_steps_alone_save_at_their_multiples_also_after_a_save_between_them(clock):
    schedule = Schedule(CheckpointConfig(), 5, step=7, num_steps=10**6, num_bytes=0)
    assert [n for n in range(8, 21) if schedule.is_due(n, is_writing=False)][0] == 10
    schedule.note_begun(10, 0.0)
    assert [n for n in range(11, 21) if schedule.is_due(n, is_writing=False)][0] == 15


def test_no_steps_and_no_minutes_save_nothing(clock):
    schedule = Schedule(CheckpointConfig(), 0, step=0, num_steps=10**6, num_bytes=0)
    clock[0] += 10**6
    assert not any(schedule.is_due(n, is_writing=False) for n in range(1, 100))


def test_minutes_save_after_the_time_whatever_the_steps(clock):
    schedule = Schedule(CheckpointConfig(minutes=2.0), 0, step=0, num_steps=10**6, num_bytes=0)
    clock[0] += 119
    assert not schedule.is_due(3, is_writing=False)
    clock[0] += 1
    assert schedule.is_due(4, is_writing=False)
    schedule.note_begun(4, 0.1)
    assert not schedule.is_due(5, is_writing=False)


def test_a_save_is_put_off_until_its_share_allows_it_and_stays_due(clock):
    """Saves of 6 s, a share of 5 %: after the first the second fits from 12 / 0.05 - 6 = 234 s."""
    schedule = Schedule(
        CheckpointConfig(share=0.05), 10, step=0, num_steps=10**6, num_bytes=6 * 10**9
    )
    clock[0] = 100 + 113.9  # the first from 6 / 0.05 - 6 = 114 s
    assert not schedule.is_due(10, is_writing=False)
    clock[0] = 100 + 114.1
    assert schedule.is_due(13, is_writing=False)
    schedule.note_begun(13, 6.0)
    assert not schedule.is_due(19, is_writing=False)
    clock[0] = 100 + 233.9
    assert not schedule.is_due(20, is_writing=False)
    clock[0] = 100 + 234.1
    assert schedule.is_due(24, is_writing=False)


@pytest.mark.parametrize(
    "num_steps, a_step, copying, writing",
    # All weights of the 1B: 500 GRPO steps of 1.14 s (model), 12 GB; to the host at the rate that
    # is taken before one was measured, to the disk at 0.15 GB/s. Then slower and longer ones.
    [
        (500, 1.14, 12.0, 80.0),
        (500, 1.14, 3.0, 80.0),
        (2000, 1.0, 3.0, 7.0),
        (300, 6.0, 60.0, 90.0),
    ],
)
def test_over_a_stage_the_share_is_kept(clock, num_steps, a_step, copying, writing):
    num_bytes = int(1e9 * copying)
    config = CheckpointConfig(share=0.05)
    schedule = Schedule(config, 1, step=0, num_steps=num_steps, num_bytes=num_bytes)
    began, stood_still, written_at, saves = clock[0], 0.0, 0.0, 0
    for step in range(1, num_steps):
        clock[0] += a_step
        if written_at and clock[0] >= written_at:
            schedule.note_written(float(writing))
        if schedule.is_due(step, is_writing=clock[0] < written_at):
            written_at, saves = clock[0] + writing, saves + 1
            clock[0] += copying
            stood_still += copying
            schedule.note_begun(step, float(copying))
        assert stood_still <= 0.05 * (clock[0] - began) + 1e-6
    stood_still += max(written_at - clock[0] - a_step, 0.0)  # its end waits for the last save
    assert stood_still <= 0.05 * (clock[0] - began)
    assert saves >= 1


def test_a_save_that_would_not_be_whole_before_the_stages_end_is_not_begun(clock):
    schedule = Schedule(CheckpointConfig(), 1, step=100, num_steps=200, num_bytes=10**9)
    clock[0] += 1000  # 20 steps of 50 s
    schedule.note_written(250.0)
    assert schedule.is_due(120, is_writing=False)
    clock[0] += 3750
    assert schedule.is_due(195, is_writing=False)
    clock[0] += 50
    assert not schedule.is_due(196, is_writing=False)


def test_seconds_in_which_training_stood_still_to_save_are_none_of_a_steps(clock):
    config = CheckpointConfig(share=1.0)
    schedule = Schedule(config, 1, step=0, num_steps=20, num_bytes=10**9)
    schedule.note_begun(5, 100.0)
    schedule.note_written(150.0)
    clock[0] += 200  # 10 steps of 10 s, beside the 100 s of the save
    assert not schedule.is_due(10, is_writing=False)  # the 10 steps left take 100 s
    schedule.note_written(100.0)
    assert schedule.is_due(10, is_writing=False)


def test_a_small_state_is_saved_whenever_it_is_due_so_that_load_changes_no_run(clock):
    schedule = Schedule(
        CheckpointConfig(share=0.001), 2, step=0, num_steps=10**6, num_bytes=5 * 10**6
    )
    for step in range(1, 20):
        assert schedule.is_due(step, is_writing=True) == (step % 2 == 0)
        if step % 2 == 0:
            schedule.note_begun(step, 100.0)


def test_no_save_of_a_large_state_begins_while_one_is_written(clock):
    schedule = Schedule(CheckpointConfig(), 1, step=0, num_steps=10**6, num_bytes=10**9)
    clock[0] += 1000
    assert not schedule.is_due(1, is_writing=True)
    assert schedule.is_due(1, is_writing=False)


# --- the loop, with a state of one array ---------------------------------------------------------


def fresh():
    return TrainState({"w": jnp.arange(8.0)}, (), jnp.int32(0))


@jax.jit
def double(w):
    return w * 2 + 1


def step_fn(state, step):
    w = double(state.params["w"])
    return TrainState({"w": w}, (), state.num_updates + 1), StepResult({"loss": float(w[0])})


def train(run_dir, *, steps=6, every=2, step=step_fn, interrupt=None, **settings):
    """Runs a stage; returns its weights, which are also what it leaves."""
    left = []
    done = stage_checkpoints(run_dir, "sft", settings.get("saving", CheckpointConfig())).newest()
    resume_from = {"stage": "sft", "step": int(done.name) if done else 0}
    settings = {"write_weights": left.append} | settings
    writer = MetricsWriter(run_dir, resume_from=resume_from)
    files = RunFiles(run_dir, writer, interrupt or Interrupt(), **settings)
    try:
        state = run_steps("sft", step, fresh(), files, num_steps=steps, checkpoint_every=every)
    finally:
        writer.close()
    if left:
        assert left == [state.params]
    return np.asarray(state.params["w"])


def wanted(steps=6):
    return np.float32([2**steps * n + 2**steps - 1 for n in range(8)])


def saved(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_last_step_is_saved_only_if_asked_since_the_weights_hold_it(tmp_path):
    np.testing.assert_array_equal(train(tmp_path / "a"), wanted())
    assert saved(tmp_path / "a/checkpoints/sft") == ["000002", "000004"]
    train(tmp_path / "b", keep_last=True)
    assert saved(tmp_path / "b/checkpoints/sft") == ["000004", "000006"]


def test_if_the_weights_cannot_be_written_the_state_is_saved(tmp_path):
    def full(params):
        raise UserError("cannot write weights")

    with pytest.raises(UserError, match="cannot write weights"):
        train(tmp_path, every=0, write_weights=full)
    assert saved(tmp_path / "checkpoints/sft") == ["000006"]

    def never(state, step):
        raise AssertionError("no step is taken again")

    np.testing.assert_array_equal(train(tmp_path, every=0, step=never), wanted())


def test_a_signal_while_the_weights_are_written_is_heard_after_them(tmp_path):
    interrupt, left = Interrupt(), []

    def write_weights(params):
        interrupt._note(15, None)
        left.append(params)

    with pytest.raises(InterruptedRunError):
        train(tmp_path, interrupt=interrupt, write_weights=write_weights)
    assert len(left) == 1


def slow_writing(monkeypatch, seconds, error=None):
    """Every save takes so long in the background, and then fails if there is an error."""
    begin = checkpoint._begin_write

    def begin_slowly(path, arrays):
        written = begin(path, arrays)

        def wait():
            time.sleep(seconds)
            written()
            if error:
                raise error

        return wait

    monkeypatch.setattr(checkpoint, "_begin_write", begin_slowly)


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    slow_writing(monkeypatch, 0.3)
    seen = []

    def step(state, number):
        seen.append(saved(tmp_path / "checkpoints/sft"))
        return step_fn(state, number)

    train(tmp_path, steps=4, every=2, step=step)
    assert seen[2] == ["000002.tmp"]
    assert saved(tmp_path / "checkpoints/sft") == ["000002"]  # the end waits for it


def test_a_save_that_fails_beside_the_steps_stops_the_run_in_one_line(tmp_path, monkeypatch):
    train(tmp_path, steps=2, every=1)
    with monkeypatch.context() as patched:
        slow_writing(patched, 0.0, OSError(28, "No space left on device", "x"))

        def step(state, number):
            time.sleep(0.3 if number >= 4 else 0.0)
            return step_fn(state, number)

        with pytest.raises(UserError, match="000004: No space left .*step 1 is kept") as caught:
            train(tmp_path, steps=30, every=4, step=step)
    assert "\n" not in str(caught.value)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps[-1] < 8  # soon, not at the next save
    assert saved(tmp_path / "checkpoints/sft") == ["000001"]
    np.testing.assert_array_equal(train(tmp_path), wanted())


def failing_at(number):
    def step(state, step):
        if step == number:
            raise UserError("a reward failed")
        return step_fn(state, step)

    return step


@pytest.mark.parametrize("end", ["error", "signal", "deadline"])
def test_every_early_end_waits_for_the_save_under_way_and_saves_its_step(
    tmp_path, monkeypatch, end
):
    slow_writing(monkeypatch, 0.2)
    interrupt, deadline = Interrupt(), Deadline()

    def step(state, number):
        if number == 2 and end == "signal":
            interrupt._note(15, None)
        if number == 2 and end == "deadline":
            monkeypatch.setattr(deadline, "allows", lambda *kinds: False)
        return (failing_at(3) if end == "error" else step_fn)(state, number)

    errors = UserError, InterruptedRunError, OutOfTimeError
    with pytest.raises(errors):
        train(tmp_path, every=2, step=step, interrupt=interrupt, deadline=deadline)
    assert saved(tmp_path / "checkpoints/sft") == ["000002", "000003"]
    monkeypatch.undo()
    np.testing.assert_array_equal(train(tmp_path), wanted())


class Asked(Deadline):
    """Allows all, and keeps what it was asked for."""

    def __init__(self):
        super().__init__()
        self.kinds = []

    def allows(self, *kinds):
        self.kinds.append(kinds)
        return True


def test_the_deadline_counts_a_save_that_may_still_be_under_way_and_a_snapshot_that_is_due(
    tmp_path,
):
    deadline = Asked()
    files = RunFiles(tmp_path, None, Interrupt(), deadline, snapshots=Snapshots(every=3))
    keeper = loop._Keeper("sft", 9, files, files.checkpoints("sft"), Watch("sft"))
    keeper._has_time(1, is_writing=True)
    assert deadline.kinds == [("step", "save", "save", "evaluate", "save")]
    for step in (2, 3, 5):  # the next are 3, 4 and 6
        keeper._has_time(step, is_writing=False)
    bare = ("step", "save", "save", "evaluate")
    assert deadline.kinds[1:] == [(*bare, "snapshot"), bare, (*bare, "snapshot")]


def test_snapshots_are_of_their_steps_weights_on_their_lines_and_taken_again_after_a_stop(tmp_path):
    taken = []

    def take(step, params):
        taken.append(step)
        return {"evaluation/accuracy": float(params["w"][0])}

    snapshots = Snapshots(2, take)
    with pytest.raises(UserError, match="a reward failed"):
        train(tmp_path, every=3, step=failing_at(4), snapshots=snapshots)
    np.testing.assert_array_equal(train(tmp_path, every=3, snapshots=snapshots), wanted())
    assert taken == [2, 4, 6]  # the stop after four steps saved them
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line.get("evaluation/accuracy") for line in lines}
    of = lambda steps: float(wanted(steps)[0])
    assert measured == {1: None, 2: of(2), 3: None, 4: of(4), 5: None, 6: of(6)}
    assert len(lines) == 6


def test_without_time_for_the_snapshot_its_step_is_not_taken(tmp_path, monkeypatch):
    class NoSnapshot(Deadline):
        def allows(self, *kinds):
            return "snapshot" not in kinds

    with pytest.raises(OutOfTimeError) as stop:
        train(tmp_path, deadline=NoSnapshot(), snapshots=Snapshots(4))
    assert stop.value.step == 3 and saved(tmp_path / "checkpoints/sft")[-1] == "000003"


def test_no_save_is_begun_that_would_leave_the_next_step_no_time_to_stop(tmp_path):
    class NoThirdSave(Deadline):
        def allows(self, *kinds):
            return kinds.count("save") < 3

    trained = train(tmp_path, every=2, deadline=NoThirdSave())
    np.testing.assert_array_equal(trained, wanted())
    assert not (tmp_path / "checkpoints").exists()


# --- a folder of their own -----------------------------------------------------------------------


def test_with_a_folder_the_runs_own_holds_only_the_checkpoint_of_an_early_end(tmp_path):
    run_dir, own = tmp_path / "run", tmp_path / "scratch"
    how = {"saving": CheckpointConfig(folder=str(own)), "every": 2}
    with pytest.raises(UserError, match="a reward failed"):
        train(run_dir, step=failing_at(5), **how)
    assert saved(own / "sft") == ["000002", "000004"]
    assert saved(run_dir / "checkpoints/sft") == ["000005"]
    with pytest.raises(UserError, match="a reward failed"):  # before any step
        train(run_dir, step=failing_at(5), **how)
    assert saved(own / "sft") == ["000002", "000004", "000005"]
    assert saved(run_dir / "checkpoints/sft") == ["000005"]
    np.testing.assert_array_equal(train(run_dir, **how), wanted())
    assert saved(run_dir / "checkpoints/sft") == []


def test_without_the_folder_a_stopped_run_goes_on_from_its_own(tmp_path):
    run_dir, own = tmp_path / "run", tmp_path / "scratch"
    with pytest.raises(UserError, match="a reward failed"):
        train(run_dir, step=failing_at(3), saving=CheckpointConfig(folder=str(own)))
    other = CheckpointConfig(folder=str(tmp_path / "next session"))
    taken = []

    def step(state, number):
        taken.append(number)
        return step_fn(state, number)

    np.testing.assert_array_equal(train(run_dir, step=step, saving=other), wanted())
    assert taken == [3, 4, 5]


def test_a_damaged_copy_does_not_replace_its_original(tmp_path, monkeypatch):
    how = CheckpointConfig(folder=str(tmp_path / "scratch"))
    with pytest.raises(UserError):
        train(tmp_path / "run", step=failing_at(3), every=0, saving=how)
    places = stage_checkpoints(tmp_path / "run", "sft", how)

    def torn(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:-1])

    monkeypatch.setattr(checkpoint.shutil, "copyfile", torn)
    with pytest.raises(UserError, match="copy of .*000003 in .* is damaged"):
        places.consolidate()
    assert saved(tmp_path / "scratch/sft") == []
    assert saved(tmp_path / "run/checkpoints/sft") == ["000003"]
    monkeypatch.undo()
