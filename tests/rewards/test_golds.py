"""Gold answers that are not what they seem are counted before training."""

import pytest

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
