"""Published tables and hand arithmetic for intervals, pass@k, maj@k and the paired test."""

import math
from itertools import combinations

import numpy as np
import pytest

from gemma_grpo.evaluation import statistics

FOUR_DECIMALS = 5e-5  # the published tables are rounded to four


@pytest.mark.parametrize(
    "successes, n, low, high",
    [  # Newcombe 1998, Stat. Med. 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_agrees_with_newcombes_table(successes, n, low, high):
    assert statistics.wilson_interval(successes, n) == pytest.approx((low, high), abs=FOUR_DECIMALS)


def test_wilson_interval_mirrors_when_successes_and_failures_swap():
    low, high = statistics.wilson_interval(3, 29)
    assert statistics.wilson_interval(26, 29) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_limits_touch_zero_and_one_exactly():
    assert statistics.wilson_interval(0, 300)[0] == 0.0
    assert statistics.wilson_interval(300, 300)[1] == 1.0
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes, n", [(-1, 5), (6, 5)])
def test_wilson_interval_refuses_counts_that_cannot_be(successes, n):
    with pytest.raises(ValueError, match="must lie in"):
        statistics.wilson_interval(successes, n)


@pytest.mark.parametrize("n, c, k", [(6, 2, 3), (6, 0, 2), (5, 5, 1), (7, 3, 1), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_completion(n, c, k):
    right = [True] * c + [False] * (n - c)
    subsets = list(combinations(right, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert statistics.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_by_hand():
    # n=10, c=3, k=2: 1 - C(7,2)/C(10,2) = 1 - 21/45 = 24/45
    assert statistics.pass_at_k(10, 3, 2) == 24 / 45


def test_pass_at_k_keeps_tiny_and_huge_cases():
    assert statistics.pass_at_k(2000, 1, 1000) == 0.5
    assert statistics.pass_at_k(2000, 0, 1000) == 0.0
    assert statistics.pass_at_k(2000, 1001, 1000) == 1.0


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_counts_that_cannot_be(n, c, k):
    with pytest.raises(ValueError, match="must lie in"):
        statistics.pass_at_k(n, c, k)


def test_majority_is_the_most_common_answer_and_ties_go_to_the_first_given():
    assert statistics.majority_answer(["7", "9", "9", "8"]) == "9"
    assert statistics.majority_answer(["8", "7", "7", "8"]) == "8"
    assert statistics.majority_answer(["7", "8", "8", "7"]) == "7"


def test_unreadable_completions_cast_no_vote():
    assert statistics.majority_answer([None, None, None, "4"]) == "4"
    assert statistics.majority_answer([None, None]) is None
    assert statistics.majority_answer([]) is None


def test_votes_are_counted_by_what_says_the_same():
    same = lambda a, b: a[0] == b[0]
    assert statistics.majority_answer(["9", "7 km", "9", "7", "7.0"], same) == "7 km"
    assert statistics.majority_answer(["9", "9", "7 km", "7"], same) == "9"


def runs(both, gained, lost, neither):
    """The two boolean arrays whose fourfold table this is."""
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return np.array(before), np.array(after)


def test_paired_difference_agrees_with_the_published_analysis_of_cavo_2012():
    # Complete response before/after: 59 both, 6 only before, 16 only after, 80 neither.
    # R package contingencytables (Fagerland, Lydersen, Laake 2017, chapter 8), which counts
    # before - after: -0.0621 (-0.1186 to -0.0046), exact conditional McNemar P = 0.052479.
    result = statistics.paired_difference(*runs(both=59, gained=16, lost=6, neither=80))
    assert result.difference == pytest.approx(0.0621, abs=FOUR_DECIMALS)
    assert result.ci95 == pytest.approx((0.0046, 0.1186), abs=FOUR_DECIMALS)
    assert result.p_value == pytest.approx(0.052479, abs=5e-7)
    assert (result.gained, result.lost, result.n) == (16, 6, 161)


def test_a_weak_positive_correlation_counts_as_none():
    # Bentur 2009: determinant 1*12 - 7*1 = 5 lies under n/2 = 10.5, so phi = 0 and the interval is
    # the one for independent shares: statsmodels 0.15 confint_proportions_2indep(8, 21, 2, 21,
    # method="newcomb") = (0.025559124, 0.506920227).
    result = statistics.paired_difference(*runs(both=1, gained=7, lost=1, neither=12))
    assert result.ci95 == pytest.approx((0.025559124, 0.506920227), abs=1e-8)
    assert result.p_value == 2 * (1 + 8) / 2**8


def test_a_negative_correlation_is_taken_as_it_is():
    # determinant 3*2 - 9*4 = -30, margins 12*6*7*11 = 5544, phi = -30/sqrt(5544) = -0.402911
    # Wilson limits from statsmodels 0.15: 12/18 (0.437495, 0.837212), 7/18 (0.203052, 0.613810)
    # p1-l1 = 0.229172, u2-p2 = 0.224921, u1-p1 = 0.170546, p2-l2 = 0.185836
    phi = -30 / math.sqrt(5544)
    below = 0.229172**2 + 0.224921**2 - 2 * phi * 0.229172 * 0.224921
    above = 0.170546**2 + 0.185836**2 - 2 * phi * 0.170546 * 0.185836
    expected = (5 / 18 - math.sqrt(below), 5 / 18 + math.sqrt(above))
    result = statistics.paired_difference(*runs(both=3, gained=9, lost=4, neither=2))
    assert result.ci95 == pytest.approx(expected, abs=2e-6)


def test_exact_mcnemar_agrees_with_the_published_value():
    # Armitage & Berry 1994 p. 127, two culture media, 12 against 2: P = 0.0129 (StatsDirect)
    assert statistics.exact_mcnemar(12, 2) == pytest.approx(0.0129, abs=FOUR_DECIMALS)
    assert statistics.exact_mcnemar(2, 12) == statistics.exact_mcnemar(12, 2)


def test_exact_mcnemar_by_hand():
    assert statistics.exact_mcnemar(5, 0) == 2 / 32
    assert statistics.exact_mcnemar(3, 3) == 1.0
    assert statistics.exact_mcnemar(0, 0) == 1.0
    assert statistics.exact_mcnemar(4000, 4000) == 1.0  # 2**8000 is no float


def test_swapping_the_runs_mirrors_the_interval():
    before_P, after_P = runs(both=59, gained=16, lost=6, neither=80)
    forward = statistics.paired_difference(before_P, after_P)
    backward = statistics.paired_difference(after_P, before_P)
    assert backward.difference == -forward.difference
    assert backward.ci95 == pytest.approx((-forward.ci95[1], -forward.ci95[0]), abs=1e-12)
    assert backward.p_value == forward.p_value


def test_identical_runs_differ_by_nothing():
    before_P, after_P = runs(both=30, gained=0, lost=0, neither=70)
    result = statistics.paired_difference(before_P, after_P)
    low, high = result.ci95
    assert result.difference == 0.0 and result.p_value == 1.0
    assert low < 0.0 < high


def test_all_right_in_both_runs_still_has_an_interval_with_width():
    low, high = statistics.paired_difference(*runs(both=5, gained=0, lost=0, neither=0)).ci95
    # Wilson limits of 5/5: (0.565518, 1); phi = 0: -/+ sqrt(0.434482^2)
    assert (low, high) == pytest.approx((-0.434482, 0.434482), abs=1e-6)


def test_paired_difference_refuses_no_problems():
    with pytest.raises(ValueError, match="at least one problem"):
        statistics.paired_difference(np.zeros(0, bool), np.zeros(0, bool))


# --- intervals of means ---------------------------------------------------------------------------


def test_the_interval_of_zeros_and_ones_is_wilsons():
    assert statistics.mean_interval([0, 1, 1, 0, 1]) == statistics.wilson_interval(3, 5)
    assert statistics.mean_interval([True] * 4) == statistics.wilson_interval(4, 4)
    assert statistics.mean_interval([]) == statistics.wilson_interval(0, 0)


def test_the_interval_of_other_values_is_normal_over_the_problems():
    # 1/4, 3/4, 1/4, 3/4: mean 1/2, sample variance 4/16/3.
    half = 1.959964 * math.sqrt(4 / 16 / 3 / 4)
    assert statistics.mean_interval([0.25, 0.75] * 2) == pytest.approx(
        (0.5 - half, 0.5 + half), abs=1e-6
    )
    assert statistics.mean_interval([0.0, 0.5]) == (
        0.0,
        pytest.approx(0.25 + 1.959964 * 0.25, abs=1e-6),
    )


def test_equal_values_do_not_pass_for_certainty():
    assert statistics.mean_interval([0.5] * 4) == statistics.wilson_interval(2, 4)
    assert statistics.mean_interval([0.25]) == pytest.approx(statistics.wilson_interval(0.25, 1))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_value_outside_0_to_1_has_no_interval(value):
    with pytest.raises(ValueError, match="0..1"):
        statistics.mean_interval([0.5, value])
