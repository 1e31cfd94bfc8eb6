"""Learning curves beside Tunix's: what is paid, what is compared, what is cut."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.tunix import convert, curves, learn, ours, replay
from gemma_grpo import model, weights
from gemma_grpo.data.problem import Problem
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.text.tokenizer import Tokenizer

RIGHT = "<reasoning>\n2 + 3 = 5\n</reasoning>\n<answer>\n5\n</answer>"
PROBLEMS = [
    Problem(prompt="2 + 3?", answer="5", completion=None, difficulty="easy", domain="sums"),
    Problem(prompt="2 + 5?", answer="7", completion=None, difficulty="easy", domain="sums"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(weights.tokenizer_path(weights.open_source("gemma3-nano")))


def test_parameters_come_back_from_tunix_as_they_went():
    config = model.CONFIGS["gemma3-nano"]
    _, params = model.split(model.Gemma3(config, rngs=nnx.Rngs(0)))
    back = convert.from_tunix(convert.to_tunix(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back, params))


def test_a_completion_is_paid_for_the_problem_of_its_own_group(tokenizer):
    ids = tokenizer.encode(RIGHT)
    scores = learn.score(PROBLEMS, [ids] * 4, [True] * 4, budget=60, tokenizer=tokenizer)
    assert scores.totals == pytest.approx(
        [1.0, 1.0, 0.2, 0.2]
    )  # a wrong answer pays a third of its trace


def test_one_that_did_not_end_by_itself_is_not_paid_for_its_form(tokenizer):
    ids = tokenizer.encode(RIGHT)
    scores = learn.score(PROBLEMS, [ids, ids], [True, False], budget=60, tokenizer=tokenizer)
    assert scores.totals == pytest.approx([1.0, 0.1])  # a wrong trace is worth a third


def test_the_update_of_the_untrained_stop_sees_what_tunix_keeps_of_a_completion():
    ids = np.array([[7, 8, 106, 0], [7, 1, 0, 0], [7, 8, 9, 9]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    drawn = Rollout(ids, mask, np.zeros((3, 4)), np.array([True, True, False]))
    assert ours.without_tokens(drawn, [1, 106]).completion_mask.sum(axis=1).tolist() == [2, 1, 4]


def test_a_distance_is_over_all_weights():
    one = {"a": np.array([3.0, 0.0]), "b": {"c": np.array(4.0)}}
    other = {"a": np.array([0.0, 0.0]), "b": {"c": np.array(0.0)}}
    assert replay.distance(one, other) == pytest.approx(5.0)


def test_blocks_are_means_of_steps_and_the_last_may_be_shorter():
    values = np.array([[1.0, 3.0, 5.0], [0.0, 2.0, 8.0]])
    assert curves.block_means(values, 2).tolist() == [[2.0, 5.0], [1.0, 8.0]]


def test_a_running_mean_looks_back_and_never_ahead():
    values = np.array([1.0, 3.0, 5.0, 1.0])
    assert curves.running_mean(values, 2).tolist() == [1.0, 2.0, 4.0, 3.0]


def test_steps_count_from_one_and_a_target_may_be_missed():
    values = np.array([0.1, 0.5, 0.4, 0.6])
    assert curves.steps_to(values, 0.5) == 2
    assert curves.steps_to(values, 0.7) is None


def test_a_target_is_a_share_of_the_way_to_the_lower_end():
    rewards = [np.array([[0.2, 0.2, 0.9, 0.9]]), np.array([[0.4, 0.4, 0.8, 0.8]])]
    assert curves.target_of(rewards, 2, 0.9) == pytest.approx(0.3 + 0.9 * 0.5)


def test_compilation_counts_as_a_step_like_the_others():
    assert curves.without_first([20.0, 1.0, 2.0, 9.0]) == [2.0, 1.0, 2.0, 9.0]


def row(side: str, seed: int, reward: float, cpu: float) -> dict:
    rising = [0.0] * 10 + [reward] * 10 + [1.05 * reward] * 10
    return {
        "benchmark": "tunix/learn",
        "side": side,
        "seed": seed,
        "reward": rising,
        "accuracy": rising,
        "format": [0.0] * 23 + [1.0, *[0.5] * 6],
        "cpu": [50.0] + [cpu] * 29,
        "wall": [50.0] + [cpu / 2] * 29,
        "held_out": {"accuracy": reward, "pass_at_1": 0.5, "format_rate": 1.0},
    }


ROWS = [
    row("ours", 0, 0.5, 1.0),
    row("ours", 1, 0.7, 1.0),
    row("tunix", 1, 0.8, 3.0),
    row("tunix", 0, 0.4, 3.0),
]


def test_the_difference_stands_against_what_one_seed_is_from_another():
    (said,) = curves.summaries(curves.read(ROWS))
    assert said["difference"] == [0.0, 0.0, 0.0]  # 0.6 and 0.6 on average
    # Variances with ddof 1: 0.2^2 / 2 and 0.4^2 / 2; the root of their mean, 0.05.
    assert said["seed_std"] == pytest.approx([0.0, 0.224, 0.235], abs=5e-4)
    # 0.1 and -0.1 by seed
    assert said["held_out"]["accuracy"]["difference"] == {"mean": 0.0, "error": 0.1}


def test_the_last_quarter_is_the_last_quarter():
    (said,) = curves.summaries(curves.read(ROWS))
    assert said["last_quarter"]["format"]["ours"] == pytest.approx((1.0 + 6 * 0.5) / 7, abs=5e-5)


def test_a_side_that_is_behind_is_said_to_be_behind():
    worse = [
        dict(r, reward=[x / 2 for x in r["reward"]]) if r["side"] == "ours" else r for r in ROWS
    ]
    (said,) = curves.summaries(curves.read(worse))
    assert said["difference"][1] == pytest.approx(-0.3)
    assert said["blocks_within_seed_std"] == "1 of 3"


def test_the_same_steps_to_a_target_cost_each_side_its_own_seconds():
    (said,) = curves.summaries(curves.read(ROWS))
    # 0.9 * 0.63: the running mean of ten is 0.54 after nine steps at 0.6, and 0.6 after ten.
    assert said["reached"][-1] == {
        "reward": 0.567,
        "ours": {"steps": 20, "cpu": 20.0, "wall": 10.0},
        "tunix": {"steps": 20, "cpu": 60.0, "wall": 30.0},
    }


def test_when_ours_ends_tunix_is_where_its_seconds_have_brought_it():
    (said,) = curves.summaries(curves.read(ROWS))
    assert said["when_side_ends"] == {"cpu": 30.0, "reward": {"ours": 0.63, "tunix": 0.0}}


def test_each_two_sides_are_compared_once():
    third = [dict(r, side="ours_stop_untrained") for r in ROWS if r["side"] == "ours"]
    said = curves.summaries(curves.read([*ROWS[:2], *third, *ROWS[2:]]))
    pairs = [("ours", "ours_stop_untrained"), ("ours", "tunix"), ("ours_stop_untrained", "tunix")]
    assert [(r["side"], r["against"]) for r in said] == pairs


def test_one_seed_is_no_measure_of_noise():
    with pytest.raises(SystemExit, match="two seeds"):
        curves.summaries(curves.read([row("ours", 0, 0.5, 1.0), row("tunix", 0, 0.5, 1.0)]))


def test_the_chart_is_drawn_of_the_rows(tmp_path, capsys):
    path, chart = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    path.write_text("\n".join(json.dumps(r) for r in ROWS))
    curves.main((path,), chart=chart)
    assert json.loads(capsys.readouterr().out)["seeds"] == 2
    assert chart.stat().st_size > 1000
