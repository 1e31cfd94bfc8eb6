"""A run's own weights file: trained parameters under our own names."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from stubs import TINY, drawn_adapter

from gemma_grpo import model, weights
from gemma_grpo.errors import UserError

LORA = model.LoRAConfig(rank=2)
ADAPTER, _ = model.partition(model.abstract(TINY, LORA)[1])


@pytest.fixture
def path(tmp_path):
    """A file of adapters."""
    weights.save(tmp_path / "run.safetensors", drawn_adapter(TINY, LORA))
    return tmp_path / "run.safetensors"


def test_weights_survive_the_file_bit_for_bit(path):
    weights.save(path.with_name("again.safetensors"), weights.load(path, ADAPTER))
    assert path.with_name("again.safetensors").read_bytes() == path.read_bytes()
    assert {file.name for file in path.parent.iterdir()} == {path.name, "again.safetensors"}


NAME = "layers.attention.q_proj_lora.a"


def damaged(tensors, how):
    if how == "missing":
        del tensors[NAME]
    if how == "extra":
        tensors["bias"] = np.zeros(3, np.float32)
    if how == "shape":
        tensors[NAME] = tensors[NAME][:-1]
    return tensors


@pytest.mark.parametrize("how, named", [("missing", NAME), ("extra", "bias"), ("shape", NAME)])
def test_weights_of_another_model_are_refused_by_tensor(path, how, named):
    safetensors.numpy.save_file(damaged(safetensors.numpy.load_file(path), how), path)
    with pytest.raises(UserError, match=named):
        weights.load(path, ADAPTER)


def test_a_disk_that_cannot_be_written_is_one_clear_error(path):
    params = weights.load(path, ADAPTER)
    with pytest.raises(
        UserError, match="cannot write .*: File exists; something else has that name"
    ):
        weights.save(path / "model.safetensors", params)


def test_a_torn_weights_file_is_named(path):
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="run.safetensors"):
        weights.load(path, ADAPTER)


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.safetensors"):
        weights.load(tmp_path / "gone.safetensors", ADAPTER)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(path, value):
    tensors = safetensors.numpy.load_file(path)
    tensors[NAME].reshape(-1)[-1] = value
    before = path.read_bytes()
    tree = jax.tree.map(np.asarray, weights.load(path, ADAPTER))
    leaf = tree["layers"]["attention"]["q_proj_lora"]["a"]
    tree["layers"]["attention"]["q_proj_lora"]["a"] = np.full_like(leaf, value)
    with pytest.raises(UserError, match=f"{NAME} holds nan or infinite numbers"):
        weights.save(path, tree)
    assert path.read_bytes() == before
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match=f"{NAME} holds nan or infinite numbers"):
        weights.load(path, ADAPTER)


def test_a_bit_flipped_anywhere_in_the_numbers_is_noticed(path):
    whole = bytearray(path.read_bytes())
    for at in range(len(whole) - 1, len(whole) - 600, -97):
        whole[at] ^= 1
        path.write_bytes(whole)
        with pytest.raises(UserError, match="have changed since they were written"):
            weights.load(path, ADAPTER)
        whole[at] ^= 1
    path.write_bytes(whole)
    weights.load(path, ADAPTER)
