"""From hidden states to the next token and its log-prob, by the settings. Knows no model or loop.

The drawing itself is the kernels'; this chooses the one that serves the settings.
"""

from jaxtyping import Array, Float, Int, Key

from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.truncated_sampling import check_truncation, truncated_sampling


def check_sampling(*, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises UserError where a sampling setting has no meaning."""
    # Greedy goes by no temperature; what else is set must have a meaning all the same.
    check_truncation(temperature=temperature or 1.0, top_k=top_k, top_p=top_p, min_p=min_p)


def sample(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    keys_B: Key[Array, " B"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    axis_name: str | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token for each row with that row's key, the tied head included.

    Args:
        keys_B: one key a row; a draw depends on its own row alone.
        temperature: divides the logits; 0 takes the largest, with its log-prob at temperature 1.
        top_k: keep the k largest, and whatever ties with the smallest of them; 0 keeps all.
        top_p: then keep the smallest set of largest ones whose mass reaches p; 1 keeps all.
        min_p: then keep those of min_p times the largest probability or more; 0 keeps all.
        axis_name: inside `shard_map`, the axis over which the words are sliced; `embedding_VD` is
            then this device's slice, and every device draws the same.

    Returns:
        Ids, and their log-probs under the distribution drawn from: tempered and, where tokens were
        cut off, renormalised over the kept ones. Greedy log-probs are of the full distribution.
    """
    if temperature == 0 or (top_k == 0 and top_p == 1 and min_p == 0):
        drawn = fused_sampling(
            hidden_BD, embedding_VD, keys_B, temperature=temperature, axis_name=axis_name
        )
    else:
        drawn = truncated_sampling(
            hidden_BD,
            embedding_VD,
            keys_B,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            axis_name=axis_name,
        )
    return drawn.ids, drawn.logps
