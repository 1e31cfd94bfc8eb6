"""The settings of a model: adapters, how it is run, and the seeds allowed. Does not import jax."""

import re
from dataclasses import dataclass
from typing import Literal

from gemma_grpo.errors import UserError

NANO = "gemma3-nano"  # the embedded weights
TARGETS = (
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
# What the forward pass stores for the backward pass. none: everything, logits too. dots: matmuls
# with weights; norms, attention and the MLP's gate are computed again. full: a block's input alone.
Remat = Literal["none", "dots", "full"]
_MOST_CPU_DEVICES = 256  # XLA starts threads for each, and crashes with too many
_SEEDS = 2**31 - 1  # seeds below this fit a signed 32-bit integer


def check_seed(seed: int) -> None:
    """Raises UserError for a seed whose bits JAX would truncate."""
    if not 0 <= seed < _SEEDS:
        raise UserError(f"seed={seed}: must be 0 or more, and below {_SEEDS}")


@dataclass(frozen=True)
class LoRAConfig:
    """Train low-rank adapters beside a frozen base instead of all weights."""

    rank: int = 0
    """Rank r of the adapters; 0 trains all weights, without adapters."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    targets: str = ".*"
    """Regular expression searched for in attention.q_proj, .k_proj, .v_proj, .o_proj, mlp.gate, .up
    and .down: the projections that get an adapter, in every layer."""
    dropout: float = 0.0
    """Share of the adapters' inputs dropped in training. Old and reference log-probs are scored
    under the update's own dropout masks, so that the ratio is 1 until the weights move, and the KL
    is 0 while they equal the reference's. Sampling drops nothing, so logp_gap is not measured."""

    def __post_init__(self):
        if self.rank < 0 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"lora: rank={self.rank} must be 0 (off) or more, alpha={self.alpha} above 0, "
                f"dropout={self.dropout} in [0, 1)"
            )
        try:
            chosen = self.chosen
        except re.error as error:
            raise UserError(
                f"lora.targets={self.targets!r} is not a regular expression: {error}"
            ) from error
        if self.rank and not chosen:
            raise UserError(
                f"lora.targets={self.targets!r} matches none of {', '.join(TARGETS)}; "
                "'.*' takes all"
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The projections in `TARGETS` that get an adapter."""
        if self.rank == 0:
            return ()
        return tuple(name for name in TARGETS if re.search(self.targets, name))


NO_LORA = LoRAConfig()


@dataclass(frozen=True)
class ModelConfig:
    """What is trained, and how it is run."""

    weights: str = "gemma3-nano"
    """gemma3-nano (embedded), gemma3-270m (its installed package), a folder (Hugging Face's or
    Kaggle's), a file (.safetensors in such a folder, .gguf) or a model on Kaggle
    (kagglehub:OWNER/MODEL/FRAMEWORK/VARIATION)."""
    tokenizer: str = ""
    """A SentencePiece tokenizer.model; "" uses the one that comes with the weights."""
    lora: LoRAConfig = NO_LORA
    """Adapters; off unless lora.rank is set."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; master weights are always float32. On a TPU float32 takes six passes of the
    matrix units where bfloat16 takes one."""
    instruction: str = ""
    """Text put before every question, on its own line."""
    max_prompt_length: int = 48
    """Most tokens of a prompt, including the chat turns."""
    max_completion_length: int = 60
    """Most tokens of a completion, including the stop token."""
    remat: Remat = "none"
    """What the backward pass recomputes to save memory: none; dots, all but the matmuls with
    weights; full, each block. none also keeps the logits if the embedding is trained: a GB per
    thousand tokens of a pack."""
    rollout_layout: Literal["data", "tensor_parallel"] = "data"
    """Layout of the weights while sampling. data: replicated on every device. tensor_parallel: MLPs
    and embedding sharded over the devices, faster if each of several chips decodes only a few
    rows."""
    cpu_devices: int = 0
    """CPU devices; 0: one per core, reduced until batch sizes divide evenly. Use 1 for a large
    model, whose matmuls use all cores anyway."""

    def __post_init__(self):
        if self.max_prompt_length < 1 or self.max_completion_length < 1:
            raise UserError("model: max_prompt_length and max_completion_length must be at least 1")
        if not 0 <= self.cpu_devices <= _MOST_CPU_DEVICES:
            raise UserError(f"model: cpu_devices must be from 0 to {_MOST_CPU_DEVICES}")

    @property
    def of_gemma(self) -> bool:
        """Whether the weights are Gemma's, whose terms apply; the embedded ones are not."""
        return self.weights != NANO
