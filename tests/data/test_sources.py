"""The one door to the data: every form of a source name."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gemma_grpo.data import gsm8k, reasoning_gym, sources
from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.errors import UserError


def write(file, prompts, field="prompt"):
    rows = [{field: prompt, "answer": f"#### {n}"} for n, prompt in enumerate(prompts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(source, split="train", num=0, seed=1) -> list[Problem]:
    return sources.load(source, split=split, num=num, seed=seed)


def prompts(source, split="train", **options) -> set[str]:
    return {problem.prompt for problem in load(source, split, **options)}


def test_one_file_is_divided_into_training_and_test(tmp_path):
    everything = {f"question {n}" for n in range(300)}
    file = write(tmp_path / "mine.jsonl", sorted(everything))
    train, test = prompts(file), prompts(file, "test")
    assert train | test == everything
    assert not train & test
    assert 10 < len(test) < 60  # a tenth of 300, sd 5
    assert test == prompts(file, "test", seed=99)  # whatever the seed


def test_num_picks_this_many_by_seed_and_zero_or_more_than_all_takes_all(tmp_path):
    file = write(tmp_path / "mine.jsonl", [f"question {n}" for n in range(100)])
    assert len(load(file, num=20)) == 20
    assert load(file, num=20) == load(file, num=20)
    assert load(file, num=20) != load(file, num=20, seed=2)
    assert prompts(file, num=20) <= prompts(file)
    assert load(file, num=5000) == load(file)


def test_two_files_are_taken_as_they_are(tmp_path):
    pair = write(tmp_path / "a.jsonl", ["x", "y"]) + "," + write(tmp_path / "b.jsonl", ["z"])
    assert prompts(pair) == {"x", "y"}
    assert prompts(pair, "test") == {"z"}
    assert prompts(pair.replace(",", " , "), "test") == {"z"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_files_that_share_a_prompt_are_refused(tmp_path, split):
    pair = write(tmp_path / "a.jsonl", ["x", "y"]) + "," + write(tmp_path / "b.jsonl", ["z", " y"])
    with pytest.raises(UserError, match=r'b\.jsonl shares 1 prompts with .*a\.jsonl \("y"\)'):
        load(pair, split)


def test_a_csv_file_of_your_own_may_have_questions(tmp_path):
    (tmp_path / "mine.csv").write_text("question,answer\n1 + 1?,2\n2 + 2?,4\n")
    both = load(str(tmp_path / "mine.csv")) + load(str(tmp_path / "mine.csv"), "test")
    assert {(p.prompt, p.answer) for p in both} == {("1 + 1?", "2"), ("2 + 2?", "4")}


def test_a_comma_in_a_file_name_is_no_pair(tmp_path):
    file = write(tmp_path / "a,b.jsonl", ["x", "y"])
    assert prompts(file) | prompts(file, "test") == {"x", "y"}


def test_gsm8k_tests_on_its_test_split_and_its_validation_source_does_not(tmp_path):
    write(tmp_path / "train.jsonl", [f"t {n}" for n in range(60)], field="question")
    write(tmp_path / "test.jsonl", ["held 0", "held 1"], field="question")
    official, carved = f"gsm8k:{tmp_path}", f"gsm8k-validation:{tmp_path}"
    assert prompts(official, "test") == {"held 0", "held 1"}
    assert prompts(official) == prompts(carved)
    assert not prompts(carved) & prompts(carved, "test")
    assert prompts(carved) | prompts(carved, "test") == {f"t {n}" for n in range(60)}


def test_gsm8k_without_a_path_goes_to_the_hub(monkeypatch):
    asked = []

    def gsm8k_problems(path, split):
        asked.append((path, split))
        return [Problem("q", "1")]

    monkeypatch.setattr(gsm8k, "gsm8k_problems", gsm8k_problems)
    load("gsm8k"), load("gsm8k", "test"), load("gsm8k-validation", "test")
    assert asked == [(None, "train"), (None, "test"), (None, "validation")]


def test_generated_sources_get_split_number_and_seed(monkeypatch):
    asked = []

    def record(*args, **kwargs):
        asked.append((*args, kwargs))
        return [Problem("q", "1")]

    monkeypatch.setattr(sources.curriculum, "problems", record)
    monkeypatch.setattr(reasoning_gym, "reasoning_gym_problems", record)
    load("curriculum", "test", num=7, seed=3)
    load("reasoning_gym:chain_sum", "test", num=8, seed=4)
    assert asked == [
        ("test", 7, 3, DIFFICULTIES, {}),
        ("chain_sum", {"split": "test", "num": 8, "seed": 4}),
    ]


@pytest.mark.parametrize("source", ["curriculum", "reasoning_gym:chain_sum"])
def test_generated_sources_cannot_give_all(source):
    with pytest.raises(UserError, match=f"{source} has no end"):
        load(source, num=0)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "curriculm",
        "curriculum:x",
        "a.jsonl,b.jsonl,c.jsonl",
        "a.jsonl,b.tsv",
        "gsm",
    ],
)
def test_an_unknown_source_names_the_known_ones(source):
    with pytest.raises(UserError, match='unknown data source ".*": use curriculum, gsm8k, .*jsonl'):
        load(source)


@pytest.mark.parametrize(
    ("source", "num", "message"),
    [
        ("gone.jsonl", 0, "no such file: gone.jsonl"),
        (
            "list.json",
            0,
            r"list\.json: a \.json file is not read: write a JSON object a line, .*jsonl",
        ),
        ("a.jsonl,b.json", 0, r"b\.json: a \.json file is not read"),
        ("gsm8k:", 0, "names no path"),
        ("curriculum", -1, "cannot load -1 problems"),
        ("reasoning_gym", 3, "reasoning_gym needs a task"),
        ("curriculum", 10**6, "1,000,000 problems are more .* at most 100,000"),
        ("reasoning_gym:chain_sum", 2**63, "at most 100,000"),
    ],
)
def test_a_bad_source_is_one_clear_line(source, num, message):
    with pytest.raises(UserError, match=message):
        load(source, num=num)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no problems in .*mine\.jsonl"):
        load(write(tmp_path / "mine.jsonl", []))


# Through the datasets package, which takes seconds to import


def write_parquet(file, rows) -> str:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(file))
    return str(file)


def test_problems_survive_a_parquet_file(tmp_path):
    problems = [
        Problem("What is 2 + 3?", "5", "<answer>5</answer>", difficulty="easy", domain="sums"),
        Problem("ein\u2028Rätsel", "ja", None, difficulty="hard"),
    ]
    folder = tmp_path / "[a] domain=sums"  # no glob, and no partition that adds a column
    folder.mkdir()
    file = write_parquet(folder / "mine.parquet", [vars(problem) for problem in problems])
    assert sorted(load(file) + load(file, "test"), key=problems.index) == problems


def test_gsm8k_reads_the_layout_of_the_hub(tmp_path):
    import datasets

    for folder in ("main", "socratic"):
        (tmp_path / folder).mkdir()
        rows = [{"question": f"{folder} {n}", "answer": f"#### {n}"} for n in range(3)]
        file = tmp_path / folder / "test-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    assert prompts(f"gsm8k:{tmp_path}", "test") == {"main 0", "main 1", "main 2"}
    rows = [{"question": "q", "answer": "#### 1"}, {"question": "r", "answer": "two"}]
    datasets.Dataset.from_list(rows).to_parquet(str(file.parent.parent / "main" / file.name))
    with pytest.raises(UserError, match=r"parquet, row 2: field .answer. must end in"):
        load(f"gsm8k:{tmp_path}", "test")


def test_answers_in_narrow_floats_are_the_shortest_decimals_of_their_width(tmp_path):
    import datasets

    numbers = [0.1, 2.5, 3.0, 1234.5]
    for width in ("float16", "float32", "float64"):
        columns = {"prompt": [f"q{i}" for i in range(4)], "answer": np.array(numbers, width)}
        features = {"prompt": datasets.Value("string"), "answer": datasets.Value(width)}
        file = tmp_path / f"{width}.parquet"
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(file))
        answers = [problem.answer for problem in sources._read(str(file))]
        expected = ["0.1", "2.5", "3.0", "1234.0" if width == "float16" else "1234.5"]
        assert answers == expected, width  # float16 has no 1234.5: its steps are 1 there


def test_faulty_parquet_files_are_refused(tmp_path):
    rows = [{"prompt": "a", "answer": 1.5}, {"prompt": None, "answer": 2.0}]
    with pytest.raises(UserError, match=r'gap\.parquet, row 2: field "prompt" is missing'):
        load(write_parquet(tmp_path / "gap.parquet", rows))
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"cannot read .*bad\.parquet as parquet"):
        load(str(tmp_path / "bad.parquet"))
    with pytest.raises(UserError, match="no such file: gone.parquet"):
        load("gone.parquet")
    forever = pyarrow.array([2**62], pyarrow.duration("s"))
    table = pyarrow.table({"prompt": ["a"], "answer": forever})
    pyarrow.parquet.write_table(table, tmp_path / "time.parquet")
    with pytest.raises(UserError, match=r"cannot read .*time\.parquet as parquet"):
        load(str(tmp_path / "time.parquet"))
    texts = pyarrow.array(["a"])
    twice = pyarrow.Table.from_arrays([texts, texts, texts], ["prompt", "answer", "answer"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="names a column twice"):
        load(str(tmp_path / "twice.parquet"))
    with pytest.raises(UserError, match=r"no problems in .*none\.parquet"):
        load(write_parquet(tmp_path / "none.parquet", []))


def test_numbers_in_a_parquet_file_are_answers(tmp_path):
    rows = [{"prompt": f"q{n}", "answer": n + 0.5} for n in range(3)]
    file = write_parquet(tmp_path / "numbers.parquet", rows)
    assert {p.answer for p in load(file) + load(file, "test")} == {"0.5", "1.5", "2.5"}


def test_a_folder_is_refused_with_what_to_name_instead(tmp_path):
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        sources.load(str(tmp_path), split="train", num=0, seed=0)


def test_problems_of_other_difficulties_are_left_out_before_any_are_picked(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": f"question {n}", "answer": "1", "difficulty": DIFFICULTIES[n % 3]}
        for n in range(300)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = load(str(file))
    hard = sources.load(str(file), split="train", num=0, seed=1, difficulties=("hard",))
    assert hard == [problem for problem in every if problem.difficulty == "hard"]
    both = ("easy", "hard")
    picked = sources.load(str(file), split="train", num=50, seed=1, difficulties=both)
    assert len(picked) == 50 and {problem.difficulty for problem in picked} == set(both)
    drawn = sources.load("curriculum", split="test", num=40, seed=1, difficulties=both)
    assert [problem.difficulty for problem in drawn[:4]] == ["easy", "hard"] * 2
    assert len(drawn) == 40


def test_a_difficulty_without_problems_is_named_and_so_is_what_is_there(tmp_path):
    file = write(tmp_path / "mine.jsonl", [f"question {n}" for n in range(20)])
    with pytest.raises(UserError, match=r"no easy or hard problems .*, only medium"):
        sources.load(file, split="train", num=0, seed=1, difficulties=("easy", "hard"))


def test_of_a_file_that_is_measured_on_in_part_the_problems_are_picked_by_hash_not_by_place(
    tmp_path,
):
    names = [f"question {n}" for n in range(40)]
    forth, back = write(tmp_path / "a.jsonl", names), write(tmp_path / "b.jsonl", names[::-1])
    of = lambda file, num: {each.prompt for each in sources.to_measure(file, num=num)}
    assert of(forth, 10) == of(back, 10) and len(of(forth, 10)) == 10
    assert of(forth, 5) < of(forth, 10) < of(forth, None) == of(forth, 0) == set(names)


def test_the_file_that_a_model_was_trained_on_is_known_by_any_path(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "a.jsonl", [f"question {n}" for n in range(40)])
    write(tmp_path / "other.jsonl", ["question 3", "new"])
    monkeypatch.chdir(tmp_path)
    held_out = load(file, "test")
    of = lambda source: sources.to_measure(source, trained_on=file, load_train=lambda: load(file))
    assert of(file) == of("a.jsonl") == of("./a.jsonl") == held_out
    assert capsys.readouterr().err == ""
    assert [each.prompt for each in of("other.jsonl")] == ["question 3", "new"]
    said = 'other.jsonl: 1 of 2 problems were trained on ("question 3")'
    assert said in capsys.readouterr().err


def test_what_was_trained_on_is_not_loaded_for_a_source_that_is_no_file():
    def load_train():
        raise AssertionError("it may be a download")

    for num, found in ((3, 3), (None, 400)):
        problems = sources.to_measure(
            "curriculum", num=num, trained_on="mine.jsonl", load_train=load_train
        )
        assert len(problems) == found


def test_more_problems_than_there_are_end_in_a_line_and_not_in_a_search(monkeypatch):
    monkeypatch.setitem(sources.curriculum.FAMILIES, "hard", (sources.curriculum.work,))
    with pytest.raises(UserError, match="hard problems alone give hardly more than .* different"):
        sources.load("curriculum", split="test", num=20_000, seed=1, difficulties=("hard",))


def test_fields_that_no_problem_takes_are_named_and_what_is_meant_where_only_the_case_differs(
    tmp_path,
):
    row = {"prompt": "1 + 1?", "answer": "2", "tests": [1], "Difficulty": "hard"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.csv").write_text("question,answer,domain,id\n2 + 2?,4,sums,7\n")
    pair = f"{tmp_path}/a.jsonl,{tmp_path}/b.csv"
    assert sources.fields_not_read(pair) == (
        f"{pair}: fields not read: tests, Difficulty (write difficulty), id"
    )
    file = write(tmp_path / "fine.jsonl", ["x", "y"])
    for source in (file, "curriculum", "gsm8k:nowhere.jsonl", "session", "reasoning_gym:sums"):
        assert sources.fields_not_read(source) is None
