"""Chips of every kind are planned for, and an unknown one by the memory that it reports."""

import math
from dataclasses import replace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_grpo import presets
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.model import CONFIGS
from gemma_grpo.planning import chips, compiled, fit, programs, roofline, topology

TWO_LAYERS = replace(CONFIGS["gemma3-1b"], num_layers=2)


def device(kind, coords=(0, 0, 0), memory=None):
    made = Mock(spec=jax.Device, device_kind=kind, coords=list(coords))
    made.memory_stats.return_value = {"bytes_limit": memory} if memory else None
    return made


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_a_chip_in_the_table_is_known_by_its_kind_and_has_the_memory_it_reports(kind):
    chip = chips.chip_here([device(kind, memory=12 * 10**9)])
    assert chip.memory == 12e9 and chip.flops > 1e14
    assert chips.chip_here([device(kind)]).memory > 15e9


def test_two_devices_of_a_chip_have_half_of_it_each():
    halves = [device("TPU v4", coords=(x, 0, 0)) for x in (0, 0, 1, 1)]
    chip = chips.chip_here(halves)
    assert (chip.memory, chip.flops) == (16 * 2**30, 137.5e12)
    assert chips.chip_of("v4:2x1x1", halves) == chip


def test_an_unknown_chip_has_its_memory_and_times_that_are_unknown():
    chip = chips.chip_here([device("TPU v9", memory=64 * 10**9)])
    work = roofline.Work(1e12, 1e9, 3)
    assert chip.memory == 64e9 and math.isnan(work.seconds(chip)) and work.bound(chip) == "unknown"
    assert chips.chip_here([device("TPU v9")]) is None


@pytest.mark.parametrize("wrong", ["v5e-8", "v5e:2y4", "v5e:8", "v5e:0x4", "v4:2x2x1x1", ":2x4"])
def test_a_misspelt_topology_is_refused_in_one_line(wrong):
    with pytest.raises(UserError, match=r"write it like v5e:2x4 or v5p:2x2x1") as caught:
        topology.devices(wrong)
    assert "\n" not in str(caught.value)


def test_a_chip_without_figures_is_refused_by_name():
    with pytest.raises(UserError, match="no figures of v9; use v4, v5e"):
        chips.chip_of("v9:2x2", [device("TPU v9")])


def test_a_program_whose_text_cannot_be_printed_is_read_without_it(monkeypatch):
    def fails(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async instruction")

    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((1024,), jnp.float32))
    whole = compiled.compile_and_read(lowered)
    monkeypatch.setattr(jax.stages.Compiled, "as_text", fails)
    read = compiled.compile_and_read(lowered)
    assert (read.arguments, read.peak) == (whole.arguments, whole.peak)
    assert whole.hbm_bytes and whole.collectives == []
    assert read.collectives is read.hbm_bytes is read.loop_bytes is read.kept_on_chip is None


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="the TPU's compiler: pip install libtpu")


WHERE = {"v4:2x2x1": 8, "v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x4": 8, "tpu7x:2x2x1": 8}


@pytest.mark.parametrize("where", WHERE)
def test_a_host_of_each_kind_has_its_devices_and_their_share_of_a_chip(libtpu, where):
    devices = topology.devices(where)
    assert len(devices) == WHERE[where] and {one.process_index for one in devices} == {0}
    kind = where.partition(":")[0]
    shares = 2 if kind in ("v4", "tpu7x") else 1
    assert chips.chip_of(where, devices).flops == chips.CHIPS[kind].flops / shares
    here = [device(one.device_kind, one.coords) for one in devices]
    assert chips.chip_here(here) == chips.chip_of(where, devices)


@pytest.mark.parametrize("where", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4"])
def test_a_kernel_compiles_for_each_kind(libtpu, where):
    """Sampling from the 1B's head, eight rows of bfloat16."""
    one = NamedSharding(Mesh(np.array(topology.devices(where)[:1]), ("x",)), PartitionSpec())
    shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(size, dtype, sharding=one)
    draw = lambda hidden, head, keys: fused_sampling(
        hidden, head, jax.random.wrap_key_data(keys), temperature=1.0
    )
    lowered = jax.jit(draw).lower(
        shape(8, 1152), shape(262_144, 1152), shape(8, 2, dtype=jnp.uint32)
    )
    assert compiled.compile_and_read(lowered).temporaries < 1e6


@pytest.mark.slow
@pytest.mark.parametrize("where", ["v5p:2x2x1", "v6e:2x4"])
def test_a_rollout_compiles_for_each_kind_and_fits(libtpu, where):
    """Two layers of the 1B, at its widths."""
    devices = topology.devices(where)
    run, chip = presets.preset("gemma3-1b"), chips.chip_of(where, devices)
    rollout = programs.of_step(run, TWO_LAYERS, mesh.data_mesh(devices))[0]
    read = compiled.compile_and_read(rollout.trace().lower())
    assert 0 < read.peak + rollout.resident < chip.memory


@pytest.mark.slow
def test_a_step_compiles_for_v6e_and_fits_though_its_text_cannot_be_read(libtpu):
    devices = topology.devices("v6e:2x4")
    chip = chips.chip_of("v6e:2x4", devices)
    rows = fit.plan(presets.preset("gemma3-1b"), TWO_LAYERS, mesh.data_mesh(devices), chip)
    assert {"rollout", "update", "sft update"} < {row.name for row in rows}
    assert not any(fit.excess(row, chip) for row in rows)
