"""Times that a chip's speed limits allow, from stated formulas. A model: nothing here is measured.

N parameters of the blocks, E = V*D of the embedding, B = P*G rows, S and T tokens; bf16, 2 bytes.
A collective costs its latency; what it moves is left out.
"""

import math
from dataclasses import dataclass

from gemma_grpo.model import Gemma3Config, Remat
from gemma_grpo.planning.chips import Chip

BYTES = 2  # of bfloat16
Number = int | float


@dataclass(frozen=True)
class Work:
    """What one chip does in one program: FLOPs, bytes between HBM and the cores, and collectives
    that the rest waits for."""

    flops: Number
    bytes: Number
    collectives: Number = 0

    def seconds(self, chip: Chip) -> float:
        """The longer of the two limits, which overlap at best, and then the collectives."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth) + self._waiting(chip)

    def bound(self, chip: Chip) -> str:
        """Which limit sets the time, or most of it; "unknown" for a chip of unknown speed."""
        if math.isnan(chip.flops):
            return "unknown"
        limits = {
            "memory": self.bytes / chip.bandwidth,
            "compute": self.flops / chip.flops,
            "latency": self._waiting(chip),
        }
        return max(limits, key=lambda name: limits[name])

    def _waiting(self, chip: Chip) -> float:
        return self.collectives * chip.latency


def mlp_parameters(config: Gemma3Config) -> int:
    """Weights of all blocks' MLPs."""
    return config.num_layers * 3 * config.embed_dim * config.hidden_dim


def block_parameters(config: Gemma3Config) -> int:
    """N: weights of all blocks' projections (norm gains left out)."""
    attention = config.embed_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    return config.num_layers * attention + mlp_parameters(config)


def prefill(
    config: Gemma3Config, *, num_prompts: Number, prompt_length: Number, shards: int = 1
) -> Work:
    """2 N FLOPs a prompt token; the weights are read once.

    Args:
        shards: devices that MLPs and embedding are sharded over (`model/layout.py`). Each reads its
            shard and does as much as before, for all rows; two collectives a layer, and one for the
            embedding.
    """
    N = block_parameters(config)
    read = N - mlp_parameters(config) * (1 - 1 / shards)
    collectives = 0 if shards == 1 else 2 * config.num_layers + 1
    return Work(2 * N * num_prompts * prompt_length, BYTES * read, collectives)


def decode_step(
    config: Gemma3Config,
    *,
    num_rows: Number,
    num_prompts: Number,
    prompt_length: Number,
    num_slots: Number,
    shards: int = 1,
) -> Work:
    """2 (N + E) FLOPs a row; read: all weights, the caches (all slots that a layer has, a ring of
    its window if it is local: a mask does not spare the reading), the prompts' keys and values once
    per group.

    Args:
        shards: as in `prefill`; the head's rows and the draw are two collectives more.
    """
    E = config.vocab_size * config.embed_dim
    weights = block_parameters(config) + E
    read = weights - (mlp_parameters(config) + E) * (1 - 1 / shards)
    collectives = 0 if shards == 1 else 2 * config.num_layers + 3
    slot = 2 * config.num_kv_heads * config.head_dim * BYTES
    ring = min(num_slots, config.sliding_window)
    row_slots = sum(num_slots if is_global else ring for is_global in config.is_global)
    prompt_slots = prompt_length * config.num_layers
    caches = slot * (num_rows * row_slots + num_prompts * prompt_slots)
    return Work(2 * weights * num_rows, BYTES * read + caches, collectives)


def seen_pairs(config: Gemma3Config, *, before: int, tokens: int) -> float:
    """Pairs of a query and a key that it sees, itself among them, of `tokens` in a row behind
    `before` others; the mean of local and global layers."""
    seen = lambda window: sum(min(before + t + 1, window) for t in range(tokens))
    near, far = seen(config.sliding_window), seen(before + tokens)
    return (near * config.is_global.count(False) + far * sum(config.is_global)) / config.num_layers


def attention(config: Gemma3Config, attended: Number) -> Number:
    """FLOPs of `attended` pairs of a query and a key in each layer: 2 for the score and 2 for the
    value, per head and dimension."""
    return 4 * config.num_layers * config.num_heads * config.head_dim * attended


def log_probs(
    config: Gemma3Config,
    *,
    block_tokens: Number,
    head_tokens: Number,
    attended: Number,
    adapter_parameters: Number = 0,
) -> Work:
    """2 N a token through the blocks and 2 E a token through the head, adapters' likewise."""
    N, E = block_parameters(config), config.vocab_size * config.embed_dim
    blocks = 2 * (N + adapter_parameters) * block_tokens + attention(config, attended)
    return Work(blocks + 2 * E * head_tokens, BYTES * (N + E))


def update(
    config: Gemma3Config,
    *,
    block_tokens: Number,
    head_tokens: Number,
    attended: Number,
    adapter_parameters: Number = 0,
    remat: Remat,
) -> Work:
    """Forward and backward: 2 and 4 per weight and token, or 2 backward where weights are frozen
    under adapters. Remat "full" runs the blocks forward again, "dots" attention's matmuls, and both
    a trained head.

    Args:
        block_tokens, head_tokens: that pass the blocks and the head.
        attended: pairs of a query and a key, in a layer on average.
        adapter_parameters: of all adapters; 0 where all weights are trained.

    Bytes: the weights in each pass; activations are left out, so that this is a floor.
    """
    N, E = block_parameters(config), config.vocab_size * config.embed_dim
    frozen, again = adapter_parameters > 0, 1 if remat == "full" else 0
    weights = (2 * (1 + again) + (2 if frozen else 4)) * N
    adapters = (2 * (1 + again) + 4) * adapter_parameters
    head = (2 + 2 if frozen else 2 + 4 + (0 if remat == "none" else 2)) * E
    flops = (
        (weights + adapters) * block_tokens
        + (3 if remat == "none" else 4) * attention(config, attended)
        + head * head_tokens
    )
    return Work(flops, BYTES * (N + E) * 3)
