"""A run as text: what changed, and one problem through the stages."""

import pytest
from run_folders import FALSE, PROSE, RIGHT, held_out, write_rows, write_run

from gemma_grpo import view
from gemma_grpo.records import trace
from gemma_grpo.view import terminal


def test_the_overview_names_the_problems_gained_and_lost_and_shows_one_gained(tmp_path, capsys):
    assert view.main([str(write_run(tmp_path / "run")), "--text"]) == 0
    said = capsys.readouterr().out
    assert "grpo     66.7 %" in said
    assert "base to sft, lost 1: 0" in said and "sft to grpo, gained 2: 1 2" in said
    assert "sft to grpo, lost 0\n" in said
    assert "problem 1" in said and "  | 3 + 4 = 8" in said and "grpo: right, trace 0.50" in said


def test_two_runs_are_compared_at_their_last_stages_over_the_problems_of_both(tmp_path, capsys):
    # One greedy answer each: of problems 0, 1, 2 the first run has 1 and 2 right (write_run). Of
    # 0, 1, 2, 3 the second has 0, 1, 3: on the three of both one is gained, one lost, one right in
    # both. McNemar's exact p of 1 and 1 is 1. The interval is Newcombe's (statistics' tests).
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", problems=4)
    rows = held_out([RIGHT, RIGHT, FALSE, RIGHT], [PROSE])
    write_rows(other / "evaluations" / "grpo.jsonl", rows)
    assert view.main([str(one), str(other), "--text"]) == 0
    *_, place, pair = capsys.readouterr().out.splitlines()
    assert place == f"{other} (grpo) against {one} (grpo), the 3 problems that both answered:"
    assert pair.startswith("  accuracy 66.7 % against 66.7 %: +0.0 points (95 % interval -")
    assert pair.endswith("; 1 problems gained, 1 lost of 3; exact McNemar p = 1")


def test_the_comparison_says_which_run_is_better(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    write_rows(other / "evaluations" / "grpo.jsonl", held_out([RIGHT, RIGHT, RIGHT]))
    assert "accuracy 100.0 % against 66.7 %: +33.3 points" in terminal.comparison(one, other)
    assert "accuracy 66.7 % against 100.0 %: -33.3 points" in terminal.comparison(other, one)


def test_runs_without_a_common_problem_are_not_compared(tmp_path, capsys):
    one, other = write_run(tmp_path / "one"), tmp_path / "other"
    rows = [row | {"prompt": "What is 3 + 4?"} for row in held_out([RIGHT])]
    write_rows(other / "evaluations" / "grpo.jsonl", rows)
    assert view.main([str(one), str(other), "--text"]) == 0
    said = f"{other} against {one}: no held-out problem that both answered\n"
    assert capsys.readouterr().out.endswith(said)


def test_a_problem_is_shown_through_all_stages(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert view.main([str(run), "--text", "--problem", "0"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith(("base", "sft", "grpo"))] == [
        "base: right, trace 0.50, confidence 0.25, format 1.00",
        "sft: wrong, trace 0.00, confidence 0.25, format 1.00",
        "grpo: wrong, trace 0.00, confidence 0.25, format 1.00",
    ]


@pytest.mark.parametrize("value", [None, "x", [], {"a": 1}, 10**400, "NaN"])
def test_a_row_whose_verdict_is_damaged_is_not_right(tmp_path, capsys, value):
    run = write_run(tmp_path / "run")
    rows = held_out([RIGHT, RIGHT, RIGHT])
    rows[1] |= {"correctness": value, "trace": value}
    write_rows(run / "evaluations" / "grpo.jsonl", rows)
    assert view.main([str(run), "--text"]) == 0
    assert "base to sft, lost 1: 0" in (said := capsys.readouterr().out)
    assert "sft to grpo, gained 2: 0 2" in said
    assert view.main([str(run), "--text", "--problem", "1"]) == 0
    assert "grpo: wrong, confidence" in capsys.readouterr().out


def test_a_run_without_evaluations_says_so(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert view.main([str(tmp_path), "--text"]) == 0
    assert "no evaluation has finished yet" in capsys.readouterr().out


def test_the_trace_is_cut_to_a_screen_and_obeys_no_control_character(tmp_path):
    long = "\x1b[2J\u202e" + "word " * 20_000
    rows = held_out([RIGHT.replace("3 + 4", long)])
    write_rows(tmp_path / "evaluations" / "base.jsonl", held_out([PROSE]))
    write_rows(tmp_path / "evaluations" / "grpo.jsonl", rows)
    shown = trace.gained(tmp_path)
    assert len(shown.splitlines()) < 30 and max(map(len, shown.splitlines())) <= trace.WIDTH
    assert "characters in all" in shown
    assert "\x1b" not in shown and "\u202e" not in shown


@pytest.mark.parametrize("last", [[FALSE], [PROSE]])
def test_where_nothing_was_gained_there_is_no_trace(last, tmp_path):
    write_rows(tmp_path / "evaluations" / "base.jsonl", held_out([RIGHT]))
    write_rows(tmp_path / "evaluations" / "grpo.jsonl", held_out(last))
    assert trace.gained(tmp_path) is None


def test_a_terminal_without_unicode_gets_what_it_can_show(tmp_path, capsysbinary, monkeypatch):
    import io
    import sys

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    trace.show("½ is 0.5")
    sys.stdout.flush()
    assert raw.getvalue() == b"? is 0.5\n"
