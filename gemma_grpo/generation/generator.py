"""Completions of prompts as text: whole, in batches, or while they are drawn. Knows no terminal.

The engine is the rollout of training, in one program (`complete`) or read as it grows (`stream`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.generation.rollout import Rollout, make_rollout, make_stream
from gemma_grpo.model import Params
from gemma_grpo.runtime import Runtime
from gemma_grpo.text import padding

CHUNK = 4  # tokens between two looks at a stream: smooth to read, and the host hardly in the way
SHORTEST = 64  # slots for prompts: 64, 128, 256, ... so that few shapes are compiled


class Completion(NamedTuple):
    """One completion, or what there is of it.

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

        The batch is filled up to split over the devices.

        Raises:
            UserError: a prompt is longer than the budget.
        """
        missing = -len(prompts) % self.runtime.mesh.size
        ids, mask = self._padded([*prompts, *[prompts[-1]] * missing])
        drawn = jax.device_get(self.rollout(self.params, ids, mask, key))
        rows = [self._completion(drawn, row) for row in range(len(prompts) * self.num)]
        return [rows[start : start + self.num] for start in range(0, len(rows), self.num)]

    def stream(self, prompt: Sequence[int], key: jax.Array) -> Iterator[list[Completion]]:
        """The `num` completions of one prompt as they grow; the last yielded are `complete`'s.

        Of a text yielded earlier nothing is taken back: it is the beginning of the later ones.

        Raises:
            UserError: the prompt is longer than the budget.
        """
        ids, mask = self._padded([prompt])
        for drawn in self.growing(self.params, ids, mask, key, CHUNK):
            yield [self._completion(drawn, row, whole=False) for row in range(self.num)]
        yield [self._completion(drawn, row) for row in range(self.num)]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        longest, budget = max(map(len, prompts)), self.runtime.max_prompt_length
        if longest > budget:
            raise UserError(
                f"a prompt takes {longest} tokens, max_prompt_length is {budget}; raise it to "
                f"{longest} or shorten the prompt"
            )
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
    runtime: Runtime,
    params: Params,
    *,
    num: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Generator:
    """The generator of a model; prompts may fill the runtime's budget of tokens, and so may
    completions.

    Args:
        params: what of the model's parameters is trained, as `load_model` gives them.
        num: completions of each prompt.
        temperature, top_k, top_p, min_p: see `sampling.sample`.

    Raises:
        UserError: a sampling setting has no meaning.
    """
    settings = dict(
        num_generations=num,
        max_completion_length=runtime.max_completion_length,
        stop_ids=runtime.tokenizer.stop_ids,
        pad_id=runtime.tokenizer.pad_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    return Generator(
        runtime=runtime,
        params=runtime.sampling_params(params),
        num=num,
        rollout=make_rollout(runtime.graphdef, runtime.mesh, **settings),
        growing=make_stream(runtime.graphdef, **settings),
    )
