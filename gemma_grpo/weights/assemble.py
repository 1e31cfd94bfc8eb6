"""A checkpoint's tensors into our parameter tree, and the tree back into tensors.

Host memory: beside the parameters themselves, one leaf at a time, each layer read straight into its
place. The largest leaves come first, while the least of the parameters is there already.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.model import Gemma3Config, Params
from gemma_grpo.records import files
from gemma_grpo.weights import buffers, hf_folder, tensor_file
from gemma_grpo.weights.names import TABLE, Entry, by_path, their_shapes
from gemma_grpo.weights.source import Source


def assemble(
    source: Source, like: Params, *, dtype: DTypeLike, sharding: Sharding | PyTree | None
) -> Params:
    """Read every tensor of a checkpoint into its place.

    Args:
        source: the open checkpoint.
        like: the tree to fill, such as `abstract(source.config)[1]`; only shapes are looked at.
        dtype: of the parameters.
        sharding: of all leaves, or a tree of them; None is the default device, uncommitted.

    Raises:
        UserError: a tensor is missing, left over or misshapen, or a file is not as its SHA256SUMS
            say; nothing was read then. One holds nan or infinity.
    """
    _check(source)
    files.require_sums(source.path, hf_folder.TENSORS)
    leaves = by_path(like)
    if sharding is None or isinstance(sharding, Sharding):
        places = dict.fromkeys(leaves, sharding)
    else:
        places = by_path(sharding)
    placed = {}
    for entry in sorted(TABLE, key=lambda entry: -leaves[entry.ours].size):
        buffer = _read(source, entry, leaves[entry.ours].shape, np.dtype(dtype))
        placed[entry.ours] = meshes.place(buffer, places[entry.ours], may_alias=True)
    return jax.tree.unflatten(jax.tree.structure(like), [placed[path] for path in leaves])


def hf_tensors(params: Params, config: Gemma3Config) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters as tensors of `Gemma3ForCausalLM`, in the order of `their_shapes(config)`.

    One leaf at a time is brought to the host.
    """
    leaves = by_path(params)
    for entry in TABLE:
        leaf = meshes.to_host(leaves[entry.ours])
        layers = leaf if entry.stacked else [leaf]
        for name, array in zip(entry.their_names(config.num_layers), layers, strict=True):
            yield name, entry.to_theirs(array)


def _check(source: Source) -> None:
    """Raises UserError unless the checkpoint holds the model's tensors and no others."""
    wanted = their_shapes(source.config)
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise UserError(
            f"weights {source.path}: no tensor {_first(missing)}; an unfinished download, or its "
            "configuration is another model's"
        )
    extra = sorted(source.tensors.keys() - wanted.keys())
    if extra:
        raise UserError(
            f"weights {source.path}: the model has no place for {_first(extra)}; its configuration "
            "is another model's"
        )
    for name, shape in wanted.items():
        if source.tensors[name].shape != shape:
            raise UserError(
                f"weights {source.path}: {name} has shape {source.tensors[name].shape}, but its "
                f"configuration says {shape}"
            )


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _read(source: Source, entry: Entry, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """One leaf of ours on the host."""
    if not entry.stacked:
        tensor = _finite(source, entry.theirs)
        if tensor.dtype == dtype:
            return tensor
        buffer = buffers.empty(shape, dtype)
        buffer[...] = tensor
        return buffer
    buffer = buffers.empty(shape, dtype)
    for layer, name in enumerate(entry.their_names(shape[0])):
        buffer[layer] = entry.to_ours(_finite(source, name), shape[1:])
    return buffer


def _finite(source: Source, name: str) -> np.ndarray:
    """One tensor of theirs. Raises UserError if it holds nan or infinity."""
    tensor = source.tensors[name].read()
    tensor_file.require_finite(f"weights {source.path}: {name}", tensor)
    return tensor
