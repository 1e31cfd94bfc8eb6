"""Orbax checkpoints of Gemma 3 as Google's `gemma` library keeps them, which are Kaggle's "flax"
downloads.

A checkpoint is one OCDBT key-value store of Zarr arrays, named by their path in the tree: nested
(`layer_0.attn.q_einsum.w`) as the library saves it, or flat (`transformer/layer_0/attn/q_einsum.w`)
as it was released. It states no configuration: the sizes are read off the shapes, and the rest is
known by them. Names and layouts: gemma 3.3.0, gm/nn/_modules.py and gm/ckpts/_checkpoint.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.weights.names import LAYERS, their_shapes
from gemma_grpo.weights.source import Source, StoredTensor
from gemma_grpo.weights.tensor_file import FLOATS

MANIFEST = "manifest.ocdbt"
_NOT_TEXT = ("SigLiPFromPatches_0.", "vision_encoder.", "embedder.mm_")


@dataclass(frozen=True)
class _Array:
    """What a tensor of Hugging Face's is in a checkpoint of Google's.

    Attributes:
        name: of the array, with `{layer}` in it if each layer has one.
        axes: of that array, in the project's letters; S stacks the matrices of one matmul.
        to_theirs: the array, or its part along S, in Hugging Face's layout.
        part: its index along S; None where there is no S.
    """

    name: str
    axes: str
    to_theirs: Callable[[np.ndarray], np.ndarray]
    part: int | None = None


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _out_in(array_NDH: np.ndarray) -> np.ndarray:
    """In: [N, D, H]  Out: [N * H, D]"""
    return array_NDH.transpose(0, 2, 1).reshape(-1, array_NDH.shape[1])


def _flip(array: np.ndarray) -> np.ndarray:
    """In: [..., D]  Out: [D, ...], the other axes as one"""
    return array.reshape(-1, array.shape[-1]).T


_ATTENTION, _MLP = "layer_{layer}.attn.", "layer_{layer}.mlp."
_ARRAYS = {
    "model.embed_tokens.weight": _Array("embedder.input_embedding", "VD", _same),
    "model.norm.weight": _Array("final_norm.scale", "D", _same),
    LAYERS + "self_attn.q_proj.weight": _Array(_ATTENTION + "q_einsum", "NDH", _out_in),
    LAYERS + "self_attn.k_proj.weight": _Array(_ATTENTION + "kv_einsum", "SKDH", _out_in, part=0),
    LAYERS + "self_attn.v_proj.weight": _Array(_ATTENTION + "kv_einsum", "SKDH", _out_in, part=1),
    LAYERS + "self_attn.o_proj.weight": _Array(_ATTENTION + "attn_vec_einsum", "NHD", _flip),
    LAYERS + "self_attn.q_norm.weight": _Array(_ATTENTION + "_query_norm.scale", "H", _same),
    LAYERS + "self_attn.k_norm.weight": _Array(_ATTENTION + "_key_norm.scale", "H", _same),
    LAYERS + "mlp.gate_proj.weight": _Array(_MLP + "gating_einsum", "SFD", _same, part=0),
    LAYERS + "mlp.up_proj.weight": _Array(_MLP + "gating_einsum", "SFD", _same, part=1),
    LAYERS + "mlp.down_proj.weight": _Array(_MLP + "linear", "FD", _flip),
} | {
    LAYERS + f"{theirs}.weight": _Array("layer_{layer}." + f"{name}.scale", "D", _same)
    for theirs, name in {
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }.items()
}


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint that a folder is, or those directly in it."""
    if (path / MANIFEST).is_file():
        return [path]
    return sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))


def open_orbax(path: Path) -> Source:
    """Open a checkpoint, or the folder with one in it; no array is read.

    Raises:
        UserError: no such checkpoint or several, of no known size, with arrays missing, left over
            or misshapen.
    """
    folders = find_checkpoints(path)
    if len(folders) != 1:
        names = ", ".join(folder.name for folder in folders) or "none"
        raise UserError(f"weights {path}: {names} of Orbax checkpoints in it; name exactly one")
    folder = folders[0]
    stores = _open_stores(folder)
    ignored = [name for name in stores if name.startswith(_NOT_TEXT)]
    text = {name: store for name, store in stores.items() if name not in ignored}
    config = _known_config(text, folder)
    tensors, used = {}, set()
    for pattern, array in _ARRAYS.items():
        for layer in range(config.num_layers if "{layer}" in pattern else 1):
            name = array.name.format(layer=layer)
            used.add(name)
            _check(name, text, array.axes, config, folder)
            store = text[name] if array.part is None else text[name][array.part]
            read = partial(_read, store, array.to_theirs, f"{folder}: {name}")
            tensors[pattern.format(layer=layer)] = read
    left_over = sorted(text.keys() - used)
    if left_over:
        raise UserError(f"weights {folder}: the model has no place for {left_over[0]}")
    shapes = their_shapes(config)
    return Source(
        path=path,
        config=config,
        tensors={name: StoredTensor(shapes[name], read) for name, read in tensors.items()},
        tokenizer=_tokenizer(path, folder),
        ignored=tuple(ignored),
        multimodal=config.rope_scale_global != 1.0,
    )


def _open_stores(folder: Path) -> dict[str, Any]:
    """Every array of a checkpoint, by its path as the library nests it, without a final `w`."""
    store = {"driver": "ocdbt", "base": folder.absolute().as_uri() + "/"}
    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
        headers = (key.decode() for key in keys if key.endswith((b"/.zarray", b"/zarr.json")))
        opened = {}
        for header in headers:
            name, kind = header.rsplit("/", maxsplit=1)
            driver = "zarr" if kind == ".zarray" else "zarr3"
            spec = {"driver": driver, "kvstore": store | {"path": name}}
            plain = name.replace("/", ".").removeprefix("transformer.").removesuffix(".w")
            opened[plain] = tensorstore.open(spec, read=True)
        return {name: future.result() for name, future in opened.items()}
    except ValueError as error:  # what tensorstore raises for all that is wrong with a file
        raise UserError(f"weights {folder}: a damaged Orbax checkpoint; fetch it again") from error


def _known_config(stores: dict[str, Any], folder: Path) -> Gemma3Config:
    """The Gemma 3 whose sizes the shapes are. Raises UserError if there is none."""
    sizes = {
        "num_layers": len(
            {name for name in stores if re.fullmatch(r"layer_\d+\.mlp\.linear", name)}
        )
    }
    for name, fields in (
        ("embedder.input_embedding", ("vocab_size", "embed_dim")),
        ("layer_0.attn.q_einsum", ("num_heads", None, "head_dim")),
        ("layer_0.attn.kv_einsum", (None, "num_kv_heads")),
        ("layer_0.mlp.linear", ("hidden_dim",)),
    ):
        if name not in stores:
            raise UserError(f"weights {folder}: no array {name}; not a Gemma 3 checkpoint")
        stated = zip(fields, stores[name].shape, strict=False)
        sizes |= {field: size for field, size in stated if field is not None}
    # Hugging Face's files pad the vocabulary of the multimodal models, Google's do not.
    vocab_size = sizes.pop("vocab_size")
    for config in CONFIGS.values():
        if all(getattr(config, field) == size for field, size in sizes.items()):
            return replace(config, vocab_size=vocab_size)
    told = ", ".join(f"{field}={size}" for field, size in sizes.items())
    raise UserError(f"weights {folder}: {told} is none of {', '.join(CONFIGS)}")


def _check(
    name: str, stores: dict[str, Any], axes: str, config: Gemma3Config, folder: Path
) -> None:
    """Raises UserError unless the array is there, in its shape and in a dtype that we read."""
    sizes = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.hidden_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "S": 2,
    }
    expected = tuple(sizes[axis] for axis in axes)
    if name not in stores:
        raise UserError(f"weights {folder}: no array {name}; an unfinished download")
    store = stores[name]
    if store.shape != expected:
        raise UserError(f"weights {folder}: {name} has shape {store.shape}, expected {expected}")
    if store.dtype.numpy_dtype not in FLOATS.values():
        raise UserError(
            f"weights {folder}: {name} is stored as {store.dtype.name}, a quantised model; fetch "
            "the one in bfloat16"
        )


def _read(store: Any, to_theirs: Callable[[np.ndarray], np.ndarray], named: str) -> np.ndarray:
    try:
        return to_theirs(store.read().result())
    except ValueError as error:
        raise UserError(f"weights {named} is damaged; fetch it again") from error


def _tokenizer(path: Path, folder: Path) -> Path | None:
    """The SentencePiece file in the named folder, in the checkpoint, or beside it."""
    for place in (path, folder, folder.parent):
        if found := sorted(place.glob("tokenizer*.model")):
            return found[0]
    return None
