"""Host memory that a CPU device can take over as it stands."""

import math
from collections.abc import Sequence

import numpy as np

_ALIGNMENT = 64  # bytes; XLA's CPU backend copies an array that begins anywhere else


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """`np.empty`, at an address that `jax.device_put` to a CPU need not copy from."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)
