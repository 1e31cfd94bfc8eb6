"""A checkpoint by what a user calls it: a name, a folder or a file."""

import hashlib
from dataclasses import replace
from pathlib import Path

from gemma_grpo.data import kaggle
from gemma_grpo.errors import UserError, expanded
from gemma_grpo.model import CONFIGS, NANO
from gemma_grpo.records import files, origin
from gemma_grpo.weights import (
    assets,
    gemma3_270m,
    gguf_file,
    hf_folder,
    orbax_flax,
    sentencepiece_model,
)
from gemma_grpo.weights.source import Source


def open_source(where: str) -> Source:
    """Open what the user named; only headers are read, except that gemma3-270m is converted once.

    Args:
        where: gemma3-nano (embedded), gemma3-270m (its installed package), a folder as Hugging Face
            or Kaggle has it or a *.safetensors file in it, an Orbax checkpoint ("flax" at Kaggle)
            or the folder around it, a *.gguf file, or a model at Kaggle as
            kagglehub:OWNER/MODEL/FRAMEWORK/VARIATION. A folder called as one of the names is
            `./gemma3-270m`.

    Raises:
        UserError: nothing is there, or it is no Gemma 3 that can be read.
    """
    if where == NANO:
        return _with_known_config(hf_folder.open_folder(assets.NANO))
    if where == gemma3_270m.NAME:
        return hf_folder.open_folder(gemma3_270m.cached_folder())
    from_kaggle = where.startswith(kaggle.PREFIX)
    path = kaggle.model_folder(where) if from_kaggle else expanded(where)
    if path.suffix == ".gguf" and path.is_file():
        return gguf_file.open_gguf(path)
    file = None
    if path.suffix == ".safetensors" and path.is_file():
        path, file = path.parent, path
    if not path.exists() and where in CONFIGS:
        raise UserError(
            f"weights {where}: not shipped; download google/{where.replace('3', '-3')}-it and "
            "give its folder with --model.weights"
        )
    if not path.is_dir():
        raise UserError(
            f"weights {where}: no such folder, *.safetensors or *.gguf file; {NANO} and "
            f"{gemma3_270m.NAME} are the known names"
        )
    if (path / "config.json").is_file():
        return _with_known_config(hf_folder.open_folder(path, file))
    if orbax_flax.find_checkpoints(path):
        return orbax_flax.open_orbax(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"weights {where}: adapters alone, without their base; export the run without "
            "--adapter, or merge them into their base with PEFT"
        )
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    raise UserError(
        f"weights {where}: neither config.json (a Hugging Face folder) nor {orbax_flax.MANIFEST} "
        f"(an Orbax checkpoint) in it; name {f'{ggufs[0]} itself' if ggufs else 'another folder'}"
    )


def digest(where: str) -> str:
    """Of the checkpoint that the user named, by `origin.of_files`. Raises as `open_source`."""
    return origin.of_files(open_source(where).path)


def tokenizer_path(source: Source) -> Path:
    """The checkpoint's own tokenizer; that of a GGUF file is rebuilt into the cache.

    Raises:
        UserError: it brings none that is read, or the cache cannot be written.
    """
    if source.tokenizer is not None:
        return source.tokenizer
    if source.path.suffix == ".gguf":
        return _rebuilt_tokenizer(source.path)
    folder = source.path if source.path.is_dir() else source.path.parent
    has_json = (folder / "tokenizer.json").is_file()
    found = "only tokenizer.json, which is not read" if has_json else "nor a tokenizer.json"
    raise UserError(
        f"weights {source.path}: no tokenizer.model ({found}); fetch it from where the model came "
        "from (google/gemma-3-* has it) and put it there, or name one with --model.tokenizer"
    )


def _rebuilt_tokenizer(gguf: Path) -> Path:
    """A GGUF's tokenizer as a file, under the name of its content: files with one share it."""
    content = sentencepiece_model.rebuild(gguf)
    path = assets.cache() / "tokenizers" / f"{hashlib.sha256(content).hexdigest()[:16]}.model"
    if not path.is_file():
        another = assets.ANOTHER_CACHE
        with files.atomic_write(path, shared=True, another_place=another) as unfinished:
            unfinished.write_bytes(content)
    return path


def _with_known_config(source: Source) -> Source:
    """A model of ours runs as its config says, which knows more than the file's: how to compile."""
    for known in CONFIGS.values():
        if replace(source.config, scan_unroll=known.scan_unroll) == known:
            return replace(source, config=known)
    return source
