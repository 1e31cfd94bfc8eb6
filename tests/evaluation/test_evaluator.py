"""What an evaluation reports, worked out by hand on four problems."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from stubs import tiny_runtime

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.evaluation import evaluator, statistics
from gemma_grpo.evaluation.config import RunEvaluationConfig
from gemma_grpo.generation import collect
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.generation.sampling import SamplingConfig


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


END_PAY = evaluator.Pay()


def completed(samples, logps=(), pay=END_PAY):
    """The samples with their scores."""
    scores = rewards.score(samples, pay.weights, pay.extra, pay.trace)
    return evaluator.Completed(samples, scores, list(logps), {})


def summarize(problems, greedy, sampled):
    sampled = sampled and completed(sampled)
    return evaluator.summarize(problems, completed(greedy), sampled)


GREEDY = [
    answered(PROBLEMS[0], "1"),
    answered(PROBLEMS[1], "9"),
    answered(PROBLEMS[2], "3", well_formed=False),
    answered(PROBLEMS[3], "4", steps=1, stopped=False),
]


def test_greedy_figures_are_those_of_hand_counting():
    result = summarize(PROBLEMS, GREEDY, None)
    assert result["accuracy"] == 0.5  # a and d; c is right in prose only
    assert result["lenient_accuracy"] == 0.75
    assert result["format_rate"] == 0.5  # c has none, d ran out of budget
    assert result["truncation_rate"] == 0.25
    # "a" to "d" say no numbers, and "0 + 1 = 1" starts from none of theirs.
    assert result["trace_score"] == 0
    # "1 + 1 = 2" of a and b; "0 + 1 = 1" is filler. Then with a false line in d.
    assert (result["steps"], result["true_steps"]) == (2, 1.0)
    wrong = replace(GREEDY[3], completion=GREEDY[3].completion.replace("0 + 1 = 1", "2 + 2 = 5"))
    with_wrong = summarize(PROBLEMS, [*GREEDY[:3], wrong], None)
    assert (with_wrong["steps"], with_wrong["true_steps"]) == (3, pytest.approx(2 / 3))
    assert summarize(PROBLEMS[2:3], GREEDY[2:3], None)["true_steps"] is None
    assert result["by_difficulty"] == {
        "easy": {"accuracy": 1.0, "n": 1},
        "medium": {"accuracy": 0.0, "n": 2},
        "hard": {"accuracy": 1.0, "n": 1},
    }
    assert result["by_domain"] == {
        "x": {"accuracy": 0.5, "n": 2},
        "y": {"accuracy": 0.5, "n": 2},
    }
    # Wilson's interval for 2 of 4 by hand: centre 1/2, half width z sqrt(n/4 + z^2/4) / (n + z^2).
    z = 1.959964
    half = z * math.sqrt(4 / 4 + z * z / 4) / (4 + z * z)
    wilson_of_two = pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    assert result["accuracy_ci95"] == wilson_of_two == result["format_rate_ci95"]
    # Of 1 of 4: centre (1/4 + z^2/8) / (1 + z^2/4), half width z sqrt(3/64 + z^2/64) / (1 + z^2/4).
    scale = 1 + z * z / 4
    middle, half = (1 / 4 + z * z / 8) / scale, z * math.sqrt(3 / 64 + z * z / 64) / scale
    low, high = result["truncation_rate_ci95"]
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    # Three of four found leniently is the mirror image.
    assert result["lenient_accuracy_ci95"] == pytest.approx([1 - high, 1 - low], abs=1e-6)


def test_pass_at_k_and_maj_at_k_count_problems_not_samples():
    given = [["1", "9", "9", "9"], ["2", "2", "9", "8"], ["9", "9", "9", "9"], ["4", "4", "4", "4"]]
    sampled = [
        answered(problem, answer)
        for problem, answers in zip(PROBLEMS, given, strict=True)
        for answer in answers
    ]
    result = summarize(PROBLEMS, GREEDY, sampled)
    assert result["k"] == 4
    assert result["pass_at_k"] == 0.75
    assert result["maj_at_k"] == 0.5
    assert result["pass_at_1"] == (1 + 2 + 0 + 4) / 16
    assert result["sampled_truncation_rate"] == 0
    # Two of four drawn without replacement: 1 of 4 right is hit by 3 of the 6 pairs, 2 of 4 by 5.
    pass_at_2 = (3 / 6 + 5 / 6 + 0 + 1) / 4
    assert result["pass_at"] == {"1": 7 / 16, "2": pytest.approx(pass_at_2), "4": 0.75}
    # pass@4 and maj@4 are 0 or 1 for each problem, so their intervals are Wilson's.
    wilson = statistics.wilson_interval
    assert result["pass_at_k_ci95"] == list(wilson(3, 4)) == result["pass_at_ci95"]["4"]
    assert result["maj_at_k_ci95"] == list(wilson(2, 4))
    # pass@1 is 1/4, 1/2, 0, 1: deviations from 7/16 are -3, 1, -7, 9 sixteenths.
    deviation = math.sqrt((9 + 1 + 49 + 81) / 16**2 / 3)
    half = 1.959964 * deviation / 2
    assert result["pass_at_1_ci95"] == pytest.approx([7 / 16 - half, 7 / 16 + half], abs=1e-6)
    assert result["pass_at_ci95"]["1"] == result["pass_at_1_ci95"]


def test_pass_at_is_reported_at_powers_of_two_and_at_k():
    sampled = [answered(problem, "1") for problem in PROBLEMS for _ in range(6)]
    result = summarize(PROBLEMS, GREEDY, sampled)
    assert list(result["pass_at"]) == list(result["pass_at_ci95"]) == ["1", "2", "4", "6"]


def test_an_answer_outside_the_format_counts_for_the_lenient_figures_only():
    sampled = [answered(problem, problem.answer, well_formed=False) for problem in PROBLEMS]
    result = summarize(PROBLEMS, GREEDY, sampled)
    assert result["pass_at_k"] == result["pass_at_1"] == result["maj_at_k"] == 0
    assert result["lenient_pass_at_k"] == result["lenient_maj_at_k"] == 1
    assert result["lenient_pass_at_1"] == 1


def test_a_majority_is_one_vote_a_sample_by_the_reader_in_use():
    votes = [("9", True), ("1", True), ("1", False), ("1", False)]
    sampled = [answered(PROBLEMS[0], answer, well_formed=formed) for answer, formed in votes]
    result = summarize(PROBLEMS[:1], GREEDY[:1], sampled)
    assert result["maj_at_k"] == 0  # 9 and 1 once each; the first one given wins
    assert result["lenient_maj_at_k"] == 1


def test_truncation_of_samples_is_counted_over_all_of_them():
    sampled = [answered(PROBLEMS[0], "1", stopped=stopped) for stopped in (True, False, True, True)]
    result = summarize(PROBLEMS[:1], GREEDY[:1], sampled)
    assert result["sampled_truncation_rate"] == 0.25
    low, high = result["sampled_truncation_rate_ci95"]
    assert 0 < low < 0.25 < high < 1  # one problem says little about others


def test_a_row_says_what_was_asked_said_read_and_judged():
    sampled = [answered(problem, answer) for problem in PROBLEMS[:2] for answer in "29"]
    logps = [-1.0, -2.0, -3.0, -4.0]
    rows = evaluator.rows(PROBLEMS[:2], completed(sampled, logps), greedy=False)
    place = [(row["problem"], row["sample"], row["prompt"]) for row in rows]
    assert place == [(0, 0, "a"), (0, 1, "a"), (1, 0, "b"), (1, 1, "b")]
    assert [row["logp"] for row in rows] == [-1, -2, -3, -4]
    assert [row["correctness"] for row in rows] == [0, 0, 1, 0]
    assert not any(row["greedy"] for row in rows)
    (row,) = evaluator.rows(PROBLEMS[2:3], completed(GREEDY[2:3], [-1.0]), greedy=True)
    assert row["greedy"] and row["answer"] == "3" and row["completion"] == "It is 3"
    assert (row["strict_answer"], row["correctness"]) == (None, 0)
    assert (row["lenient_answer"], row["lenient_correctness"]) == ("3", 1)
    assert (row["stopped"], row["num_tokens"]) == (True, 20)
    assert (row["difficulty"], row["domain"], row["format"]) == ("medium", "y", 0)


def test_a_comparison_is_paired_by_problem():
    row = lambda right, greedy=True: {"correctness": float(right), "greedy": greedy}
    before = [row(right) for right in (1, 0, 0, 0, 0, 0, 1, 0)]
    after = [row(right) for right in (1, 1, 1, 1, 1, 1, 0, 0)]
    before += [row(1, greedy=False)] * 3  # samples are no part of it
    result = evaluator.compare(before, after)
    assert (result["gained"], result["lost"], result["n"]) == (5, 1, 8)
    assert result["difference"] == 0.5
    assert result["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)
    low, high = result["ci95"]
    assert -1 < low < 0.5 < high < 1


def test_samples_are_drawn_by_the_settings_and_greedy_ones_by_none(monkeypatch):
    made = []

    def make_rollout(graphdef, mesh, config, *, layout):
        made.append((config.num_generations, config.sampling))
        return lambda: None

    monkeypatch.setattr(collect, "make_rollout", make_rollout)
    settings = dict(temperature=0.8, top_k=7, top_p=0.9, min_p=0.1)
    runtime = tiny_runtime(jax.device_count())
    evaluator.make_evaluator(evaluator.EvaluationConfig(num_samples=4, **settings), runtime)
    greedy = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    assert made == [(4, SamplingConfig(**settings)), (1, SamplingConfig(**greedy))]


def test_the_reward_of_an_evaluation_is_what_the_run_pays_in_the_end(tmp_path):
    weights = rewards.RewardWeights(correctness=1.0, trace=0.0, confidence=0.0, verbosity=0.0)
    told = []
    config = rewards.RewardConfig(end=weights, extra=("session:tokens=0.01", "gone.py:f"))
    functions = {"tokens": lambda sample: sample.num_tokens}
    pay = evaluator.pay_of(config, functions, without=told.append)
    assert len(told) == 1 and "gone.py" in told[0]
    with pytest.raises(UserError, match=r"gone\.py"):
        evaluator.pay_of(config, functions)
    result = evaluator.summarize(PROBLEMS, completed(GREEDY, pay=pay), None)
    # Right: 1 and 4; well formed and ended: 1 and 2; each has 20 tokens.
    assert result["reward"] == pytest.approx((2 * 1.0 + 2 * 0.1) / 4 + 0.01 * 20)
    rows = evaluator.rows(PROBLEMS, completed(GREEDY, [0.0] * 4, pay), greedy=True)
    assert [row["reward"] for row in rows] == pytest.approx([1.3, 0.3, 0.2, 1.2])
    assert [row["tokens"] for row in rows] == [20] * 4
    structure = evaluator.pay_of(rewards.RewardConfig(trace="structure"))
    assert (structure.trace, structure.weights) == ("structure", rewards.END_WEIGHTS)


@pytest.fixture
def fake_evaluator(monkeypatch):
    """An evaluator with samplers of 1 and of 2 completions that answer their own number, in
    batches of 4 completions; and the prompts of the batches that it was asked for."""
    seen = []

    def fake_collect(self, params, problems, key, weights, extra, trace):
        seen.append([problem.prompt for problem in problems])
        G = self.num_generations
        samples = [answered(p, str(g)) for p in problems for g in range(G)]
        B = len(samples)
        drawn = Rollout(
            completion_ids=np.array([[10 * len(seen) + row] * 2 + [0] for row in range(B)]),
            completion_mask=np.array([[True, True, False]] * B),
            sampler_logps=np.array([[-1.0, -g, -7.0] for _ in problems for g in range(G)]),
            stopped=np.array([True] * B),
        )
        scores = rewards.score(samples, weights, extra, trace)
        ids, mask = np.zeros((len(problems), 48), int), np.ones((len(problems), 48), bool)
        return collect.Groups(problems, ids, mask, drawn, drawn.completion_ids, samples, scores)

    monkeypatch.setattr(collect.Sampler, "collect", fake_collect)
    runtime = tiny_runtime()
    greedy, sampled = (
        collect.Sampler(lambda: None, runtime.mesh, runtime.tokenizer, "", 48, G) for G in (1, 2)
    )
    config = evaluator.EvaluationConfig(batch_size=4, num_samples=2)
    return evaluator.Evaluator(config, greedy, sampled, runtime), seen


def test_the_last_batch_is_filled_up_and_its_filling_left_out(fake_evaluator):
    own, seen = fake_evaluator
    looks = []
    _, rows, tokens = own.run({}, PROBLEMS[:3], before_batch=lambda: looks.append(len(seen)))
    assert looks == [0, 1, 2]
    assert seen == [["a", "b", "c"], ["a", "b"], ["c", "c"]]
    assert [row["prompt"] for row in rows] == ["a", "b", "c", "a", "a", "b", "b", "c", "c"]
    assert [row["logp"] for row in rows] == [-1] * 3 + [-1, -2] * 3  # of the tokens that count
    assert tokens["num_tokens"].tolist() == [2] * 9
    ids = [10, 11, 12, 20, 21, 22, 23, 30, 31]
    assert tokens["token_ids"].tolist() == [each for each in ids for _ in range(2)]
    logps = [-1, -0.0] * 3 + [-1, -0.0, -1, -1] * 3
    assert tokens["logps"].tolist() == logps and "gaps" not in tokens


def test_a_reward_of_the_users_own_is_in_every_row_of_an_evaluation(fake_evaluator):
    own, _ = fake_evaluator
    ones = {"ones": lambda sample: 1.0}
    paying = evaluator.pay_of(rewards.RewardConfig(extra=("session:ones=0.5",)), ones)
    _, plain, _ = own.run({}, PROBLEMS[:3])
    result, rows, _ = replace(own, pay=paying).run({}, PROBLEMS[:3])
    assert [row["ones"] for row in rows] == [1.0] * 9
    more = [row["reward"] - less["reward"] for row, less in zip(rows, plain, strict=True)]
    assert more == pytest.approx([0.5] * 9)


def test_a_reward_of_the_users_own_has_its_mean_beside_the_stages_figures(fake_evaluator):
    own, _ = fake_evaluator
    pay = rewards.RewardConfig(extra=("session:halves=0.5",))
    halves = {"halves": lambda sample: 0.5 if sample.prompt == "a" else 0.0}
    result, *_ = replace(own, pay=evaluator.pay_of(pay, halves)).run({}, PROBLEMS[:3])
    assert result["own_rewards"] == {"halves": pytest.approx(0.5 / 3)}
    assert "own_rewards" not in own.run({}, PROBLEMS[:3])[0]


def test_a_reward_that_fails_on_every_completion_stops_no_evaluation(fake_evaluator):
    def broken(sample):
        raise ValueError("no")

    own, _ = fake_evaluator
    pay = evaluator.pay_of(rewards.RewardConfig(extra=("session:broken=0.5",)), {"broken": broken})
    result, rows, _ = replace(own, pay=pay).run({}, PROBLEMS[:3])
    assert [row["broken"] for row in rows] == [None] * 9
    assert result["own_rewards"] == {"broken": None}  # which the table shows as "-"
    assert result["missing/broken"] == 9  # three greedy ones and two sampled ones of each


def test_each_batch_has_noise_of_its_own_and_each_row_its_problems_domain(
    fake_evaluator, monkeypatch
):
    own, _ = fake_evaluator
    keys, collected = [], collect.Sampler.collect

    def noted(self, params, problems, key, *others):
        keys.append(key)
        return collected(self, params, problems, key, *others)

    monkeypatch.setattr(collect.Sampler, "collect", noted)
    problems = [replace(each, domain=name) for each, name in zip(PROBLEMS, "xyzw", strict=True)]
    _, rows, _ = own.run({}, problems)
    starts = [0, 0, 2]  # all four greedy ones, then two and two
    expected = [jax.random.fold_in(own.runtime.key, start) for start in starts]
    data = lambda each: jax.random.key_data(each).tolist()
    assert [data(key) for key in keys] == [data(key) for key in expected]
    assert [row["domain"] for row in rows] == list("xyzwxxyyzzww")


def test_a_snapshot_is_the_greedy_part_of_the_first_problems_in_a_batch_of_all(fake_evaluator):
    own, seen = fake_evaluator
    result, rows, tokens = own.run_first(2, {}, PROBLEMS)
    assert seen == [["a", "b", "b", "b"]]  # the batch that measures all four
    assert result["n"] == 2 and "k" not in result
    assert [(row["problem"], row["greedy"]) for row in rows] == [(0, True), (1, True)]
    assert tokens["num_tokens"].tolist() == [2, 2]
    whole, all_rows, _ = own.run({}, PROBLEMS)
    place = lambda row: [row[name] for name in ("problem", "prompt", "completion", "reward")]
    assert [place(row) for row in rows] == [place(row) for row in all_rows[:2]]
    assert own.run_first(9, {}, PROBLEMS)[0]["n"] == 4


@pytest.mark.parametrize(
    "change",
    [
        dict(batch_size=0),
        dict(num_samples=-1),
        dict(num_samples=7),
        dict(every=-1),
        dict(snapshot_problems=0),
    ],
)
def test_a_senseless_setting_is_refused(change):
    with pytest.raises(UserError, match="evaluation"):
        RunEvaluationConfig(**change)


def test_shares_are_reported_in_order_of_appearance():
    shares = evaluator._shares(np.array([True, False, True]), ["z", "a", "z"])
    assert list(shares) == ["z", "a"] and shares["z"] == {"accuracy": 1.0, "n": 2}


def test_spellings_of_one_number_are_votes_for_one_candidate():
    (problem,) = PROBLEMS[:1]
    given = ["9", "9", "1.0", "1 km", "2/2 km"]  # the last is not worked out: a vote of its own
    sampled = [answered(problem, answer) for answer in given]
    assert summarize([problem], [sampled[0]], sampled)["maj_at_k"] == 0  # 2 to 2
    sampled = [answered(problem, answer) for answer in ["9", "9", "1.0", "1 km", "1e0"]]
    assert summarize([problem], [sampled[0]], sampled)["maj_at_k"] == 1


@pytest.mark.parametrize("num_problems, prompts", [(4, 8), (9, 16), (40, 40), (10**7, 10**6)])
def test_no_more_rows_are_drawn_than_the_problems_fill_on_the_devices(num_problems, prompts):
    assert evaluator.prompts_at_once(1_000_000, num_problems, num_devices=8) == prompts
