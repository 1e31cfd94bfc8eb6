"""From final hidden states to a token and its log-prob, head included."""

from gemma_grpo.kernels.fused_sampling.api import FusedDraw, fused_sampling

__all__ = ["FusedDraw", "fused_sampling"]
