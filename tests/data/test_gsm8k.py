"""GSM8K from tiny files in our own words; from a real copy where GSM8K_DIR names one."""

import json
import os
import sys
import types

import pytest

from gemma_grpo.data import gsm8k
from gemma_grpo.errors import UserError

ANSWER = (
    "The shed holds 3*4 = <<3*4=12>>12 crates of 100.\r\n\n"
    "  So there are 12*100 = <<12*100=1200>>1,200 pears, and 900 < 1,200.  \n#### 1,200"
)
ROW = {"question": "A shed has 3 rows of 4 crates. How many pears?", "answer": ANSWER}


def rows(count: int, word: str = "row") -> list[dict[str, str]]:
    return [
        {"question": f"{word} {number}?", "answer": f"#### {number}"} for number in range(count)
    ]


def write(file, some_rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in some_rows))
    return file


def prompts(path, split) -> set[str]:
    return {problem.prompt for problem in gsm8k.gsm8k_problems(path, split)}


def test_a_row_becomes_our_format_without_marks_and_commas():
    problem = gsm8k.problem_from_row(ROW, "here")
    assert problem.prompt == ROW["question"]
    assert problem.answer == "1200"
    assert problem.domain == "gsm8k"
    assert problem.completion == (
        "<reasoning>\n"
        "The shed holds 3*4 = 12 crates of 100.\n"
        "So there are 12*100 = 1,200 pears, and 900 < 1,200.\n"
        "</reasoning>\n<answer>\n1200\n</answer>"
    )


@pytest.mark.parametrize(
    ("num_marks", "difficulty"),
    [(0, "easy"), (2, "easy"), (3, "medium"), (4, "medium"), (5, "hard"), (9, "hard")],
)
def test_difficulty_is_the_number_of_calculator_marks(num_marks, difficulty):
    row = {"question": "q", "answer": "so <<1+1=2>>2\n" * num_marks + "then\n#### 2"}
    assert gsm8k.problem_from_row(row, "here").difficulty == difficulty


def test_an_answer_without_reasoning_has_no_worked_solution():
    assert gsm8k.problem_from_row({"question": "q", "answer": "#### -7"}, "here").completion is None


@pytest.mark.parametrize("answer", ["just 72", "work\n####", "work\n#### \n", "#### 7\nand more"])
def test_an_answer_without_its_end_mark_is_named_by_file_and_line(tmp_path, answer):
    write(tmp_path / "train.jsonl", [ROW, {"question": "q", "answer": answer}])
    with pytest.raises(UserError, match=r'train\.jsonl:2: field "answer" must end in .*#### N'):
        gsm8k.gsm8k_problems(tmp_path, "train")


def test_a_missing_question_is_named_by_file_and_line(tmp_path):
    write(tmp_path / "test.jsonl", [{"prompt": "q", "answer": "#### 1"}])
    with pytest.raises(UserError, match=r'test\.jsonl:1: field "question" is missing'):
        gsm8k.gsm8k_problems(tmp_path, "test")


def test_validation_is_carved_from_training_and_test_stays_whole(tmp_path):
    write(tmp_path / "train.jsonl", rows(600))
    write(tmp_path / "test.jsonl", rows(30, "held"))
    train, validation = prompts(tmp_path, "train"), prompts(tmp_path, "validation")
    assert not train & validation
    assert train | validation == {row["question"] for row in rows(600)}
    assert 15 < len(validation) < 70  # 600 / 15 = 40, sd 6
    assert prompts(tmp_path, "test") == {row["question"] for row in rows(30, "held")}


@pytest.mark.parametrize(
    ("train_name", "test_name"),
    [
        ("train.jsonl", "test.jsonl"),
        ("main/train.jsonl", "main/test.jsonl"),
        ("gsm8k_train.jsonl", "gsm8k-Test.jsonl"),
    ],
)
def test_a_folder_is_searched_for_the_names_of_the_splits(tmp_path, train_name, test_name):
    write(tmp_path / train_name, rows(3))
    write(tmp_path / test_name, rows(2, "held"))
    write(tmp_path / "contest.jsonl", rows(5, "no"))
    write(tmp_path / "constraints.jsonl", rows(5, "no"))
    write(tmp_path / "testing.jsonl", rows(5, "no"))
    write(tmp_path / "train.txt", rows(5, "no"))
    assert len(prompts(tmp_path, "train") | prompts(tmp_path, "validation")) == 3
    assert len(prompts(tmp_path, "test")) == 2


def test_the_exact_name_wins_over_its_neighbours(tmp_path):
    write(tmp_path / "test.jsonl", rows(2))
    write(tmp_path / "test_socratic.jsonl", rows(3, "why"))
    assert len(prompts(tmp_path, "test")) == 2


def test_several_files_that_might_be_meant_are_refused(tmp_path):
    write(tmp_path / "old_test.jsonl", rows(2))
    write(tmp_path / "new_test.jsonl", rows(2))
    with pytest.raises(UserError, match=r"several test files \(new_test.jsonl, old_test.jsonl\)"):
        gsm8k.gsm8k_problems(tmp_path, "test")


def test_shards_are_read_in_order_and_a_missing_one_is_noticed(tmp_path):
    write(tmp_path / "test-00001-of-00002.jsonl", rows(2, "late"))
    with pytest.raises(UserError, match="holds 1 of 2 test shards"):
        gsm8k.gsm8k_problems(tmp_path, "test")
    write(tmp_path / "test-00000-of-00002.jsonl", rows(1, "early"))
    found = [problem.prompt for problem in gsm8k.gsm8k_problems(tmp_path, "test")]
    assert found == ["early 0?", "late 0?", "late 1?"]
    write(tmp_path / "other_test-00000-of-00002.jsonl", rows(1))
    with pytest.raises(UserError, match="several test files"):
        gsm8k.gsm8k_problems(tmp_path, "test")


def test_a_single_file_is_training_data_unless_named_test(tmp_path):
    plain = write(tmp_path / "sums.jsonl", rows(4))
    test = write(tmp_path / "test.jsonl", rows(2))
    assert len(prompts(plain, "train") | prompts(plain, "validation")) == 4
    assert len(prompts(test, "test")) == 2
    with pytest.raises(UserError, match="holds no GSM8K train split"):
        gsm8k.gsm8k_problems(test, "train")


def test_a_missing_test_split_names_the_validation_source(tmp_path):
    write(tmp_path / "train.jsonl", rows(4))
    with pytest.raises(UserError, match="holds no GSM8K test split.*gsm8k-validation:"):
        gsm8k.gsm8k_problems(tmp_path, "test")


def test_a_missing_path_is_named():
    with pytest.raises(UserError, match="no such file or folder: nowhere"):
        gsm8k.gsm8k_problems("nowhere", "train")


def stub_datasets(monkeypatch, load_dataset):
    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)


@pytest.mark.parametrize(
    ("split", "stored", "count"), [("train", "train", 40), ("test", "test", 20)]
)
def test_without_a_path_the_hub_is_asked(monkeypatch, split, stored, count):
    asked = []

    class Table:
        def to_list(self):
            return rows(count)

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Table()

    stub_datasets(monkeypatch, load_dataset)
    found = gsm8k.gsm8k_problems(None, split)
    assert asked == [("openai/gsm8k", "main", stored)]
    if split == "test":
        assert len(found) == count
    else:
        assert len(found) + len(gsm8k.gsm8k_problems(None, "validation")) == count


def test_no_network_is_one_line_that_tells_of_local_copies(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach the Hub\nand a long tale")

    stub_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError) as caught:
        gsm8k.gsm8k_problems(None, "train")
    message = str(caught.value)
    assert message == (
        "cannot fetch openai/gsm8k from the hub (Couldn't reach the Hub): "
        "give a local copy's file or folder instead, as gsm8k:PATH"
    )


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR names no copy of GSM8K")
def test_the_real_training_problems_read_whole():
    train = gsm8k.gsm8k_problems(os.environ["GSM8K_DIR"], "train")
    validation = gsm8k.gsm8k_problems(os.environ["GSM8K_DIR"], "validation")
    assert len(train) + len(validation) == 7473
    assert len(validation) == 482
    for problem in train + validation:
        assert int(problem.answer) is not None
        assert "<<" not in problem.completion and "####" not in problem.completion
        assert problem.completion.endswith(f"<answer>\n{problem.answer}\n</answer>")
