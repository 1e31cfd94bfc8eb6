"""Intervals and tests for accuracies: strings, counts and booleans in, numbers out.

Departures from the papers:
  1. `paired_difference` counts after minus before, so that an improvement is positive.
  2. `majority_answer` lets an unreadable completion (None) cast no vote.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy import special

Z95 = float(special.ndtri(0.975))  # the standard normal's 97.5 % point


def wilson_interval(successes: float | int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion. Wilson 1927; Newcombe 1998, Stat. Med. 17:857, method 3.

    With no trials nothing is known, and the interval is (0, 1). `scipy.stats` has it for whole
    numbers of successes only; `mean_interval` needs it for sums of shares.

    Raises:
        ValueError: successes not in 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes=} must lie in 0..{n=}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    center = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    # The formula's limits at 0 and n successes are 0 and 1 exactly; rounding misses them by 1e-17.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def mean_interval(values: Sequence[float | int]) -> tuple[float, float]:
    """95 % interval of the mean of one value in 0..1 for each problem; problems are what varies.

    Where every value is 0 or 1, Wilson's. Else the normal one, mean +- z s / sqrt(n) with the
    sample standard deviation s, cut off at 0 and 1. Equal values show no spread to go by: they get
    Wilson's too, which no values in 0..1 with that mean could exceed in variance.

    Raises:
        ValueError: a value is not in 0..1.
    """
    values_P = np.asarray(values, np.float64)
    if not ((values_P >= 0) & (values_P <= 1)).all():
        raise ValueError("mean_interval takes values in 0..1")
    n = len(values_P)
    if n == 0 or np.isin(values_P, (0, 1)).all() or (values_P == values_P[0]).all():
        return wilson_interval(float(values_P.sum()), n)
    mean, half = values_P.mean(), Z95 * values_P.std(ddof=1) / math.sqrt(n)
    return max(0.0, float(mean - half)), min(1.0, float(mean + half))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n completions, drawn without replacement, hold one of the c right ones.

    Unbiased for "at least one of k fresh completions is right": 1 - C(n-c, k) / C(n, k).
    Chen et al. 2021 (Codex), eq. 1. The integers are exact, so large n loses nothing.

    Raises:
        ValueError: c not in 0..n, or k not in 1..n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c=} right completions must lie in 0..{n=}")
    if not 1 <= k <= n:
        raise ValueError(f"{k=} must lie in 1..{n=}: pass@k needs at least k completions a problem")
    # 1 - a / b would round 1e-20 away; one quotient of exact integers does not.
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def majority_answer(
    answers: Sequence[str | None], same: Callable[[str, str], bool] = str.__eq__
) -> str | None:
    """The answer that most others agree with; of several, the one given first. Wang et al. 2022.

    None, a completion without a readable answer, casts no vote; where no one votes the result is
    None.

    Args:
        same: whether two answers say the same. It need not be transitive: "5" may agree with both
            "5 km" and "5 m".
    """
    counts = Counter(answer for answer in answers if answer is not None)
    agreeing = {
        answer: sum(n for other, n in counts.items() if other == answer or same(other, answer))
        for answer in counts
    }
    # Counter keeps the order in which answers come and max returns the first of equals.
    return max(agreeing, key=agreeing.__getitem__) if agreeing else None


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy after minus accuracy before, on the same problems.

    Attributes:
        difference: in -1..1; positive where more problems are right after.
        ci95: its 95 % interval, (low, high).
        p_value: two-sided exact McNemar; of "a changed problem is as likely gained as lost".
        gained: problems wrong before and right after.
        lost: problems right before and wrong after.
        n: all problems.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    gained: int
    lost: int
    n: int


def paired_difference(
    before_P: Bool[np.ndarray, "P"], after_P: Bool[np.ndarray, "P"]
) -> PairedDifference:
    """Compares two runs over the same problems in the same order; entries say "was right".

    The interval is method 10 of Newcombe 1998, Stat. Med. 17:2635 (`_newcombe_interval`), the
    p-value `exact_mcnemar`. The two may disagree by a hair at the 5 % border: the test is exact
    and so conservative, the interval is not.

    Raises:
        ValueError: no problems.
    """
    n = len(before_P)
    if n == 0:
        raise ValueError("paired_difference needs at least one problem")
    both = int(np.sum(before_P & after_P))
    gained = int(np.sum(~before_P & after_P))
    lost = int(np.sum(before_P & ~after_P))
    return PairedDifference(
        difference=(gained - lost) / n,
        ci95=_newcombe_interval(both, gained, lost, n - both - gained - lost),
        p_value=exact_mcnemar(gained, lost),
        gained=gained,
        lost=lost,
        n=n,
    )


def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact conditional test: Binomial(gained + lost, 1/2)."""
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5)))


def _newcombe_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval for after - before: Wilson limits of each share, squared and added.

    With p1 = after, p2 = before, their Wilson limits (l, u) and phi, the correlation of the two:
        low  = p1-p2 - sqrt((p1-l1)^2 - 2 phi (p1-l1)(u2-p2) + (u2-p2)^2)
        high = p1-p2 + sqrt((u1-p1)^2 - 2 phi (u1-p1)(p2-l2) + (p2-l2)^2)
    Newcombe 1998, Stat. Med. 17:2635, method 10.
    """
    n = both + gained + lost + neither
    l1, u1 = wilson_interval(both + gained, n)
    l2, u2 = wilson_interval(both + lost, n)
    p1, p2 = (both + gained) / n, (both + lost) / n
    phi = _corrected_phi(both, gained, lost, neither)
    below = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    above = (u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2
    difference = (gained - lost) / n
    return difference - math.sqrt(max(0.0, below)), difference + math.sqrt(max(0.0, above))


def _corrected_phi(both: int, gained: int, lost: int, neither: int) -> float:
    """Correlation of the fourfold table, a positive one drawn n/2 towards 0 (method 10's part)."""
    n = both + gained + lost + neither
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:  # all right or all wrong in one run: no correlation to speak of
        return 0.0
    determinant: float = both * neither - gained * lost
    if determinant > 0:
        determinant = max(0.0, determinant - n / 2)
    return determinant / math.sqrt(margins)
