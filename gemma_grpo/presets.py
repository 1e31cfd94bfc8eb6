"""Named configurations, each with the command, what to expect and how long it takes."""

from dataclasses import replace

from gemma_grpo.config import DataConfig, ModelConfig, RunConfig
from gemma_grpo.errors import UserError
from gemma_grpo.evaluation import EvaluationConfig
from gemma_grpo.grpo import GRPOConfig, RewardConfig
from gemma_grpo.model import LoRAConfig
from gemma_grpo.rewards import END_WEIGHTS, START_WEIGHTS
from gemma_grpo.sft import SFTConfig
from gemma_grpo.train_state import OptimizerConfig

GEMMA3_NANO = RunConfig(
    sft=SFTConfig(
        num_steps=100,
        batch_size=32,
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
    ),
    grpo=GRPOConfig(
        num_steps=200,
        prompts_per_step=4,
        num_generations=8,
        optimizer=OptimizerConfig(learning_rate=1e-4, decay="linear"),
    ),
)
"""`python -m gemma_grpo.train`: the embedded model on the built-in curriculum. README.md has its
measured results and times."""

GEMMA3_270M = RunConfig(
    model=ModelConfig(
        weights="gemma3-270m",
        lora=LoRAConfig(rank=16, alpha=32.0),
        max_prompt_length=48,
        max_completion_length=64,
        logits_chunk=128,
        cpu_devices=1,
    ),
    data=DataConfig(num_test=300),
    sft=SFTConfig(
        num_steps=40,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=5e-4),
        checkpoint_every=20,
    ),
    grpo=GRPOConfig(
        num_steps=60,
        prompts_per_step=4,
        num_generations=8,
        optimizer=OptimizerConfig(learning_rate=5e-5, decay="linear"),
        curriculum=False,
        # Most groups are all wrong at first. Divided by their own std, the little that tells their
        # rows apart (confidence, length) would count as much as a right answer does (LOG.md).
        scale="batch",
        length_bucket=16,
        checkpoint_every=5,
    ),
    reward=RewardConfig(
        start=replace(START_WEIGHTS, correctness=1.0), end=replace(END_WEIGHTS, correctness=1.0)
    ),
    evaluation=EvaluationConfig(batch_size=100, num_samples=0),
)
"""`python -m gemma_grpo.train --preset gemma3-270m` (extra `[gemma3-270m]`): the real Gemma 3 270M,
base, with adapters, on the built-in curriculum. Sized for two CPU cores; README.md has its measured
results and times."""

PRESETS = {"gemma3-nano": GEMMA3_NANO, "gemma3-270m": GEMMA3_270M}


def preset(name: str) -> RunConfig:
    """The configuration of that name. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
