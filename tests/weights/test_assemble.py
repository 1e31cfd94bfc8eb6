"""gemma_grpo.weights.names and .assemble: the table, each layout, and what is refused."""

import weakref
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles.gemma3_recipe import CASES, draw_weights, shapes
from small_models import make_config, make_params

from gemma_grpo import model as gemma3
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.weights import buffers
from gemma_grpo.weights.assemble import assemble, hf_tensors
from gemma_grpo.weights.names import TABLE, by_path, their_shapes
from gemma_grpo.weights.source import Source, StoredTensor

GQA = CASES["gqa_2_window_4_in_19_layers_8_of_6"]
CONFIG = make_config(GQA)
LIKE = gemma3.abstract(CONFIG)[1]


def source_of(weights: dict[str, np.ndarray], config: gemma3.Gemma3Config = CONFIG) -> Source:
    stored = {
        name: StoredTensor(array.shape, lambda array=array: array.copy())
        for name, array in weights.items()
    }
    return Source(Path("checkpoint"), config, stored, tokenizer=None)


def equal(ours: gemma3.Params, theirs: gemma3.Params) -> bool:
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), ours, theirs)
    return jax.tree.all(same)


# --- the table ---


@pytest.mark.parametrize("case", CASES)
def test_the_table_names_every_leaf_of_ours_once_and_every_tensor_of_theirs(case):
    config = make_config(CASES[case])
    paths = [entry.ours for entry in TABLE]
    assert sorted(paths) == sorted(by_path(gemma3.abstract(config)[1]))
    assert their_shapes(config) == shapes(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_becomes_the_tree_written_out_by_hand_and_comes_back(case):
    settings = CASES[case]
    config, weights = make_config(settings), draw_weights(settings)
    like = gemma3.abstract(config)[1]
    params = assemble(source_of(weights, config), like, dtype=jnp.float32, sharding=None)
    assert equal(params, make_params(settings))
    back = list(hf_tensors(params, config))
    assert [(name, array.shape) for name, array in back] == list(their_shapes(config).items())
    assert all((array == weights[name]).all() for name, array in back)


# --- dtype and place ---


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_values_are_rounded_once_to_the_dtype_asked_for(stored, wanted):
    weights = {name: array.astype(stored) for name, array in draw_weights(GQA).items()}
    params = assemble(source_of(weights), LIKE, dtype=wanted, sharding=None)
    embedding, norm = "model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    np.testing.assert_array_equal(params["embedding"], weights[embedding].astype(wanted))
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"][3], weights[norm].astype(wanted).T)


def test_leaves_go_where_they_are_told_to_and_stay_uncommitted_if_told_nothing():
    source, mesh = source_of(draw_weights(GQA)), meshes.data_mesh(jax.devices()[:2])
    replicated = meshes.replicated(mesh)
    everywhere = assemble(source, LIKE, dtype=jnp.float32, sharding=replicated)
    assert {leaf.sharding for leaf in jax.tree.leaves(everywhere)} == {replicated}
    by_layer = NamedSharding(mesh, PartitionSpec("data"))
    tree = {
        "embedding": replicated,
        "final_norm": {"scale": replicated},
        "layers": jax.tree.map(lambda _: by_layer, LIKE["layers"]),
    }
    split = assemble(source, LIKE, dtype=jnp.float32, sharding=tree)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == tree
    assert equal(jax.device_get(split), jax.device_get(everywhere))
    nowhere = assemble(source, LIKE, dtype=jnp.float32, sharding=None)
    assert not any(leaf.committed for leaf in jax.tree.leaves(nowhere))


def test_a_parameter_taken_over_without_a_copy_can_still_be_donated():
    params = assemble(source_of(draw_weights(GQA)), LIKE, dtype=jnp.float32, sharding=None)
    before = jax.tree.map(np.array, params)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)
    after = doubled(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == 2 * b).all()), after, before))


# --- host memory ---


def test_the_cpu_device_takes_a_buffer_over_without_a_copy():
    buffer = buffers.empty((3, 5, 7), np.dtype(np.float32))
    buffer[...] = 1
    taken = jax.device_put(buffer, jax.devices()[0], may_alias=True)
    assert taken.unsafe_buffer_pointer() == buffer.ctypes.data


def test_each_tensor_is_read_once_the_largest_leaves_first_and_no_two_are_held_at_once():
    weights, read, alive = draw_weights(GQA), [], []

    def reader(name: str):
        def of_layer() -> np.ndarray:
            assert all(ref() is None for ref in alive), f"{read[-1]} is held while {name} is read"
            array = weights[name].copy()
            alive[:] = [weakref.ref(array)]
            read.append(name)
            return array

        return of_layer

    stored = {name: StoredTensor(array.shape, reader(name)) for name, array in weights.items()}
    source = Source(Path("checkpoint"), CONFIG, stored, tokenizer=None)
    assemble(source, LIKE, dtype=jnp.bfloat16, sharding=None)
    assert sorted(read) == sorted(weights)
    leaf_sizes = [
        weights[name].size * (CONFIG.num_layers if ".layers." in name else 1) for name in read
    ]
    assert leaf_sizes == sorted(leaf_sizes, reverse=True)


# --- what is refused, before anything is read ---


def unreadable(weights: dict[str, np.ndarray]) -> Source:
    def read():
        raise AssertionError("read before it was checked")

    source = source_of(weights)
    stored = {name: StoredTensor(tensor.shape, read) for name, tensor in source.tensors.items()}
    return replace(source, tensors=stored)


def refusal(weights: dict[str, np.ndarray]) -> str:
    with pytest.raises(UserError) as caught:
        assemble(unreadable(weights), LIKE, dtype=jnp.float32, sharding=None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named_and_more_are_counted():
    weights = draw_weights(GQA)
    del weights["model.norm.weight"]
    assert "checkpoint: no tensor model.norm.weight;" in refusal(weights)
    del weights["model.layers.7.mlp.up_proj.weight"]
    assert "no tensor model.layers.7.mlp.up_proj.weight and 1 more;" in refusal(weights)


def test_a_tensor_left_over_is_named():
    weights = draw_weights(GQA) | {"model.layers.8.mlp.up_proj.weight": np.zeros(3)}
    assert "no place for model.layers.8.mlp.up_proj.weight;" in refusal(weights)


def test_a_misshapen_tensor_is_named_with_both_shapes():
    name = "model.layers.2.self_attn.o_proj.weight"
    weights = draw_weights(GQA)
    weights[name] = weights[name].T
    assert f"{name} has shape (32, 12), but its configuration says (12, 32)" in refusal(weights)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(value):
    weights = draw_weights(GQA)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][-1, -1] = value
    with pytest.raises(UserError, match=f"{name} holds nan or infinite numbers"):
        assemble(source_of(weights), LIKE, dtype="float32", sharding=None)
