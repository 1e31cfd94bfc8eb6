"""A checkpoint by what a user calls it: a name, a folder or a file. Knows no format itself."""

from dataclasses import replace
from pathlib import Path

from gemma_grpo import assets
from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS
from gemma_grpo.weights import gemma3_270m, gguf_file, hf_folder
from gemma_grpo.weights.source import Source

NANO = "gemma3-nano"


def open_source(where: str) -> Source:
    """Open what the user named; only headers are read, except that gemma3-270m is converted once.

    Args:
        where: gemma3-nano (embedded), gemma3-270m (its installed package), a folder as Hugging Face
            or Kaggle has it, or a .gguf file.

    Raises:
        UserError: nothing is there, or it is no Gemma 3 that can be read.
    """
    if where == NANO:
        return _with_known_config(hf_folder.open_folder(assets.NANO))
    if where == gemma3_270m.NAME:
        return hf_folder.open_folder(gemma3_270m.cached_folder())
    path = Path(where).expanduser()
    if path.is_dir():
        return _with_known_config(hf_folder.open_folder(path))
    if path.suffix == ".gguf" and path.is_file():
        return gguf_file.open_gguf(path)
    raise UserError(
        f"weights {where}: no such folder or .gguf file; {NANO} and {gemma3_270m.NAME} are the "
        "known names"
    )


def _with_known_config(source: Source) -> Source:
    """A model of ours runs as its config says, which knows more than the file's: how to compile."""
    for known in CONFIGS.values():
        if replace(source.config, scan_unroll=known.scan_unroll) == known:
            return replace(source, config=known)
    return source
