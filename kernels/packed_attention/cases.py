"""Shapes of packed attention that tests and benchmarks share."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    window: int
    num_tokens: int  # X, of one pack


GEMMA3_270M = Case("270m", 4, 1, 256, 512, 3072)
GEMMA3_1B = Case("1b", 4, 1, 256, 512, 3072)  # the preset's
GEMMA3_1B_LARGE = Case("1b, a large pack", 4, 1, 256, 512, 8192)
GEMMA3_4B = Case("4b", 8, 4, 256, 1024, 3072)
