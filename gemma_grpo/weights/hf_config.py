"""A config as transformers writes it to `config.json`. Knows no file.

Source: `Gemma3TextConfig` of transformers; both the names of release 5 (rope_parameters) and those
that release 4 reads (rope_theta and the rest) are given.
"""

from typing import Any

from gemma_grpo.model import Gemma3Config

MAX_POSITIONS = 32_768


def to_hf(config: Gemma3Config, dtype: str) -> dict[str, Any]:
    """What goes into `config.json` for `Gemma3ForCausalLM`, its weights stored in `dtype`."""
    kinds = ["full_attention" if full else "sliding_attention" for full in config.is_global]
    bases = {
        "full_attention": config.rope_base_global,
        "sliding_attention": config.rope_base_local,
    }
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": config.pattern,
        "layer_types": kinds,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar),
        "rope_theta": config.rope_base_global,
        "rope_local_base_freq": config.rope_base_local,
        "rope_scaling": None,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
        },
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": dtype,
    }
