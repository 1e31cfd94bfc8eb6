"""A line is said when a metric has left its healthy range for long, and never on a healthy run."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import metrics_page
from gemma_grpo.records import watch
from gemma_grpo.records.metric_notes import NOTES, note
from gemma_grpo.records.watch import Watch

# The watched metrics of `python -m gemma_grpo.train`, 200 steps, to three digits.
DEFAULT_RUN = json.loads(Path(__file__).with_name("default_run.json").read_text())
HEALTHY = {
    "all_wrong_groups": 0.2,
    "all_right_groups": 0.2,
    "truncated": 0.05,
    "entropy": 0.3,
    "clip_fraction": 0.01,
    "logp_gap/mean": 0.005,
    "kl": 0.02,
    "tis_weight": 1.0,
    "tis_capped_fraction": 0.01,
    "learning_rate": 1e-6,
    "reward/mean": 0.5,
    "reward/correctness": 0.4,
    "completion_length/mean": 40.0,
}


def said(series, steps=80):
    """(step, line) of each line said on a run that is healthy but for `series`: a value of each
    metric, or step -> value."""
    watching, lines = Watch("grpo"), []
    for step in range(1, steps + 1):
        changed = {name: of(step) if callable(of) else of for name, of in series.items()}
        if line := watching.see(step, HEALTHY | changed):
            lines.append((step, line))
    return lines


def test_a_healthy_run_says_nothing():
    assert said({}, steps=300) == []


def test_scoring_that_takes_more_than_half_of_a_step_is_said():
    ((step, line),) = said({"time/step_s": 4.0, "time/reward_s": 3.0})
    assert step == watch.WINDOW and "scoring takes 3 of a step's 4 seconds" in line
    assert "@batch_reward" in line
    assert said({"time/step_s": 4.0, "time/reward_s": 2.0}) == []


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_default_run_says_nothing(stage):
    series = DEFAULT_RUN[stage]
    watching = Watch(stage)
    steps = zip(*series.values(), strict=True)
    for step, values in enumerate(steps, start=1):
        assert watching.see(step, dict(zip(series, values, strict=True))) is None


@pytest.mark.parametrize(
    "metric, value, word",
    [
        ("all_wrong_groups", 0.8, "too hard"),
        ("all_right_groups", 1.0, "too easy"),
        ("truncated", 0.5, "max-completion-length"),
        ("reward/std", 0.0, "no gradient"),
        ("entropy", 0.001, "copies"),
        ("entropy", 4.0, "falls apart"),
        ("reward/format", 0.4, "More SFT steps"),
        ("clip_fraction", 0.4, "num-iterations"),
        ("logp_gap/mean", 0.2, "disagree"),
        ("kl", 2.0, "beta"),
        ("tis_weight", 0.5, "logp_gap"),
        ("tis_capped_fraction", 0.2, "logp_gap"),
        ("learning_rate", 0.0, "Nothing is learned"),
    ],
)
def test_a_range_that_is_left_for_long_is_named_with_the_fix(metric, value, word):
    ((step, line),) = said({metric: value})
    assert step == watch.WINDOW
    assert line.startswith(f"grpo step {watch.WINDOW}: {metric} ") and word in line


def test_a_collapse_is_told_by_its_entropy_before_what_follows_from_it():
    """As at a learning rate of 0.02: two wild steps, then one token again and again."""
    collapsed = {
        "entropy": lambda step: {1: 0.1, 2: 3.6, 3: 4.7}.get(step, 0.03),
        "completion_length/mean": lambda step: 13.0 if step == 1 else 60.0,
        "truncated": lambda step: 0.0 if step == 1 else 1.0,
        "all_wrong_groups": 1.0,
        "reward/format": 0.0,
    }
    ((step, line),) = said(collapsed)
    assert step == watch.WINDOW and line.startswith("grpo step 30: entropy was 4.7 in one of 30 ")
    assert "lower grpo.optimizer.learning-rate" in line and "More SFT steps" not in line
    assert line.endswith("Not healthy either: truncated, reward/format, all_wrong_groups.")


def test_length_and_truncation_are_told_before_format():
    late = lambda before, after: lambda step: before if step <= 30 else after
    drift = {"completion_length/mean": late(13.0, 60.0), "truncated": late(0.0, 1.0)}
    (_, line), *_ = said(drift | {"reward/format": late(1.0, 0.0)}, steps=100)
    assert line.startswith("grpo step 37: truncated is ")
    worst = watch.History()
    for step in range(1, 100):
        worst.add({name: of(step) for name, of in drift.items()} | {"reward/format": 0.0})
    found = [each.metric for each in watch.findings(worst)]
    assert found == ["completion_length/mean", "truncated", "reward/format"]


def test_equal_rewards_are_named_first_and_an_unpaid_component_is_not():
    """The reward of one's own is always 0, and all built-in weights are."""
    useless = {"reward/std": 0.0, "reward/format": 0.0, "weight/format": 0.0}
    ((_, line),) = said(useless | {"kl": 2.0})
    assert line.startswith("grpo step 30: reward/std is 0 ") and "rewards are equal" in line
    assert line.endswith("Not healthy either: kl.")


def test_a_component_that_is_paid_later_is_named():
    rising = {"reward/format": 0.0, "weight/format": lambda step: 0.001 * (step - 1)}
    ((_, line),) = said(rising)
    assert "reward/format is 0 " in line


def test_every_range_of_the_table_is_tried_above():
    ranges = {name for name, each in NOTES.items() if (each.low, each.high) != (None, None)}
    marks = test_a_range_that_is_left_for_long_is_named_with_the_fix.pytestmark
    assert ranges <= {metric for metric, _, _ in marks[0].args[1]}


def test_what_is_left_for_a_few_steps_is_not_said():
    assert said({"truncated": lambda step: 1.0 if step % 30 < 5 else 0.0}, steps=300) == []


def test_a_line_is_said_once_in_a_hundred_steps():
    steps = [step for step, _ in said({"truncated": 0.9}, steps=330)]
    assert steps == [30, 130, 230, 330]


def test_two_metrics_share_the_lines_and_each_line_names_both():
    lines = said({"truncated": 0.9, "all_wrong_groups": 1.0}, steps=330)
    assert [step for step, _ in lines] == [30, 130, 230, 330]
    about = [line.split()[3] for _, line in lines]
    assert sorted(about[:2]) == ["all_wrong_groups", "truncated"] and about[2:] == about[:2]
    for (_, line), other in zip(lines, about[1:], strict=False):
        assert line.endswith(f"Not healthy either: {other}.")


def test_what_breaks_after_a_line_waits_for_the_next():
    lines = said({"truncated": 0.9, "kl": lambda step: 2.0 if step > 60 else 0.0}, steps=140)
    assert [(step, line.split()[3]) for step, line in lines] == [(30, "truncated"), (130, "kl")]


def test_reward_that_rises_without_accuracy_is_suspected():
    climb = lambda step: min(0.3 + step / 200, 0.8)
    ((step, line), *_) = said({"reward/mean": climb}, steps=200)
    assert step == watch.WINDOW + watch.APART and "a hack?" in line and "rescore" in line


def test_reward_that_rises_with_accuracy_is_not_suspected():
    climb = lambda step: 0.3 + step / 400
    assert said({"reward/mean": climb, "reward/correctness": climb}, steps=200) == []


def test_reward_may_rise_alone_where_nearly_all_is_right():
    climb = lambda step: 0.3 + step / 200
    assert said({"reward/mean": climb, "reward/correctness": 0.97}, steps=200) == []


@pytest.mark.parametrize("factor", [2.5, 0.3])
def test_completions_that_drift_in_length_are_named(factor):
    drift = lambda step: 40.0 if step <= 30 else 40.0 * factor
    ((_, line),) = said({"completion_length/mean": drift})
    assert "in the first 30 steps they had 40" in line


def test_numbers_of_numpy_are_seen_and_what_was_not_measured_is_not():
    watching = Watch("grpo")
    lines = []
    for step in range(1, 61):
        metrics = {"truncated": np.array(0.9, np.float32), "kl": None, "phase": "easy"}
        lines.append(watching.see(step, metrics))
    (line,) = filter(None, lines)
    assert "truncated is 0.9 " in line


def test_rewards_and_weights_of_a_users_own_have_a_note():
    assert note("reward/brevity") is NOTES["reward/*"]
    assert note("weight/brevity") is NOTES["weight/*"]
    assert note("reward/mean") is NOTES["reward/mean"]
    assert note("nothing") is None


def test_loss_near_zero_is_explained():
    assert "Loss about 0 is expected on-policy" in NOTES["loss"].healthy


def test_the_page_is_that_of_the_table():
    """`python -m benchmarks.metrics_page` writes it."""
    assert metrics_page.PAGE.read_text(encoding="utf-8") == metrics_page.page()
