"""Strictness for the whole suite: eight fake CPU devices, and no silent rank promotion."""

import gc
import os
import shutil
import tempfile

gc.disable()  # while tests are collected: a quarter of that time

os.environ["JAX_PLATFORMS"] = "cpu"  # also of child processes; libtpu is here only to compile with
# One cache of compiled programs for the session: its tests, its workers (pytest -n), its commands.
CACHE = "JAX_COMPILATION_CACHE_DIR"
IS_OURS = CACHE not in os.environ
if IS_OURS:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="gemma_grpo-tests-")
# All of them: to write a small one costs a tenth of its compilation, to read it a quarter.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import compiling  # noqa: E402

# XLA reads its flags when it starts. libtpu, which may be loaded later, does not know all of them.
os.environ["XLA_FLAGS"] = compiling.QUICKLY

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()
del os.environ["XLA_FLAGS"]


def pytest_collection_finish():
    gc.freeze()  # what is there by now stays: no collection looks at it again
    gc.enable()


def pytest_sessionfinish():
    if IS_OURS:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory):
    """The folder of a model to run where depth is not what is tested: one layer of the embedded."""
    from benchmarks.campaign import models

    return str(models.cut_nano(tmp_path_factory.mktemp("models") / "one_layer"))


@pytest.fixture(scope="session")
def v5e():
    """Eight v5e chips in one host, to compile for without a TPU."""
    pytest.importorskip("libtpu", reason="the TPU's compiler: pip install libtpu")
    from gemma_grpo.planning import topology

    return topology.devices("v5e:2x4")
