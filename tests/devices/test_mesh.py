"""What is sharded, what is replicated, and that it changes no result."""

import functools
from unittest.mock import Mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from fake_batches import T, batch_of, fake_rollout, packs_of
from jax.sharding import PartitionSpec
from stubs import tiny_model

from gemma_grpo import weights
from gemma_grpo.devices import mesh
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import grpo_update
from gemma_grpo.training import state as train_state
from gemma_grpo.training.update import UpdateConfig

GRAPHDEF, PARAMS = tiny_model(scale=1.5)


def spec(shape, num_devices=8):
    devices = mesh.data_mesh(jax.devices()[:num_devices])
    return mesh.fsdp_shardings(devices, jax.ShapeDtypeStruct(shape, jnp.float32)).spec


def test_the_devices_of_a_process_stand_side_by_side_in_their_order():
    device = lambda process, number: Mock(spec=jax.Device, process_index=process, id=number)
    given = [device(1, 0), device(0, 1), device(1, 2), device(0, 3)]
    assert [each.id for each in mesh.data_mesh(given).devices.flat] == [1, 3, 0, 2]


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((26, 1152, 6912), PartitionSpec(None, None, "data")),
        ((1024, 1024), PartitionSpec("data")),  # 2^20 elements: the least that are sharded
        ((1016, 1024), PartitionSpec()),
        ((26, 6912, 1152), PartitionSpec(None, "data")),
        ((26, 1152, 4, 256), PartitionSpec(None, "data")),
        ((262_144, 1152), PartitionSpec("data")),
        ((1031, 2048), PartitionSpec(None, "data")),  # the longest axis that divides
        ((2048, 2048), PartitionSpec("data")),  # the first of equals
        ((2048, 64, 32), PartitionSpec(None, "data")),  # never the axis of layers
        ((26, 1152), PartitionSpec()),  # small
        ((1031, 1031), PartitionSpec()),  # nothing divides
    ],
)
def test_a_large_array_is_split_along_its_longest_axis_that_divides(shape, expected):
    assert spec(shape) == expected


@pytest.fixture
def everything_is_sharded(monkeypatch):
    """The tiny model has no array that is large enough by itself."""
    monkeypatch.setattr(mesh, "FSDP_FROM", 1)


@functools.cache
def updated(num_devices, *, tokens=0, beta=0.0):
    """State and metrics after two updates of the tiny model, everything sharded."""
    devices = mesh.data_mesh(jax.devices()[:num_devices])
    optimizer = optax.sgd(0.1, momentum=0.9)  # a moment, and linear: rounding stays rounding
    update = grpo_update.make_update(
        GRAPHDEF,
        devices,
        optimizer,
        LossConfig(beta=beta),
        UpdateConfig("float32", "full"),
        temperature=1.0,
    )
    state = train_state.init_train_state(PARAMS, optimizer, devices)
    for seed in (3, 4):
        batch = batch_of(fake_rollout(seed))
        if beta:
            batch["ref_logps"] = np.full((len(batch["weights"]), T), -3.0, np.float32)
        packs = packs_of(batch, tokens=tokens, num_devices=num_devices)
        state, metrics = update(state, {}, mesh.place_rows(devices, packs))
    return state, metrics


@pytest.mark.usefixtures("everything_is_sharded")
@pytest.mark.parametrize("tokens, beta", [(0, 0.0), (0, 0.1), (20, 0.1)])
def test_an_update_sharded_over_eight_devices_is_that_of_one(tokens, beta):
    one, metrics_of_one = updated(1, beta=beta)
    eight, metrics_of_eight = updated(8, tokens=tokens, beta=beta)
    chex.assert_trees_all_close(
        jax.device_get(one.params), jax.device_get(eight.params), atol=tolerances.MODEL_GRAD
    )
    chex.assert_trees_all_close(
        jax.device_get(metrics_of_one), jax.device_get(metrics_of_eight), atol=tolerances.MODEL_GRAD
    )


@pytest.mark.usefixtures("everything_is_sharded")
def test_master_weights_and_moments_stay_in_pieces_from_update_to_update():
    state, _ = updated(8)
    layout = mesh.fsdp_shardings(mesh.data_mesh(), state)
    jax.tree.map(lambda leaf, place: chex.assert_equal(leaf.sharding, place), state, layout)
    embedding, gate = state.params["embedding"], state.params["layers"]["mlp"]["gate"]
    for leaf in (embedding, gate, state.opt_state[0].trace["embedding"]):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


@pytest.mark.usefixtures("everything_is_sharded")
def test_saved_weights_come_back_into_their_pieces(tmp_path):
    layout = mesh.fsdp_shardings(mesh.data_mesh(), PARAMS)
    weights.save(tmp_path / "w.safetensors", jax.device_put(PARAMS, layout))
    loaded = weights.load(tmp_path / "w.safetensors", mesh.with_shardings(PARAMS, layout))
    jax.tree.map(lambda leaf, place: chex.assert_equal(leaf.sharding, place), loaded, layout)
    chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(PARAMS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resharding_moves_nothing_through_the_host(dtype):
    devices = mesh.data_mesh()
    array = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    rows = jax.device_put(array, mesh.batch_sharding(devices))
    tree, other = {"a": rows, "b": rows}, PartitionSpec(None, "data")
    wanted = mesh.named_shardings(devices, {"a": PartitionSpec(), "b": other})
    with jax.transfer_guard("disallow_explicit"):
        moved = mesh.reshard(tree, wanted, dtype)
    for name, leaf in moved.items():
        assert leaf.sharding.is_equivalent_to(wanted[name], 2) and leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), array.astype(dtype))
    assert mesh.reshard(moved, wanted, dtype)["a"] is moved["a"]


def test_resharding_casts_what_lies_where_it_should_and_copies_nothing_that_is_so_already():
    whole = mesh.replicated(mesh.data_mesh(jax.devices()[:1]))
    tree = {
        "cast": jax.device_put(jnp.ones(3), whole),
        "kept": jax.device_put(jnp.ones(3, jnp.bfloat16), whole),
    }
    moved = mesh.reshard(tree, {"cast": whole, "kept": whole}, "bfloat16")
    assert moved["cast"].dtype == jnp.bfloat16 and moved["kept"] is tree["kept"]


def test_only_a_cpu_is_given_options_of_a_cpu():
    assert mesh.training_options("cpu") == mesh.CPU_OPTIONS
    assert mesh.training_options("tpu") is mesh.training_options("gpu") is None


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch):
    mesh._known_cpu_options.cache_clear()
    monkeypatch.setattr(mesh, "CPU_OPTIONS", {"xla_cpu_of_another_version": "1"})
    assert mesh.training_options("cpu") is None
    mesh._known_cpu_options.cache_clear()
