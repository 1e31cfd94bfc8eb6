"""Which problems a step takes, a function of seed and step alone.

Nothing here keeps a position: a resumed run asks for step n and gets what it would have got.
Two ways to choose: `batch_indices` walks through all problems epoch by epoch; `phase_batch` draws
by difficulty, easy problems first. `pass_rates` has a third.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.errors import UserError

PHASE_BOUNDARIES = (1 / 3, 2 / 3)  # shares of the run at which medium and hard begin

# For each phase, how often a problem of each of DIFFICULTIES is drawn. Later phases keep some of
# the earlier ones, so that what was learned stays practised.
PHASE_MIX = {
    "easy": (1.0, 0.0, 0.0),
    "medium": (0.3, 0.7, 0.0),
    "hard": (0.2, 0.3, 0.5),
}

# One seed, independent randomness for each use.
EPOCH_STREAM, PHASE_STREAM, PASS_RATE_STREAM, SKIP_STREAM = range(4)


def epoch_order(num_problems: int, seed: int, epoch: int) -> Int[np.ndarray, "num_problems"]:
    """The order of the problems in one epoch: a permutation of their rows, int64.

    Raises:
        UserError: a negative seed.
    """
    return generator(seed, EPOCH_STREAM, epoch).permutation(num_problems)


def batch_indices(
    step: int, batch_size: int, num_problems: int, seed: int
) -> Int[np.ndarray, "batch_size"]:
    """The problem rows that a step takes, int64.

    They are the positions step * batch_size and on of all epochs' orders laid end to end, so that
    every problem comes up once an epoch. A batch across an epoch's end may hold a problem twice,
    and a batch larger than the data set must.

    Raises:
        UserError: no problems, or a negative seed.
    """
    if num_problems < 1:
        raise UserError("no problems to take a batch from")
    epochs_P, places_P = np.divmod(
        np.arange(step * batch_size, (step + 1) * batch_size), num_problems
    )
    orders = {int(e): epoch_order(num_problems, seed, int(e)) for e in np.unique(epochs_P)}
    return np.array(
        [orders[int(e)][place] for e, place in zip(epochs_P, places_P, strict=True)], np.int64
    )


def by_difficulty(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """The problems under each of `DIFFICULTIES`, in order; a difficulty that is absent has none."""
    return {name: [p for p in problems if p.difficulty == name] for name in DIFFICULTIES}


def curriculum_phase(progress: float) -> str:
    """The phase, one of `DIFFICULTIES`, at `progress` = step / num_steps in [0, 1].

    Each of `PHASE_BOUNDARIES` belongs to the phase it begins.

    Raises:
        ValueError: progress outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"{progress=} must lie in [0, 1]")
    return DIFFICULTIES[sum(progress >= boundary for boundary in PHASE_BOUNDARIES)]


def phase_weights(phase: str, present: Sequence[str]) -> dict[str, float]:
    """How often each difficulty of `present` is drawn in a phase; sums to 1.

    The phase's weights are rescaled to those present. Where they are all zero, the easiest one
    present stands in: data without easy problems begins with its medium ones.

    Args:
        present: the difficulties that have problems, in the order of `DIFFICULTIES`; not empty.
    """
    weights = dict(zip(DIFFICULTIES, PHASE_MIX[phase], strict=True))
    total = sum(weights[name] for name in present)
    if total == 0:
        return {name: float(name == present[0]) for name in present}
    return {name: weights[name] / total for name in present}


def phase_batch(
    problems_by_difficulty: Mapping[str, Sequence[Problem]],
    *,
    step: int,
    num_steps: int,
    batch_size: int,
    seed: int,
) -> list[Problem]:
    """The problems_P of one step, drawn by its phase's weights, in mixed order.

    How many come from each difficulty is a multinomial draw, so that a batch of one gets its share
    too. Within a batch a problem repeats only when its difficulty has fewer than are drawn from it;
    between batches the draws are independent.

    Raises:
        UserError: no problems, or a negative seed.
    """
    present = [name for name in DIFFICULTIES if problems_by_difficulty.get(name)]
    if not present:
        raise UserError("no problems to take a batch from")
    weights = phase_weights(curriculum_phase(step / num_steps), present)
    rng = generator(seed, PHASE_STREAM, step)
    counts = rng.multinomial(batch_size, list(weights.values()))
    drawn_P = [
        problems_by_difficulty[name][row]
        for name, count in zip(present, counts, strict=True)
        for row in _rows(len(problems_by_difficulty[name]), int(count), rng)
    ]
    # Mixed, lest the devices that hold a batch's last rows always get the hard, long problems.
    return [drawn_P[place] for place in rng.permutation(batch_size)]


def _rows(num_problems: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` rows from shuffles laid end to end: no repeat before all have come up."""
    num_shuffles = -(-count // num_problems)
    shuffles = [rng.permutation(num_problems).tolist() for _ in range(num_shuffles)]
    return sum(shuffles, [])[:count]


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Of step (or epoch) `index`, for one of the streams above.

    Raises:
        UserError: a negative seed.
    """
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give 0 or more")
    # spawn_key, not (seed, stream, index) as entropy: there trailing zeros are lost.
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, index))
    return np.random.Generator(np.random.PCG64(sequence))
