"""Truncated sampling: hidden states and the tied embedding to a token drawn from those kept."""

from gemma_grpo.kernels.truncated_sampling.api import TruncatedDraw, truncated_sampling

__all__ = ["TruncatedDraw", "truncated_sampling"]
