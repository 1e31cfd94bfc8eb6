"""Completions of prompts as text: finished, in batches, or while they are drawn.

The engine is the rollout of training, in one program (`complete`) or read as it grows (`stream`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout, make_stream
from gemma_grpo.model import Params
from gemma_grpo.runtime import Runtime
from gemma_grpo.text import padding

CHUNK = 4  # tokens between two updates of a stream: smooth to read, little host overhead
SHORTEST = 64  # slots for prompts: 64, 128, 256, ... so that few shapes are compiled


class Completion(NamedTuple):
    """One completion, whole or so far.

    Attributes:
        text: decoded, stop token and an unfinished last character left out.
        logp: sum of the log-probs of its tokens, the stop token's too.
        num_tokens: the stop token included.
        stopped: it ended on a stop token of its own.
    """

    text: str
    logp: float
    num_tokens: int
    stopped: bool


@dataclass(frozen=True)
class Generator:
    """A model with the settings to sample from it; see `make_generator`."""

    runtime: Runtime
    params: Params
    num: int
    rollout: Callable[..., Rollout]
    growing: Callable[..., Iterator[Rollout]]

    def complete(self, prompts: Sequence[Sequence[int]], key: jax.Array) -> list[list[Completion]]:
        """`num` completions of each prompt, in one batch.

        The batch is padded with copies of the last prompt to divide over the devices.

        Raises:
            UserError: a prompt is longer than the budget.
        """
        missing = -len(prompts) % self.runtime.mesh.size
        ids, mask = self._padded([*prompts, *[prompts[-1]] * missing])
        drawn = jax.device_get(self.rollout(self.params, ids, mask, key))
        rows = [self._completion(drawn, row) for row in range(len(prompts) * self.num)]
        return [rows[start : start + self.num] for start in range(0, len(rows), self.num)]

    def complete_all(
        self, prompts: Sequence[Sequence[int]], key: jax.Array, batch_size: int
    ) -> Iterator[list[Completion]]:
        """`num` completions of each prompt, `batch_size` prompts at a time; the last batch has the
        shape of the others. Raises as `complete`, before anything is generated."""
        self.check(prompts)
        size = min(batch_size, len(prompts))
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            yield from self.complete(filled, jax.random.fold_in(key, start))[: len(batch)]

    def stream(self, prompt: Sequence[int], key: jax.Array) -> Iterator[list[Completion]]:
        """The `num` completions of one prompt as they grow; the last yielded are `complete`'s.

        A text yielded earlier is a prefix of every later one.

        Raises:
            UserError: the prompt is longer than the budget.
        """
        ids, mask = self._padded([prompt])
        for drawn in self.growing(self.params, ids, mask, key, CHUNK):
            yield [self._completion(drawn, row, whole=False) for row in range(self.num)]
        yield [self._completion(drawn, row) for row in range(self.num)]

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError if a prompt is longer than the budget; names the longest."""
        budget = self.runtime.max_prompt_length
        longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
        if (length := len(prompts[longest])) > budget:
            raise UserError(
                f"prompt {longest + 1} takes {length} tokens, max_prompt_length is {budget}; raise "
                f"it to {length} or shorten the prompt"
            )

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        self.check(prompts)
        longest = max(map(len, prompts))
        slots = max(SHORTEST, 1 << (longest - 1).bit_length())
        return padding.pad_left(prompts, length=slots, pad_id=self.runtime.tokenizer.pad_id)

    def _completion(self, drawn: Rollout, row: int, *, whole: bool = True) -> Completion:
        kept = drawn.completion_mask[row]
        ids = drawn.completion_ids[row][kept].tolist()
        tokenizer, stopped = self.runtime.tokenizer, bool(drawn.stopped[row])
        decode = tokenizer.decode if whole or stopped else tokenizer.decode_whole
        return Completion(
            decode(ids), float(np.sum(drawn.sampler_logps[row][kept])), len(ids), stopped
        )


def make_generator(
    runtime: Runtime, params: Params, *, num: int, sampling: SamplingConfig
) -> Generator:
    """The generator of a model. Prompts and completions may be as long as the runtime's maxima.

    Args:
        params: the model's trained parameters, as `load_model` gives them.
        num: completions of each prompt.
        sampling: the distribution that tokens are drawn from.
    """
    config = RolloutConfig(
        num_generations=num,
        max_completion_length=runtime.max_completion_length,
        stop_ids=runtime.tokenizer.stop_ids,
        pad_id=runtime.tokenizer.pad_id,
        sampling=sampling,
    )
    return Generator(
        runtime=runtime,
        params=runtime.sampling_params(params),
        num=num,
        rollout=make_rollout(runtime.graphdef, runtime.mesh, config),
        growing=make_stream(runtime.graphdef, config),
    )
