"""Which truncations of a distribution can be sampled from. Does not import jax."""

from gemma_grpo.errors import UserError


def check_truncation(*, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises UserError if a setting is out of range."""
    if not 1e-6 <= temperature < float("inf"):
        raise UserError(
            f"temperature={temperature}: must be 1e-6 or more and finite (greedy cuts nothing off)"
        )
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (off)")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p={min_p}: must be at least 0 (off) and at most 1")
