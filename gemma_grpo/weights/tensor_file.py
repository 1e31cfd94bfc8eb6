"""The safetensors format, one tensor at a time, so that memory never holds a full file.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and
byte range of each tensor, counted from the header's end) and the tensors' bytes. The safetensors
library reads through a map of the file, whose pages count as the process's memory until the file
is closed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.weights import buffers

FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in FLOATS.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a file.

    Attributes:
        path: the file.
        dtype: as the header has it: "BF16".
        shape: of the tensor.
        start: its first byte, from the beginning of the file.
        nbytes: its length.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> np.ndarray:
        """The tensor, read from the disk; its dtype is one of `FLOATS`."""
        tensor = buffers.empty(self.shape, FLOATS[self.dtype])
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(tensor.view(np.uint8).data) != self.nbytes:
                raise UserError(f"{self.path}: was cut short while it was read; fetch it again")
        return tensor

    def same_values(self, other: "Slot") -> bool:
        """Whether two tensors are equal to the byte; read in chunks."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with self.path.open("rb") as mine, other.path.open("rb") as theirs:
            mine.seek(self.start)
            theirs.seek(other.start)
            for done in range(0, self.nbytes, _CHUNK):
                size = min(_CHUNK, self.nbytes - done)
                if mine.read(size) != theirs.read(size):
                    return False
        return True


def slots(path: Path) -> dict[str, Slot]:
    """Every tensor of a file by its name; nothing but the header is read.

    Raises:
        UserError: no safetensors file, or one that was cut short.
    """
    if not path.is_file():
        raise UserError(f"{path}: not a file; fetch it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            is_there = 8 + length <= size and length <= _LONGEST_HEADER
            header: Any = json.loads(file.read(length)) if is_there else None
            header.pop("__metadata__", None)
            found = {name: _slot(path, 8 + length, **fields) for name, fields in header.items()}
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a safetensors file; fetch it again") from error
    end = 8 + length
    for name, slot in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if slot.start != end:
            raise UserError(f"{path}: {name} overlaps another tensor, or a gap is before it")
        end += slot.nbytes
    if end != size:
        raise UserError(f"{path}: {size} bytes, but its header says {end}; fetch it again")
    return found


def _slot(path: Path, base: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Slot:
    begin, end = data_offsets
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError("sizes that are no whole numbers")
    if dtype in FLOATS and math.prod(shape) * FLOATS[dtype].itemsize != end - begin:
        raise ValueError("a shape that does not fill its bytes")
    return Slot(path, dtype, tuple(shape), base + begin, end - begin)


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, np.ndarray]],
    dtype: np.dtype,
) -> None:
    """Write one file; tensors are taken one by one and cast.

    Args:
        path: the file; it may be left half-written if an error is raised.
        shapes: of all tensors, by name in the order in which they come.
        tensors: these; no more than these are taken.
        dtype: one of `FLOATS`.

    Raises:
        OSError: the disk is full or cannot be written.
        UserError: a tensor holds nan or infinity, or is too large for the dtype.
    """
    dtype = np.dtype(dtype)
    end, header = 0, dict[str, Any](__metadata__={"format": "pt"})  # transformers asks for it
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            given, tensor = next(tensors)
            if (name, shape) != (given, tensor.shape):
                raise ValueError(f"{given}{tensor.shape} comes where {name}{shape} was announced")
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(tensor, dtype)
            require_finite(name, tensor)
            if dtype == np.float16 and np.isinf(stored).any():
                raise UserError(
                    f"{name} holds {np.abs(tensor).max():g}, more than {dtype.name} can store; "
                    "use bfloat16 or float32"
                )
            file.write(stored.view(np.uint8).data)


def require_finite(name: str, tensor: np.ndarray) -> None:
    """Raises UserError if the tensor holds nan or infinity."""
    flat = tensor.reshape(-1)
    if not all(np.isfinite(flat[at : at + _CHUNK]).all() for at in range(0, flat.size, _CHUNK)):
        raise UserError(
            f"{name} holds nan or infinite numbers; such weights give no text (after training: "
            "lower the learning rate)"
        )
