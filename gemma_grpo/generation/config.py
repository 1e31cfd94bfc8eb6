"""`SamplingConfig`: the distribution that tokens are drawn from. Does not import jax."""

from dataclasses import dataclass

from gemma_grpo.kernels.truncation import check_truncation


@dataclass(frozen=True)
class SamplingConfig:
    """The distribution that tokens are drawn from; by default the model's own.

    Truncations apply in the order top_k, top_p, min_p, each to the tokens that the last one kept.

    Attributes:
        temperature: divides the logits; 0 is greedy, with log-probs at temperature 1.
        top_k: keep the k most likely tokens, and ties with the last of them; 0 keeps all.
        top_p: then keep the fewest most likely tokens whose mass reaches p; 1 keeps all.
        min_p: then keep tokens at least min_p times as likely as the likeliest; 0 keeps all.

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
