"""The frozen batch that both sides run: prompts, completions, lengths, rewards. Knows no side.

Lengths are the 32 quantiles (i + 1/2) / 32 of a log-normal with median 0.3236 and sigma 0.6 of the
budget, cut off at it: a mean of 0.38 of the budget and one row of 32 that runs into it, as in GRPO
runs of which `mean 312 of 800 tokens, 3 % cut off` is typical. Dealt to four groups of eight, or,
in the same order, to groups of another size.
"""

import numpy as np

LENGTHS_PG = (  # of 128
    (11, 22, 28, 35, 42, 51, 64, 87),
    (15, 23, 30, 37, 44, 54, 68, 97),
    (18, 25, 32, 39, 47, 57, 73, 113),
    (20, 27, 33, 40, 49, 60, 79, 128),
)
BUDGET = 128
FIRST_ID, BOS, PAD = 110, 2, 0  # ids below are special in Gemma's tokenizer


def make_trace(
    *, vocab_size: int, generations: int, prompt_length: int, budget: int
) -> dict[str, np.ndarray]:
    """prompt_ids_PS, completion_ids_BT (padded by 0), lengths_B and rewards_B, of B=32 rows."""
    rng = np.random.default_rng(0)
    lengths_B = np.maximum(1, np.array(LENGTHS_PG).reshape(-1) * budget // BUDGET)
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
