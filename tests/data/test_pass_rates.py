"""Draws by pass rate, and problems that are passed over: by hand arithmetic and by counting."""

import collections
import math

import numpy as np
import pytest

from gemma_grpo.data import batches, pass_rates
from gemma_grpo.data.pass_rates import Group, Kind, PassRates
from gemma_grpo.data.problem import DIFFICULTIES, Problem

EASY, HARD = Kind("easy", "sums"), Kind("hard", "sums")
MANY = [Problem(f"{name} {n}", "1", None, name, "sums") for name in DIFFICULTIES for n in range(20)]
POOLS = batches.by_difficulty(MANY)


def rates_of(*steps):
    rates = PassRates()
    for groups in steps:
        rates.add(groups)
    return rates


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_kind_never_seen_is_as_undecided_as_can_be():
    assert PassRates().rate(EASY) == 0.5
    np.testing.assert_array_equal(PassRates().weights(MANY), np.full(60, 0.25))


def test_pass_rates_count_right_completions_with_one_right_and_one_wrong_added():
    rates = rates_of([Group("a", EASY, 7, 8), Group("b", EASY, 5, 8), Group("c", HARD, 0, 8)])
    assert rates.rate(EASY) == pytest.approx(13 / 18)
    assert rates.rate(HARD) == pytest.approx(1 / 10)
    weights_N = rates.weights(MANY)
    assert weights_N[0] == pytest.approx(13 / 18 * 5 / 18)  # easy
    assert weights_N[20] == 0.25  # medium, unseen
    assert weights_N[40] == pytest.approx(0.09)  # hard


def test_kinds_of_one_difficulty_have_pass_rates_of_their_own():
    rates = rates_of([Group("a", EASY, 8, 8)])
    assert rates.rate(Kind("easy", "products")) == 0.5


def test_older_groups_count_less_and_a_kind_left_alone_is_forgotten():
    first = [Group("a", EASY, 8, 8)]
    kept = math.exp(-1 / pass_rates.MEMORY)
    rates = rates_of(first, [Group("b", EASY, 0, 8)])
    assert rates.rate(EASY) == pytest.approx((8 * kept + 1) / (8 * kept + 8 + 2))
    rates = rates_of(first, *[[]] * 400)
    assert rates.rate(EASY) == pytest.approx(0.5, abs=1e-6)


def test_draws_go_by_the_weights():
    weights_N = np.repeat([0.2, 0.05, 0.01], 20)
    counts = collections.Counter(
        pass_rates.weighted_batch(MANY, weights_N, 1, rng(seed))[0].difficulty
        for seed in range(4000)
    )
    share = {name: counts[name] / 4000 for name in DIFFICULTIES}
    # 4 standard errors of a share of 20 / 26 among 4000 draws.
    assert share["easy"] == pytest.approx(20 / 26, abs=0.027)
    assert share["medium"] == pytest.approx(5 / 26, abs=0.025)


def test_a_batch_repeats_no_problem_before_all_have_come_up():
    batch = pass_rates.weighted_batch(MANY[:5], np.array([1.0, 1e-6, 1, 1, 1]), 12, rng())
    assert len(batch) == 12
    for part in (batch[:5], batch[5:10]):
        assert {p.prompt for p in part} == {p.prompt for p in MANY[:5]}


def test_the_chance_to_be_passed_over_grows_with_uniform_groups_in_a_row_and_a_mixed_one_ends_it():
    a, b = MANY[0], MANY[1]
    uniform = [Group(a.prompt, EASY, 8, 8)], [Group(a.prompt, EASY, 0, 8)]
    rates = rates_of(*uniform)
    assert rates.skip_chance(a, 0.5) == 0.75 and rates.skip_chance(b, 0.5) == 0.0
    assert rates.skip_chance(a, 0.0) == 0.0
    rates = rates_of(*uniform, [Group(a.prompt, EASY, 3, 8)])
    assert rates.skip_chance(a, 0.5) == 0.0


def test_another_problem_of_its_difficulty_stands_in_for_one_that_is_passed_over():
    solved = rates_of([Group(p.prompt, pass_rates.kind_of(p), 8, 8) for p in MANY[:10]])
    drawn = [MANY[0], MANY[30], MANY[5]]
    seen = set()
    for seed in range(50):
        batch = pass_rates.pass_over(drawn, POOLS, solved, 1 - 1e-9, rng(seed))
        assert batch[1] is MANY[30]  # never drawn before
        assert [p.difficulty for p in batch] == ["easy", "medium", "easy"]
        assert len({p.prompt for p in batch}) == 3
        seen |= {batch[0].prompt, batch[2].prompt}
    assert seen == {p.prompt for p in MANY[10:20]}


def test_half_of_the_draws_are_passed_over_at_a_half():
    solved = rates_of([Group(MANY[0].prompt, EASY, 0, 8)])
    kept = sum(
        pass_rates.pass_over(MANY[:1], POOLS, solved, 0.5, rng(seed))[0] is MANY[0]
        for seed in range(2000)
    )
    assert kept / 2000 == pytest.approx(0.5, abs=0.045)  # 4 standard errors


def test_a_problem_stays_where_no_other_is_left():
    every = rates_of([Group(p.prompt, pass_rates.kind_of(p), 8, 8) for p in MANY])
    assert pass_rates.pass_over(MANY[:4], POOLS, every, 1 - 1e-9, rng()) == MANY[:4]
    alone = {"easy": MANY[:1]}
    assert pass_rates.pass_over(MANY[:1], alone, every, 0.999999, rng()) == MANY[:1]
