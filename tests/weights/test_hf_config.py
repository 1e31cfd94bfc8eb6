"""gemma_grpo.weights.hf_config: published files, both layouts, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.weights.hf_config import config_from_hf, config_to_hf

LINEAR = {"factor": 8.0, "rope_type": "linear"}

# config.json, or its text_config, as Google published it (google/gemma-3-*), where it bears on us.
PUBLISHED = {
    "gemma3-270m": {
        "_sliding_window_pattern": 6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "use_bidirectional_attention": False,
        "vocab_size": 262144,
    },
    "gemma3-1b": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "gemma3-4b": {  # heads, head_dim and vocabulary are left to transformers' defaults
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": LINEAR,
        "sliding_window": 1024,
    },
    "gemma3-12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": LINEAR,
        "sliding_window": 1024,
    },
    "gemma3-27b": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": LINEAR,
        "sliding_window": 1024,
    },
}
BASE = PUBLISHED["gemma3-1b"]


def read(settings: dict) -> Gemma3Config:
    return config_from_hf(settings, where=Path("folder/config.json"))


def without(*fields: str) -> dict:
    return {field: value for field, value in BASE.items() if field not in fields}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_states_the_known_size(name):
    assert read(PUBLISHED[name]) == CONFIGS[name]


def test_every_released_size_is_among_the_published():
    assert PUBLISHED.keys() == CONFIGS.keys() - {"gemma3-nano"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name):
    config = CONFIGS[name]
    written = config_to_hf(config, np.dtype(np.float32))
    assert replace(read(written), scan_unroll=config.scan_unroll) == config


@pytest.mark.parametrize("name", ["gemma3-1b", "gemma3-27b"])
def test_either_layout_of_rope_alone_says_the_same(name):
    written = config_to_hf(CONFIGS[name], np.dtype(np.float32))
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    for left_out in (old, ("rope_parameters",)):
        kept = {field: value for field, value in written.items() if field not in left_out}
        assert read(kept) == CONFIGS[name]


def test_rope_parameters_are_read_and_what_they_leave_unsaid_is_the_default():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    bare = without("rope_theta", "rope_local_base_freq", "rope_scaling")
    config = read(bare | {"rope_parameters": rope})
    bases = (config.rope_base_local, config.rope_base_global, config.rope_scale_global)
    assert bases == (2e4, 5e5, 4.0)
    assert read(bare | {"rope_parameters": None}) == CONFIGS["gemma3-1b"]
    only_local = read(bare | {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}})
    assert (only_local.rope_base_local, only_local.rope_base_global) == (2e4, 1e6)


def test_what_a_file_leaves_unsaid_is_the_default_of_transformers():
    """The figures of its class Gemma3TextConfig."""
    assert read({}) == Gemma3Config(
        vocab_size=262_208,
        num_layers=26,
        embed_dim=2304,
        hidden_dim=9216,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        sliding_window=4096,
        query_pre_attn_scalar=256.0,
        pattern=6,
        rope_base_local=1e4,
        rope_base_global=1e6,
        rope_scale_global=1.0,
        norm_eps=1e-6,
    )


@pytest.mark.parametrize(
    ("name", "positions"), [("gemma3-270m", 32_768), ("gemma3-1b", 32_768), ("gemma3-4b", 131_072)]
)
def test_as_many_positions_are_written_as_the_model_was_trained_for(name, positions):
    written = config_to_hf(CONFIGS[name], np.dtype(np.float32))
    assert written["max_position_embeddings"] == positions  # the Gemma 3 report: 32K and 128K


def test_the_pattern_is_read_from_the_list_of_layers_where_no_number_states_it():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    bare = without("sliding_window_pattern") | {"num_hidden_layers": 4}
    assert read(bare | {"layer_types": kinds}).pattern == 3
    all_local = read(bare | {"layer_types": ["sliding_attention"] * 4})
    assert all_local.is_global == (False,) * 4


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("final_logit_softcapping", 30.0, "final_logit_softcapping=30.0 is not implemented"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0 is not implemented"),
        ("attention_bias", True, "attention_bias=True is not implemented"),
        ("attention_dropout", 0.1, "attention_dropout=0.1 is not implemented"),
        ("hidden_activation", "silu", "hidden_activation='silu' is not implemented"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention=True is not"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "RoPE of type 'yarn' in full_att"),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}, "RoPE of type 'dynamic' in full_att"),
        ("rope_scaling", {"rope_type": "linear"}, "factor=None must be a number above 0"),
        ("rope_scaling", "linear", "rope_scaling='linear' must be a JSON object"),
        ("rope_parameters", {"rope_type": "default"}, "not ['rope_type']"),
        ("rope_parameters", {"sliding_attention": LINEAR}, "'linear' in sliding_attention layers"),
        ("rope_parameters", {"full_attention": 3}, "full_attention=3 must be a JSON object"),
        ("layer_types", ["full_attention"] * 26, "layer_types is not every 6th of 26 layers"),
        ("layer_types", 5, "layer_types=5 must be a list"),
        ("hidden_size", "1152", "hidden_size='1152' must be a number above 0"),
        ("hidden_size", True, "hidden_size=True must be a number above 0"),
        ("num_hidden_layers", 2.5, "num_hidden_layers=2.5 must be a whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers=0 must be a number above 0"),
        ("sliding_window", None, "sliding_window=None must be a number above 0"),
        ("sliding_window_pattern", 0, "sliding_window_pattern=0 must be a number above 0"),
        ("num_key_value_heads", 3, "num_attention_heads=4 must be a multiple of num_key"),
    ],
)
def test_what_we_cannot_run_is_refused_by_file_and_field(field, value, words):
    with pytest.raises(UserError) as caught:
        read(BASE | {field: value})
    message = str(caught.value)
    assert message.startswith("folder/config.json: ") and words in message and "\n" not in message


@pytest.mark.parametrize("name", ["gemma3-nano", "gemma3-270m", "gemma3-27b"])
def test_transformers_reads_from_our_file_what_we_put_in(name):
    transformers = pytest.importorskip("transformers", reason="an optional second reader")
    config = CONFIGS[name]
    theirs = transformers.Gemma3TextConfig(**config_to_hf(config, np.dtype(np.float32)))
    linear = {"rope_type": "linear", "factor": 8.0}
    scaling = linear if config.rope_scale_global != 1 else {"rope_type": "default"}
    assert theirs.rope_parameters == {
        "full_attention": {"rope_theta": 1e6, **scaling},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    is_global = tuple(kind == "full_attention" for kind in theirs.layer_types)
    assert is_global == config.is_global
    assert theirs.query_pre_attn_scalar == config.query_pre_attn_scalar
    assert (theirs.hidden_size, theirs.intermediate_size) == (config.embed_dim, config.hidden_dim)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim) == (
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )
    assert (theirs.sliding_window, theirs.rms_norm_eps) == (config.sliding_window, config.norm_eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 2**31, -1, 0, True, "8"])
@pytest.mark.parametrize("field", ["rms_norm_eps", "hidden_size", "vocab_size"])
def test_a_number_that_is_out_of_all_range_is_refused_by_field(field, value):
    with pytest.raises(UserError, match=f"{field}=.* must be a number above 0, below 2"):
        config_from_hf({field: value}, where=Path("config.json"))
