"""The picture shows what metrics.jsonl says, and says where it says nothing; the table lines up."""

import json
import math

import numpy as np
import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records import report

PANELS = ["GRPO loss", "Reward", "Accuracy", "Trace score", "Reward weights", "Curriculum phase"]


def grpo_lines(count):
    phases = ["easy", "medium", "hard"]
    return [
        {
            "stage": "grpo",
            "step": step,
            "loss": -0.5 * step,
            "reward/mean": 0.01 * step,
            "reward/correctness": 0.02 * step,
            "reward/trace": 0.03 * step,
            "weight/correctness": 0.40 + 0.001 * step,
            "weight/trace": 0.45 - 0.001 * step,
            "weight/confidence": 0.15,
            "weight/verbosity": -0.05,
            "phase": phases[3 * (step - 1) // count],
        }
        for step in range(1, count + 1)
    ]


def sft_lines(count):
    return [{"stage": "sft", "step": step, "loss": 3.0 / step} for step in range(1, count + 1)]


def panels(lines):
    return {axes.get_title(): axes for axes in report.curves_figure(lines).axes}


def drawn(axes):
    """Label -> (steps, values) of each line of a panel."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_each_panel_shows_its_own_metric_with_labels():
    shown = panels(grpo_lines(10))
    assert list(shown) == PANELS
    steps = list(range(1, 11))
    assert drawn(shown["GRPO loss"])["each step"] == (steps, [-0.5 * s for s in steps])
    assert drawn(shown["Reward"])["each step"] == (steps, [0.01 * s for s in steps])
    assert drawn(shown["Accuracy"])["each step"] == (steps, [0.02 * s for s in steps])
    assert drawn(shown["Trace score"])["each step"] == (steps, [0.03 * s for s in steps])
    for axes in shown.values():
        assert axes.get_xlabel() == "GRPO step" and axes.get_ylabel() and not texts(axes)


def test_the_weights_and_the_phase_are_drawn_by_name():
    shown = panels(grpo_lines(9))
    weights = drawn(shown["Reward weights"])
    assert {name: values[0] for name, (_, values) in weights.items()} == pytest.approx(
        {"correctness": 0.401, "trace": 0.449, "confidence": 0.15, "verbosity": -0.05}
    )
    phase = shown["Curriculum phase"]
    assert list(drawn(phase).values()) == [(list(range(1, 10)), [0, 0, 0, 1, 1, 1, 2, 2, 2])]
    assert [label.get_text() for label in phase.get_yticklabels()] == ["easy", "medium", "hard"]
    assert phase.lines[0].get_drawstyle() == "steps-post"  # a phase changes at once


def test_shares_of_difficulties_are_drawn_as_means_over_a_twentieth_of_the_steps():
    lines = grpo_lines(40)
    for number, line in enumerate(lines):
        line |= {"share/easy": number % 2, "share/medium": 0.25, "share/hard": None}
    shown = panels(lines)
    assert list(shown) == [*PANELS[:-1], "Problems by difficulty"]
    axes = shown["Problems by difficulty"]
    assert axes.get_ylabel() == "share, mean of the last 2 steps"
    curves = drawn(axes)
    assert curves["easy"] == (list(range(1, 41)), [0.0] + [0.5] * 39)
    assert curves["medium"][1] == [0.25] * 40 and curves["hard"] == ([], [])


def test_a_weight_has_the_color_of_its_own_panel():
    shown = panels(grpo_lines(9))
    weights = {line.get_label(): line.get_color() for line in shown["Reward weights"].lines}
    assert weights["correctness"] == shown["Accuracy"].lines[0].get_color()
    assert weights["trace"] == shown["Trace score"].lines[0].get_color()
    assert len(set(weights.values())) == 4


def test_many_points_are_smoothed_and_the_legend_says_so():
    shown = panels(grpo_lines(60))  # a twentieth of 60 steps is 3
    axes = shown["Reward"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["each step", "mean of the last 3 steps"]
    values = drawn(axes)["mean of the last 3 steps"][1]
    # Steps 1, 1-2, 1-3, 2-4 of 0.01 * step.
    assert values[:4] == pytest.approx([0.01, 0.015, 0.02, 0.03])
    assert values[-1] == pytest.approx(0.59)


def testrunning_mean_by_hand():
    values = np.array([4.0, 0.0, 2.0, 7.0])
    assert report.running_mean(values, 2).tolist() == [4.0, 2.0, 1.0, 4.5]
    assert report.running_mean(values, 1).tolist() == values.tolist()
    assert report.running_mean(values, 9).tolist() == [4.0, 2.0, 2.0, 3.25]


def test_the_sft_loss_has_a_panel_above_the_grpo_loss():
    shown = panels(sft_lines(4) + grpo_lines(5))
    assert list(shown) == ["SFT loss (nats a token)", *PANELS]
    sft, grpo = shown["SFT loss (nats a token)"], shown["GRPO loss"]
    assert drawn(sft)["each step"] == ([1, 2, 3, 4], [3.0, 1.5, 1.0, 0.75])
    assert sft.get_xlabel() == "SFT step"
    assert drawn(grpo)["each step"][0] == [1, 2, 3, 4, 5]
    assert sft.get_position().y0 > grpo.get_position().y1


@pytest.mark.parametrize("lines", [[], sft_lines(3)])
def test_without_grpo_every_grpo_panel_says_not_measured(lines):
    shown = panels(lines)
    assert [title for title, axes in shown.items() if texts(axes) == ["not measured"]] == PANELS


@pytest.mark.parametrize(
    "title, names",
    [
        ("GRPO loss", ["loss"]),
        ("Reward", ["reward/mean"]),
        ("Accuracy", ["reward/correctness"]),
        ("Trace score", ["reward/trace"]),
        ("Reward weights", [f"weight/{name}" for name in report.WEIGHTS]),
        ("Curriculum phase", ["phase"]),
    ],
)
def test_a_missing_metric_leaves_the_other_panels_alone(title, names):
    lines = [{k: v for k, v in line.items() if k not in names} for line in grpo_lines(5)]
    shown = panels(lines)
    assert [name for name, axes in shown.items() if texts(axes)] == [title]


def test_a_null_is_a_gap_and_not_a_zero():
    lines = grpo_lines(4)
    lines[1]["reward/mean"] = None
    assert drawn(panels(lines)["Reward"])["each step"] == ([1, 3, 4], [0.01, 0.03, 0.04])


def test_a_single_line_gives_visible_points():
    for axes in panels(grpo_lines(1)).values():
        assert axes.lines and all(line.get_marker() == "o" for line in axes.lines)


def test_a_phase_of_another_name_gets_a_line_of_its_own():
    phase = panels([{"stage": "grpo", "step": 1, "phase": "all"}])["Curriculum phase"]
    names = [label.get_text() for label in phase.get_yticklabels()]
    assert names == ["easy", "medium", "hard", "all"]
    assert list(drawn(phase).values()) == [([1], [3])]


def test_the_picture_is_written_whole_from_a_file_still_being_written(tmp_path):
    lines = "".join(json.dumps(line) + "\n" for line in sft_lines(3) + grpo_lines(3))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"stage": "grpo", "st')
    path = report.plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG") and len(path.read_bytes()) > 10_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist: is .* a run directory\?"):
        report.plot_curves(tmp_path)


def test_a_broken_line_is_named_by_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\nnot json\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is no metrics line; delete it"):
        report.plot_curves(tmp_path)


def test_an_unwritable_picture_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*curves.png: Is a directory"):
        report.plot_curves(tmp_path)
    assert not (tmp_path / "curves.png.tmp").exists()


SUMMARY = {
    "stages": {
        "base": {"accuracy": 0.0, "accuracy_ci95": [0.0, 0.0121], "format_rate": 0.0, "n": 314},
        "sft": {
            "accuracy": 0.5123,
            "accuracy_ci95": [0.457, 0.5675],
            "format_rate": 0.96,
            "trace_score": 0.71,
            "true_steps": 0.875,
            "reward": 0.58125,
            "n": 314,
        },
    }
}


def test_the_table_lines_up_and_marks_what_was_not_measured():
    assert report.before_after_table(SUMMARY).splitlines() == [
        "stage  accuracy     95 % interval  format  trace  true steps  reward    n",
        "-----  --------  ----------------  ------  -----  ----------  ------  ---",
        "base      0.0 %    0.0 % to 1.2 %   0.0 %      -           -       -  314",
        "sft      51.2 %  45.7 % to 56.8 %  96.0 %  0.710      87.5 %   0.581  314",
    ]


def test_the_table_shows_paired_differences_with_their_direction():
    pair = {
        "difference": 0.132,
        "ci95": [0.0951, -0.004],
        "p_value": 3.21e-7,
        "gained": 50,
        "lost": 9,
        "n": 314,
    }
    lines = report.before_after_table(SUMMARY | {"paired": {"sft -> grpo": pair}}).splitlines()
    assert lines[4:] == [
        "",
        "accuracy, same problems before and after:",
        "  sft -> grpo: +13.2 points (95 % interval +9.5 to -0.4); 50 problems gained, 9 lost of "
        "314; exact McNemar p = 3.2e-07",
    ]


@pytest.mark.parametrize("damaged", [None, True, [], [1], {}, {"a": 1}, "x", math.nan, 10**400])
def test_what_is_no_number_shows_as_not_measured(damaged):
    names = ("accuracy", "accuracy_ci95", "format_rate", "trace_score", "true_steps", "reward", "n")
    stage, pair = dict.fromkeys(names, damaged), dict.fromkeys(("difference", "ci95"), damaged)
    table = report.before_after_table({"stages": {"base": stage}, "paired": {"a": pair}})
    assert table.splitlines()[2].split() == ["base", *"-" * 7]
    assert table.splitlines()[-1] == "  a: -"
    pairs = 3 * (damaged == {"a": 1})
    table = report.before_after_table({"stages": {}, "paired": damaged})
    assert len(table.splitlines()) == 2 + pairs


def test_rollbacks_are_lines_below_and_what_is_none_is_left_out():
    noted = {"why": "kl was 9", "at": 7, "to": 4, "rate_factor": 0.5}
    table = lambda rows: report.before_after_table({"stages": {}, "rollbacks": rows}).splitlines()
    last = "went back from step 7 to 4, with 0.5 times the learning rate: kl was 9"
    assert table([noted])[2:] == ["", last]
    for damaged in (True, 3, [1], {"a": 1}, None, [noted | {"at": "7"}]):
        assert len(table(damaged)) == 2


def test_a_summary_without_stages_yet_is_a_header():
    assert len(report.before_after_table({"stages": {}}).splitlines()) == 2


def test_snapshots_are_drawn_where_they_were_taken_beside_the_training_accuracy():
    lines = [
        {"stage": "grpo", "step": step, "reward/correctness": 0.5, "reward/trace": 0.1}
        for step in range(1, 7)
    ]
    lines[1] |= {"evaluation/accuracy": 0.25, "evaluation/trace_score": 0.5}
    lines[3] |= {"evaluation/accuracy": 0.75, "evaluation/trace_score": 0.25}
    axes = {axes.get_title(): axes for axes in report.curves_figure(lines).axes}
    for title, values in (("Accuracy", [0.25, 0.75]), ("Trace score", [0.5, 0.25])):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes[title].lines}
        expected = [[2, values[0]], [4, values[1]]]
        assert drawn["held-out problems, greedy"] == expected and len(drawn) == 2
    assert "held-out problems, greedy" not in [line.get_label() for line in axes["Reward"].lines]
