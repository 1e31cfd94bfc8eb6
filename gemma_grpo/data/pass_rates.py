"""What earlier groups say of the problems: how often each kind is solved, which teach nothing.

A group whose completions are all right, or all wrong, has no advantage to learn from. Two remedies:
kinds of problems are drawn by how undecided they are, and a problem whose last groups were uniform
is passed over for another one. Does not import jax.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gemma_grpo.data.problem import Problem

MEMORY = 20  # steps after which a group counts for 1/e of a new one: the policy has moved on


class Kind(NamedTuple):
    """Problems of one difficulty and domain share a pass rate: few are drawn twice in a run."""

    difficulty: str
    domain: str


class Group(NamedTuple):
    """What is known of one group: its problem, and how many of its completions are right."""

    prompt: str
    kind: Kind
    num_right: int
    num_completions: int

    @property
    def is_uniform(self) -> bool:
        """Whether all completions are right, or all wrong."""
        return self.num_right in (0, self.num_completions)


@dataclass
class PassRates:
    """A summary of all groups so far.

    Attributes:
        right, seen: completions of each kind, older ones counted less (`MEMORY`).
        uniform: of a prompt, its last groups in a row that were uniform.
    """

    right: dict[Kind, float] = field(default_factory=dict)
    seen: dict[Kind, float] = field(default_factory=dict)
    uniform: dict[str, int] = field(default_factory=dict)

    def add(self, groups: Iterable[Group]) -> None:
        """Takes in the groups of one step."""
        for counts in (self.right, self.seen):
            for kind in counts:
                counts[kind] *= np.exp(-1 / MEMORY)
        for group in groups:
            kind = group.kind
            self.right[kind] = self.right.get(kind, 0.0) + group.num_right
            self.seen[kind] = self.seen.get(kind, 0.0) + group.num_completions
            in_a_row = self.uniform.get(group.prompt, 0) + 1
            self.uniform[group.prompt] = in_a_row if group.is_uniform else 0

    def rate(self, kind: Kind) -> float:
        """The kind's pass rate p, with one right and one wrong completion added: 1/2 if unseen."""
        return (self.right.get(kind, 0.0) + 1) / (self.seen.get(kind, 0.0) + 2)

    def weights(self, problems_N: Sequence[Problem]) -> Float[np.ndarray, " N"]:
        """How often to draw each problem, up to a factor: p (1 - p), the variance of a 0/1 reward
        within its groups (learnability, arXiv 2502.12272)."""
        kinds = [kind_of(problem) for problem in problems_N]
        by_kind = {kind: self.rate(kind) * (1 - self.rate(kind)) for kind in set(kinds)}
        return np.array([by_kind[kind] for kind in kinds])

    def skip_chance(self, problem: Problem, skip: float) -> float:
        """The chance to pass over a problem: 1 - (1 - skip)^z after z uniform groups in a row
        (GRESO, arXiv 2506.02177, but with one fixed chance to explore, for right and for wrong)."""
        return 1 - (1 - skip) ** self.uniform.get(problem.prompt, 0)


def kind_of(problem: Problem) -> Kind:
    """The kind of a problem."""
    return Kind(problem.difficulty, problem.domain)


def weighted_batch(
    problems_N: Sequence[Problem],
    weights_N: Float[np.ndarray, " N"],
    batch_size: int,
    rng: np.random.Generator,
) -> list[Problem]:
    """`batch_size` problems, drawn in turn by their weights, which are above 0. None repeats before
    all have come up."""
    rows: list[int] = []
    while len(rows) < batch_size:
        # The order of N exponential clocks is that of drawing without replacement.
        times_N = rng.exponential(size=len(problems_N)) / weights_N
        rows += np.argsort(times_N).tolist()
    return [problems_N[row] for row in rows[:batch_size]]


def pass_over(
    drawn_P: Sequence[Problem],
    pools: dict[str, list[Problem]],
    rates: PassRates,
    skip: float,
    rng: np.random.Generator,
) -> list[Problem]:
    """The batch with some problems replaced by others of the same difficulty, each by its
    `skip_chance`, those that stand in too. A problem stays if no other one is left.

    Args:
        pools: all problems by difficulty.
    """
    is_skipped = lambda problem: rng.random() < rates.skip_chance(problem, skip)
    batch, taken = [], {problem.prompt for problem in drawn_P}
    for problem in drawn_P:
        if is_skipped(problem):
            pool = pools[problem.difficulty]
            order = (pool[row] for row in rng.permutation(len(pool)))
            others = (p for p in order if p.prompt not in taken and not is_skipped(p))
            problem = next(others, problem)
            taken.add(problem.prompt)
        batch.append(problem)
    return batch
