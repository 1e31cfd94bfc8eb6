"""Completions of prompts as text: in batches, or while they grow.

Sampling is training's rollout, in one program (`complete`) or a few tokens at a time (`stream`).
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

CHUNK = 4  # tokens per update of a stream: smooth to read, little host overhead
SHORTEST = 64  # prompts are padded to 64, 128, 256, ... slots, so that few shapes are compiled


class Completion(NamedTuple):
    """One completion, finished or so far.

    Attributes:
        text: decoded, without the stop token and an unfinished last character.
        logp: sum of the log-probs of its tokens, stop token included.
        num_tokens: stop token included.
        stopped: whether it ended on a stop token rather than on the budget.
    """

    text: str
    logp: float
    num_tokens: int
    stopped: bool


@dataclass(frozen=True)
class Generator:
    """A model with its sampling programs; see `make_generator`.

    Attributes:
        num: completions per prompt.
        rollout: of `make_rollout`.
        growing: of `make_stream`.
    """

    runtime: Runtime
    params: Params
    num: int
    rollout: Callable[..., Rollout]
    growing: Callable[..., Iterator[Rollout]]

    def complete(self, prompts: Sequence[Sequence[int]], key: jax.Array) -> list[list[Completion]]:
        """`num` completions of each prompt, in one batch.

        The batch is padded with copies of the last prompt, so that it divides over the devices.

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
        """`num` completions of each prompt, `batch_size` prompts at a time, the last batch padded.
        Raises as `complete`, before anything is generated."""
        self.check(prompts)
        size = min(batch_size, len(prompts))
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            yield from self.complete(filled, jax.random.fold_in(key, start))[: len(batch)]

    def stream(self, prompt: Sequence[int], key: jax.Array) -> Iterator[list[Completion]]:
        """The `num` completions of one prompt as they grow; the last ones equal `complete`'s.

        Each text is a prefix of all later ones.

        Raises:
            UserError: the prompt is longer than the budget.
        """
        ids, mask = self._padded([prompt])
        for drawn in self.growing(self.params, ids, mask, key, CHUNK):
            yield [self._completion(drawn, row, finished=False) for row in range(self.num)]
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

    def _completion(self, drawn: Rollout, row: int, *, finished: bool = True) -> Completion:
        mask = drawn.completion_mask[row]
        ids = drawn.completion_ids[row][mask].tolist()
        tokenizer, stopped = self.runtime.tokenizer, bool(drawn.stopped[row])
        decode = tokenizer.decode if finished or stopped else tokenizer.decode_whole
        return Completion(
            decode(ids), float(np.sum(drawn.sampler_logps[row][mask])), len(ids), stopped
        )


def make_generator(
    runtime: Runtime, params: Params, *, num: int, sampling: SamplingConfig
) -> Generator:
    """The generator of a model, within the runtime's prompt and completion lengths.

    Args:
        params: the model's trained parameters, as `load_model` returns them.
        num: completions per prompt.
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
