"""The frozen batch that both sides run: prompts, completions, lengths, rewards.

Lengths are the first of `benchmarks/lengths.py`, scaled to the budget, which one of the first
sixteen runs into; groups may be of another size, in the same order.
"""

import numpy as np

from benchmarks import lengths

FIRST_ID, BOS, PAD = 110, 2, 0  # ids below are special in Gemma's tokenizer


def make_trace(
    *, vocab_size: int, rows: int, generations: int, prompt_length: int, budget: int
) -> dict[str, np.ndarray]:
    """prompt_ids_PS, completion_ids_BT (padded by 0), lengths_B and rewards_B, of B `rows`."""
    rng = np.random.default_rng(0)
    lengths_B = np.array(lengths.scaled(budget)[:rows])
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
