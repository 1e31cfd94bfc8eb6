"""Log-probs of given words under the tied head, whose logits are never whole."""

from gemma_grpo.kernels.lm_head_logps.api import TokenLogps, lm_head_logps

__all__ = ["TokenLogps", "lm_head_logps"]
