"""Gold answers that are not what they seem are counted before training."""

import pytest

from gemma_grpo.data import curriculum
from gemma_grpo.data.problem import Problem
from gemma_grpo.rewards import golds


def problems(*answers: str) -> list[Problem]:
    return [Problem(f"question {i}", answer) for i, answer in enumerate(answers)]


def test_readable_answers_give_no_warning():
    fine = ("5", "1,234", "3/4", "$18", "yes", "x + 1", "7:30", "2, 3", "2023-05-01", "5 km")
    assert golds.warning(problems(*fine)) is None


@pytest.mark.parametrize("answer", ["1.234.567", "36/2", "1/0", "5 6"])
def test_an_answer_that_looks_like_a_number_and_is_none_is_counted(answer):
    line = golds.warning(problems("5", answer, "yes", answer))
    assert line.startswith("2 of 4 gold answers") and repr(answer) in line and "\n" not in line


def test_completions_without_the_tags_or_with_another_answer_are_counted():
    good = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n2\n</answer>"
    of = lambda *texts: golds.completions_warnings(
        [Problem("1 + 1?", "2.0", each) for each in texts]
    )
    assert of(good, None) == []
    assert of("the sum is 2", good, None, f"{good} Done.") == [
        "2 of 3 completions lack <reasoning>...</reasoning><answer>...</answer>: SFT will teach "
        "what they have"
    ]
    (line,) = of(good, good.replace("\n2\n", "\n3\n"))
    assert line == "1 of 2 completions end in another answer than `answer` (first: '3', not '2.0')"


def test_the_curriculum_s_own_completions_give_no_warning():
    assert golds.completions_warnings(curriculum.problems("train", 60, 0)) == []
