"""Gemma 3 text as a Flax NNX module: config, layers, attention, packed rows, transformer.

Names are imported on first use, so that settings and sizes can be read without importing jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_grpo.model.config import CONFIGS, Gemma3Config
    from gemma_grpo.model.decoding import decode, empty_cache, unstack_layers
    from gemma_grpo.model.groups import forward_groups
    from gemma_grpo.model.layout import REPLICATED, Layout, TensorParallel
    from gemma_grpo.model.lora import merge_adapter
    from gemma_grpo.model.packed import Packed, Rows
    from gemma_grpo.model.params import PRNG, in_dtype, join, partition, random_key
    from gemma_grpo.model.sequences import KV, forward
    from gemma_grpo.model.settings import NANO, NO_LORA, LoRAConfig, ModelConfig, Remat, check_seed
    from gemma_grpo.model.stack import Gather
    from gemma_grpo.model.transformer import Gemma3, Params, abstract, init_adapter, split

_MODULES = (  # searched for a name in this order; the first two do not import jax
    *("config", "settings", "params", "lora", "layout", "transformer", "stack"),
    *("sequences", "decoding", "packed", "groups"),
)
__all__ = [
    "CONFIGS",
    "Gather",
    "Gemma3",
    "Gemma3Config",
    "KV",
    "Layout",
    "LoRAConfig",
    "ModelConfig",
    "NANO",
    "NO_LORA",
    "PRNG",
    "Packed",
    "Params",
    "REPLICATED",
    "Remat",
    "Rows",
    "TensorParallel",
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


def __getattr__(name: str) -> Any:
    for module_name in _MODULES if name in __all__ else ():
        module = importlib.import_module(f"{__name__}.{module_name}")
        if name in vars(module):
            return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
