"""Shapes and truncations that tests and benchmarks share. Holds numbers only."""

from typing import NamedTuple

from gemma_grpo.kernels.truncated_sampling.search import Truncation


class Case(NamedTuple):
    name: str
    num_words: int  # V
    embed_dim: int  # D
    rows: tuple[int, ...]  # B


NANO = Case("nano", 512, 64, (8, 64))
GEMMA3_270M = Case("270m", 262_144, 640, (8, 16, 64))
GEMMA3_1B = Case("1b", 262_144, 1152, (8, 64, 96))
GEMMA3_1B_MULTIMODAL = Case("1b-multimodal-words", 262_208, 1152, (64,))

TRUNCATIONS = {
    "top-k": Truncation(top_k=50),
    "top-p": Truncation(top_p=0.95),
    "top-k, top-p": Truncation(top_k=50, top_p=0.95),
    "min-p": Truncation(min_p=0.05),
    "all": Truncation(top_k=100, top_p=0.9, min_p=0.02),
}
