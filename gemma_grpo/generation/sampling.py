"""How a token is drawn: `SamplingConfig`; hidden states to the next token and its log-prob.

The drawing itself is the kernels'; this chooses the one that serves the settings.
"""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int, Key

from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.truncated_sampling import check_truncation, truncated_sampling


@dataclass(frozen=True)
class SamplingConfig:
    """The distribution that tokens are drawn from; by default the model's own.

    Truncations apply in the order top_k, top_p, min_p, each to what the one before has left.

    Attributes:
        temperature: divides the logits; 0 takes the largest, with its log-prob at temperature 1.
        top_k: keep the k largest, and whatever ties with the smallest of them; 0 keeps all.
        top_p: then keep the smallest set of largest ones whose mass reaches p; 1 keeps all.
        min_p: then keep those of min_p times the largest probability or more; 0 keeps all.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        # Greedy decoding ignores the other settings; they must be in range all the same.
        check_truncation(
            temperature=self.temperature or 1.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )

    @property
    def truncates(self) -> bool:
        """Whether tokens are cut off before the draw."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


GREEDY = SamplingConfig(temperature=0.0)


def sample(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    keys_B: Key[Array, " B"],
    config: SamplingConfig,
    *,
    axis_name: str | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token for each row with that row's key, the tied head included.

    Args:
        keys_B: one key a row; a draw depends on its own row alone.
        config: the distribution to draw from.
        axis_name: inside `shard_map`, the axis that the vocabulary is sharded over; `embedding_VD`
            is then this device's shard, and every device draws the same.

    Returns:
        Ids, and their log-probs under the distribution drawn from: tempered and, where tokens were
        cut off, renormalised over the kept ones. Greedy log-probs are of the full distribution.
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
