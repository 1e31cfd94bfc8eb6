"""What a guard takes for a collapse, and which checkpoints it takes for good: hand-made steps."""

import json
from pathlib import Path

import numpy as np
import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records.metric_notes import NOTES
from gemma_grpo.training.config import GRPOConfig, GuardConfig
from gemma_grpo.training.guard import Guard, guard_of

HEALTHY = {
    "loss": 0.0,
    "grad_norm": 0.3,
    "reward/format": 0.9,
    "reward/correctness": 0.6,
    "entropy": 0.3,
    "truncated": 0.05,
    "kl": 0.1,
    "logp_gap/mean": 1e-3,
    "completion_length/mean": 40.0,
}
NAN = float("nan")


def watched(*steps, every=2, **settings):
    """A guard that has seen healthy steps but for these changes to each, and the step at which it
    first saw a collapse, or None."""
    guard, collapsed_at = Guard(GuardConfig(**settings), every), None
    for step, changes in enumerate(steps, start=1):
        guard.see(step, HEALTHY | changes)
        collapsed_at = collapsed_at or (step if guard.collapse else None)
    return guard, collapsed_at


@pytest.mark.parametrize(
    "metric, value",
    [
        ("reward/format", 0.49),
        ("entropy", 0.004),
        ("entropy", 3.1),
        ("truncated", 0.51),
        ("kl", 1.01),
        ("logp_gap/mean", 0.051),
        ("completion_length/mean", 9.9),  # a quarter of 40
        ("completion_length/mean", 160.1),  # four times 40
    ],
)
def test_a_figure_out_of_its_range_for_as_many_steps_as_the_patience_is_a_collapse(metric, value):
    broken = {metric: value}
    guard, at = watched({}, {}, {}, broken, broken, patience=3)
    assert at is None and guard.collapse == ""
    guard, at = watched({}, {}, {}, broken, broken, broken, patience=3)
    assert at == 6
    side = "below" if value < HEALTHY[metric] else "above"
    assert guard.collapse.startswith(f"{metric} was {side} ")
    assert guard.collapse.endswith(f"in steps 4 to 6 (last {value:.3g})")


@pytest.mark.parametrize(
    "metric, value",
    [
        ("reward/format", 0.5),
        ("entropy", 0.005),
        ("entropy", 3.0),
        ("truncated", 0.5),
        ("kl", 1.0),
        ("logp_gap/mean", 0.05),
        ("completion_length/mean", 10.0),
        ("completion_length/mean", 160.0),
    ],
)
def test_both_ends_of_a_range_are_within_it(metric, value):
    _, at = watched({}, {}, *[{metric: value}] * 20, patience=2)
    assert at is None


def test_limits_that_the_metrics_have_healthy_ranges_for_are_those():
    config = GuardConfig()
    assert config.min_format == NOTES["reward/format"].low
    assert (config.min_entropy, config.max_entropy) == (NOTES["entropy"].low, NOTES["entropy"].high)
    assert config.max_logp_gap == NOTES["logp_gap/mean"].high


def test_the_last_steps_share_of_right_completions_is_compared_with_the_best_so_far():
    right = lambda *values: [{"reward/correctness": value} for value in values]
    # Means of two: 0.4, 0.3, 0.6 (the best), 0.5, 0.44, 0.38, 0.29.
    falling = right(0.2, 0.4, 0.8, 0.2, 0.68, 0.08, 0.5)
    guard, at = watched({}, *falling, patience=2, every=1)
    assert at == 8 and guard.collapse == (
        "reward/correctness was 0.483 of its best 0.6 in the mean of steps 7 to 8"
    )
    assert guard.best(range(9)) == 4  # 0.44, the mean at step 6, is less than three quarters
    assert watched({}, *falling[:6], *right(0.53), patience=2)[1] is None
    assert watched({}, *falling, patience=2, min_correctness=0.0)[1] is None
    assert watched(*right(*[0.0] * 30), patience=2)[1] is None


def test_fewer_are_right_of_the_problems_of_a_harder_phase_which_is_no_collapse():
    easy = [{"reward/correctness": 0.9, "phase": "easy"}] * 5
    hard = [{"reward/correctness": 0.3, "phase": "hard"}] * 5
    assert watched(*easy, *hard, patience=2)[1] is None
    fewer = [{"reward/correctness": 0.1, "phase": "hard"}] * 2
    assert watched(*easy, *hard, *fewer, patience=2)[1] == 12


def test_a_step_within_the_range_ends_the_row():
    broken, steps = {"kl": 5.0}, []
    for _ in range(5):
        steps += [broken, broken, {}]
    assert watched({}, *steps, patience=3)[1] is None


def test_rows_of_two_figures_do_not_add_up():
    low, high = {"reward/format": 0.0}, {"entropy": 5.0}
    assert watched({}, low, low, high, high, low, low, patience=3)[1] is None


def test_what_never_was_in_its_range_has_not_left_it():
    """An instruction-tuned model that learns the format in GRPO begins without it."""
    unformed = {"reward/format": 0.0, "truncated": 1.0}
    assert watched(*[unformed] * 30, patience=3)[1] is None
    assert watched(*[unformed] * 9, {}, *[unformed] * 3, patience=3)[1] == 13


def test_what_was_not_measured_neither_breaks_a_limit_nor_ends_a_row():
    absent, broken = {"kl": None}, {"kl": 2.0}
    assert watched(*[absent] * 30, patience=2)[1] is None
    assert watched({}, broken, absent, absent, broken, patience=2)[1] == 5


@pytest.mark.parametrize(
    "setting, metric, value",
    [
        ("min_format", "reward/format", 0.0),
        ("min_entropy", "entropy", 0.0),
        ("max_entropy", "entropy", 9.0),
        ("max_truncated", "truncated", 1.0),
        ("max_kl", "kl", 90.0),
        ("max_logp_gap", "logp_gap/mean", 9.0),
        ("min_length", "completion_length/mean", 1.0),
        ("max_length", "completion_length/mean", 900.0),
    ],
)
def test_a_limit_of_0_is_not_looked_at(setting, metric, value):
    steps = [{}] * 3 + [{metric: value}] * 20
    assert watched(*steps, patience=3)[1] == 6
    assert watched(*steps, patience=3, **{setting: 0.0})[1] is None


def test_lengths_are_compared_with_the_mean_of_the_first_steps():
    long = {"completion_length/mean": 60.0}
    steps = [{"completion_length/mean": n} for n in (10.0, 20.0, 30.0)]  # their mean is 20
    assert watched(*steps, {}, *[long] * 3, patience=3, max_length=3.0)[1] is None
    assert watched(*steps, {}, *[long] * 3, patience=3, max_length=2.9)[1] == 7


@pytest.mark.parametrize("value", [NAN, float("inf"), None])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_is_a_collapse_at_once(name, value):
    """None is what metrics.jsonl has in its place."""
    guard, at = watched({}, {name: value}, patience=10)
    assert at == 2 and guard.collapse == f"{name} was not finite in step 2"


def test_numbers_of_numpy_are_seen():
    guard, at = watched({}, {"kl": np.float32(2.0)}, {"kl": np.array(2.0)}, patience=2)
    assert at == 3 and "above 1 in steps 2 to 3 (last 2)" in guard.collapse


def test_a_patience_of_one_names_one_step():
    guard, _ = watched({}, {"kl": 2.0}, patience=1)
    assert guard.collapse == "kl was above 1 in step 2 (2)"


def test_a_collapse_is_of_the_last_step():
    guard, at = watched({}, {"kl": 2.0}, {"kl": 2.0}, {}, patience=2)
    assert at == 3 and guard.collapse == ""


# --- which checkpoints are good ------------------------------------------------------------------


def test_a_checkpoint_is_good_if_its_step_and_the_next_keep_all_limits():
    """The next step's figures are the first of its weights."""
    guard, _ = watched({}, {}, {}, {}, {"kl": 2.0}, {"kl": 2.0}, {}, {})
    good = {step for step in range(1, 9) if guard.best([step])}
    assert good == {1, 2, 3, 7}


def test_the_newest_good_one_is_gone_back_to_of_those_that_are_there():
    guard, _ = watched(*[{}] * 9, every=3)
    assert guard.best([3, 6, 9]) == 6  # how the last one's weights do is not seen yet
    assert guard.best([3]) == 3
    assert guard.best([]) == guard.best([9]) == 0


def test_one_between_the_multiples_is_gone_back_to_only_where_none_of_them_is_left():
    """It was written when a session ended: a run that was not stopped has none."""
    guard, _ = watched(*[{}] * 9, every=3)
    assert guard.best([3, 5]) == 3
    assert guard.best([4, 5]) == 5


def test_at_the_multiples_a_checkpoint_is_needed():
    guard, _ = watched(every=5)
    assert [step for step in range(1, 12) if guard.needs_checkpoint(step)] == [5, 10]


# --- the default run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [GuardConfig(), GuardConfig(patience=2, min_correctness=0.0)], ids=["10", "2"]
)
def test_a_guard_is_silent_on_the_default_run(config):
    file = Path(__file__).parents[1] / "records" / "default_run.json"
    series = json.loads(file.read_text())["grpo"]
    guard = Guard(config, 50)
    for step, values in enumerate(zip(*series.values(), strict=True), start=1):
        guard.see(step, dict(zip(series, values, strict=True)))
        assert not guard.collapse
    assert guard.best([50, 100, 150, 200]) == 150


def test_a_resumed_run_s_guard_knows_what_the_run_s_own_knew(tmp_path):
    steps = [{}, {}, {"kl": 2.0}, {}, {"kl": 2.0}, {"loss": 0.5, "kl": 2.0}]
    own, _ = watched(*steps, patience=3)
    lines = [{"stage": "sft", "step": 1, "loss": NAN}]
    lines += [{"stage": "grpo", "step": n} | HEALTHY | each for n, each in enumerate(steps, 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines).replace("NaN", "null")
    torn = '{"stage": "grpo", "step": 7, "lo'
    (tmp_path / "metrics.jsonl").write_text(text + torn)
    resumed = guard_of(GuardConfig(patience=3), 2, tmp_path, "grpo")
    for guard in (own, resumed):
        assert guard.collapse == "" and guard.best(range(7)) == 1
        guard.see(7, HEALTHY | {"kl": 2.0})
        assert "steps 5 to 7" in guard.collapse
    assert guard_of(GuardConfig(), 2, tmp_path / "absent", "grpo").best([2]) == 0


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"rollbacks": 0}, "rollbacks=0 must be at least 1"),
        ({"min_format": 1.5}, "min_format=1.5"),
        ({"min_format": NAN}, "min_format=nan"),
        ({"min_correctness": 2.0}, "min_correctness=2.0"),
        ({"max_truncated": -0.1}, "max_truncated=-0.1"),
        ({"min_length": 2.0}, "min_length=2.0"),
        ({"max_length": 0.5}, "max_length=0.5"),
        ({"min_entropy": -1.0}, "min_entropy=-1.0"),
        ({"max_entropy": 0.001}, "max_entropy=0.001"),
        ({"max_kl": float("inf")}, "max_kl=inf"),
        ({"max_logp_gap": -1.0}, "max_logp_gap=-1.0"),
    ],
)
def test_settings_without_sense_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=f"^grpo.guard: {named}") as caught:
        GuardConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_guard_without_checkpoints_by_steps_is_refused(action):
    GRPOConfig(checkpoint_every=0)
    with pytest.raises(UserError, match="set grpo.checkpoint-every above 0"):
        GRPOConfig(checkpoint_every=0, guard=GuardConfig(action=action))
