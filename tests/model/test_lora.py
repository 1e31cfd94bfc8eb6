"""Adapters: what they add, what is trained, what is dropped, and how they leave."""

import functools
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import stubs
import tolerances
from fake_batches import packs_of
from flax import nnx
from stubs import PAD, TINY, host, tiny_model, tiny_prompts

from gemma_grpo import model
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout
from gemma_grpo.model import LoRAConfig, layers, lora
from gemma_grpo.model.lora import LoRA
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import grpo_update, logps
from gemma_grpo.training import state as train_state
from gemma_grpo.training.update import UpdateConfig
from gemma_grpo.weights import peft_adapter
from gemma_grpo.weights.source import Source

LORA = LoRAConfig(rank=3, alpha=6.0)
P, G, T = 4, 2, 5
_, BASE = tiny_model(scale=1.5)
NO_BASE = Source(Path("base"), TINY, {}, tokenizer=None)


def drawn_adapter(config=LORA):
    return stubs.drawn_adapter(TINY, config, seed=5)


def graph(config=LORA):
    return model.abstract(TINY, config)[0]


@functools.cache
def forward_program(config):
    def run(params, ids_BL, mask_BL):
        return model.forward(nnx.merge(graph(config), params), ids_BL, mask_BL)[0]

    return jax.jit(run)


def hidden(params, config=LORA):
    return np.asarray(forward_program(config)(params, *tiny_prompts(6)))


def test_a_fresh_adapter_changes_nothing():
    fresh = model.init_adapter(TINY, LORA, seed=0)
    np.testing.assert_array_equal(
        hidden(model.join(fresh, BASE)), hidden(BASE, config=model.NO_LORA)
    )


def test_one_adapter_adds_alpha_over_rank_times_x_a_b():
    adapter = LoRA(4, 5, "mlp.up", LoRAConfig(rank=2, alpha=8.0), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    adapter.a[...], adapter.b[...] = jnp.asarray(a), jnp.asarray(b)
    x = rng.normal(size=(3, 6, 4)).astype(np.float32)
    expected = 8.0 / 2 * (x @ a @ b)
    np.testing.assert_allclose(adapter(jnp.asarray(x), None), expected, atol=1e-5)


def test_a_is_born_uniform_within_one_over_the_root_of_its_width_and_b_zero():
    fresh = model.init_adapter(TINY, LoRAConfig(rank=16), seed=1)
    a = np.asarray(fresh["layers"]["mlp"]["down_lora"]["a"])
    bound = TINY.hidden_dim**-0.5
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.95 * bound
    assert abs(a.std() - bound / 3**0.5) < 0.05 * bound
    assert not np.any(fresh["layers"]["mlp"]["down_lora"]["b"])
    other = model.init_adapter(TINY, LoRAConfig(rank=16), seed=2)
    assert np.any(other["layers"]["mlp"]["down_lora"]["a"] != a)
    assert np.any(a[0] != a[1])  # no two layers alike


@pytest.mark.parametrize("targets", [".*", "q_proj|v_proj", "mlp", "attention.o_proj"])
def test_a_merged_tree_computes_what_base_and_adapter_compute(targets):
    config = LoRAConfig(rank=3, alpha=6.0, targets=targets)
    adapter = drawn_adapter(config)
    merged = model.merge_adapter(adapter, BASE, scale=2.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, BASE)
    apart = hidden(model.join(adapter, BASE), config)
    assert np.abs(apart - hidden(BASE, model.NO_LORA)).max() > 0.05
    np.testing.assert_allclose(hidden(merged, model.NO_LORA), apart, atol=tolerances.HIDDEN_F32)


def test_a_merge_into_bfloat16_rounds_once():
    # 1 + 2^-8 + 2^-20 is nearer to 1 + 2^-7; an adapter rounded by itself would leave a tie, 1.
    weight = {"w": jnp.ones((1, 1, 1), jnp.bfloat16)}
    pair = {"a": jnp.ones((1, 1, 1)), "b": jnp.full((1, 1, 1), 2.0**-8 + 2.0**-20)}
    merged = model.merge_adapter({"w_lora": pair}, weight, scale=1.0)["w"]
    assert merged.dtype == jnp.bfloat16 and float(merged[0, 0, 0]) == 1 + 2.0**-7


def test_targets_are_a_regular_expression_over_the_projections():
    chosen = LoRAConfig(rank=1, targets="q_proj|mlp.(up|down)").chosen
    assert chosen == ("attention.q_proj", "mlp.up", "mlp.down")
    adapter = model.init_adapter(TINY, LoRAConfig(rank=1, targets="q_proj"), seed=0)
    assert jax.tree.map(jnp.shape, adapter) == {
        "layers": {"attention": {"q_proj_lora": {"a": (2, 16, 1), "b": (2, 1, 32)}}}
    }


def test_rank_zero_has_no_adapter():
    assert model.partition(model.abstract(TINY)[1])[0] == {}
    assert LoRAConfig().chosen == ()


def test_partition_and_join_are_each_others_inverse():
    adapter, base = model.partition(model.abstract(TINY, LORA)[1])
    assert jax.tree.structure(base) == jax.tree.structure(BASE)
    both = model.join(adapter, base)
    again, base_again = model.partition(both)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    assert jax.tree.structure(base_again) == jax.tree.structure(base)
    assert len(jax.tree.leaves(both)) == len(jax.tree.leaves(BASE)) + 2 * len(lora.TARGETS)


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(rank=-1), "rank=-1"),
        (dict(rank=4, alpha=0.0), "alpha"),
        (dict(rank=4, dropout=1.0), "dropout"),
        (dict(rank=4, targets="lm_head"), "lm_head"),
        (dict(rank=4, targets="("), "regular expression"),
    ],
)
def test_a_senseless_setting_is_refused_by_name(settings, named):
    with pytest.raises(UserError, match=re.escape(named)):
        LoRAConfig(**settings)


# --- training ---


@functools.cache
def rollout_program():
    config = RolloutConfig(G, T, stop_ids=(7,), pad_id=PAD)
    return make_rollout(graph(), mesh.data_mesh(jax.devices()[:1]), config)


def batch_of(params):
    """A rollout of the model with its adapters, and made-up advantages."""
    drawn = Rollout(*host(rollout_program()(params, *tiny_prompts(P), jax.random.key(0))))
    advantages = np.random.default_rng(4).normal(size=P * G).astype(np.float32)
    batch = grpo_update.make_batch(*tiny_prompts(P), drawn, advantages, LossConfig())
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def update_program(num_devices=1):
    return grpo_update.make_update(
        graph(),
        mesh.data_mesh(jax.devices()[:num_devices]),
        optax.sgd(1.0),
        LossConfig(),
        UpdateConfig("float32", "none"),
        temperature=1.0,
    )


def moved(adapter, batch, *, tokens=0, num_devices=1):
    """The adapters' gradient, and the update's metrics."""
    devices = mesh.data_mesh(jax.devices()[:num_devices])
    state = train_state.init_train_state(adapter, optax.sgd(1.0), devices)
    packs = packs_of(host(batch), tokens=tokens, num_devices=num_devices)
    after, metrics = update_program(num_devices)(state, BASE, packs)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), adapter, after.params), metrics


def test_the_gradient_is_that_of_the_merged_weights_by_the_chain_rule():
    """W + s a b: dL/da = s dL/dW b^T and dL/db = s a^T dL/dW."""
    adapter = drawn_adapter()
    batch = batch_of(model.join(adapter, BASE))
    gradient, _ = moved(adapter, batch)
    plain, _ = model.abstract(TINY)

    def loss(params):
        values, _ = logps.batch_logps(nnx.merge(plain, params), batch)
        return -(values * batch["advantages"][:, None] * batch["weights"]).sum()

    merged = model.merge_adapter(adapter, BASE, scale=2.0)
    of_up = np.asarray(jax.jit(jax.grad(loss))(merged)["layers"]["mlp"]["up"])
    up = adapter["layers"]["mlp"]["up_lora"]
    of_a = 2.0 * np.einsum("lio,lro->lir", of_up, up["b"])
    of_b = 2.0 * np.einsum("lir,lio->lro", up["a"], of_up)
    actual = gradient["layers"]["mlp"]["up_lora"]
    np.testing.assert_allclose(actual["a"], of_a, atol=tolerances.MODEL_GRAD)
    np.testing.assert_allclose(actual["b"], of_b, atol=tolerances.MODEL_GRAD)


@pytest.mark.parametrize("settings", [dict(num_devices=4), dict(tokens=60)])
def test_devices_and_packs_do_not_change_the_gradient(settings):
    adapter = drawn_adapter()
    batch = batch_of(model.join(adapter, BASE))
    plain, other = moved(adapter, batch)[0], moved(adapter, batch, **settings)[0]
    chex.assert_trees_all_close(plain, other, atol=tolerances.MODEL_GRAD, rtol=0)


def test_the_sampler_runs_with_the_adapters_as_the_trainer_does():
    adapter = drawn_adapter()
    _, metrics = moved(adapter, batch_of(model.join(adapter, BASE)))
    assert metrics["logp_gap/mean"] < tolerances.LOGP_GAP
    _, without = moved(adapter, batch_of(model.join(model.init_adapter(TINY, LORA, seed=0), BASE)))
    assert without["logp_gap/mean"] > 0.05


# --- dropout ---

DROPPING = LoRAConfig(rank=3, alpha=6.0, dropout=0.5)


@jax.jit
def dropping(params, batch):
    return logps.batch_logps(nnx.merge(graph(DROPPING), params), batch)[0]


def dropped_logps(keys, batch, adapter):
    return np.asarray(dropping(model.join(adapter, BASE), batch | keys))


def key_words(seed):
    keys = lambda num: jax.random.key_data(jax.random.split(jax.random.key(seed), num))
    return {"dropout_keys": keys(P), "completion_dropout_keys": keys(P * G)}


def test_dropout_depends_on_the_rows_key_alone_and_is_off_without_one():
    adapter = drawn_adapter(DROPPING)
    batch = batch_of(model.join(adapter, BASE))
    one, two = key_words(1), key_words(2)
    first = dropped_logps(one, batch, adapter)
    np.testing.assert_array_equal(first, dropped_logps(one, batch, adapter))
    assert np.abs(first - dropped_logps(two, batch, adapter)).max() > 1e-3
    first_group = {"dropout_keys": 1, "completion_dropout_keys": G}
    mixed = {
        name: jnp.concatenate([one[name][:rows], two[name][rows:]])
        for name, rows in first_group.items()
    }
    np.testing.assert_allclose(
        dropped_logps(mixed, batch, adapter)[:G], first[:G], atol=tolerances.LOGP_GAP
    )
    off = dropped_logps({}, batch, adapter)
    np.testing.assert_allclose(
        off[np.asarray(batch["completion_mask"])],
        np.asarray(batch["sampler_logps"])[np.asarray(batch["completion_mask"])],
        atol=tolerances.LOGP_GAP,
    )  # fmt: skip


def test_dropout_drops_its_share_and_keeps_the_mean():
    """8000 inputs of 1 through a = b = 1: a share p gives 0, the rest 1 / (1 - p)."""
    config = LoRAConfig(rank=1, alpha=1.0, dropout=0.2)
    adapter = LoRA(1, 1, "mlp.up", config, nnx.Rngs(0))
    adapter.a[...], adapter.b[...] = jnp.ones((1, 1)), jnp.ones((1, 1))
    keys = jax.random.split(jax.random.key(0), (8, 1000))
    out = np.asarray(adapter(jnp.ones((8, 1000, 1)), keys))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.8], rtol=1e-6)
    assert abs((out == 0).mean() - 0.2) < 5 * (0.2 * 0.8 / 8000) ** 0.5
    other = LoRA(1, 1, "mlp.gate", config, nnx.Rngs(0))
    other.a[...], other.b[...] = jnp.ones((1, 1)), jnp.ones((1, 1))
    assert ((np.asarray(other(jnp.ones((8, 1000, 1)), keys)) == 0) != (out == 0)).any()


# --- PEFT ---


def test_a_peft_folder_holds_each_factor_in_torchs_layout(tmp_path):
    adapter = drawn_adapter()
    peft_adapter.write_adapter(tmp_path / "peft", adapter, LORA, base=NO_BASE)
    tensors = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == TINY.num_layers * len(lora.TARGETS) * 2
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    o_proj = adapter["layers"]["attention"]["o_proj_lora"]
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], o_proj["a"][1].T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], o_proj["b"][1].T)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["r"] == 3 and settings["lora_alpha"] == 6.0
    assert settings["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_a_peft_folder_is_not_written_over(tmp_path):
    (tmp_path / "kept").touch()
    with pytest.raises(UserError, match="there already"):
        peft_adapter.write_adapter(tmp_path, drawn_adapter(), LORA, base=NO_BASE)


def test_in_bfloat16_an_adapter_is_added_before_the_one_rounding():
    """As large as a hundredth of the product's last place: its mean over many outputs stays."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(1, 64, 32)), rng.normal(size=(32, 512))
    adapter = lora.LoRA(32, 512, "mlp.up", LoRAConfig(rank=4, alpha=6.0), nnx.Rngs(0))
    adapter.a.set_value(jnp.asarray(rng.normal(size=(32, 4)), jnp.bfloat16))
    adapter.b.set_value(jnp.asarray(1e-4 * rng.normal(size=(4, 512)), jnp.bfloat16))
    x, weight = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    of = lambda array: np.asarray(array, np.float64)
    inner = (of(x) @ of(adapter.a[...])).astype(jnp.bfloat16).astype(np.float64)
    part = inner @ of(adapter.b[...]) * 1.5
    got = layers.adapted(x, weight, adapter, None)
    assert got.dtype == jnp.bfloat16
    expected = (of(x) @ of(weight) + part).astype(jnp.bfloat16)
    assert (np.asarray(got) == expected).mean() > 0.999
    moved = of(got) - of(layers.adapted(x, weight, None, None))
    assert abs((moved * part).sum() / (part**2).sum() - 1) < 0.1
