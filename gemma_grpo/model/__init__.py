"""Gemma 3 text as a Flax NNX module: config, layers, attention, packed rows, transformer."""

from gemma_grpo.model.config import CONFIGS, Gemma3Config
from gemma_grpo.model.layout import REPLICATED, Layout, TensorParallel
from gemma_grpo.model.lora import NO_LORA, LoRAConfig, merge_adapter
from gemma_grpo.model.packed import Packed, Rows
from gemma_grpo.model.params import in_dtype, join, partition
from gemma_grpo.model.transformer import (
    KV,
    Gather,
    Gemma3,
    Params,
    Remat,
    abstract,
    decode,
    empty_cache,
    forward,
    forward_groups,
    init_adapter,
    split,
    unstack_layers,
)

__all__ = [
    "CONFIGS",
    "Gather",
    "KV",
    "NO_LORA",
    "Packed",
    "Gemma3",
    "Gemma3Config",
    "Layout",
    "LoRAConfig",
    "Params",
    "Remat",
    "Rows",
    "TensorParallel",
    "REPLICATED",
    "abstract",
    "decode",
    "empty_cache",
    "forward",
    "forward_groups",
    "in_dtype",
    "init_adapter",
    "join",
    "merge_adapter",
    "partition",
    "split",
    "unstack_layers",
]
