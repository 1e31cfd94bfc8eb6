"""Writes transformers_logits.npz: what Gemma3ForCausalLM makes of the models in gemma3_recipe.py.

The suite reads the file only, so it needs neither torch nor transformers. To write it again:

    python -m venv hf && hf/bin/pip install torch==2.13.0 transformers==5.23.0
    hf/bin/python tests/oracles/make_transformers_logits.py

A CPU build of torch will do; it takes seconds. Everything is float32, attention is the eager one.
Kept for each case: ids, mask, the logits at real tokens in row-major order [tokens, V], and the
weights' checksum.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gemma3_recipe import CASES, checksum, draw_inputs, draw_weights
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

DEFAULT_BASES = {"local": 10_000.0, "global": 1_000_000.0}


def make_model(settings: dict[str, Any], weights: dict[str, np.ndarray]) -> Gemma3ForCausalLM:
    """Their model with our weights. What of RoPE we do not name is left to their default."""
    rope = {kind: {"rope_type": "default"} for kind in ("sliding_attention", "full_attention")}
    if "rope_base_local" in settings:
        rope["sliding_attention"]["rope_theta"] = settings["rope_base_local"]
        rope["full_attention"]["rope_theta"] = settings["rope_base_global"]
    if "rope_scale_global" in settings:
        scaling = {"rope_type": "linear", "factor": settings["rope_scale_global"]}
        rope["full_attention"] |= scaling
    config = Gemma3TextConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["embed_dim"],
        intermediate_size=settings["hidden_dim"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=settings["num_heads"],
        num_key_value_heads=settings["num_kv_heads"],
        head_dim=settings["head_dim"],
        sliding_window=settings["sliding_window"],
        sliding_window_pattern=settings["pattern"],
        query_pre_attn_scalar=int(settings["query_pre_attn_scalar"]),  # they take no float
        rms_norm_eps=settings.get("norm_eps", 1e-6),
        rope_parameters=rope,
        attn_implementation="eager",
    )
    model = Gemma3ForCausalLM(config).eval()
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    left = model.load_state_dict(state, strict=False)
    assert left.missing_keys in ([], ["lm_head.weight"]) and not left.unexpected_keys, left
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    check_in_force(model, settings)
    return model


def check_in_force(model: Gemma3ForCausalLM, settings: dict[str, Any]) -> None:
    """Their configuration renames and defaults much; look at what the model really runs with."""
    exponents = torch.arange(0, settings["head_dim"], 2, dtype=torch.float64) / settings["head_dim"]
    for kind, field in (("sliding_attention", "local"), ("full_attention", "global")):
        base = settings.get(f"rope_base_{field}", DEFAULT_BASES[field])
        if kind in model.config.layer_types:
            inv_freq = getattr(model.model.rotary_emb, f"{kind}_inv_freq").double()
            scale = settings.get("rope_scale_global", 1.0) if field == "global" else 1.0
            torch.testing.assert_close(inv_freq, base**-exponents / scale, rtol=1e-6, atol=0)
    for number, layer in enumerate(model.model.layers, start=1):
        is_global = number % settings["pattern"] == 0
        assert layer.self_attn.is_sliding != is_global, number
        assert layer.self_attn.scaling == settings["query_pre_attn_scalar"] ** -0.5
        window = None if is_global else settings["sliding_window"]
        assert layer.self_attn.sliding_window == window, number
    assert model.config._attn_implementation == "eager" and model.dtype == torch.float32


@torch.no_grad()
def run(model: Gemma3ForCausalLM, ids_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
    """Logits [B, L, V], and a check that their left padding changes nothing of theirs."""
    positions_BL = np.maximum(np.cumsum(mask_BL, axis=1) - 1, 0)
    logits_BLV = model(
        input_ids=torch.from_numpy(ids_BL),
        attention_mask=torch.from_numpy(mask_BL.astype(np.int64)),
        position_ids=torch.from_numpy(positions_BL),
    ).logits
    for row, ids_L in enumerate(ids_BL):
        alone = model(input_ids=torch.from_numpy(ids_L[mask_BL[row]])[None]).logits[0]
        padded = logits_BLV[row, torch.from_numpy(mask_BL[row])]
        torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
    return logits_BLV.numpy()


def main() -> None:
    arrays = {
        "versions": np.array(
            [
                f"torch {torch.__version__}",
                f"numpy {np.__version__}",
                f"transformers {transformers.__version__}",
            ]
        )
    }
    for name, settings in CASES.items():
        weights = draw_weights(settings)
        ids_BL, mask_BL = draw_inputs(settings)
        logits_BLV = run(make_model(settings, weights), ids_BL, mask_BL)
        arrays[f"{name}/ids"] = ids_BL.astype(np.int32)
        arrays[f"{name}/mask"] = mask_BL
        arrays[f"{name}/logits"] = logits_BLV[mask_BL].astype(np.float32)
        arrays[f"{name}/checksum"] = np.array(checksum(weights), np.uint32)
        print(f"{name}: {mask_BL.sum()} tokens, logits up to {np.abs(logits_BLV).max():.2f}")
    np.savez_compressed(Path(__file__).with_name("transformers_logits.npz"), **arrays)


if __name__ == "__main__":
    main()
