"""Log-probs of given tokens under the tied head, whose logits are never all in memory."""

from gemma_grpo.kernels.lm_head_logps.api import TokenLogps, lm_head_logps

__all__ = ["TokenLogps", "lm_head_logps"]
