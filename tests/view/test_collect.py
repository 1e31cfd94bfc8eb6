"""What the page holds of a run's folder, whole, torn, old or hostile. No browser."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import run_folders
from run_folders import FALSE, HOSTILE, PROSE, RIGHT, held_out, write_rows, write_run

from gemma_grpo import view
from gemma_grpo.errors import UserError
from gemma_grpo.records import metric_notes, tokens
from gemma_grpo.view import collect, completions, page

TEMPLATES = Path(page.__file__).parent / "page"


def rows_of(data: dict) -> list[dict]:
    """The completions, one dict each."""
    columns = data["completions"]
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def at_stage(data: dict, name: str) -> list[dict]:
    return [row for row in rows_of(data) if data["stages"][row["stage"]] == name]


def in_page(text: str) -> dict:
    """The data of a written page, as a browser would find it."""
    body = text.split('<script type="application/json" id="data">')[1]
    return json.loads(body[: re.search("</script", body, re.IGNORECASE).start()])


def test_each_completion_of_a_run_is_on_the_page_once(tmp_path):
    data = collect.collect([write_run(tmp_path / "run")])
    assert data["stages"] == ["base", "sft", "grpo", "training"]
    assert len(rows_of(data)) == 3 * 3 * 3 + 2 * 5
    greedy = [row["text"] for row in at_stage(data, "grpo") if row["sample"] == -1]
    assert greedy == [FALSE, RIGHT, RIGHT]
    training = at_stage(data, "training")
    assert [(row["step"], row["group"], row["sample"]) for row in training] == [
        (step, group, sample)
        for step in (1, 2)
        for group, size in ((0, 3), (1, 2))
        for sample in range(size)
    ]
    assert [row["advantage"] for row in training[:3]] == [-1, 0, 1]
    (run,) = data["runs"]
    assert run["notes"] == [] and run["curves"]["grpo"]["reward/mean"] == [0.1, 0.2]


def test_false_arithmetic_is_marked_on_its_line():
    reasoning = "3 + 4 = 7\n3 + 4 = 8\nnothing to see\n3 + 4 = 7\nAnn buys apples."
    text = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n7\n</answer>"
    assert completions.line_kinds(text, run_folders.PROMPT) == "ef.is"


def test_one_question_with_two_answers_is_two_problems(tmp_path):
    run = write_run(tmp_path / "run", problems=1)
    path = run / "evaluations" / "grpo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [*rows, *[row | {"answer": "8", "problem": 1} for row in rows]])
    data = collect.collect([run])
    first, second, *_ = data["problems"]
    assert first["question"] == second["question"]
    assert (first["answer"], second["answer"]) == ("7", "8")


def test_what_is_right_for_a_lenient_reader_alone_is_flagged_as_that_alone():
    row = run_folders.row(PROSE) | {"correctness": 0.0, "stopped": False}
    strict = completions.flags(row)
    lenient = completions.flags(row | {"lenient_correctness": 1.0})
    right = completions.flags(row | {"correctness": 1.0})
    assert (strict, lenient, right) == (0, 1 << 5, 1 << 4)


def test_the_reward_of_an_evaluation_is_the_total_at_the_end_weights():
    row = {"correctness": 1.0, "trace": 0.5, "confidence": 0.8, "verbosity": 1.0, "format": 1.0}
    assert completions.reward(row) == pytest.approx(0.6 + 0.125 + 0.12 - 0.05 + 0.1)
    assert completions.reward(row | {"reward": 3.0}) == 3.0


def test_tokens_are_encoded_as_documented_and_within_what_an_eye_can_tell(tmp_path):
    write_run(tmp_path / "run", steps=1)
    row = at_stage(collect.collect([tmp_path / "run"]), "training")[1]
    lengths, levels, gaps = ([ord(c) - 64 for c in row[k]] for k in ("lengths", "logps", "gaps"))
    assert sum(lengths) == len(FALSE) and lengths[-1] == 0
    count = len(FALSE.split()) + 1
    first = len(PROSE.split()) + 1  # log-probs were numbered within each row
    assert first and len(levels) == count
    for k, level in enumerate(levels):
        assert (level / 24) ** 2 == pytest.approx(k, abs=0.05 * math.sqrt(k) + 0.001)
    for gap in gaps:
        assert gap % 2 == 0 and 10 ** (gap // 2 / 5 - 7) == pytest.approx(1e-3, rel=0.3)
    assert row["logp"] == pytest.approx(-(count - 1) / 2, abs=2e-3)


def test_a_token_of_many_characters_keeps_their_number_up_to_50_000():
    of = {"logps": np.zeros(3, np.float16), "characters": np.array([1, 300, 60_000], np.uint16)}
    assert completions.encode_tokens(of)[0] == "A" + chr(64 + 300) + chr(64 + 50_000)


def test_a_completion_longer_than_the_page_shows_is_flagged_as_it_is():
    text = f"<reasoning>\n{'a ' * 15_000}\n</reasoning>\n<answer>\n7\n</answer>"
    assert completions.flags({"completion": text}) & completions.WELL_FORMED
    assert len(completions.text_of({"completion": text}, "completion")) < len(text)


def test_the_page_of_a_collapsed_run_does_not_say_that_it_goes_on_the_same_way():
    none = {"kept": 0, "all": 0, "old": 0}
    of = lambda unfinished: collect._notes({"unfinished": unfinished}, 1.0, none, none)
    assert any("--resume goes on" in note for note in of({"stage": "grpo"}))
    assert any("another --grpo.guard" in note for note in of({"stage": "grpo", "collapse": "kl"}))


def test_two_runs_share_problems_and_keep_their_own_names(tmp_path):
    runs = [write_run(tmp_path / name / "run", problems=2 + k) for k, name in enumerate("ab")]
    data = collect.collect(runs)
    assert [run["name"] for run in data["runs"]] == ["run (1)", "run (2)"]
    assert len(data["problems"]) == 3
    first = [row["run"] for row in rows_of(data) if row["prompt"] == 0 and row["sample"] == -1]
    assert first == [0, 0, 0, 1, 1, 1]


def test_beyond_the_limit_problems_and_steps_are_left_out_evenly_and_the_page_says_so(tmp_path):
    run = write_run(tmp_path / "run", steps=40, problems=60)
    whole = page.html([run], 8)
    room = len(page.embedded(in_page(whole))) / page.MEGABYTE / 3
    data = in_page(page.html([run], room))
    assert len(page.embedded(data)) <= room * page.MEGABYTE
    steps = sorted({row["step"] for row in at_stage(data, "training")})
    assert steps[0] == 1 and steps[-1] == 40 and 6 <= len(steps) <= 20
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)][:-1]
    assert max(gaps) - min(gaps) <= 1
    problems = {row["prompt"] for row in at_stage(data, "base")}
    assert problems == {row["prompt"] for row in at_stage(data, "grpo")}
    (note,) = data["runs"][0]["notes"]
    assert f"{len(problems)} of 60 held-out problems" in note and "of 40 training steps" in note
    assert len(data["runs"][0]["curves"]["grpo"]["step"]) == 40


def test_the_last_training_step_is_on_the_page_whatever_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=6, problems=1)
    rows = rows_of(collect.collect([run], share=0.5))
    assert sorted({row["step"] for row in rows} - {0}) == [1, 3, 5, 6]


def test_a_run_without_grpo_steps_or_evaluations_has_a_page(tmp_path):
    run = write_run(tmp_path / "none", steps=0)
    assert "There are no training rollouts." in collect.collect([run])["runs"][0]["notes"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("seed: 0\n")
    assert rows_of(collect.collect([bare])) == []
    assert view.main([str(bare)]) == 0 and (bare / "view.html").stat().st_size > 0


def test_a_run_killed_in_mid_line_shows_all_whole_lines_and_counts_the_torn_one(tmp_path):
    run = write_run(tmp_path / "run", summary=False)
    path = run / "rollouts" / "grpo-000002.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "st')
    data = collect.collect([run])
    assert len(at_stage(data, "training")) == 9
    notes = " ".join(data["runs"][0]["notes"])
    assert "being written" in notes and "2 torn lines" in notes
    assert [bool(row["logps"]) for row in at_stage(data, "training")] == [True] * 5 + [False] * 4


def test_a_run_of_an_older_version_has_its_texts_and_no_token_log_probs(tmp_path):
    run = write_run(tmp_path / "run")
    for path in run.rglob("*.npz"):
        path.unlink()
    path = run / "rollouts" / "grpo-000001.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for row in old:
        del row["domain"], row["format"]
    write_rows(path, old, with_tokens=False)
    data = collect.collect([run])
    assert len(rows_of(data)) == 37
    assert {row["logps"] for row in rows_of(data)} == {""}
    assert at_stage(data, "training")[0]["components"][-1] is None
    assert "older version" in " ".join(data["runs"][0]["notes"])


def test_a_token_file_that_is_damaged_or_of_other_rows_is_as_none(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "rollouts" / "grpo-000001.npz"
    path.write_bytes(path.read_bytes()[:100])
    path = run / "rollouts" / "grpo-000002.jsonl"
    path.write_text(path.read_text().replace('"num_tokens": 5', '"num_tokens": 4', 1))
    assert not any(row["logps"] for row in at_stage(collect.collect([run]), "training"))


def test_no_flipped_bit_of_a_token_file_stops_the_page(tmp_path):
    path = write_run(tmp_path / "run") / "rollouts" / "grpo-000001.npz"
    whole, num_rows, found = path.read_bytes(), len(tokens.read(path)), []
    for place in range(0, 8 * len(whole), 13):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        found.append(tokens.read(path))
    assert None in found
    assert all(rows is None or len(rows) == num_rows for rows in found)


def test_what_is_not_as_the_page_takes_it_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    odd = {"n": {"ONMOUSEOVER": "alert(1)"}, "reward": "0.5", "accuracy_ci95": 0.5, "accuracy": 0.5}
    (run / "evaluations" / "base.json").write_text(json.dumps(odd))
    good = {"n": 3, "difference": 0.1, "gained": 1, "lost": 0, "p_value": 1.0, "ci95": [0.0, 0.2]}
    pairs = {"sft_vs_base": good | {"more": {}}, "grpo_vs_sft": good | {"p_value": None}, "a": [1]}
    summary = {"paired": pairs, "unfinished": True, "device": {"onclick": "x"}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "seconds.json").write_text('{"sft": "12", "grpo": 3.0}')
    (page_run,) = collect.collect([run])["runs"]
    assert page_run["stages"][0] == {"name": "base", "accuracy": 0.5}
    assert page_run["paired"] == {"sft_vs_base": good}
    assert page_run["seconds"] == {"grpo": 3.0} and page_run["device"] is None


def test_no_text_of_the_model_leaves_its_json_string(tmp_path):
    run = tmp_path / "run"
    write_rows(run / "evaluations" / "grpo.jsonl", held_out(HOSTILE))
    assert view.main([str(run)]) == 0
    text = (run / "view.html").read_text(encoding="utf-8")
    empty = page.html([write_run(tmp_path / "tame")], 8)
    for tag in ("<script", "</script", "<!--", "<img"):
        assert text.count(tag) == empty.count(tag)
    shown = [row["text"] for row in rows_of(in_page(text))]
    assert shown[:3] == HOSTILE[:3] and shown[4:7] == HOSTILE[4:7] and shown[8] == HOSTILE[8]
    assert shown[3] == "x" * completions.MAX_CHARACTERS
    assert rows_of(in_page(text))[3]["cut"] == 100_000 - completions.MAX_CHARACTERS


def test_the_page_asks_nothing_of_a_network_and_makes_no_element_from_text():
    text = "".join(path.read_text() for path in TEMPLATES.iterdir())
    addresses = set(re.findall(r"\w+://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not addresses and not re.search(r"@import|url\(|<link|\bsrc=", text)
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|DOMParser"
    assert not re.search(forbidden, text)


def test_every_script_of_the_folder_is_in_the_page():
    assert {path.stem for path in TEMPLATES.glob("*.js")} == set(page.SCRIPTS)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty is no run"),
        (["run", "--megabytes", "0"], "--megabytes"),
        (["run", "--problem", "1"], "--text"),
        (["run", "--text", "--problem", "77"], "problem 77 is not in this run: it has problems 0"),
        (["run", "--out", "run/config.yaml/view.html"], "name another file with --out"),
    ],
)
def test_what_cannot_be_shown_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_run(Path("run"))
    assert view.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_named_with_the_fix(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    run.chmod(0o555)
    assert view.main([str(run)]) == 2
    assert "--out" in capsys.readouterr().err
    run.chmod(0o755)


def test_a_disk_that_is_read_only_is_named_with_the_fix(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")

    def refuse(path, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert view.main([str(run)]) == 2
    said = capsys.readouterr().err
    assert "Read-only file system" in said and "--out" in said and said.count("\n") == 1


def test_a_run_that_is_read_only_is_still_read(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert view.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_reward_of_the_users_own_has_a_column(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    path = run / "rollouts" / "grpo-000001.jsonl"
    write_rows(path, run_folders.rollout([RIGHT], brevity=0.25))
    line = {
        "stage": "grpo",
        "step": 1,
        "reward/mean": 1.0,
        "reward/std": 0.0,
        "reward/brevity": 0.2,
    }
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    data = collect.collect([run])
    assert data["components"][-1] == "brevity" and len(data["components"]) == 6
    assert at_stage(data, "training")[0]["components"][-1] == 0.25
    assert at_stage(data, "base")[0]["components"][-1] is None


def test_the_command_needs_neither_jax_nor_a_display(tmp_path):
    run = write_run(tmp_path / "run")
    script = (
        "import sys; from gemma_grpo import view; "
        f"assert view.main([{str(run)!r}]) == 0; "
        "print([m for m in ('jax', 'matplotlib', 'sentencepiece') if m in sys.modules])"
    )
    environment = {name: v for name, v in os.environ.items() if name != "DISPLAY"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_is_no_number_is_left_out_of_the_page(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    odd = run_folders.rollout([RIGHT], reward=math.nan, advantage=math.inf, trace="much")
    odd[0] |= {"group": None, "verbosity": 10**400}
    write_rows(run / "rollouts" / "grpo-000001.jsonl", odd)
    (run / "evaluations" / "grpo.json").write_text('{"accuracy": NaN, "reward": Infinity}')
    (run / "metrics.jsonl").write_text(
        '{"stage": "grpo", "step": 1, "loss": NaN, "kl": 1%s}\n[1]\n' % ("0" * 400)
    )
    evaluated = run / "evaluations" / "grpo.jsonl"
    rows = [json.loads(line) for line in evaluated.read_text().splitlines()]
    write_rows(evaluated, [rows[0] | {"problem": 10**400}, *rows[1:]])
    (run / "summary.json").write_text('{"weights": NaN, "device": 1e999}')
    data = in_page(page.html([run], 8))
    (row,) = at_stage(data, "training")
    assert data["runs"][0]["weights"] is data["runs"][0]["device"] is None
    assert (row["reward"], row["advantage"], row["components"][1], row["group"]) == (0, 0, 0, 0)
    curves = data["runs"][0]["curves"]["grpo"]
    assert curves["loss"] == curves["kl"] == [None]
    assert data["runs"][0]["stages"][-1] == {"name": "grpo", "accuracy": None, "reward": None}


def test_a_page_replaces_a_page_and_no_other_file(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "x.html"
    assert [view.main([str(run), f"--out={out}"]) for _ in range(2)] == [0, 0]
    out.write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    capsys.readouterr()
    for path, words in ((out, "no page of a run"), (tmp_path / "loop", "a link to itself")):
        assert view.main([str(run), f"--out={path}"]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert out.read_text() == "mine" and (tmp_path / "loop").is_symlink()


def test_no_run_is_an_error_of_the_reader_too(tmp_path):
    with pytest.raises(UserError, match="no run"):
        collect.collect([tmp_path])


def with_snapshots(folder: Path) -> Path:
    """A run of three problems with two snapshots of two of them."""
    run = write_run(folder)
    for step, texts in ((50, [RIGHT, FALSE]), (100, [RIGHT, RIGHT])):
        path = run / "evaluations" / f"grpo-step-{step:06d}.jsonl"
        write_rows(path, held_out(texts))
        path.with_suffix(".json").write_text('{"accuracy": 0.5, "n": 2}')
    return run


def test_snapshots_stand_between_sft_and_grpo(tmp_path):
    run = with_snapshots(tmp_path / "run")
    data = collect.collect([run])
    names = [stage["name"] for stage in data["runs"][0]["stages"]]
    assert names == ["base", "sft", "grpo-step-000050", "grpo-step-000100", "grpo"]
    of_problem = [row["stage"] for row in rows_of(data) if row["prompt"] == 1]
    assert [data["stages"][n] for n in of_problem if n < 5].count("grpo-step-000050") == 1


def test_text_shows_snapshots_of_a_problem_and_leaves_them_out_of_the_table(tmp_path, capsys):
    run = with_snapshots(tmp_path / "run")
    assert view.main([str(run), "--text", "--problem", "1"]) == 0
    stages = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": " in line]
    assert stages[1:] == ["base", "sft", "grpo-step-000050", "grpo-step-000100", "grpo"]
    assert view.main([str(run), "--text"]) == 0
    assert "-step-" not in capsys.readouterr().out


def test_each_metric_of_the_page_has_the_note_of_the_code_s_table(tmp_path):
    data = in_page(page.html([write_run(tmp_path / "run")], 8))
    loss = metric_notes.NOTES["loss"]
    assert data["metrics"]["loss"] == [loss.meaning, loss.healthy, loss.fix]
    curves = [curves for run in data["runs"] for curves in run["curves"].values()]
    assert data["metrics"].keys() == {n for each in curves for n in each} - {"step"}
    drawn = re.findall(
        r'^  \["(?:sft|grpo)", "([^"]+)"', (TEMPLATES / "overview.js").read_text(), re.M
    )
    assert len(drawn) > 8 and all(metric_notes.note(name) for name in drawn)


def test_a_notebook_shows_the_page_in_a_frame_that_holds_exactly_it(tmp_path):
    run = tmp_path / "run"
    write_rows(run / "evaluations" / "grpo.jsonl", held_out([*HOSTILE[:3], "it's & \"&#39;\" '>"]))
    whole = page.html([run], 8)

    class Frame(HTMLParser):
        tags: list = []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))

    frame = Frame()
    frame.feed(page.Inline(whole, height=500)._repr_html_())
    ((tag, attributes),) = frame.tags
    assert tag == "iframe" and attributes["srcdoc"] == whole
    assert attributes["sandbox"] == "allow-scripts" and "height:500px" in attributes["style"]
