"""CSV files: fields, faults named by file and row, and problems from them."""

import csv
import os

import pytest

from gemma_grpo.data import gsm8k, sources, tables
from gemma_grpo.errors import UserError

HEADER = b"question,answer\r\n"
WORKED = 'She says "five": 2+3 = <<2+3=5>>5, so\nit is 5.\n#### 5'


def read(tmp_path, content: bytes) -> list[dict[str, str]]:
    (tmp_path / "mine.csv").write_bytes(content)
    return [row for _, row in tables.read_rows(tmp_path / "mine.csv")]


def refusal(tmp_path, content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def write_csv(file, rows: list[dict[str, str]]):
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return file


def prompts(source: str, split: str) -> set[str]:
    return {problem.prompt for problem in sources.load(source, split=split, num=0, seed=0)}


def test_quotes_commas_and_line_breaks_in_fields_are_read_as_they_were_written(tmp_path):
    content = HEADER + b'"a, ""b""\nand c?",0.10\r\n d ,\xe2\x98\x83\r\n'
    assert read(tmp_path, content) == [
        {"question": 'a, "b"\nand c?', "answer": "0.10"},
        {"question": " d ", "answer": "☃"},
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_blank_lines_and_spaces_around_column_names_are_skipped(tmp_path, end):
    content = b"\xef\xbb\xbf" + end.join([b"question, answer", b"", b"q,1", b"", b"r,2", b""])
    found = [{"question": "q", "answer": "1"}, {"question": "r", "answer": "2"}]
    assert read(tmp_path, content) == found


def test_an_empty_field_is_absent(tmp_path):
    assert read(tmp_path, b"prompt,answer,domain\nq,1,\n") == [{"prompt": "q", "answer": "1"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no problems in mine.csv: the file is empty"),
        (b"\xef\xbb\xbf\n\n", "no problems in mine.csv: the file is empty"),
        (HEADER, "no problems in mine.csv: no rows after the names of the columns"),
        (b"answer,answer\n1,2\n", "mine.csv: its first row names a column twice"),
        (HEADER + b"q,1\nr,2,3\n", "mine.csv, row 2: 3 fields, but 2 columns (question, answer)"),
        (HEADER + b"q,1\n\nr\n", "mine.csv, row 2: 1 fields, but 2 columns"),
        (HEADER + b'q,1\n"a\nb"c,2\n', "mine.csv, row 2, line 4: not CSV"),
        (HEADER + b'q,1\n"never closed,2\n', "mine.csv, row 2, line 3: not CSV (unexpected end"),
        (HEADER + b"q,1\nr,\xff\n", "mine.csv, line 3: not UTF-8"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_row(tmp_path, content, message):
    assert refusal(tmp_path, content).startswith(message)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"no such file: gone\.csv"):
        tables.read_rows("gone.csv")


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_a_csv_of_prompts_or_questions_is_a_source(tmp_path, name):
    rows = [{name: f"q, {n}", "answer": f"{n}.50"} for n in range(40)]
    file = str(write_csv(tmp_path / "mine.csv", rows))
    problems = [p for s in ("train", "test") for p in sources.load(file, split=s, num=0, seed=0)]
    assert {(p.prompt, p.answer) for p in problems} == {(r[name], r["answer"]) for r in rows}


def test_two_csv_files_are_a_pair(tmp_path):
    one = write_csv(tmp_path / "a.csv", [{"prompt": "x", "answer": "1"}])
    two = write_csv(tmp_path / "b.csv", [{"prompt": "y", "answer": "2"}])
    assert prompts(f"{one},{two}", "train") == {"x"} and prompts(f"{one},{two}", "test") == {"y"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("question,solution", r'mine\.csv, row 1: field "answer" is missing \(.*solution\)'),
        ("question;answer,x", r'mine\.csv, row 1: field "answer" is missing \(.*question;answer'),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, columns, message):
    (tmp_path / "mine.csv").write_text(f"{columns}\nq,1\n")
    with pytest.raises(UserError, match=message):
        prompts(str(tmp_path / "mine.csv"), "train")


def test_a_file_of_gsm8k_without_its_name_is_refused_with_the_source_that_reads_it(tmp_path):
    file = write_csv(tmp_path / "main_train.csv", [{"question": "q", "answer": WORKED}] * 2)
    with pytest.raises(UserError, match=r"main_train\.csv, row 1: .*give gsm8k:FILE"):
        prompts(str(file), "train")


def test_gsm8k_is_read_as_kaggle_keeps_it(tmp_path):
    for split, count in (("train", 30), ("test", 4)):
        for config in ("main", "socratic"):
            rows = [{"question": f"{config} {n}?", "answer": WORKED} for n in range(count)]
            write_csv(tmp_path / f"{config}_{split}.csv", rows)
    source = f"gsm8k:{tmp_path}"
    assert prompts(source, "test") == {f"main {n}?" for n in range(4)}
    trained = prompts(source, "train") | prompts(f"gsm8k-validation:{tmp_path}", "test")
    assert trained == {f"main {n}?" for n in range(30)}
    problem = gsm8k.gsm8k_problems(tmp_path / "main_test.csv", "test")[0]
    assert problem.answer == "5" and problem.completion.startswith(
        '<reasoning>\nShe says "five": 2+3 = 5, so\nit is 5.\n</reasoning>'
    )


def test_a_faulty_row_of_gsm8k_is_named_by_file_and_row(tmp_path):
    rows = [{"question": "q", "answer": "#### 1"}, {"question": "r", "answer": "two"}]
    write_csv(tmp_path / "main_test.csv", rows)
    with pytest.raises(UserError, match=r"main_test\.csv, row 2: field .answer. must end in"):
        prompts(f"gsm8k:{tmp_path}", "test")


def test_a_parquet_text_that_is_not_utf_8_is_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"Gr\xf6\xdfe"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, text.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="cannot read .*a.parquet as parquet"):
        tables.read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_a_fifo_is_refused_and_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match="is no file"):
        tables.read_rows(tmp_path / f"a{suffix}")
