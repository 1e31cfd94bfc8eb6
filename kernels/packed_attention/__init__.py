"""Attention within a packed row of prompts and completions: the public names."""

from gemma_grpo.kernels.packed_attention.api import packed_attention
from gemma_grpo.kernels.packed_attention.block_masks import (
    BlockMask,
    Segments,
    dense_mask,
    make_block_mask,
)

__all__ = ["BlockMask", "Segments", "dense_mask", "make_block_mask", "packed_attention"]
