"""Hidden states to the next token and its log-prob, by the kernel that fits the settings."""

from jaxtyping import Array, Float, Int, Key

from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.truncated_sampling import truncated_sampling


def sample(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    keys_B: Key[Array, " B"],
    config: SamplingConfig,
    *,
    axis_name: str | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Apply the tied head and draw one token for each row.

    Args:
        keys_B: one key per row; a draw depends on its own row alone.
        config: the distribution to draw from.
        axis_name: inside `shard_map`, the axis that the vocabulary is sharded over; `embedding_VD`
            is then this device's shard, and every device draws the same tokens.

    Returns:
        Ids, and their log-probs under the distribution drawn from: tempered and, if truncated,
        renormalised over the kept tokens. Greedy log-probs are of the full distribution.
    """
    if config.truncates:
        drawn = truncated_sampling(
            hidden_BD,
            embedding_VD,
            keys_B,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            axis_name=axis_name,
        )
    else:
        drawn = fused_sampling(
            hidden_BD, embedding_VD, keys_B, temperature=config.temperature, axis_name=axis_name
        )
    return drawn.ids, drawn.logps
