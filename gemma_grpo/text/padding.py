"""Lists of ids to padded arrays and masks.

Prompts are left-padded, so that all completions of a batch start at the same slot; completions are
right-padded.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


def pad_left(
    rows: Sequence[Sequence[int]], *, length: int, pad_id: int
) -> tuple[Int[np.ndarray, "P S"], Bool[np.ndarray, "P S"]]:
    """Ids that end at the last slot, and a mask that is True on them."""
    ids_PS = np.full((len(rows), length), pad_id, np.int32)
    mask_PS = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        ids_PS[row, length - len(ids) :] = ids
        mask_PS[row, length - len(ids) :] = True
    return ids_PS, mask_PS


def pad_right(
    rows: Sequence[Sequence[int]], *, length: int, pad_id: int
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Ids that begin at the first slot, and a mask that is True on them."""
    ids_BT = np.full((len(rows), length), pad_id, np.int32)
    mask_BT = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = ids
        mask_BT[row, : len(ids)] = True
    return ids_BT, mask_BT


def bucket(longest: int, *, multiple: int) -> int:
    """The length to pad to: `longest` rounded up to a multiple, so that few shapes are compiled."""
    return -(-longest // multiple) * multiple
