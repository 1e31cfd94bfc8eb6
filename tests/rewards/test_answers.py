"""The grader's two tables, hostile input, and the known traps of GSM8K parsers.

tests/rewards/test_rewards.py holds the readers' rules."""

import time
from pathlib import Path

import pytest

from gemma_grpo.rewards import arithmetic
from gemma_grpo.rewards.answers import answers_match
from gemma_grpo.rewards.lenient import lenient_answer

LONG = " and so on" * 40  # 400 characters; a bare number before it is out of reach

TRAPS = [
    # commas
    ("That makes 1,234 in all.", "1234"),
    ("#### 1,234,567", "1234567"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{12,\!345}", "12345"),
    # signs
    ("The balance is -5.", "-5"),
    ("The balance is - 5.", "-5"),
    ("balance = - 5", "-5"),
    ("Balance: \u2212 5", "-5"),
    ("10 - 5 makes 5, as 10 - 5", "5"),
    ("#### - 5", "-5"),
    ("#### -5", "-5"),
    ("- 3 apples\n- 4 apples", "4"),  # a list's dash is no sign
    ("the range is 3-4", "4"),
    # units and currencies
    ("She earns $1,234.50", "1234.50"),
    ("She earns $1,234.50.", "1234.5"),
    ("She owes -$ 18", "-18"),
    ("#### 18 dollars per day", "18"),
    ("#### $18.00", "18"),
    (r"\boxed{\$18}", "18"),
    (r"\boxed{18\text{ km}}", "18"),
    # the hash line, with and without a dot, and text after it
    ("#### 18.", "18"),
    ("12 * 2 = 24\n#### 24\nThe 3 of them agree on 7.", "24"),
    # far from the end
    ("#### 72\n" + LONG, "72"),
    (r"\boxed{72}" + LONG, "72"),
    ("<answer>72</answer>" + LONG, "72"),
    # nested braces
    (r"\boxed{\frac{3}{4}}", "0.75"),
    (r"so \boxed{\text{\$18}} it is", "18"),
    (r"{see \boxed{\frac{37}{2}}} {", "18.5"),
    # trailing dots and marks
    ("The answer is 18...", "18"),
    ("**18.**", "18"),
    # two numbers: the last one said, the last one marked
    ("first 17, then 18", "18"),
    (r"\boxed{17} no, \boxed{18}", "18"),
    # two forms of a mark: the block before the hash line, that before the box, wherever they stand
    ("#### 18\n\\boxed{17}", "18"),
    ("<answer>18</answer>\n#### 17", "18"),
    # percent
    ("It grew by 25%.", "25%"),
    ("It grew by 25%.", "25"),
    (r"\boxed{25\%}", "25"),
    ("It grew by 25 percent.", "25%"),
]


@pytest.mark.parametrize(("completion", "gold"), TRAPS)
def test_the_lenient_reader_finds_what_the_completion_says(completion, gold):
    assert answers_match(lenient_answer(completion), gold)


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("18" + LONG, "18"),
        ("I cannot tell.", "18"),
        ("", "18"),
        ("18 or 17", "18"),
        ("The balance is 5.", "-5"),
        ("The balance is - 5.", "5"),
        ("It grew by 25%.", "0.25"),
        ("#### 18 or 17", "18"),
        (r"\boxed{17, 18}", "18"),
        ("1.234", "1234"),
    ],
)
def test_what_it_does_not_say_stays_wrong(completion, gold):
    assert not answers_match(lenient_answer(completion), gold)


# --- the tables -----------------------------------------------------------------------------------

FOLDER = Path(__file__).parent


def rows(name: str) -> list[list[str]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").split("\n")
    return [line.split("\t") for line in lines if line and not line.startswith("# ")]


BLIND = rows("blind_pairs.tsv")
PAIRS = [(right == "1", given, gold) for _, right, given, gold in rows("grader_pairs.tsv")]


def test_the_table_has_400_pairs_of_both_verdicts():
    assert len(PAIRS) >= 400 and len({pair[1:] for pair in PAIRS}) == len(PAIRS)
    assert min(sum(right for right, *_ in PAIRS), sum(not right for right, *_ in PAIRS)) > 150


def test_the_strict_grader_never_says_right_of_a_wrong_answer_in_either_direction():
    said_right = [
        (given, gold)
        for right, given, gold in PAIRS
        if not right and (answers_match(given, gold) or answers_match(gold, given))
    ]
    assert said_right == []


def test_the_strict_grader_says_wrong_of_one_right_answer_alone():
    right_pairs = [(given, gold) for right, given, gold in PAIRS if right]
    said_wrong = [pair for pair in right_pairs if not answers_match(*pair)]
    assert said_wrong == [("n(n+1)/2", "(n^2 + n)/2")]  # n(...) may be a function


def test_on_pairs_made_without_a_look_at_the_table_no_wrong_answer_is_said_to_be_right():
    """In the styles of MATH, GSM8K, SVAMP and AQuA. Of the right ones 22 of 79 are said to be wrong
    (calculations not carried out, other units of the same length, orders): never more."""
    said = [(right == "1", answers_match(a, b), answers_match(b, a), a, b) for right, a, b in BLIND]
    assert len(said) >= 300
    wrong = [(a, b) for right, one, other, a, b in said if not right and (one or other)]
    assert wrong == []
    assert sum(right and not one for right, one, *_ in said) <= 22


@pytest.mark.parametrize(("right", "completion", "gold"), rows("lenient_pairs.tsv"))
def test_the_lenient_reader_reads_whole_numbers_in_sentences_and_blocks(right, completion, gold):
    assert answers_match(lenient_answer(completion), gold) == (right == "1")


@pytest.mark.parametrize(
    "completion",
    [
        "#### Step 1: Add\n5 + 13 = 18\n#### Step 2: Answer\nIt is $\\boxed{18}$",
        "#### Final Answer\n\n18",
        "#### **Answer:**\n18",
        "#### Part 2\n#### 18",
    ],
)
def test_a_heading_is_no_answer(completion):
    assert lenient_answer(completion) == "18"


def test_a_symbol_beside_a_function_is_no_number_and_huge_powers_are_left_alone():
    assert arithmetic.evaluate("x + sqrt(4)")[1] and arithmetic.evaluate("sqrt(4)") == (2, False)
    assert arithmetic.evaluate("2^-101") is None and arithmetic.evaluate("(9^-99)^99") is None


HOSTILE = [
    "9" * 10**6,
    "(" * 10**6,
    "(" * 400 + "1" + ")" * 400,
    "{" * 900 + "}" * 90,
    "\\frac{" * 150 + "1" + "}{2}" * 150,
    "\\boxed{" * 10**5,
    "9**9**9",
    "7^-9999999",
    "((((9^-99)^-99)^-99)^-99)",
    "((((9^99)^99)^99)^99)",
    "1e999999999",
    "sqrt" * 200 + "2",
    "[(" * 100 + "1" + ")]" * 100,
    "five " * 190,
    "1/" * 400,
    "^" * 1000,
    "- " * 500,
    "x^" * 90 + "2",
    "1 234 " * 10**5,
    "<answer>" * 10**5,
    "#### " * 10**5,
    "\ud800",
    "\u200b" * 1000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_answers_neither_hang_nor_raise_nor_pay(text):
    started = time.process_time()
    assert not answers_match(text, "5") and not answers_match("5", text)
    assert not answers_match(text + "x", text)
    assert not answers_match(lenient_answer(text), "5")
    assert not answers_match(lenient_answer(f"<answer>{text[:3000]}</answer>"), "5")
    assert time.process_time() - started < 3  # 0.1 s; on a loaded machine more
