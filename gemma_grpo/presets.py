"""Named configurations, each with the command, what to expect and how long it takes."""

from gemma_grpo.config import RunConfig
from gemma_grpo.errors import UserError
from gemma_grpo.grpo import GRPOConfig
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

PRESETS = {"gemma3-nano": GEMMA3_NANO}


def preset(name: str) -> RunConfig:
    """The configuration of that name. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
