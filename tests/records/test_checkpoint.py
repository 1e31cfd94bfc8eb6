"""A checkpoint comes back bit for bit, or not at all: killed, damaged, full disk, wrong shape."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records import checkpoint
from gemma_grpo.records.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def make_state(seed=0):
    """Every dtype a state may hold, with the values that careless copying changes."""
    generator = np.random.default_rng(seed)
    odd = np.array(
        [0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32
    )  # nan, -inf, -0, tiny
    return {
        "params": {
            "embed": jnp.asarray(generator.standard_normal((7, 5)), jnp.bfloat16),
            "w": jnp.asarray(generator.standard_normal((3, 40)), jnp.float32),
            "odd": jax.device_put(odd.view(np.float32)),
        },
        "opt": Moments({"w": jnp.zeros((3, 40))}, jnp.int32(17 + seed)),
        "key": jax.random.key_data(jax.random.key(42)),
        "mask": jnp.array([True, False, True]),
    }


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.mark.parametrize("pack_below", [0, 100, 1 << 20])  # none packed, some, all
def test_a_state_comes_back_bit_for_bit(checkpoints, monkeypatch, pack_below):
    monkeypatch.setattr(checkpoint, "PACK_BELOW", pack_below)
    state = make_state()
    host = {"stage": "grpo", "counts": [2**63 + 1, 0.1], "phase": "easy", "name": "Größe"}
    checkpoints.save(3, state, host)
    restored, restored_host = checkpoints.restore(3, abstract(state))
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored_host == host


def test_small_arrays_share_one_of_orbaxs_since_each_costs_time(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoint, "PACK_BELOW", 12)
    checkpoints.save(1, {"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.zeros(1)}, {})
    index = json.loads((checkpoints.directory / "000001" / "index.json").read_text())
    # a and c are of 8 and 4 bytes, end to end; b is of 12 and stands alone.
    assert {name: entry.get("offset") for name, entry in index.items()} == {
        "a": 0,
        "b": None,
        "c": 8,
    }


def test_arrays_return_to_the_devices_their_counterparts_are_committed_to(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoint, "PACK_BELOW", 100)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = 4 * jax.device_count()
    state = {
        "large_split": jax.device_put(jnp.arange(rows * 8.0).reshape(rows, 8), split),
        "small_everywhere": jax.device_put(jnp.arange(3.0), everywhere),
        "large_free": jnp.arange(30.0),
        "small_free": jnp.float32(5),
    }
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(1, state)
    assert bits(restored) == bits(state)
    for name in state:
        assert restored[name].committed == state[name].committed, name
        assert restored[name].sharding == state[name].sharding, name


def test_a_restored_state_may_be_donated(checkpoints):
    state = {"a": jnp.arange(64.0), "b": jnp.arange(64.0) + 100}
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(1, state)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
    assert bits(step(restored)) == bits(jax.tree.map(lambda leaf: leaf * 2, state))


def test_latest_is_the_newest_by_number_and_none_where_nothing_was_saved(checkpoints):
    assert checkpoints.latest() is None
    for step in (9, 10):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    assert checkpoints.latest() == 10


def test_only_the_last_are_kept(checkpoints):
    for step in (1, 2, 3, 5):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    assert checkpoints.steps() == [3, 5]
    assert sorted(os.listdir(checkpoints.directory)) == ["000003", "000005"]


def test_a_save_drops_later_steps_of_an_abandoned_history(checkpoints):
    for step in (10, 20):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    checkpoints.save(15, {"w": jnp.float32(15)}, {})
    assert checkpoints.steps() == [10, 15]


def test_one_more_is_kept_beside_the_newest_ones(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    checkpoints.also_keep = 2
    for step in (4, 5, 6):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    assert checkpoints.steps() == [2, 5, 6]
    checkpoints.also_keep = 5  # one of the newest, or one that is not there: no more are kept
    checkpoints.save(7, {"w": jnp.float32(7)}, {})
    checkpoints.also_keep = 3
    checkpoints.save(8, {"w": jnp.float32(8)}, {})
    assert checkpoints.steps() == [7, 8]


def test_those_after_a_step_are_dropped_and_what_a_killed_process_left_of_that(
    checkpoints, monkeypatch
):
    checkpoints.drop_after(0)  # nothing was saved yet
    for step in (10, 20):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        checkpoints.drop_after(15)
    assert checkpoints.steps() == [10]
    shutil.copytree(checkpoints.directory / "000010", checkpoints.directory / "000020")
    checkpoints.drop_after(10)
    assert os.listdir(checkpoints.directory) == ["000010"]
    checkpoints.drop_after(0)
    assert checkpoints.latest() is None


def test_all_are_removed_together_and_again_without_harm(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    (checkpoints.directory / "000003.tmp").mkdir()
    for _ in range(2):
        checkpoints.remove()
        assert not checkpoints.directory.exists() and checkpoints.latest() is None
    checkpoints.save(4, {"w": jnp.float32(4)}, {})
    assert checkpoints.latest() == 4


def test_a_removal_that_is_killed_leaves_no_checkpoint_to_be_taken(checkpoints, monkeypatch):
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        checkpoints.remove()
    assert checkpoints.latest() is None


def test_a_step_saved_again_is_replaced(checkpoints):
    checkpoints.save(4, {"w": jnp.float32(1)}, {"try": 1})
    checkpoints.save(4, {"w": jnp.float32(2)}, {"try": 2})
    state, host = checkpoints.restore(4, {"w": jnp.float32(0)})
    assert (float(state["w"]), host) == (2.0, {"try": 2})
    assert os.listdir(checkpoints.directory) == ["000004"]


def test_what_was_not_finished_is_ignored_and_swept_by_the_next_save(checkpoints):
    checkpoints.save(1, {"w": jnp.float32(1)}, {})
    finished = checkpoints.directory / "000001"
    shutil.copytree(finished, checkpoints.directory / "000002.tmp")
    shutil.copytree(finished, checkpoints.directory / "000003")
    (checkpoints.directory / "000003" / checkpoint.SUMS).unlink()
    assert checkpoints.latest() == 1
    checkpoints.save(3, {"w": jnp.float32(3)}, {})
    assert sorted(os.listdir(checkpoints.directory)) == ["000001", "000003"]
    assert float(checkpoints.restore(3, {"w": jnp.float32(0)})[0]["w"]) == 3.0


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, Path.unlink])
def test_harm_to_any_file_is_found_and_the_checkpoint_before_it_taken(checkpoints, capsys, harm):
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.arange(99.0) + step}, {"step": step})
    newest = checkpoints.directory / "000002"
    intact = newest.with_name("intact")
    shutil.copytree(newest, intact)
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    assert len(files) > 5
    for file in files:
        harm(file)
        capsys.readouterr()
        assert checkpoints.latest() == 1, file
        if (newest / checkpoint.SUMS).exists():  # without it the step was never finished
            assert f"warning: checkpoint {newest} is damaged" in capsys.readouterr().err
            with pytest.raises(UserError, match="000002 is damaged"):
                checkpoints.restore(2, {"w": jnp.zeros(99)})
        shutil.rmtree(newest)
        shutil.copytree(intact, newest)
    assert checkpoints.latest() == 2


def test_a_file_that_the_sums_do_not_list_is_not_trusted(checkpoints):
    checkpoints.save(1, {"w": jnp.float32(1)}, {})
    sums = checkpoints.directory / "000001" / checkpoint.SUMS
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "host.json" not in line))
    with pytest.raises(UserError, match=r"damaged \(host.json is not in SHA256SUMS\)"):
        checkpoints.restore(1, {"w": jnp.float32(0)})


def test_when_all_are_damaged_the_directory_and_the_fix_are_named(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.float32(step)}, {})
        truncate(checkpoints.directory / f"{step:06d}" / "index.json")
    with pytest.raises(UserError, match="none of its 2 checkpoints is intact; put back") as caught:
        checkpoints.latest()
    assert str(checkpoints.directory) in str(caught.value)


def test_an_absent_step_is_named(checkpoints):
    with pytest.raises(UserError, match="no finished checkpoint of step 7"):
        checkpoints.restore(7, {})


@pytest.mark.parametrize(
    "like, complaint",
    [
        (
            {"p": {"w": jnp.zeros((2, 4))}, "n": jnp.int32(0)},
            r"p\.w is float32\(2, 3\), .*\(2, 4\)",
        ),
        (
            {"p": {"w": jnp.zeros((2, 3), jnp.bfloat16)}, "n": jnp.int32(0)},
            r"p\.w .*wants bfloat16",
        ),
        (
            {"p": {"w": jnp.zeros((2, 3)), "v": jnp.zeros(8)}, "n": jnp.int32(0)},
            r"no .* p\.v\(8,\)",
        ),
        ({"p": {"w": jnp.zeros((2, 3))}}, r"holds n\(\), for which the run has no place"),
    ],
)
def test_what_does_not_fit_is_named_with_both_shapes(checkpoints, like, complaint):
    checkpoints.save(1, {"p": {"w": jnp.zeros((2, 3))}, "n": jnp.int32(0)}, {})
    with pytest.raises(UserError, match=complaint):
        checkpoints.restore(1, like)


def test_a_typed_key_is_refused_by_name(checkpoints):
    with pytest.raises(TypeError, match="rng.key is a typed random key"):
        checkpoints.save(1, {"rng": {"key": jax.random.key(0)}}, {})


def test_two_arrays_of_one_name_are_refused(checkpoints):
    with pytest.raises(ValueError, match="two arrays of the state are called 'a.b'"):
        checkpoints.save(1, {"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, {})


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_failed_save_leaves_nothing_half_written(checkpoints):
    checkpoints.save(1, {"w": jnp.float32(1)}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(2, {"w": jnp.float32(2)}, {"set": {1}})
    assert os.listdir(checkpoints.directory) == ["000001"]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*Not a directory; .*none was saved before"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, {"w": jnp.float32(1)}, {})


FULL_DISK = """
import jax.numpy as jnp
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.errors import UserError
checkpoints = Checkpoints("DIRECTORY/checkpoints")
checkpoints.save(1, {"w": jnp.arange(1000.0)}, {})
try:
    checkpoints.save(2, {"w": jnp.arange(500_000.0), "small": jnp.arange(9.0)}, {})
except UserError as error:
    print(error)
state, _ = checkpoints.restore(checkpoints.latest(), {"w": jnp.zeros(1000)})
assert (state["w"] == jnp.arange(1000.0)).all()
print(*[path.name for path in checkpoints.directory.iterdir()])
"""


@pytest.mark.parametrize(
    "pretend",
    ["", "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(0, 0, 10**9)"],
    ids=["seen coming", "met on the way"],
)
def test_a_full_disk_loses_nothing_and_says_so(tmp_path, pretend):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = pretend + FULL_DISK.replace("DIRECTORY", str(disk))
    # A file system of 1 MB, in a namespace of the child's own: gone when it ends.
    mount = f'mount -t tmpfs -o size=1m tmpfs "{disk}" || exit 77; exec "$0" -c "$1"'
    if not shutil.which("unshare"):
        pytest.skip("no unshare on this machine: no way to make a small disk")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, script]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if child.returncode == 77 or "unshare" in child.stderr:
        pytest.skip(f"this machine does not let us mount a small disk: {child.stderr.strip()}")
    message, left = child.stdout.splitlines()
    assert message == (
        f"cannot write {disk}/checkpoints/000002: No space left on device; free some space, "
        "then try again (a training run with --resume); the checkpoint of step 1 is kept"
    )
    assert left == "000001"
    assert "ERROR:absl" not in child.stderr  # one line, not Orbax's five tracebacks
    assert child.stderr == "" or pretend


# 4000 bytes of the array, 65,536 of the index and Orbax's metadata, 2048 for each array in them.
@pytest.mark.parametrize("free, fits", [(4000, False), (71_583, False), (71_584, True)])
def test_a_disk_without_room_for_arrays_and_index_is_left_alone(
    checkpoints, monkeypatch, free, fits
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    written = []
    monkeypatch.setattr(
        checkpoint, "_begin_write", lambda path, *_: lambda: (path.mkdir(), written.append(path))
    )
    if fits:
        checkpoints.save(1, {"w": jnp.zeros(1000)}, {})
    else:
        with pytest.raises(UserError, match="000001: No space left .*; none was saved before"):
            checkpoints.save(1, {"w": jnp.zeros(1000)}, {})
    assert bool(written) == fits


def test_a_save_takes_the_seconds_from_its_start_until_it_is_whole(checkpoints, monkeypatch):
    clock = iter([100.0, 107.0])
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(checkpoint, "_begin_write", lambda path, *_: path.mkdir)
    checkpoints.save(1, {"w": jnp.zeros(1000)}, {})
    assert checkpoints.seconds == 7


def test_a_full_disk_met_outside_orbax_is_told_alike(checkpoints, monkeypatch):
    def no_space(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "_digests", no_space)
    with pytest.raises(UserError, match="000002: No space left .*; none was saved before"):
        checkpoints.save(2, {"w": jnp.float32(2)}, {})
    assert os.listdir(checkpoints.directory) == []


# Imports once, then forks a saver for each line on stdin (no backend runs yet, so forking is safe).
SAVERS = """
import os, sys
import jax.numpy as jnp
import orbax.checkpoint
from gemma_grpo.records.checkpoint import Checkpoints
for line in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        print("dead", flush=True)
    else:
        break
else:
    sys.exit()
checkpoints = Checkpoints(sys.argv[1])
first = step = (checkpoints.latest() or 0) + 1
while True:
    state = {"w": jnp.full(200_000, step, jnp.float32), "v": jnp.full(500_000, step)}
    checkpoints.save(step, state, {"step": step})
    if step == first:
        print(os.getpid(), step, flush=True)
    step += 1
"""


def test_after_kill_9_at_any_moment_the_latest_is_intact(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    like = {"w": jnp.zeros(200_000, jnp.float32), "v": jnp.zeros(500_000, jnp.int32)}
    generator = np.random.default_rng()
    command = [sys.executable, "-c", SAVERS, str(checkpoints.directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as savers:
        step = 0
        for _ in range(3):
            savers.stdin.write("\n")
            savers.stdin.flush()
            pid, saved = map(int, savers.stdout.readline().split())
            assert saved == step + 1  # it went on from what the killed one left
            wait = generator.uniform(0, 0.3)
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            assert savers.stdout.readline() == "dead\n"
            step = checkpoints.latest()
            assert step >= saved, f"killed after {wait} s"
            state, host = checkpoints.restore(step, like)
            assert host == {"step": step}
            assert (state["w"] == step).all() and (state["v"] == step).all()
        savers.stdin.close()


def test_the_sums_can_be_checked_without_python(checkpoints):
    checkpoints.save(1, {"w": jnp.float32(1)}, {"stage": "sft"})
    path = checkpoints.directory / "000001"
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum on this machine")
    subprocess.run(
        ["sha256sum", "-c", "--quiet", "--strict", checkpoint.SUMS], cwd=path, check=True
    )
    assert json.loads((path / "host.json").read_text()) == {"stage": "sft"}


# --- written in the background -------------------------------------------------------------------


def test_arrays_may_be_donated_and_overwritten_as_soon_as_a_save_is_begun(checkpoints):
    """Large enough that the update is through long before the bytes are on the disk."""
    size = 4_000_000
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    for step in (1, 2):
        state = {
            "a": jnp.arange(size),
            "b": jnp.arange(4.0),
            "host": np.arange(size, dtype=np.int32),
        }
        wanted = bits(jax.tree.map(np.array, state))
        like = abstract(state)
        checkpoints.start(step, state, {})
        state["host"][:] = -1
        jax.block_until_ready(update({name: state[name] for name in "ab"}))
        checkpoints.wait()
        assert bits(checkpoints.restore(step, like)[0]) == wanted


def hold_back(monkeypatch, error=None):
    """Saves that the background finishes when the test says so, or fails to."""
    go_on = threading.Event()
    begin = checkpoint._begin_write

    def begin_and_hold(path, arrays):
        written = begin(path, arrays)

        def wait():
            assert go_on.wait(60)
            written()
            if error:
                raise error

        return wait

    monkeypatch.setattr(checkpoint, "_begin_write", begin_and_hold)
    return go_on


def test_a_save_under_way_is_no_checkpoint_yet_and_the_next_waits_for_it(checkpoints, monkeypatch):
    go_on = hold_back(monkeypatch)
    checkpoints.start(1, {"w": jnp.float32(1)}, {})
    assert checkpoints.is_writing() and checkpoints.steps() == []
    checkpoints.check()
    order = []
    next_save = threading.Thread(
        target=lambda: (checkpoints.start(2, {"w": jnp.float32(2)}, {}), order.append("begun"))
    )
    next_save.start()
    time.sleep(0.2)
    order.append("first may end")
    go_on.set()
    next_save.join(60)
    assert order == ["first may end", "begun"]
    checkpoints.wait()
    assert not checkpoints.is_writing() and checkpoints.steps() == [1, 2]
    assert checkpoints.seconds > 0


@pytest.mark.parametrize("told", ["check", "wait", "start"])
def test_a_save_that_fails_in_the_background_is_told_once_asked(checkpoints, monkeypatch, told):
    checkpoints.save(1, {"w": jnp.float32(1)}, {})
    with monkeypatch.context() as patched:
        go_on = hold_back(patched, OSError(28, "No space left on device", "x"))
        checkpoints.start(2, {"w": jnp.float32(2)}, {})
        go_on.set()
        while checkpoints.is_writing():
            time.sleep(0.01)
        ask = {"start": lambda: checkpoints.start(3, {"w": jnp.float32(3)}, {})}
        with pytest.raises(UserError, match="000002: No space left .* of step 1 is kept"):
            ask.get(told, getattr(checkpoints, told))()
    assert os.listdir(checkpoints.directory) == ["000001"]
    with contextlib.suppress(UserError):  # `check` does not forget it
        checkpoints.wait()
    checkpoints.save(4, {"w": jnp.float32(4)}, {})
    assert checkpoints.latest() == 4


def test_an_intact_checkpoint_is_taken_from_another_folder_in_place_of_a_damaged_one(
    checkpoints, tmp_path
):
    other = Checkpoints(tmp_path / "other")
    other.save(7, {"w": jnp.arange(9.0)}, {"step": 7})
    checkpoints.save(7, {"w": jnp.arange(9.0)}, {"step": 7})
    truncate(checkpoints.directory / "000007" / "index.json")
    checkpoints.take(other.directory / "000007")
    state, host = checkpoints.restore(7, {"w": jnp.zeros(9)})
    assert (state["w"] == jnp.arange(9.0)).all() and host == {"step": 7}
    assert os.listdir(checkpoints.directory) == ["000007"]


def test_a_checkpoint_that_was_given_another_steps_name_is_passed_over(checkpoints, capsys):
    for step in (2, 4):
        checkpoints.save(step, {"w": jnp.float32(step)}, {"step": step})
    (checkpoints.directory / "000004").rename(checkpoints.directory / "000009")
    assert checkpoints.latest() == 2
    assert "000009 is damaged (it was saved as step 4)" in capsys.readouterr().err
