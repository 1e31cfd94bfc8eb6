"""Writes hf_folders/: tiny checkpoints saved by transformers, and what its models make of them.

The suite reads the files only. To write them again, in the environment of
make_transformers_logits.py:

    hf/bin/python tests/oracles/make_hf_folders.py

    text/           Gemma3ForCausalLM in bfloat16, in several files with their index
    multimodal/     Gemma3ForConditionalGeneration in float16, with a SigLIP tower of two layers
    logits.npz      for each: ids [B, L] and the logits [B, L, V] of the folder read back in float32

The text models' weights are drawn by gemma3_recipe.py. No tokenizer is saved.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from gemma3_recipe import CASES, draw_inputs, draw_weights
from make_transformers_logits import make_model
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

OUT = Path(__file__).parent / "hf_folders"
TEXT = "window_one_short_of_13_layers_4_of_2"
MULTIMODAL = "global_rope_scaled_by_8_window_6_in_29_layers_7_of_3"


def save_text() -> dict[str, np.ndarray]:
    settings = CASES[TEXT]
    model = make_model(settings, draw_weights(settings)).bfloat16()
    model.save_pretrained(OUT / "text", max_shard_size="12KB")
    return logits_of(Gemma3ForCausalLM, "text", settings)


def save_multimodal() -> dict[str, np.ndarray]:
    settings = CASES[MULTIMODAL]
    text = make_model(settings, draw_weights(settings))
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=text.config,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=1,
        eoi_token_index=2,
        image_token_index=3,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.half().save_pretrained(OUT / "multimodal")
    return logits_of(Gemma3ForConditionalGeneration, "multimodal", settings)


@torch.no_grad()
def logits_of(kind: type, name: str, settings: dict) -> dict[str, np.ndarray]:
    # Read back: a model cast to 16 bits has cast its RoPE frequencies too, which no file holds.
    model = kind.from_pretrained(OUT / name, dtype=torch.float32, attn_implementation="eager")
    ids_BL, _ = draw_inputs(settings)
    logits_BLV = model(input_ids=torch.from_numpy(ids_BL)).logits
    return {"ids": ids_BL.astype(np.int32), "logits": logits_BLV.numpy()}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    made = {"text": save_text(), "multimodal": save_multimodal()}
    arrays = {f"{name}/{key}": array for name, kept in made.items() for key, array in kept.items()}
    np.savez_compressed(OUT / "logits.npz", **arrays)


if __name__ == "__main__":
    main()
