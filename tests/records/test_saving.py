"""States are saved when due, while the caller goes on, and complete or not at all."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.records.saving import CheckpointConfig, Saver


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow(Checkpoints):
    """Each save waits for `allowed` and takes `seconds` by the clock."""

    def __init__(self, directory, clock=None, seconds=0.0):
        super().__init__(directory)
        self.clock, self.seconds, self.allowed = clock, seconds, threading.Event()

    def save(self, step, state, host):
        assert self.allowed.wait(60)
        if self.clock:
            self.clock.now += self.seconds
        super().save(step, state, host)


def test_a_checkpoint_is_due_at_multiples_of_the_steps_or_after_the_minutes(tmp_path):
    clock = Clock()
    config = CheckpointConfig(minutes=10.0)
    saver = Saver(Checkpoints(tmp_path), config, every=50, done=70, clock=clock)
    assert [step for step in range(71, 151) if saver.is_due(step)] == list(range(100, 151))
    clock.now = 599.0
    assert not saver.is_due(71)
    clock.now = 600.0
    assert saver.is_due(71)


@pytest.mark.parametrize("share, waits", [(0.05, 19 * 30), (0.5, 30), (1.0, 0)])
def test_a_checkpoint_waits_until_the_last_ones_seconds_are_a_small_share(tmp_path, share, waits):
    clock = Clock()
    checkpoints = Slow(tmp_path, clock, seconds=30.0)
    checkpoints.allowed.set()
    config = CheckpointConfig(minutes=1e9, share=share)
    saver = Saver(checkpoints, config, every=1, done=0, clock=clock)
    assert saver.is_due(1)
    saver.save(1, {"w": jnp.zeros(3)}, {})
    saver.wait()
    for seconds in (0.5 * waits, 0.99 * waits):
        clock.now = 30.0 + seconds
        assert saver.is_due(2) == (waits == 0)
    clock.now = 30.0 + waits + 1e-6
    assert saver.is_due(2)


def test_what_is_saved_is_the_state_of_that_step_though_its_arrays_are_donated(tmp_path):
    checkpoints = Slow(tmp_path)
    saver = Saver(checkpoints, CheckpointConfig(), every=1, done=0)
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = {"large": jax.device_put(jnp.arange(2.0**20), split), "small": jnp.arange(5.0)}
    saver.save(1, state, {"step": 1})
    for _ in range(3):
        state = double(state)
    checkpoints.allowed.set()
    saver.wait()
    restored, host = checkpoints.restore(1, state)
    assert host == {"step": 1}
    np.testing.assert_array_equal(restored["large"], np.arange(2.0**20))
    np.testing.assert_array_equal(restored["small"], np.arange(5.0))
    assert restored["large"].sharding == split


def test_one_save_is_written_at_a_time_and_none_is_due_meanwhile(tmp_path):
    checkpoints = Slow(tmp_path)
    saver = Saver(checkpoints, CheckpointConfig(share=1.0), every=1, done=0)
    saver.save(1, {"w": jnp.float32(1)}, {})
    assert checkpoints.steps() == [] and not saver.is_due(2)
    threading.Timer(0.2, checkpoints.allowed.set).start()
    saver.save(2, {"w": jnp.float32(2)}, {})
    assert 1 in checkpoints.steps()
    saver.wait()
    assert checkpoints.steps() == [1, 2]


def test_an_error_of_the_thread_is_raised_once_in_the_caller(tmp_path):
    (tmp_path / "file").write_text("")
    saver = Saver(Checkpoints(tmp_path / "file" / "x"), CheckpointConfig(), every=1, done=0)
    saver.save(1, {"w": jnp.float32(1)}, {})
    with pytest.raises(UserError, match="cannot write .*Not a directory"):
        saver.wait()
    saver.wait()
    saver.save(2, {"w": jnp.float32(1)}, {})
    while saver._thread.is_alive():
        saver._thread.join()
    with pytest.raises(UserError, match="cannot write"):
        saver.check()


def test_a_folder_of_their_own_holds_a_folder_for_each_run(tmp_path):
    config = CheckpointConfig(folder=str(tmp_path / "scratch"), keep=1)
    checkpoints = config.of_stage(tmp_path / "runs" / "a", "sft")
    assert checkpoints.directory == tmp_path / "scratch" / "a" / "sft" and checkpoints.keep == 1
    own = CheckpointConfig().of_stage(tmp_path / "runs" / "a", "grpo")
    assert own.directory == tmp_path / "runs" / "a" / "checkpoints" / "grpo"


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"minutes": 0.0}, {"share": 0.0}, {"share": 1.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="checkpoint: keep="):
        CheckpointConfig(**wrong)
