"""Times that a chip's speed limits allow, from stated formulas. A model: nothing here is measured.

N parameters of the blocks, E = V*D of the embedding, B = P*G rows, S and T tokens; bf16, 2 bytes.
Attention's products are left out where the weights' dominate (below 10 % at these lengths).
"""

from dataclasses import dataclass

from gemma_grpo.errors import UserError
from gemma_grpo.model import Gemma3Config

BYTES = 2  # of bfloat16
Number = int | float


@dataclass(frozen=True)
class Chip:
    """What one chip can do: bytes of HBM, FLOPs a second in bfloat16, bytes a second from HBM."""

    memory: float
    flops: float
    bandwidth: float


# Google's published figures: cloud.google.com/tpu/docs/v5e.
CHIPS = {"v5e": Chip(memory=16e9, flops=197e12, bandwidth=819e9)}


def chip_of(topology: str) -> Chip:
    """The chip in a topology's name. Raises UserError for one whose limits are not known here."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"topology {topology!r}: no figures of {kind}; use {', '.join(CHIPS)}")
    return CHIPS[kind]


@dataclass(frozen=True)
class Work:
    """What one chip does in one program: FLOPs, and bytes between HBM and the cores."""

    flops: Number
    bytes: Number

    def seconds(self, chip: Chip) -> float:
        """The longer of the two limits; they overlap at best."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)

    def bound(self, chip: Chip) -> str:
        """Which limit sets the time."""
        return "compute" if self.flops / chip.flops > self.bytes / chip.bandwidth else "memory"


def block_parameters(config: Gemma3Config) -> int:
    """N: weights of all blocks' projections (norm gains left out)."""
    attention = config.embed_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.embed_dim * config.hidden_dim)


def prefill(config: Gemma3Config, *, num_prompts: Number, prompt_length: Number) -> Work:
    """2 N FLOPs a prompt token; the weights are read once."""
    N = block_parameters(config)
    return Work(2 * N * num_prompts * prompt_length, BYTES * N)


def decode_step(
    config: Gemma3Config,
    *,
    num_rows: Number,
    num_prompts: Number,
    prompt_length: Number,
    num_slots: Number,
) -> Work:
    """2 (N + E) FLOPs a row; read: all weights, the caches (all slots: a mask does not spare the
    reading), the prompts' keys and values once per group."""
    weights = block_parameters(config) + config.vocab_size * config.embed_dim
    slot = 2 * config.num_kv_heads * config.head_dim * config.num_layers * BYTES
    caches = slot * (num_rows * num_slots + num_prompts * prompt_length)
    return Work(2 * weights * num_rows, BYTES * weights + caches)


def log_probs(config: Gemma3Config, *, block_tokens: Number, head_tokens: Number) -> Work:
    """2 N a token through the blocks and 2 E a token through the head."""
    N, E = block_parameters(config), config.vocab_size * config.embed_dim
    return Work(2 * N * block_tokens + 2 * E * head_tokens, BYTES * (N + E))


def update(
    config: Gemma3Config, *, block_tokens: Number, head_tokens: Number, remat: bool, frozen: bool
) -> Work:
    """Forward and backward: 2 and 4 per weight and token, or 2 backward where weights are frozen
    (adapters' own products left out); remat runs the blocks, and a trained head, forward again.
    Bytes: the weights in each pass; activations are left out, so that this is a floor."""
    N, E = block_parameters(config), config.vocab_size * config.embed_dim
    backward = 2 if frozen else 4
    blocks = 2 + backward + (2 if remat else 0)
    head = 2 + backward + (0 if frozen else 2)
    return Work(blocks * N * block_tokens + head * E * head_tokens, BYTES * (N + E) * 3)
