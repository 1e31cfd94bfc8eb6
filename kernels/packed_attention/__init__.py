"""Attention of packed completions over their prompts. The api and nothing else."""

from gemma_grpo.kernels.packed_attention.api import packed_attention
from gemma_grpo.kernels.packed_attention.sights import Sight, sight

__all__ = ["Sight", "packed_attention", "sight"]
