"""JSONL files and the division into held-out and training problems."""

import hashlib
import json
import math
from dataclasses import replace

import pytest

from gemma_grpo.data import jsonl, splits
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError

GOOD = b'{"prompt": "What is 2 + 3?", "answer": "5"}'


def read(tmp_path, *lines: bytes, end: bytes = b"\n") -> list[Problem]:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(end.join(lines) + end)
    return [jsonl.problem_from_row(row, where) for where, row in jsonl.read_rows(file)]


def refusal(tmp_path, *lines: bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, *lines)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/")


def test_every_field_is_read_and_unknown_fields_are_ignored(tmp_path):
    line = (
        b'{"prompt": " Half of 8? ", "answer": " 4\\n", "completion": "<answer>4</answer>",'
        b' "difficulty": "hard", "domain": "halves", "author": {"name": null}, "loss": NaN}'
    )
    assert read(tmp_path, line) == [
        Problem("Half of 8?", "4", "<answer>4</answer>", difficulty="hard", domain="halves")
    ]


def test_optional_fields_may_be_absent_or_null(tmp_path):
    nulls = (
        b'{"prompt": "b", "answer": "1", "completion": null, "difficulty": null, "domain": null}'
    )
    assert read(tmp_path, GOOD, nulls) == [
        Problem("What is 2 + 3?", "5", None, "medium", "general"),
        Problem("b", "1", None, "medium", "general"),
    ]


@pytest.mark.parametrize(
    ("written", "answer"),
    [(b"72", "72"), (b"-3", "-3"), (b"0.10", "0.10"), (b"12345678901234567890.5", None)],
)
def test_a_number_as_answer_keeps_its_digits(tmp_path, written, answer):
    problems = read(tmp_path, b'{"prompt": "a", "answer": ' + written + b"}")
    assert problems[0].answer == (answer or written.decode())


def test_an_answer_of_a_million_characters_or_of_none_that_can_be_seen_is_refused(tmp_path):
    long = b'{"prompt": "a", "answer": "' + b"9" * 10**6 + b'"}'
    message = refusal(tmp_path, GOOD, long)
    assert message.startswith('mine.jsonl:2: field "answer" has 1,000,000 characters')
    unseen = '{"prompt": "a", "answer": "\u200b\ufeff"}'.encode()
    assert refusal(tmp_path, unseen) == 'mine.jsonl:1: field "answer" is blank'


def test_blank_lines_a_byte_order_mark_and_carriage_returns_are_skipped(tmp_path):
    lines = (b"\xef\xbb\xbf" + GOOD, b"", b"  \t", b'{"prompt": "b", "answer": "x"}')
    problems = read(tmp_path, *lines, end=b"\r\n")
    assert [problem.answer for problem in problems] == ["5", "x"]
    assert read(tmp_path, b'{"prompt": "b",\r"answer": "1"}')[0].answer == "1"


def test_blank_lines_still_count_towards_the_line_number(tmp_path):
    assert refusal(tmp_path, b"", GOOD, b"", b"{}").startswith("mine.jsonl:4: ")


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    prompt = "one\u2028two\x85three"
    line = json.dumps({"prompt": prompt, "answer": "1"}, ensure_ascii=False).encode()
    assert read(tmp_path, line)[0].prompt == prompt


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "answer": }', "mine.jsonl:2: not JSON (Expecting value at column 27)"),
        (b'["a", "b"]', "mine.jsonl:2: must be an object with prompt and answer, not a list"),
        (b"7", "mine.jsonl:2: must be an object with prompt and answer, not a number"),
        (b"null", "mine.jsonl:2: must be an object with prompt and answer, not null"),
        (
            b'{"query": "a", "answer": "1"}',
            'mine.jsonl:2: field "prompt" is missing (fields found: answer, query)',
        ),
        (b'{"prompt": "a"}', 'mine.jsonl:2: field "answer" is missing (fields found: prompt)'),
        (b'{"prompt": "a", "answer": null}', 'mine.jsonl:2: field "answer" is missing'),
        (b'{"prompt": " \\n", "answer": "1"}', 'mine.jsonl:2: field "prompt" is blank'),
        (b'{"prompt": "a", "answer": ""}', 'mine.jsonl:2: field "answer" is blank'),
        (b'{"prompt": 3, "answer": "1"}', 'field "prompt" must be text, not a number'),
        (b'{"prompt": ["a"], "answer": "1"}', 'field "prompt" must be text, not a list'),
        (b'{"prompt": "a", "answer": true}', 'field "answer" must be text, not true or false'),
        (b'{"prompt": "a", "answer": {"x": 1}}', 'field "answer" must be text, not an object'),
        (b'{"prompt": "a", "answer": NaN}', 'field "answer" is nan: give a finite number'),
        (b'{"prompt": "a", "answer": -Infinity}', 'field "answer" is -inf'),
        (
            b'{"prompt": "a", "answer": "1", "difficulty": "Easy"}',
            'mine.jsonl:2: field "difficulty" is "Easy": use one of easy, medium, hard',
        ),
        (b'{"prompt": "a", "answer": "1", "domain": 4}', 'field "domain" must be text'),
        (b'{"prompt": "a", "answer": "1", "completion": ""}', 'field "completion" is blank'),
        (b'{"prompt": "\\ud83d", "answer": "1"}', 'field "prompt" holds half a surrogate pair'),
        (b'{"prompt": "caf\xe9", "answer": "1"}', "not UTF-8 (byte 0xe9 at column 16)"),
        (b"[" * 100_000, "mine.jsonl:2: JSON that cannot be read"),
        (b'{"prompt": "a", "answer": 1' + b"0" * 5000 + b"}", "JSON that cannot be read"),
        (b'{"prompt": "a", "answer": 1e99999999999999999999}', "JSON that cannot be read"),
    ],
)
def test_a_malformed_line_is_named_by_file_line_and_field(tmp_path, line, message):
    found = refusal(tmp_path, GOOD, line, GOOD)
    assert found.startswith("mine.jsonl:2: ")
    assert message in found


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_problems_is_refused(tmp_path, content):
    assert refusal(tmp_path, content).startswith("no problems in ")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*gone\.jsonl"):
        jsonl.read_rows(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        jsonl.read_rows(tmp_path)
    (tmp_path / "plain").touch()
    with pytest.raises(UserError, match=r"cannot read .*: Not a directory"):
        jsonl.read_rows(tmp_path / "plain" / "mine.jsonl")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jsonl").write_bytes(GOOD)
    assert len(jsonl.read_rows("~/mine.jsonl")) == 1


# The division


def some_problems(count: int) -> list[Problem]:
    return [Problem(f"question {number}", "1") for number in range(count)]


def side(problems, held_out: bool, share: float = 0.1):
    return splits.one_side(problems, held_out=held_out, share=share, origin="these")


@pytest.mark.parametrize("count", [2, 3, 5, 400])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_two_sides_part_the_problems_in_order_and_neither_is_empty(count, share):
    problems = some_problems(count)
    train, test = side(problems, False, share), side(problems, True, share)
    assert train and test
    assert not set(train) & set(test)
    assert sorted(train + test, key=problems.index) == problems
    assert train == sorted(train, key=problems.index)
    assert test == sorted(test, key=problems.index)


def test_the_share_held_out_is_the_one_asked_for():
    # Binomial: 4000 draws at 0.1 are 400, sd 19; five of them either way.
    assert abs(len(side(some_problems(4000), True, 0.1)) - 400) < 5 * math.sqrt(4000 * 0.1 * 0.9)


def test_no_problem_changes_sides_when_others_come_or_the_order_changes():
    problems = some_problems(400)
    held_out = set(side(problems, True))
    assert set(side(problems[::-1], True)) == held_out
    assert set(side(some_problems(800), True)) & set(problems) == held_out


def test_the_division_is_the_same_in_every_release():
    # By hand: sha256("held out\nquestion 3") begins with these 12 hexadecimal digits.
    place = 0xB4B2C048C488 / 2**48
    assert splits.is_held_out("question 3", share=place + 1e-6)
    assert not splits.is_held_out("question 3", share=place - 1e-6)


def test_spacing_makes_no_other_prompt():
    first, second = Problem("a  b\nc", "1"), Problem("a b c", "2")
    assert splits.shared_prompts([first], [second, Problem("a bc", "3")]) == ["a b c"]
    others = some_problems(50)
    assert all(
        (first in side([first, second, *others], held_out))
        == (second in side([first, second, *others], held_out))
        for held_out in (True, False)
    )


def test_one_prompt_alone_cannot_be_divided():
    with pytest.raises(UserError, match="these: .* at least two different prompts"):
        side([Problem("same", "1"), Problem("same", "2")], True)


def test_a_pick_is_seeded_nested_and_keeps_the_order():
    problems = some_problems(200)
    small, large = splits.pick(problems, 20, 3), splits.pick(problems, 60, 3)
    assert len(small) == 20 and len(large) == 60
    assert set(small) < set(large)
    assert large == sorted(large, key=problems.index)
    assert set(splits.pick(problems[::-1], 20, 3)) == set(small)
    assert splits.pick(problems, 20, 4) != small
    by_hash = sorted(
        problems, key=lambda p: hashlib.sha256(b"pick 3\n" + p.prompt.encode()).digest()
    )
    assert set(small) == set(by_hash[:20])  # in every process, unlike Python's own hash
    assert splits.pick(problems, 0, 3) == splits.pick(problems, 500, 3) == problems


def test_a_pick_is_independent_of_the_division():
    # Of 400 held out, a pick of half must not be the half that lies lowest in the division.
    held_out = side(some_problems(4000), True)
    picked = splits.pick(held_out, len(held_out) // 2, 0)
    low = [p for p in picked if splits.is_held_out(p.prompt, share=0.05)]
    assert 0.3 < len(low) / len(picked) < 0.7


def test_a_mapping_of_splits_is_refused_by_their_names():
    with pytest.raises(UserError, match="not a mapping of several \\('train', 'test'\\): give one"):
        jsonl.problems_from({"train": [], "test": []})


def test_a_problem_from_python_is_read_as_a_row_of_a_file():
    given = [Problem(" 2 + 2? ", "4"), {"prompt": "2 + 2?", "answer": "4"}]
    assert jsonl.problems_from(given) == [Problem("2 + 2?", "4")] * 2
    numbered = Problem("1 + 1?", "?")
    object.__setattr__(numbered, "answer", 2)  # nothing checks the types of a user's process
    assert jsonl.problems_from([numbered]) == [Problem("1 + 1?", "2")]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": " "}, 'field "prompt" is blank'),
        ({"completion": ""}, 'field "completion" is blank'),
        ({"difficulty": "Hard"}, 'field "difficulty" is "Hard": use one of easy, medium, hard'),
    ],
)
def test_a_problem_from_python_that_no_run_can_use_is_one_line(fields, said):
    bad = replace(Problem("2 + 2?", "4"), **fields)
    with pytest.raises(UserError, match=f"^problem 2: {said}"):
        jsonl.problems_from([Problem("1 + 1?", "2"), bad])
