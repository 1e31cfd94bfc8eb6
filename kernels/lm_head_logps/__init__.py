"""Log-probs of given tokens under the tied head, by chunks of the vocabulary."""

from gemma_grpo.kernels.lm_head_logps.api import TokenLogps, lm_head_logps
from gemma_grpo.kernels.lm_head_logps.xla import sizes_of

__all__ = ["TokenLogps", "lm_head_logps", "sizes_of"]
