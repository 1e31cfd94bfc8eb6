"""Shapes of fused sampling that tests and benchmarks share."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    vocab_size: int  # V
    embed_dim: int  # D
    rows: tuple[int, ...]  # B


NANO = Case("nano", 512, 64, (8, 64))
GEMMA3_270M = Case("270m", 262_144, 640, (8, 32, 64))
GEMMA3_1B = Case("1b", 262_144, 1152, (8, 64, 96))
GEMMA3_1B_MULTIMODAL = Case("1b-multimodal-vocabulary", 262_208, 1152, (64,))
