"""Truncated sampling: hidden states and the tied embedding to a word drawn from the kept ones."""

from gemma_grpo.kernels.truncated_sampling.api import Drawn as Drawn
from gemma_grpo.kernels.truncated_sampling.api import truncated_sampling as truncated_sampling
