"""What an evaluation reports, worked out by hand on four problems."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gemma_grpo import assets, collect, evaluation, rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.tokenizer import Tokenizer


def answered(problem, answer, *, steps=2, stopped=True, well_formed=True):
    reasoning = "\n".join(f"{i} + 1 = {i + 1}" for i in range(steps))
    text = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    if not well_formed:
        text = f"It is {answer}"
    return rewards.Sample(
        problem.prompt, text, problem.answer, problem.difficulty, 20, 60, (-0.1,), stopped
    )


PROBLEMS = [
    Problem("a", "1", difficulty="easy", domain="x"),
    Problem("b", "2", difficulty="medium", domain="x"),
    Problem("c", "3", difficulty="medium", domain="y"),
    Problem("d", "4", difficulty="hard", domain="y"),
]
GREEDY = [
    answered(PROBLEMS[0], "1"),
    answered(PROBLEMS[1], "9"),
    answered(PROBLEMS[2], "3", well_formed=False),
    answered(PROBLEMS[3], "4", steps=1, stopped=False),
]


def test_greedy_figures_are_those_of_hand_counting():
    result, rows = evaluation.summarize(PROBLEMS, GREEDY, None)
    assert result["accuracy"] == 0.5  # a and d; c is right in prose only
    assert result["lenient_accuracy"] == 0.75
    assert result["format_rate"] == 0.5  # c has none, d ran out of budget
    assert result["truncation_rate"] == 0.25
    # Steps needed 1, 2, 2, 3; steps shown 2, 2, none, 1.
    assert result["trace_score"] == pytest.approx((1 + 1 + 0 + 1 / 3) / 4)
    assert result["by_difficulty"] == {
        "easy": {"accuracy": 1.0, "n": 1},
        "medium": {"accuracy": 0.0, "n": 2},
        "hard": {"accuracy": 1.0, "n": 1},
    }
    assert result["by_domain"] == {
        "x": {"accuracy": 0.5, "n": 2},
        "y": {"accuracy": 0.5, "n": 2},
    }
    assert [row["correctness"] for row in rows] == [1, 0, 0, 1]
    # Wilson's interval for 2 of 4 by hand: centre 1/2, half width z sqrt(n/4 + z^2/4) / (n + z^2).
    z = 1.959964
    half = z * math.sqrt(4 / 4 + z * z / 4) / (4 + z * z)
    assert result["accuracy_ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)


def test_pass_at_k_and_maj_at_k_count_problems_not_samples():
    given = [["1", "9", "9", "9"], ["2", "2", "9", "8"], ["9", "9", "9", "9"], ["4", "4", "4", "4"]]
    sampled = [
        answered(problem, answer)
        for problem, answers in zip(PROBLEMS, given, strict=True)
        for answer in answers
    ]
    result, _ = evaluation.summarize(PROBLEMS, GREEDY, sampled)
    assert result["k"] == 4
    assert result["pass_at_k"] == 0.75
    assert result["maj_at_k"] == 0.5
    assert result["pass_at_1"] == (1 + 2 + 0 + 4) / 16


def test_a_comparison_is_paired_by_problem():
    row = lambda right: {"correctness": float(right)}
    before = [row(right) for right in (1, 0, 0, 0, 0, 0, 1, 0)]
    after = [row(right) for right in (1, 1, 1, 1, 1, 1, 0, 0)]
    result = evaluation.compare(before, after)
    assert (result["gained"], result["lost"], result["n"]) == (5, 1, 8)
    assert result["difference"] == 0.5
    assert result["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)
    low, high = result["ci95"]
    assert -1 < low < 0.5 < high < 1


def test_the_last_batch_is_filled_up_and_its_filling_left_out(monkeypatch):
    seen = []

    def fake_collect(self, params, problems, key, weights, extra):
        seen.append([problem.prompt for problem in problems])
        return SimpleNamespace(samples=[answered(p, str(g)) for p in problems for g in range(2)])

    monkeypatch.setattr(collect.Sampler, "collect", fake_collect)
    sampler = collect.Sampler(lambda: None, Tokenizer(assets.NANO_TOKENIZER), "", 48, 2)
    samples = evaluation._complete(sampler, {}, PROBLEMS[:3], 2, jax.random.key(0))
    assert seen == [["a", "b"], ["c", "c"]]
    assert [sample.prompt for sample in samples] == ["a", "a", "b", "b", "c", "c"]


@pytest.mark.parametrize("change", [dict(batch_size=0), dict(num_samples=-1), dict(num_samples=7)])
def test_a_senseless_setting_is_refused(change):
    with pytest.raises(UserError, match="evaluation"):
        evaluation.EvaluationConfig(**change)


def test_shares_are_reported_in_order_of_appearance():
    shares = evaluation._shares(np.array([True, False, True]), ["z", "a", "z"])
    assert list(shares) == ["z", "a"] and shares["z"] == {"accuracy": 1.0, "n": 2}
