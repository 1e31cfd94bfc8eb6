"""The embedded model: the folder of its files in the installed package. Knows no format."""

from pathlib import Path

NANO = Path(__file__).parent / "gemma3_nano"
NANO_TOKENIZER = NANO / "tokenizer.model"
