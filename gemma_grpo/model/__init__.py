"""Gemma 3 text as a Flax NNX module: config, layers, attention, packed rows, transformer."""

from gemma_grpo.model.config import CONFIGS, Gemma3Config
from gemma_grpo.model.decode import decode, empty_cache, unstack_layers
from gemma_grpo.model.forward import KV, forward
from gemma_grpo.model.groups import forward_groups
from gemma_grpo.model.layout import REPLICATED, Layout, TensorParallel
from gemma_grpo.model.lora import NO_LORA, LoRAConfig, merge_adapter
from gemma_grpo.model.packed import Packed, Rows
from gemma_grpo.model.params import PRNG, check_seed, in_dtype, join, partition, random_key
from gemma_grpo.model.stack import Gather, Remat
from gemma_grpo.model.transformer import Gemma3, Params, abstract, init_adapter, split

__all__ = [
    "CONFIGS",
    "Gather",
    "KV",
    "NO_LORA",
    "PRNG",
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
    "check_seed",
    "decode",
    "empty_cache",
    "forward",
    "forward_groups",
    "in_dtype",
    "init_adapter",
    "join",
    "merge_adapter",
    "partition",
    "random_key",
    "split",
    "unstack_layers",
]
