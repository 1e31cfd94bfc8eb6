"""From problems to scored groups: prompts, one rollout, samples, rewards."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.devices import processes
from gemma_grpo.generation import samples as scoring
from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout
from gemma_grpo.model import Params
from gemma_grpo.runtime import Runtime
from gemma_grpo.text import padding
from gemma_grpo.text.prompts import encode_prompts
from gemma_grpo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Groups:
    """Scored groups on the host; every field has a leading axis of P (or P * G) rows.

    Attributes:
        problems: P problems.
        prompt_ids, prompt_mask: [P, S].
        rollout: its arrays as numpy, B rows.
        characters: [B, T], how many characters of the completion's text each token stands for.
        samples: B samples.
        scores: of the B samples.
    """

    problems: list[Problem]
    prompt_ids: np.ndarray
    prompt_mask: np.ndarray
    rollout: Rollout
    characters: np.ndarray
    samples: list[rewards.Sample]
    scores: rewards.Scores


@dataclass(frozen=True)
class Sampler:
    """Turns problems into scored groups.

    Attributes:
        rollout: (params, prompt_ids_PS, prompt_mask_PS, key) -> Rollout.
        mesh: where `rollout` runs.
        tokenizer: encodes prompts, decodes completions.
        instruction: put before every question.
        max_prompt_length: S.
        num_generations: G.
        examples: turns before each prompt, counted in S; see `text.prompts`.
    """

    rollout: Callable[..., Rollout]
    mesh: Mesh
    tokenizer: Tokenizer
    instruction: str
    max_prompt_length: int
    num_generations: int
    examples: Sequence[str] = ()

    def collect(
        self,
        params: Params,
        problems_P: Sequence[Problem],
        key: jax.Array,
        weights: rewards.RewardWeights,
        extra: Sequence[tuple[str, rewards.Reward | rewards.BatchReward, float]],
        trace: str = "arithmetic",
    ) -> Groups:
        """One rollout of the problems, scored. The host waits for the devices once.

        Every process encodes, decodes and scores the rows of its own devices, and then gathers
        those of the others.
        """
        own = problems_P[meshes.own_slice(self.mesh, len(problems_P))]
        prompts = encode_prompts(
            own,
            self.tokenizer,
            instruction=self.instruction,
            max_prompt_length=self.max_prompt_length,
            examples=self.examples,
        )
        prompt_ids_PS, prompt_mask_PS = padding.pad_left(
            prompts, length=self.max_prompt_length, pad_id=self.tokenizer.pad_id
        )
        prompts = meshes.place_own_rows(self.mesh, (prompt_ids_PS, prompt_mask_PS))
        rollout = meshes.own_rows(self.rollout(params, *prompts, key))

        def score() -> Groups:
            samples = scoring.make_samples(
                [problem for problem in own for _ in range(self.num_generations)],
                rollout.completion_ids,
                rollout.completion_mask,
                rollout.sampler_logps,
                rollout.stopped,
                self.tokenizer,
            )
            scores = rewards.score(samples, weights, extra, trace)
            return Groups(
                list(own),
                prompt_ids_PS,
                prompt_mask_PS,
                rollout,
                np.array(
                    [self.tokenizer.characters(ids.tolist()) for ids in rollout.completion_ids]
                ),
                samples,
                scores,
            )

        return joined(processes.gather_from_all(score))


def make_sampler(runtime: Runtime, *, num_generations: int, sampling: SamplingConfig) -> Sampler:
    """The sampler of a run: `num_generations` completions of each problem."""
    tokenizer = runtime.tokenizer
    config = RolloutConfig(
        num_generations=num_generations,
        max_completion_length=runtime.max_completion_length,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        sampling=sampling,
    )
    return Sampler(
        make_rollout(runtime.graphdef, runtime.mesh, config, layout=runtime.layout),
        runtime.mesh,
        tokenizer,
        runtime.instruction,
        runtime.max_prompt_length,
        num_generations,
    )


def joined(parts: Sequence[Groups]) -> Groups:
    """The groups of all parts, in order; the parts were scored in parallel."""
    chained = lambda lists: list(itertools.chain.from_iterable(lists))
    components = [part.scores.components for part in parts]
    return Groups(
        chained(part.problems for part in parts),
        np.concatenate([part.prompt_ids for part in parts]),
        np.concatenate([part.prompt_mask for part in parts]),
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *[part.rollout for part in parts]),
        np.concatenate([part.characters for part in parts]),
        chained(part.samples for part in parts),
        rewards.Scores(
            {name: chained(values[name] for values in components) for name in components[0]},
            chained(part.scores.totals for part in parts),
            max(part.scores.seconds for part in parts),
        ),
    )


def token_arrays(
    rollout: Rollout, characters_BT: np.ndarray, trainer_logps_BT: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The completion tokens of B rows, concatenated, in the form of `records.tokens`."""
    mask_BT = np.asarray(rollout.completion_mask)
    sampler_logps_BT = np.asarray(rollout.sampler_logps)
    arrays_BT = {
        "token_ids": np.asarray(rollout.completion_ids),
        "characters": characters_BT,
        "logps": sampler_logps_BT,
    }
    if trainer_logps_BT is not None:
        arrays_BT["gaps"] = trainer_logps_BT - sampler_logps_BT
    flat = {name: array[mask_BT] for name, array in arrays_BT.items()}
    return {"num_tokens": mask_BT.sum(axis=1), **flat}
