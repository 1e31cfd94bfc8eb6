"""Groups that are all right or all wrong, sampled again within bounds (DAPO's dynamic sampling)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Bool

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.generation.collect import Groups, joined


def collect_mixed(
    collect: Callable[[Sequence[Problem], jax.Array], Groups],
    draw: Callable[[int], Sequence[Problem]],
    key: jax.Array,
    *,
    resample_rounds: int,
) -> tuple[Groups, int]:
    """Groups for one step; those all right or all wrong are replaced, within bounds.

    DAPO's dynamic sampling, arXiv 2503.14476, eq. 11. Groups that are still uniform after the last
    round stay.

    Args:
        collect: (problems_P, key) -> Groups.
        draw: round -> P problems.
        resample_rounds: the most extra rounds.

    Returns:
        The groups, and the number of extra rounds.
    """
    groups = collect(draw(0), jax.random.fold_in(key, 0))
    for extra_round in range(1, resample_rounds + 1):
        uniform_P = ~mixed_groups(groups)
        if not uniform_P.any():
            return groups, extra_round - 1
        fresh = collect(draw(extra_round), jax.random.fold_in(key, extra_round))
        candidates = np.flatnonzero(mixed_groups(fresh))
        replaced = np.flatnonzero(uniform_P)[: len(candidates)]
        groups = _replace_groups(groups, replaced, fresh, candidates[: len(replaced)])
    return groups, resample_rounds


def mixed_groups(groups: Groups) -> Bool[np.ndarray, " P"]:
    """True for groups with at least one right and one wrong completion."""
    correct_PG = np.reshape(groups.scores.components["correctness"], (len(groups.problems), -1))
    return correct_PG.min(axis=1) < correct_PG.max(axis=1)


def _replace_groups(groups: Groups, at: np.ndarray, other: Groups, source: np.ndarray) -> Groups:
    """`groups` with groups `at` replaced by groups `source` of `other`, which was scored after."""
    from_other = dict(zip(at.tolist(), source.tolist(), strict=True))
    both = joined(
        [
            _group(other, from_other[p]) if p in from_other else _group(groups, p)
            for p in range(len(groups.problems))
        ]
    )
    seconds = groups.scores.seconds + other.scores.seconds
    return replace(both, scores=replace(both.scores, seconds=seconds))


def _group(groups: Groups, p: int) -> Groups:
    """Group `p` alone."""
    G = len(groups.samples) // len(groups.problems)
    one, rows = slice(p, p + 1), slice(p * G, (p + 1) * G)
    scores = groups.scores
    return Groups(
        groups.problems[one],
        groups.prompt_ids[one],
        groups.prompt_mask[one],
        jax.tree.map(lambda leaf: leaf[rows], groups.rollout),
        groups.characters[rows],
        groups.samples[rows],
        rewards.Scores(
            {name: values[rows] for name, values in scores.components.items()}, scores.totals[rows]
        ),
    )
