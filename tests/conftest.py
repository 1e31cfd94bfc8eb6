"""Strictness for the whole suite: eight fake CPU devices, and no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # also of child processes; libtpu is here only to compile with

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def v5e():
    """Eight v5e chips in one host, to compile for without a TPU."""
    pytest.importorskip("libtpu", reason="the TPU's compiler: pip install libtpu")
    from gemma_grpo.planning import topology

    return topology.devices("v5e:2x4")


@pytest.fixture
def compile_quickly():
    """For tests that compile for seconds and run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
