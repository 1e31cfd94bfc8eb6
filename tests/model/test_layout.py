"""Layouts: sharding the weights changes no row, and on v5e only rows cross between chips."""

import functools
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec
from stubs import PAD, TINY, drawn_model, host, tiny_prompts

from gemma_grpo import model, presets
from gemma_grpo.config import ModelConfig
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.generation import rollout, sampling
from gemma_grpo.model import CONFIGS, NO_LORA, LoRAConfig
from gemma_grpo.planning import chips, compiled, fit, hlo, programs
from gemma_grpo.runtime import LAYOUTS, Runtime, load_model
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assets

G, T, P = 3, 9, 8
DIVIDES = replace(TINY, vocab_size=8 * 512, hidden_dim=32, num_layers=2, pattern=2)
STOPS = tuple(range(0, DIVIDES.vocab_size, 7))  # so that rows end at different slots
LORA = LoRAConfig(rank=2, alpha=8.0)
TOKENIZER = Tokenizer(assets.NANO_TOKENIZER)
TENSOR_PARALLEL = LAYOUTS["tensor_parallel"]
ONE_B = CONFIGS["gemma3-1b"]


@functools.cache
def graph_and_params(lora_config=NO_LORA):
    """A model that divides over eight; adapters are not zero."""
    return drawn_model(DIVIDES, lora_config)


def test_a_token_seen_a_thousand_times_has_the_gradient_of_all_of_them():
    """In bfloat16 a sum of alike terms stops growing at 256 of them."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full(1600, 3), rng.integers(0, 8, 448)]).reshape(2, 1024)
    terms = rng.normal(1.0, 0.5, (2, 1024, 4)).astype(jnp.bfloat16)
    loss = lambda table: (
        (model.REPLICATED.lookup(table, jnp.asarray(ids)) * terms).astype(jnp.float32).sum()
    )
    expected = np.zeros((9, 4))
    np.add.at(expected, ids, terms.astype(np.float64))
    got = jax.jit(jax.grad(loss))(jnp.ones((9, 4), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16 and not np.any(got[8])
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8)


def prompts():
    """Of ragged lengths, their tokens in all shards of the vocabulary."""
    ids, mask = tiny_prompts(P)
    return np.where(mask, ids * 101 % DIVIDES.vocab_size, PAD), mask


def program(layout, num_devices, *, lora=NO_LORA, stop_ids=STOPS, **settings):
    return rollout.make_rollout(
        graph_and_params(lora)[0],
        mesh.data_mesh(jax.devices()[:num_devices]),
        rollout.RolloutConfig(G, T, stop_ids, PAD, sampling.SamplingConfig(**settings)),
        layout=LAYOUTS[layout],
    )


def roll(layout, num_devices, *, lora=NO_LORA, **settings):
    run = program(layout, num_devices, lora=lora, **settings)
    return host(run(graph_and_params(lora)[1], *prompts(), jax.random.key(0)))


@pytest.mark.parametrize(
    "num_devices, settings",
    [
        (8, {"lora": LORA}),
        (2, {"temperature": 0.0}),
        (4, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}),
    ],
)
def test_sharded_weights_draw_the_rows_that_one_device_draws(num_devices, settings):
    found = roll("tensor_parallel", num_devices, **settings)
    expected = roll("data", 1, **settings)
    assert len(set(expected.completion_mask.sum(axis=1))) > 1
    np.testing.assert_array_equal(found.completion_ids, expected.completion_ids)
    np.testing.assert_array_equal(found.completion_mask, expected.completion_mask)
    np.testing.assert_array_equal(found.stopped, expected.stopped)
    np.testing.assert_allclose(
        found.sampler_logps, expected.sampler_logps, atol=tolerances.LOGP_GAP
    )


def test_every_device_decodes_until_the_longest_row_has_ended(monkeypatch):
    steps, sample = [], sampling.sample

    def counted(*arguments, **settings):
        jax.debug.callback(lambda: steps.append(1))
        return sample(*arguments, **settings)

    monkeypatch.setattr(sampling, "sample", counted)
    many = tuple(range(0, DIVIDES.vocab_size, 2))
    drawn = roll("tensor_parallel", 8, stop_ids=many)
    jax.effects_barrier()
    longest = drawn.completion_mask.sum(axis=1).max()
    assert 1 < longest < T and drawn.stopped.all()
    assert len(steps) == 8 * longest


def test_the_shards_of_the_rollout_are_those_that_training_keeps():
    """So only attention's weights cross devices between an update and the next rollout."""
    _, shapes = model.abstract(ONE_B)
    of_rollout = TENSOR_PARALLEL.specs(shapes)
    kept = mesh.fsdp_specs(mesh.data_mesh(), shapes)
    layers, of_training = of_rollout["layers"], kept["layers"]
    assert of_rollout["embedding"] == kept["embedding"] == PartitionSpec("data")
    assert layers["mlp"] == of_training["mlp"]
    assert layers["mlp"]["down"] == PartitionSpec(None, "data")
    assert set(jax.tree.leaves(layers["attention"])) == {PartitionSpec()}


def test_adapters_are_sharded_along_the_hidden_units_only():
    _, shapes = model.abstract(ONE_B, LORA)
    mlp = TENSOR_PARALLEL.specs(shapes)["layers"]["mlp"]
    hidden, replicated = PartitionSpec(None, None, "data"), PartitionSpec()
    assert mlp["gate_lora"] == mlp["up_lora"] == {"a": replicated, "b": hidden}
    assert mlp["down_lora"] == {"a": PartitionSpec(None, "data"), "b": replicated}


def test_a_run_puts_what_it_samples_with_into_its_layout():
    graphdef, params = graph_and_params()
    devices = mesh.data_mesh()
    runtime = Runtime(
        graphdef,
        {},
        NO_LORA,
        TOKENIZER,
        devices,
        "",
        8,
        T,
        "bfloat16",
        "none",
        0,
        layout=TENSOR_PARALLEL,
    )
    full = runtime.sampling_params(jax.device_put(params, mesh.fsdp_shardings(devices, params)))
    for leaf, parts in (
        (full["embedding"], 8),
        (full["layers"]["mlp"]["gate"], 8),
        (full["layers"]["mlp"]["down"], 8),
        (full["layers"]["attention"]["q_proj"], 1),
    ):
        assert leaf.dtype == "bfloat16"
        assert leaf.addressable_shards[0].data.size * parts == leaf.size


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden_dim": 36}, "hidden_dim=36 is not a multiple of 8"),
        ({"vocab_size": 4097}, "vocab_size=4097 is not a multiple of 4096"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_in_one_line(change, named):
    TENSOR_PARALLEL.check(DIVIDES, 8)
    TENSOR_PARALLEL.check(replace(DIVIDES, **change), 1)
    with pytest.raises(
        UserError, match=f"rollout_layout=tensor_parallel: {named}, as 8 devices need; use data"
    ):
        TENSOR_PARALLEL.check(replace(DIVIDES, **change), 8)


def test_a_run_of_such_a_model_is_refused_before_its_weights_are_read():
    settings = ModelConfig(weights="gemma3-nano", rollout_layout="tensor_parallel")
    with pytest.raises(UserError, match="vocab_size=512"):
        load_model(settings, seed=0)
    run = presets.preset("gemma3-1b")
    run = replace(run, model=replace(run.model, rollout_layout="tensor_parallel"))
    with pytest.raises(UserError, match="vocab_size=262208"):
        fit.plan(run, CONFIGS["gemma3-4b"], mesh.data_mesh(), chips.CHIPS["v5e"])


@pytest.mark.parametrize(
    "num_layers", [2, pytest.param(26, marks=pytest.mark.slow)], ids=["2 layers", "1B"]
)
def test_on_v5e_nothing_but_rows_crosses_chips_in_the_decode_loop(v5e, num_layers):
    """A shard of a matrix is 2 MB in bfloat16, of 64 rows' logits 8 MB; 64 rows are 147 kB. Prompts
    are short, so that their rows, which the prefill's scan gathers, are not as large as either."""
    run = presets.preset("gemma3-1b")
    run = replace(
        run, model=replace(run.model, rollout_layout="tensor_parallel", max_prompt_length=64)
    )
    program = programs.of_step(run, replace(ONE_B, num_layers=num_layers), mesh.data_mesh(v5e))[0]
    module = hlo.parse(program.trace().lower().compile().as_text())
    collectives = compiled.collectives_in(module)
    in_loops = [found for found in collectives if found.in_loop]
    assert max(found.largest for found in collectives) <= 8 * 64 * 1152 * 2 < 1152 * 864 * 2
    # Two in the prefill's scan. In a decode step: two a layer, the embedding, the head, the draw.
    assert sum(found.count for found in in_loops) == 2 + 2 * num_layers + 3, in_loops
    # The compiler makes all-reduces of the small reduce-scatters.
    assert {found.kind for found in in_loops} == {"all-gather", "all-reduce", "reduce-scatter"}
    # The MLPs' parts are added up in float32, in the prefill's scan and in each layer. Of the
    # embedding's rows all parts but one are 0: any dtype adds them up.
    added = Counter(
        one.shape.partition("[")[0]
        for computation in module.computations.values()
        for one in computation.instructions.values()
        if one.op.startswith(("all-reduce", "reduce-scatter")) and ",1152]" in one.shape
    )
    assert added == {"f32": 1 + num_layers, "bf16": 2}
