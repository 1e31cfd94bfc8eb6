"""Parameters to and from one safetensors file, under our own names.

A tensor's name is its path in the parameter tree, joined by dots: `layers.mlp.gate`. The file's
metadata has a digest of all tensors, which is compared when they are read.
"""

import hashlib
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import safetensors
import safetensors.numpy

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.devices import processes
from gemma_grpo.errors import UserError
from gemma_grpo.model import Params, in_dtype
from gemma_grpo.records import files
from gemma_grpo.weights import tensor_file
from gemma_grpo.weights.names import by_path


def save(
    path: Path, params: Params, *, dtype: Literal["float32", "bfloat16"] | None = None
) -> None:
    """Write every parameter; the file appears complete or not at all.

    Args:
        dtype: to store them in; None leaves them as they are.

    Raises:
        UserError: a parameter is nan or infinite, or the disk is full or cannot be written.
    """
    if dtype is not None:
        params = in_dtype(params, dtype)
    tensors = {name: meshes.to_host(leaf) for name, leaf in by_path(params).items()}
    processes.run_on_primary(lambda: _write(path, tensors))


def load(path: Path, like: Params) -> Params:
    """Read the parameters of a tree shaped like `like`, in its dtypes.

    Each gets the sharding of its counterpart (an array or a `jax.ShapeDtypeStruct`), with no full
    copy on one device in between; without a sharding it goes to the default device.

    Raises:
        UserError: the file is missing or damaged, or a tensor is missing, left over or misshapen,
            nan or infinite.
    """
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            digest = (file.metadata() or {}).get("sha256")
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"weights {path}: an incomplete or damaged safetensors file ({error})"
        ) from error
    if digest not in (None, _digest(tensors)):  # None: of an earlier version
        raise UserError(
            f"weights {path}: its bytes have changed since they were written; put back a copy, or "
            "delete it and --resume"
        )
    wanted = by_path(like)
    if tensors.keys() != wanted.keys():
        missing = sorted(wanted.keys() - tensors.keys())
        extra = sorted(tensors.keys() - wanted.keys())
        raise UserError(f"weights {path}: missing {missing}, left over {extra}: another model's?")
    for name, leaf in wanted.items():
        if tensors[name].shape != leaf.shape:
            raise UserError(
                f"weights {path}: {name} has shape {tensors[name].shape}, expected {leaf.shape}"
            )
        tensor_file.require_finite(f"weights {path}: {name}", tensors[name])
    flat = [
        meshes.place(tensors[name].astype(leaf.dtype, copy=False), getattr(leaf, "sharding", None))
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), flat)


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        tensor_file.require_finite(f"weights {path}: {name}", tensor)
    with files.atomic_write(path) as unfinished:
        safetensors.numpy.save_file(tensors, unfinished, metadata={"sha256": _digest(tensors)})


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """Of the names, shapes, dtypes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()
