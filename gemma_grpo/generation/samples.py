"""From sampled ids to the `Sample`s that rewards score: text, length, the answer's log-probs. Does
not import jax."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from gemma_grpo.data.problem import Problem
from gemma_grpo.rewards import Sample
from gemma_grpo.text.tokenizer import Tokenizer

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


def make_samples(
    problems_B: Sequence[Problem],
    completion_ids_BT: Int[np.ndarray, "B T"],
    completion_mask_BT: Bool[np.ndarray, "B T"],
    sampler_logps_BT: Float[np.ndarray, "B T"],
    stopped_B: Bool[np.ndarray, " B"],
    tokenizer: Tokenizer,
) -> list[Sample]:
    """One `Sample` per row; the problem of row b is `problems_B[b]`."""
    samples = []
    for row, problem in enumerate(problems_B):
        ids = completion_ids_BT[row][completion_mask_BT[row]].tolist()
        span = answer_span(tokenizer.pieces(ids))
        samples.append(
            Sample(
                prompt=problem.prompt,
                completion=tokenizer.decode(ids),
                answer=problem.answer,
                difficulty=problem.difficulty,
                num_tokens=len(ids),
                max_tokens=completion_ids_BT.shape[1],
                answer_logps=tuple(sampler_logps_BT[row, span.start : span.stop].tolist()),
                stopped=bool(stopped_B[row]),
                domain=problem.domain,
            )
        )
    return samples


def answer_span(pieces: Sequence[str]) -> range:
    """The indices of the tokens between the first `<answer>` and the `</answer>` after it.

    Whitespace around the answer is left out; an answer that is not closed has no tokens.
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    text = "".join(pieces)
    start = text.find(ANSWER_OPEN)
    stop = text.find(ANSWER_CLOSE, start)
    if start < 0 or stop < 0:
        return range(0)
    start += len(ANSWER_OPEN)
    answer = text[start:stop]
    start += len(answer) - len(answer.lstrip())
    stop = start + len(answer.strip())
    if stop <= start:
        return range(0)
    # From the first token that ends after `start` to the first that ends at or after `stop`.
    first = int(np.searchsorted(ends, start, side="right"))
    return range(first, int(np.searchsorted(ends, stop, side="left")) + 1)
