"""Batches of random completions that no model drew, for the tests of the update."""

import numpy as np
from stubs import PAD, TINY, tiny_prompts

from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import grpo_update, packing

P, G, T = 8, 2, 6
STOP = 7


def fake_rollout(seed=3):
    """Completions of random lengths that end in STOP where there is room."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, P * G)
    mask = np.arange(T) < lengths[:, None]
    ids = np.where(mask, rng.integers(8, TINY.vocab_size, (P * G, T)), PAD).astype(np.int32)
    stopped = lengths < T
    ids[np.flatnonzero(stopped), lengths[stopped] - 1] = STOP
    return Rollout(ids, mask, np.zeros((P * G, T), np.float32), stopped)


PROMPTS = tiny_prompts(P)
ADVANTAGES = np.random.default_rng(4).normal(size=P * G).astype(np.float32)


def packs_of(batch, *, tokens=0, num_devices=1):
    """A batch in packs of this many tokens, or as the one pack of a device's share."""
    lengths = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    num_prompts = len(batch["prompt_ids"])
    num_generations = len(batch["completion_ids"]) // num_prompts
    return packing.pack(
        batch, packing.make_packing(num_prompts, num_generations, tokens, lengths, num_devices)
    )


def batch_of(rollout, *, prompts=PROMPTS, **loss):
    return grpo_update.make_batch(*prompts, rollout, ADVANTAGES, LossConfig(**loss))
