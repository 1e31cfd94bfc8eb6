"""What a stage shows while it trains: on a terminal, in a notebook, in a log, and quietly."""

import io
import re
import sys

import pytest

from gemma_grpo.records import progress
from gemma_grpo.records.progress import Progress

STEP = {"loss": 0.0, "reward/mean": 0.41234, "reward/correctness": 0.5, "tokens_per_s": 21034.4}
ROW = {
    "prompt": "What is 3 + 4?",
    "answer": "7",
    "completion": "<answer>\n7\n</answer>",
    "reward": 1,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_bar_shows_metrics_by_name_and_the_time_left(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    shown = Progress(4, "grpo", done=1)
    shown.update(STEP)
    shown.update(STEP | {"evaluation/accuracy": 0.625})
    shown.update(STEP)
    shown.close()
    last = screen.getvalue().split("\r")[-1]
    assert "grpo" in last and "4/4" in last and "loss" not in last
    assert "reward 0.412, right 50%, held out 62.5%, 21,034 tokens/s, 0:00 left" in last


def test_in_a_notebook_with_widgets_there_is_a_bar_and_lines_go_above_it(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_has_widgets", lambda: True)
    shown = Progress(20, "sft")
    for _ in range(2):
        shown.update({"loss": 1.5}, [ROW])
    shown.say("warning: look here")
    shown.close()
    said = capsys.readouterr().err.replace("\r", "\n")
    assert "2/20" in said and "loss 1.500" in said and "\nwarning: look here\n" in said
    assert said.count("What is 3 + 4?") == 1  # at a tenth of the way


def test_widgets_want_a_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert not progress._has_widgets()


def test_without_a_terminal_a_line_and_a_sample_are_printed_every_tenth_of_the_way(
    monkeypatch, capsys
):
    clock = iter(range(0, 1000, 2))  # each look at the clock finds it 2 s later
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    shown = Progress(200, "grpo")
    for step in range(1, 201):
        shown.update({"reward/mean": step / 1000, "tokens_per_s": 20000 + step}, [ROW])
    shown.close()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 30 and captured.out == ""
    # 19 steps of 2 s since the first: 180 steps are left.
    assert lines[0] == "grpo 20/200 (10 %), reward 0.020, 20,020 tokens/s, 6:00 left"
    assert lines[1:3] == [
        "  What is 3 + 4?  answer 7",
        "  > <answer>|7|</answer>  reward 1.000",
    ]
    assert lines[-3].startswith("grpo 200/200 (100 %), reward 0.200, 20,200 tokens/s, 0:00 left")


def test_ten_lines_are_printed_also_of_steps_that_ten_does_not_divide(capsys):
    shown = Progress(25, "sft")
    for _ in range(25):
        shown.update({})
    lines = capsys.readouterr().err.splitlines()
    steps = [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]  # the first at or behind each tenth
    assert [line.split(" (")[0] for line in lines] == [f"sft {step}/25" for step in steps]


def test_the_time_left_is_reckoned_without_the_first_step_which_compiles(monkeypatch, capsys):
    # Of 20 steps the first, which took an hour, ends at 3600 s; the next take 60 s each.
    clock = iter([3600, 3660, 3720])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    shown = Progress(20, "sft", done=15)
    for _ in range(3):
        shown.update({})
    assert capsys.readouterr().err.splitlines() == [
        "sft 16/20 (80 %)",
        "sft 18/20 (90 %), 2:00 left",
    ]


def test_hours_are_shown_as_hours(monkeypatch, capsys):
    clock = iter([0, 2000])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    shown = Progress(10, "grpo")
    for _ in range(2):
        shown.update({})
    assert capsys.readouterr().err.endswith("grpo 2/10 (20 %), 4:26:40 left\n")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_quiet_shows_nothing_but_what_is_said(is_terminal, monkeypatch):
    screen = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    shown = Progress(2, "grpo", quiet=True)
    shown.update(STEP, [ROW])
    shown.say("warning: look here")
    shown.update(STEP, [ROW])
    shown.close()
    assert screen.getvalue() == "warning: look here\n"


def test_a_sample_is_two_short_lines_that_a_terminal_only_shows():
    hostile = {"prompt": "x\ny\x1b[2J", "completion": "a\x1b]0;owned\x07" + "b \n" * 10_000}
    lines = progress.sample_text(hostile).split("\n")
    assert len(lines) == 2 and max(map(len, lines)) < 300
    assert not re.search(r"[\x00-\x1f]", "".join(lines))
