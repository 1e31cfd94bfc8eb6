"""Shapes of log-probs that tests and benchmarks share."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    vocab_size: int  # V
    embed_dim: int  # D
    num_tokens: int  # X, of one device


NANO = Case("nano", 512, 64, 64 * 60)
GEMMA3_270M = Case("270m", 262_144, 640, 32 * 64)
GEMMA3_1B = Case("1b", 262_144, 1152, 4 * 800)

ONE_TOKEN = Case("one token", 512, 64, 1)
ONE_CHUNK = Case("one chunk, no power of two", 1300, 16, 7)
SHORT_END = Case("two chunks and a short one", 8500, 8, 3)
SMALL = (ONE_TOKEN, ONE_CHUNK, SHORT_END)
