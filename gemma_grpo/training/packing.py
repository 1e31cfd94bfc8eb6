"""Which slots of a padded batch hold tokens, and which device works on which prompts.

A packed batch is the padded one with one more array, `slots`: the slots that the model computes
(`model.packed`). A device takes the prompts it holds in passes; the prompts of one pass on one
device are a *pack*. All packs have room for equally many tokens, as they run side by side, so
prompts are dealt out such that no pack has many more tokens than the others.
"""

import numpy as np
from jaxtyping import Int

from gemma_grpo.errors import UserError
from gemma_grpo.text.padding import bucket


def pack(
    batch: dict[str, np.ndarray], *, num_devices: int, passes: int, sizes: int
) -> dict[str, np.ndarray]:
    """The batch with `slots` [P, X], its prompts reordered over the packs.

    The fullest pack's tokens are rounded up to one of `sizes` equal parts of the padded size, so
    that few shapes are compiled. If that is all of it, the batch stays as it is.

    `slots` of the packs' rows together: b*T + t of each token, b and t counted within the pack, and
    one beyond the last slot as filler. X is the slots that a pack has for each of its prompts.

    Args:
        batch: arrays of P, or a multiple of P, rows: `prompt_ids` P, `completion_mask` P*G.
        num_devices: that rows are split over, in contiguous blocks.
        passes: that each device takes its prompts in; pass j takes those with p % passes == j.
        sizes: 1 leaves every batch as it is.
    """
    P = len(batch["prompt_ids"])
    mask_PZ = batch["completion_mask"].reshape(P, -1)  # Z = G*T
    Z = mask_PZ.shape[1]
    pack_P = np.arange(P) // (P // num_devices) * passes + np.arange(P) % passes
    order_P = deal(mask_PZ.sum(axis=1), pack_P)
    mask_PZ = mask_PZ[order_P]
    prompts_each = P // (num_devices * passes)
    fullest = int(np.bincount(pack_P, weights=mask_PZ.sum(axis=1)).max())
    X = bucket(-(-fullest // prompts_each), multiple=-(-Z // sizes), maximum=Z)
    if X == Z:
        return batch
    slots_PX = np.empty((P, X), np.int32)
    for number in range(num_devices * passes):
        rows = pack_P == number
        slots = np.flatnonzero(mask_PZ[rows])
        filled = np.full(prompts_each * X, prompts_each * Z)
        filled[: len(slots)] = slots
        slots_PX[rows] = filled.reshape(prompts_each, X)
    return {name: _in_order(array, order_P) for name, array in batch.items()} | {"slots": slots_PX}


def check_sizes(stage: str, sizes: int) -> None:
    """Raises UserError if there is no size to pack to."""
    if sizes < 1:
        raise UserError(f"{stage}: packed_sizes={sizes} must be at least 1, which packs nothing")


def deal(tokens_P: Int[np.ndarray, " P"], pack_P: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """Which prompt goes to each place, so that packs are about equally full.

    The largest prompt left goes to the pack that is emptiest among those with a free place
    (Graham's rule for equal machines, with places). Within a pack prompts keep their order.

    Args:
        tokens_P: of each prompt's completions.
        pack_P: the pack that each place belongs to.
    """
    free = np.bincount(pack_P)
    load = np.zeros(len(free))
    goes_to_P = np.empty_like(pack_P)
    for prompt in np.argsort(-tokens_P, kind="stable"):
        emptiest = np.argmin(np.where(free > 0, load, np.inf))
        goes_to_P[prompt] = emptiest
        load[emptiest] += tokens_P[prompt]
        free[emptiest] -= 1
    order_P = np.empty_like(pack_P)
    for number in range(len(free)):
        order_P[pack_P == number] = np.flatnonzero(goes_to_P == number)
    return order_P


def _in_order(array: np.ndarray, order_P: np.ndarray) -> np.ndarray:
    P = len(order_P)
    return array.reshape(P, -1, *array.shape[1:])[order_P].reshape(array.shape)
