"""Where files are: the embedded model in the installed package, and the user's cache."""

import os
from pathlib import Path

from gemma_grpo.errors import expanded

NANO = Path(__file__).parents[1] / "gemma3_nano"
NANO_TOKENIZER = NANO / "tokenizer.model"
CACHE_VARIABLE = "GEMMA_GRPO_CACHE"
ANOTHER_CACHE = f"set {CACHE_VARIABLE} to another folder"


def cache() -> Path:
    """The folder for what can be made again: the environment's, or one in the user's home."""
    return expanded(os.environ.get(CACHE_VARIABLE) or "~/.cache/gemma_grpo")
