"""The model of a run, loaded: what does not belong together is refused."""

import dataclasses
from pathlib import Path

import jax
import pytest

from gemma_grpo import config, model, runtime
from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, LoRAConfig
from gemma_grpo.runtime import ModelConfig, load_model
from gemma_grpo.weights import Source, assets


@pytest.mark.parametrize("rows, fits", [(511, False), (512, True), (576, True), (577, False)])
def test_a_tokenizer_fits_a_model_of_its_size_or_of_the_known_few_rows_more(rows, fits):
    sizes = dataclasses.replace(CONFIGS["gemma3-nano"], vocab_size=rows)
    source = Source(Path("model"), sizes, {}, tokenizer=assets.NANO_TOKENIZER)
    if fits:
        assert runtime.load_tokenizer(ModelConfig(), source).vocab_size == 512
    else:
        with pytest.raises(UserError, match=f"512 tokens, but model has {rows}"):
            runtime.load_tokenizer(ModelConfig(), source)


@pytest.mark.parametrize("seed", [-1, 2**31 - 1, 2**32, 2**63, 10**30])
def test_a_seed_of_which_jax_would_drop_bits_is_refused_before_anything_is_loaded(seed):
    with pytest.raises(UserError, match="must be 0 or more, and below 2147483647"):
        runtime.load_model(ModelConfig(weights="nowhere"), seed=seed)
    with pytest.raises(UserError, match="seed"):
        config.RunConfig(seed=seed)


def test_draws_are_the_same_whatever_generator_the_environment_names():
    key = model.random_key(2**31 - 2)
    expected = jax.random.bits(key, 4).tolist()
    assert jax.random.key_impl(key) == jax.random.key_impl(jax.random.key(0, impl=model.PRNG))
    with jax.default_prng_impl("rbg"):
        assert jax.random.bits(model.random_key(2**31 - 2), 4).tolist() == expected


def test_the_largest_seed_drops_inputs_of_adapters_too():
    lora = LoRAConfig(rank=1, dropout=0.1)
    runtime, _ = load_model(ModelConfig(lora=lora), seed=2**31 - 2)
    assert len(runtime.dropout_keys(0, 2, 2)["completion_dropout_keys"]) == 4


@pytest.mark.parametrize("number", [-1, 257, 100_000])
def test_more_cpu_devices_than_xla_survives_are_refused(number):
    with pytest.raises(UserError, match="cpu_devices must be from 0 to 256"):
        ModelConfig(cpu_devices=number)
