"""The embedded model: where its files are in the installed package. Knows no format."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "gemma3_nano"
NANO_WEIGHTS = _FOLDER / "model.safetensors"
NANO_TOKENIZER = _FOLDER / "tokenizer.model"
