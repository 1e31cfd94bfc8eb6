"""The frozen batch that both sides run: prompts, completions, lengths, rewards. Knows no side.

Lengths are the first four groups of eight of `benchmarks/lengths.py`, scaled to the budget, one of
which runs into it; or, in the same order, groups of another size.
"""

import numpy as np

from benchmarks import lengths

NUM_ROWS = 32
FIRST_ID, BOS, PAD = 110, 2, 0  # ids below are special in Gemma's tokenizer


def make_trace(
    *, vocab_size: int, generations: int, prompt_length: int, budget: int
) -> dict[str, np.ndarray]:
    """prompt_ids_PS, completion_ids_BT (padded by 0), lengths_B and rewards_B, of B=32 rows."""
    rng = np.random.default_rng(0)
    lengths_B = np.array(lengths.scaled(budget)[:NUM_ROWS])
    num_prompts = len(lengths_B) // generations
    prompt_ids_PS = rng.integers(FIRST_ID, vocab_size, (num_prompts, prompt_length))
    prompt_ids_PS[:, 0] = BOS
    ids_BT = rng.integers(FIRST_ID, vocab_size, (len(lengths_B), budget))
    mask_BT = np.arange(budget) < lengths_B[:, None]
    return {
        "prompt_ids": prompt_ids_PS.astype(np.int32),
        "completion_ids": np.where(mask_BT, ids_BT, PAD).astype(np.int32),
        "lengths": lengths_B,
        "rewards": rng.integers(0, 5, len(lengths_B)) / 4,
    }


def padded_rows(*, vocab_size: int, length: int) -> dict[str, np.ndarray]:
    """ids and mask of two rows, one of them padded on the left, to compare logits on."""
    ids = np.random.default_rng(1).integers(FIRST_ID, vocab_size, (2, length))
    mask = np.arange(length) >= np.array([[0], [length // 3]])
    return {"ids": np.where(mask, ids, PAD).astype(np.int32), "mask": mask}
