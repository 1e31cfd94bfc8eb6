"""The host's arrays of a step, of zeros: at the full budgets, or at lengths that are likely.

Their shapes are those of every step; what is in the masks says how much of a step is computed.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int

from gemma_grpo.config import DataConfig, RunConfig
from gemma_grpo.evaluation.evaluator import prompts_at_once
from gemma_grpo.planning import disk
from gemma_grpo.training import grpo, packing, sft

Stage = Literal["sft", "grpo"]
Lengths = Literal["full", "likely"]

# Nobody has published how long Gemma 3 1B's completions of GSM8K are: the lognormal, and the seed,
# of benchmarks/lengths.py, whose trace of 64 completions `completion_lengths(64, 800)` is; prompts
# of GSM8K with the chat's turns take about these tokens.
MEDIAN, WIDTH, SEED = 269 / 800, 0.58, 61  # of the budget; of the logarithm
SHORTEST_PROMPT, LONGEST_PROMPT = 40, 120


def size(run: RunConfig, stage: Stage) -> tuple[int, int]:
    """Prompts of a step, and completions of each."""
    if stage == "sft":
        return run.sft.batch_size, 1
    return run.grpo.prompts_per_step, run.grpo.num_generations


def held_out(data: DataConfig) -> int:
    """Problems that a model is measured on; GSM8K's where the data says all."""
    return data.num_test or disk.GSM8K_PROBLEMS


def evaluation_prompts(run: RunConfig, num_devices: int) -> dict[str, int]:
    """Of a batch of each kind of evaluation, `greedy` and `sampled`."""
    config, num = run.evaluation, held_out(run.data)
    wanted = {"greedy": config.batch_size}
    if config.num_samples:
        wanted["sampled"] = config.batch_size // config.num_samples
    return {name: prompts_at_once(most, num, num_devices) for name, most in wanted.items()}


def snapshots(run: RunConfig) -> int:
    """That GRPO takes."""
    every = run.evaluation.every
    return run.grpo.num_steps // every if every and "grpo" in run.stage_list else 0


def completion_lengths(num: int, budget: int) -> Int[np.ndarray, " B"]:
    """Tokens of likely completions, the stop token included."""
    drawn = np.random.default_rng(SEED).lognormal(np.log(MEDIAN * budget), WIDTH, num)
    return np.clip(np.rint(drawn), 1, budget).astype(int)


def prompt_lengths(num: int, budget: int) -> Int[np.ndarray, " P"]:
    """Tokens of likely prompts."""
    spread = np.linspace(SHORTEST_PROMPT, LONGEST_PROMPT, num)
    return np.minimum(np.rint(spread), budget).astype(int)


def packs(
    run: RunConfig, stage: Stage, num_devices: int, lengths: Lengths = "full"
) -> tuple[dict[str, np.ndarray], ...]:
    """The packs of an update of `stage`. Raises UserError where, without packs, prompts do not
    divide over the devices."""
    budgets = run.model.max_prompt_length, run.model.max_completion_length
    how = (
        sft.make_packing(run.sft, budgets, num_devices)
        if stage == "sft"
        else grpo.make_packing(run.grpo, budgets, num_devices)
    )
    return packing.pack(batch(run, stage, lengths), how)


def batch(run: RunConfig, stage: Stage, lengths: Lengths = "full") -> dict[str, np.ndarray]:
    """The arrays that `stage` packs: those of its `make_batch`, and the keys of dropout."""
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    P, G = size(run, stage)
    B = P * G
    if lengths == "full":
        of_prompts, of_completions = np.full(P, S), np.full(B, T)
    else:
        of_prompts, of_completions = prompt_lengths(P, S), completion_lengths(B, T)
    arrays = {
        "prompt_ids": np.zeros((P, S), np.int32),
        "prompt_mask": np.arange(S) >= S - of_prompts[:, None],
        "completion_ids": np.zeros((B, T), np.int32),
        "completion_mask": np.arange(T) < of_completions[:, None],
        "weights": np.zeros((B, T), np.float32),
    }
    if stage == "grpo":
        arrays |= {
            "loss_mask": arrays["completion_mask"],
            "sampler_logps": np.zeros((B, T), np.float32),
            "advantages": np.zeros(B, np.float32),
            "rows": np.zeros(B, np.int32),
        }
    if run.model.lora.rank and run.model.lora.dropout:
        arrays["dropout_keys"] = np.zeros((P, 2), np.uint32)
        arrays["completion_dropout_keys"] = np.zeros((B, 2), np.uint32)
    return arrays
