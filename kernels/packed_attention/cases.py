"""Shapes of packed attention that tests and benchmarks share. Holds numbers only."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    window: int
    num_prompt_slots: int  # S, of one prompt
    num_tokens: int  # X, of one device


GEMMA3_270M = Case("270m", 4, 1, 256, 512, 512, 3600)
GEMMA3_1B = Case("1b", 4, 1, 256, 512, 512, 3600)  # the preset's, packed to the shared trace
GEMMA3_1B_FULL = Case("1b, all at the cap", 4, 1, 256, 512, 512, 6400)
GEMMA3_4B = Case("4b", 8, 4, 256, 1024, 512, 3600)
