"""Truncations that tests and benchmarks share."""

from gemma_grpo.kernels.truncated_sampling.search import Truncation

TRUNCATIONS = {
    "top-k": Truncation(top_k=50),
    "top-p": Truncation(top_p=0.95),
    "top-k, top-p": Truncation(top_k=50, top_p=0.95),
    "min-p": Truncation(min_p=0.05),
    "all": Truncation(top_k=100, top_p=0.9, min_p=0.02),
}
