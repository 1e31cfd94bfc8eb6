"""Gemma 3 text as a Flax NNX module: config, layers, attention, transformer."""

from gemma_grpo.model.config import CONFIGS, Gemma3Config
from gemma_grpo.model.transformer import (
    KV,
    Gemma3,
    Params,
    abstract,
    decode,
    empty_cache,
    extend,
    forward,
    split,
    unstack_layers,
)

__all__ = [
    "CONFIGS",
    "KV",
    "Gemma3",
    "Gemma3Config",
    "Params",
    "abstract",
    "decode",
    "empty_cache",
    "extend",
    "forward",
    "split",
    "unstack_layers",
]
