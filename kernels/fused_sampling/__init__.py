"""From final hidden states to a token and its log-prob, head included. The api and nothing else."""

from gemma_grpo.kernels.fused_sampling.api import FusedDraw, fused_sampling

__all__ = ["FusedDraw", "fused_sampling"]
