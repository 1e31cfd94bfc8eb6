"""A Gemma 3 as a judge: its probability of "yes" rather than "no" after a question."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.model import ModelConfig, Params, in_dtype
from gemma_grpo.rewards.judge import Judge, Question
from gemma_grpo.runtime import Runtime, load_model
from gemma_grpo.text import padding
from gemma_grpo.training import grpo_update
from gemma_grpo.weights import digest

TEMPLATE = """Question:
{prompt}

Correct result:
{answer}

Answer to judge:
{completion}

{criterion}
Say yes or no."""
YES_NO = ("yes", "no")
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class JudgeModel:
    """A model that judges.

    All batches have one shape, so one program is compiled. It runs on this process's own devices:
    processes do not wait for each other's questions.

    Attributes:
        runtime: the model's; max_prompt_length is the most tokens of a question.
        params: its weights, in the compute dtype.
        score: see `grpo_update.make_score`.
        num_rows: questions per batch.
    """

    runtime: Runtime
    params: Params
    score: Callable[..., tuple[jax.Array, ...]]
    num_rows: int

    def __call__(self, questions: Sequence[Question]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of each; None for a question over the budget of tokens."""
        prompts = [self._encode(question) for question in questions]
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= self.runtime.max_prompt_length]
        verdicts: list[float | None] = [None] * len(prompts)
        for start in range(0, len(fits), self.num_rows):
            rows = fits[start : start + self.num_rows]
            # The last batch is filled up, so that its shape is already compiled.
            filled = rows + rows[-1:] * (self.num_rows - len(rows))
            values = self._probabilities([prompts[i] for i in filled])
            for i, value in zip(rows, values, strict=False):
                verdicts[i] = value
        return verdicts

    def _encode(self, question: Question) -> list[int]:
        return self.runtime.tokenizer.encode_prompt(TEMPLATE.format(**vars(question)))

    def _probabilities(self, prompts: list[list[int]]) -> list[float]:
        runtime, tokenizer = self.runtime, self.runtime.tokenizer
        prompt_ids, prompt_mask = padding.pad_left(
            prompts, length=runtime.max_prompt_length, pad_id=tokenizer.pad_id
        )
        completion_ids, completion_mask = padding.pad_right(
            [tokenizer.encode(word) for word in YES_NO] * len(prompts),
            length=runtime.max_completion_length,
            pad_id=tokenizer.pad_id,
        )
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
        }
        packs = (meshes.place_rows(runtime.mesh, batch),)
        (logps,) = jax.device_get(self.score(self.params, runtime.frozen, packs))
        yes, no = np.sum(logps, axis=1, where=completion_mask, dtype=np.float64).reshape(-1, 2).T
        return (1.0 / (1.0 + np.exp(np.clip(no - yes, -700.0, 700.0)))).tolist()


def load_judge_model(
    weights: str, name: str, *, dtype: Dtype, question_tokens: int, num_rows: int
) -> Judge:
    """A judge that asks a checkpoint's model.

    Args:
        weights: as `ModelConfig.weights`.
        name: of the judge.
        dtype: the compute dtype.
        question_tokens: the most tokens of a question.
        num_rows: questions per batch, rounded up to a multiple of this process's devices.

    Raises:
        UserError: as `load_model`, or the template alone exceeds `question_tokens`.
    """
    config = ModelConfig(weights=weights, dtype=dtype, max_prompt_length=question_tokens)
    mesh = meshes.data_mesh(jax.local_devices())
    runtime, params = load_model(config, seed=0, mesh=mesh)
    tokenizer = runtime.tokenizer
    empty = len(tokenizer.encode_prompt(TEMPLATE))
    if question_tokens < empty:
        raise UserError(
            f"reward.rubric: question_tokens={question_tokens} holds no question to {weights}: "
            f"the template alone takes {empty} tokens"
        )
    most = max(len(tokenizer.encode(word)) for word in YES_NO)
    model = JudgeModel(
        replace(runtime, max_completion_length=most),
        in_dtype(params, dtype),
        grpo_update.make_score(runtime.graphdef, mesh, temperature=1.0, dtype=dtype),
        -(-num_rows // mesh.size) * mesh.size,
    )
    asked = f"{digest(weights)} {dtype} {TEMPLATE} {YES_NO}"
    version = hashlib.sha256(asked.encode()).hexdigest()[:16]
    return Judge(name, version, model, in_threads=False)
