"""Reading an answer, comparing it, and rewarding it. Expected values are worked by hand."""

import gc
import itertools
import json
import math
import random
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import pytest
import tolerances

from gemma_grpo import rewards
from gemma_grpo.errors import UserError
from gemma_grpo.rewards import (
    END_WEIGHTS,
    START_WEIGHTS,
    RewardConfig,
    RewardWeights,
    Sample,
    TolerantReward,
)
from gemma_grpo.rewards.answers import answers_match
from gemma_grpo.rewards.blocks import parse
from gemma_grpo.rewards.lenient import lenient_answer
from gemma_grpo.rewards.number_words import to_digits
from gemma_grpo.rewards.quantities import quantity
from gemma_grpo.rewards.steps import read_steps, true_lines

GOOD = "<reasoning>\n3 + 4 = 7\n7 * 2 = 14\n</reasoning>\n<answer>\n14\n</answer>"


def sample(completion: str = GOOD, **changes) -> Sample:
    base = Sample(
        prompt="Two baskets hold 3 + 4 eggs each. How many eggs?",
        completion=completion,
        answer="14",
        difficulty="medium",
        num_tokens=20,
        max_tokens=100,
        answer_logps=(-0.5,),
        stopped=True,
    )
    return replace(base, **changes)


def near(value: float | list[float]):
    return pytest.approx(value, abs=tolerances.F64)


# --- parsing --------------------------------------------------------------------------------------


def test_a_well_formed_completion_gives_both_parts_stripped():
    parsed = parse(GOOD)
    assert parsed.reasoning == "3 + 4 = 7\n7 * 2 = 14"
    assert parsed.answer == "14"
    assert parsed.well_formed


def test_white_space_around_the_parts_is_free():
    for gap in ("", " ", "\n\n", "\t\r\n"):
        text = f"{gap}<reasoning>{gap}why{gap}</reasoning>{gap}<answer>{gap}7{gap}</answer>{gap}"
        parsed = parse(text)
        assert (parsed.reasoning, parsed.answer, parsed.well_formed) == ("why", "7", True)


@pytest.mark.parametrize("place", range(3))
def test_any_text_outside_the_blocks_is_not_well_formed_but_the_blocks_still_count(place):
    outside = ["", "", ""]
    outside[place] = "so"
    text = "{}<reasoning>why</reasoning>{}<answer>7</answer>{}".format(*outside)
    parsed = parse(text)
    assert (parsed.reasoning, parsed.answer, parsed.well_formed) == ("why", "7", False)


# What one may get by breaking the format: (completion, reasoning, answer).
BROKEN = [
    ("", None, None),
    ("14", None, None),
    ("<answer>14</answer>", None, "14"),
    ("<reasoning>why</reasoning>", "why", None),
    ("<reasoning>why</reasoning><answer>14", "why", None),
    ("<reasoning>why", None, None),
    ("<reasoning></reasoning><answer>14</answer>", None, "14"),
    ("<reasoning> \n </reasoning><answer>14</answer>", None, "14"),
    ("<reasoning>\u200b</reasoning><answer>14</answer>", None, "14"),
    ("<reasoning>why</reasoning><answer> </answer>", "why", None),
    # two answers: 14 is one of them, and neither counts
    ("<reasoning>why</reasoning><answer>13</answer><answer>14</answer>", None, None),
    ("<answer>14</answer><answer>14</answer>", None, None),
    # two reasonings
    ("<reasoning>a</reasoning><reasoning>b</reasoning><answer>14</answer>", None, None),
    # answer only inside the reasoning
    ("<reasoning>why <answer>14</answer></reasoning>", None, None),
    ("<reasoning>why <answer>14</answer>", None, None),
    ("<reasoning><answer>13</answer></reasoning><answer>14</answer>", None, None),
    # nested
    ("<answer><answer>14</answer></answer>", None, None),
    ("<answer><reasoning>why</reasoning>14</answer>", None, None),
    ("<reasoning><reasoning>why</reasoning></reasoning><answer>14</answer>", None, None),
    # wrong order: reasoning after the answer did not lead to it
    ("<answer>14</answer><reasoning>why</reasoning>", None, "14"),
    ("</reasoning>why<reasoning><answer>14</answer>", None, None),
    ("<reasoning>why</reasoning></answer>14<answer>", None, None),
    # stray tags and other spellings
    (GOOD + "<reasoning>", None, None),
    (GOOD + "</answer>", None, None),
    ("<Reasoning>why</Reasoning><Answer>14</Answer>", None, None),
    ("< answer >14</ answer >", None, None),
]


@pytest.mark.parametrize(("completion", "reasoning", "answer"), BROKEN)
def test_a_broken_format_is_not_well_formed_and_yields_only_what_is_beyond_doubt(
    completion, reasoning, answer
):
    parsed = parse(completion)
    assert (parsed.reasoning, parsed.answer, parsed.well_formed) == (reasoning, answer, False)


def test_no_sequence_of_tags_but_the_right_one_is_well_formed():
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    for length in range(6):
        for chosen in itertools.product(tags, repeat=length):
            assert parse("7" + "7".join(chosen) + "7").well_formed is False
            spaced = parse(" 7 ".join(chosen))
            if chosen != tags:
                assert not spaced.well_formed


# --- lenient reading ------------------------------------------------------------------------------

LENIENT = [
    ("<answer>5</answer> and <answer>7</answer> 8", "7"),
    ("<answer>7", "7"),
    ("<reasoning>why <answer>9</answer></reasoning>", "9"),
    ("6 <answer></answer>", "6"),
    ("48/2 = 24, 48+24 = 72\n#### 72", "72"),
    ("#### 1,234\nthank you, 5 stars", "1,234"),
    ("#### 1\n#### 2", "2"),
    ("#### 72 then <answer>73</answer>", "73"),
    (r"so \boxed{5}, not 6", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{4} and {braces} \boxed{5} }", "5"),
    (r"\boxed{never closed 8", "8"),
    (r"\boxed{5} #### 6", "6"),
    ("he has 3 and then 1,234,567.", "1,234,567"),
    ("2,3,5", "2,3,5"),  # perhaps 2, 3 and 5, perhaps something else: no half of it is read
    ("1,2345", "1,2345"),
    ("x=-5", "-5"),
    ("x = \u22125", "-5"),
    ("that is 10-5", "5"),
    ("f(2)-5", "5"),
    ("it costs $18.50.", "$18.50"),
    ("it costs -$18", "-$18"),
    ("half is 1/2", "1/2"),
    ("use 1 1/2 cups", "1 1/2"),
    ("24/8 = 3", "3"),
    ("about 25%", "25%"),
    ("no number", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), LENIENT)
def test_the_lenient_reader_takes_tag_then_hashes_then_box_then_last_number(text, answer):
    assert lenient_answer(text) == answer


def test_a_bare_number_counts_in_the_last_300_characters_only():
    assert lenient_answer("7 " + "x" * 298) == "7"
    assert lenient_answer("7 " + "x" * 300) is None
    assert lenient_answer("#### 7\n" + "x" * 300) == "7"  # marked answers count wherever they are
    assert lenient_answer("<answer>7</answer>" + "x" * 300) == "7"


@pytest.mark.parametrize("number", ["12345", "1,234", "12.5", "3/4"])
def test_a_number_cut_by_the_300_character_limit_is_not_read_from_its_middle(number):
    for visible in range(1, len(number)):
        text = number + " " + "x" * (299 - visible)
        assert lenient_answer(text) is None
    assert lenient_answer(" " + number + " " + "x" * (299 - len(number))) == number


# --- comparing answers ----------------------------------------------------------------------------

# All the spellings of a row say the same; spellings of two rows never do.
SAME = [
    [
        "18",
        "18.0",
        "18.",
        "+18",
        " 18\n",
        "018",
        "18.000",
        "**18**",
        "`18`",
        "(18)",
        "x = 18",
    ],
    ["-18", "\u221218", "- 18", "-18.0", "\u201318"],
    ["36/2"],  # what is left to work out is not the result
    ["-36/2"],
    ["1234", "1,234", "1,234.00", "+1,234", "1.234e3", "1,234;", "1 234"],
    ["1234567", "1,234,567", "1,234,567.0"],
    ["0.5", ".5", "1/2", "½", "2/4", r"\frac{1}{2}", r"\dfrac{1}{2}", "1 / 2", "+.50"],
    ["1.5", "1 1/2", "1½", "3/2", "1 2/4"],
    ["-1.5", "-1 1/2", "\u22121½", "-3/2"],
    ["1/3", "2/6", "⅓"],
    ["0.333"],
    ["5000000", "5 million", "5e6", "5,000,000", "5000k", "5 Million"],
    ["36", "3 dozen", "\uff13\uff16"],
    ["0", "-0", "0.0", "+0"],
    ["0.25", "25/100", "1/4"],
    ["25", "٢٥"],
    ["42", "forty two", "Forty-Two", " forty  two. ", '"forty two"', "FORTY TWO."],
    ["yes", "Yes.", "YES", "'yes'", "The answer is yes"],
    ["u.s.", "US", "us"],
    ["b", "(B)", "B.", "b)"],
    ["x=1, y=2", "x = 1, y = 2"],
    ["2, -3", "(2, -3)"],
    ["2, 3", "(2,3)"],
    ["7:30", "7:30."],
    ["5^2", "5²"],
    ["5", "5."],
    ["5!"],
    ["±5"],
    ["5x"],
    ["5π"],
    ["5 and a half"],
    ["forty three fifty"],
    ["5 or six"],
    ["5 or 6"],
    ["5 point two"],
    ["5 6"],
    ["12,34"],
    ["1,2345"],
    ["3:4"],
    ["3 4"],
    ["3.5 to 1"],
    ["35 to 1"],
    ["5! + 1"],
    ["5 + 1"],
    ["10"],
    ["1/2/3"],
    ["5 10/2"],
    ["2.5.1"],
    ["--18"],
    ["1/0"],
    ["2/0"],
    ["0/0"],
    ["inf", "Inf"],
    ["-inf"],
    ["nan", "NaN"],
    ["1e999", "1E999"],
    ["1e-999"],
    ["3 + 4"],
    ["2023-05-01"],
    ["France"],
    ["Paris: France"],
    ["9" * 400],
    ["9" * 399 + "8"],
]
SPELLINGS = [(row, text) for row, texts in enumerate(SAME) for text in texts]


def test_answers_match_exactly_within_a_row_of_the_table_and_never_across_rows():
    for (row_a, a), (row_b, b) in itertools.product(SPELLINGS, repeat=2):
        assert answers_match(a, b) == (row_a == row_b), (a[:40], b[:40])


# Spellings of one unit after the number; a bare number fits all rows, other rows contradict.
UNITS = [
    ["km", "kilometers", "kilometre", " KM", " km."],
    ["m", " meters", " metres"],
    [" m²", " m^2", " square meters", " sq m"],
    [" m³", " cubic metres"],
    [" km/h", " kilometers per hour", " km per hour", " kmh"],
    [" mph", " miles per hour"],
    [" feet", " foot", " ft", " (feet)"],
    [" inches", " in", " inch"],
    ["kg", " kilograms"],
    ["%", " percent", " per cent", " %"],
    [" hours", "h", " hrs", " hour"],
    [" minutes", "min"],
    [" dollars", "$", " USD"],
    ["€", " euros"],
    [" cents", "¢"],
    [" apples", " apple", " red apples"],
    [" boxes", " box"],
    [" cherries", " cherry"],
    [" children", " child"],
    [" points"],
    ["°C", " degrees Celsius"],
    ["°F", " degrees Fahrenheit"],
    [" am", " a.m."],
    [" pm", " PM"],
]


def test_units_match_within_a_row_contradict_across_rows_and_may_be_missing():
    spelled = [(row, text) for row, texts in enumerate(UNITS) for text in texts]
    for (row_a, a), (row_b, b) in itertools.product(spelled, repeat=2):
        assert answers_match("7" + a, "7" + b) == (row_a == row_b), (a, b)
    for _, unit in spelled:
        assert not answers_match("8" + unit, "7" + unit), unit
        certain = unit not in (" apple", " box", " cherry")  # "7 apple" may be a "7 doubled"
        assert answers_match("7", "7" + unit) == answers_match("7" + unit, "7") == certain, unit
        assert not answers_match("8", "7" + unit) and not answers_match("8" + unit, "7"), unit


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("$18", "18"),
        ("$18", "18 dollars"),
        ("$ 1,800.00", "1800"),
        ("USD 18", "$18"),
        ("US$18", "$18"),
        ("-$18", "$-18"),
        ("£18", "18 pounds"),
        ("Rs. 500", "₹500"),
        ("$18 per day", "$18"),
        ("$18", "$18 every day"),
        ("$18$", "18 km"),  # LaTeX's dollars are no currency
        (r"\$18", "$18"),
        (r"25\%", "25%"),
        (r"18\text{ km}", "18 km"),
        (r"\boxed{18}", "18"),
        ("Answer: 18", "18"),
        ("The final answer is 18.", "18"),
        ("3 apples per child", "3 apples"),
        ("3/4 cup", "0.75 cups"),
        ("5 square meters of grass", "5 m² grass"),
        ("1 dozen eggs", "12 eggs"),
    ],
)
def test_dressed_numbers_match(given, gold):
    assert answers_match(given, gold)


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("0.25", "25%"),  # percent is a unit; nothing is converted
        ("25%", "0.25"),
        ("50 cents", "$0.50"),
        ("$18", "18 €"),
        ("$18", "-$18"),
        ("5 million", "5"),
        ("5k", "5"),
        ("5 km/h", "5 km"),
        ("18 is what we would say but please check it", "18"),
        ("5 apples in total", "5 inches"),
        ("17 18", "18"),
        ("17, 18", "18"),
        ("5²", "52"),
        ("1½", "11/2"),
        ("4\u200b2", "42"),
        (None, "None"),
        ("", "5"),
        ("  ", "5"),
        ("5", ""),
        ("", ""),
        (".", "!"),
    ],
)
def test_near_misses_do_not_match(given, gold):
    assert not answers_match(given, gold)


def test_numbers_are_exact_fractions_however_they_are_written():
    rng = random.Random(3)
    for _ in range(300):
        n, d = rng.randint(-(10**9), 10**9), rng.randint(1, 10**4)
        hundredths = Fraction(n, 100)
        assert quantity(f"{n:,}").value == n
        assert quantity(f"{n}/{d} kg").value == Fraction(n, d)
        assert (
            quantity(f"${'-' if n < 0 else ''}{abs(n) // 100}.{abs(n) % 100:02}").value
            == hundredths
        )
        whole, top = divmod(abs(n), d)
        assert quantity(f"-{whole} {top}/{d}").value == -Fraction(abs(n), d)


def test_comparison_is_reflexive_symmetric_and_never_raises_on_strange_strings():
    rng = random.Random(5)
    alphabet = "0123456789.,/-+$% ekxKm½²٣\\{}()^=:<>!\u200b∞\ud800\n'"
    for _ in range(1500):
        a, b = ("".join(rng.choices(alphabet, k=rng.randrange(9))) for _ in range(2))
        assert answers_match(a, b) == answers_match(b, a)
        assert answers_match(a, a) == bool(a.strip())
        parse(a)
        lenient_answer(a)


def test_huge_exponents_are_text_and_cost_nothing():
    assert quantity("1e99").value == 10**99
    for text in ("1e100", "1e-100", "1e999999999"):
        assert quantity(text) is None


def test_very_long_strings_are_read_without_quadratic_time():
    # 50 000 characters take about 0.05 s; a quadratic pass over them takes a minute
    start = time.process_time()
    assert not answers_match("9" * 5000, "9" * 4999)  # int() refuses more than 4300 digits
    for piece in ("1", "1,", "5 ", "\\boxed{", "{", "<answer>", "- ", "k ", " ", "#", "1/"):
        text = piece * (50_000 // len(piece))
        answers_match(text, "5")
        lenient_answer(text)
        parse(text)
    assert time.process_time() - start < 15


# --- correctness, trace ---------------------------------------------------------------------------


def test_correctness_reads_the_answer_block_and_nothing_else():
    assert rewards.correctness(sample()) == 1.0
    assert rewards.correctness(sample("<answer>14 eggs</answer>")) == 1.0
    assert rewards.correctness(sample(GOOD.replace("\n14\n", "\n15\n"))) == 0.0
    for hack in (
        "14",
        "#### 14",
        r"\boxed{14}",
        "<answer>13</answer><answer>14</answer>",
        "<answer>13 or 14</answer>",
        "<answer>13, 14</answer>",
        "<reasoning>it is 14 <answer>14</answer></reasoning>",
        "<answer>14",
    ):
        assert rewards.correctness(sample(hack)) == 0.0, hack


STEP_LINES = [
    "3 + 4 = 7",
    "7*2=14",
    "48/2 = <<48/2=24>>24",
    "(3 + 4) * 2 = 14",
    "$12/60 = $0.2",
    "10% of 50 = 5",
    "3 x 4 is 12",
    "-5 + 8 = 3",
    "3 apples + 4 apples = 7 apples",
    "Identify the problem components.",
    "Therefore, the answer is derived.",
    "She has 5",
]
NO_STEP_LINES = [
    "",
    "7",
    "1 = 1",
    "ok",
    "so so so so",
    "Step 1:",
    "- ",
    "...",
    "7 7 8 9",
    "3 +",
    "=",
]


@pytest.mark.parametrize("line", STEP_LINES)
def test_a_calculation_or_a_sentence_is_a_step_whatever_its_label(line):
    for label in ("", "Step 1: ", "2. ", "3) ", "- ", "* ", "**Step 4:** "):
        assert rewards.reasoning_steps(label + line) == 1, label


@pytest.mark.parametrize("line", NO_STEP_LINES)
def test_a_line_without_calculation_or_sentence_is_no_step(line):
    assert rewards.reasoning_steps(line) == 0


def test_different_lines_are_different_steps():
    assert rewards.reasoning_steps("\n".join(STEP_LINES)) == len(STEP_LINES)
    assert rewards.reasoning_steps("3 + 4 = 7\n3 - 4 = 7\n3 + 4 = 8\n3 + 4 = .8") == 4


def test_repeated_lines_count_once_under_any_label_case_spacing_or_punctuation():
    lines = [
        "3 + 4 = 7",
        "3+4=7",
        "Step 2: 3 + 4 = 7.",
        "3. 3 + 4 = 7",
        "- 3  +  4 = 7 ;",
        "**Step 2:** 3 + 4 = 7",
        "## Step 2: 3 + 4 = 7",
        "**3 + 4 = 7**",
        "3 + 4 = 7",
    ]
    assert rewards.reasoning_steps("\n\n".join(lines)) == 1
    sentences = ["We add them all up.", "we ADD them all up", "Step 9: We add them, all up!"]
    assert rewards.reasoning_steps("\n".join(sentences)) == 1


@pytest.mark.parametrize(
    ("difficulty", "scores"),
    [
        ("easy", [0, 1, 1, 1, 1]),
        ("medium", [0, 1 / 2, 1, 1, 1]),
        ("hard", [0, 1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_harder_problems_need_more_steps_for_the_same_trace_score(difficulty, scores):
    steps = [
        ["hm"],
        ["(3 + 4) * 2 = 14"],
        ["3 + 4 = 7", "7 * 2 = 14"],
        ["3 + 4 = 7", "7 * 2 = 14", "The baskets hold 14."],
        ["3 + 4 = 7", "7 * 2 = 14", "The baskets hold 14 eggs.", "Two baskets, so 14 eggs in all."],
    ]
    for expected, chosen in zip(scores, steps, strict=True):
        lines = "\n".join(chosen)
        text = f"<reasoning>{lines}</reasoning><answer>14</answer>"
        assert rewards.trace(sample(text, difficulty=difficulty)) == near(expected)


def test_trace_is_zero_without_a_reasoning_block_before_the_answer():
    steps = "3 + 4 = 7\n7 * 2 = 14"
    for hack in (
        f"{steps}<answer>14</answer>",
        f"<answer>{steps}</answer>",
        f"<answer>14</answer><reasoning>{steps}</reasoning>",
        f"<reasoning>{steps}",
        f"<reasoning>{steps}</reasoning><reasoning>{steps}</reasoning><answer>14</answer>",
        f"<reasoning></reasoning>{steps}<answer>14</answer>",
    ):
        assert rewards.trace(sample(hack)) == 0.0, hack


def traced(reasoning: str, said: str = "14", **changes) -> float:
    text = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{said}\n</answer>"
    return rewards.trace(sample(text, **changes))


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("3 + 4 = 7\n7 * 2 = 14", 1),
        ("3 + 4 = 7 eggs, so 7 eggs * 2 = 14 eggs", 1),  # two equations on one line
        ("3 + 4 = 7.\n2 × 7 = $14", 1),
        ("3 + 4 = 8\n8 * 2 = 16", 0),  # the first is false, so 8 is from nowhere
        ("3 + 4 = 7\n7 * 2 = 15", 0.25),  # one step holds, and the answer does not follow
        ("3 + 4 = 7 = 8\n7 * 2 = 14", 0),
        ("5 + 9 = 14", 0),  # true, of numbers that are not this problem's
        ("3 + 4 = 7\n4 + 3 = 7\n3+4=7", 0.25),  # one step, and not to 14
        ("3 + 4 = 7\n7 * 1 = 7\n7 * 2 = 14", 1),
        ("7 * 2 = 14", 0),  # 7 is used before it is found
        ("4 - 3 = 1\n3 + 4 = 7\n7 * 2 = 14", 1),
        ("4 * 3 = 12\n12 + 2 = 14", 1),  # true, and it leads there: what no arithmetic can tell
        ("9**9**9 = 7\n" + "(" * 400 + " = 3", 0),
        ("3 + 4 = 7, 7 * 2 = 14", 1),
        ("The two baskets hold the same eggs.", 0),  # a sentence alone is no step of arithmetic
        ("3 + 4 = 7 (3 apples and 4 pears)\n7 * 2 = 14", 1),
        ("3 apples + 4 pears = 7\n7 bags x 2 = 14", 1),
    ],
)
def test_a_step_is_a_true_new_equation_of_known_numbers_and_the_answer_follows(reasoning, expected):
    assert traced(reasoning) == near(expected)


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("3 + 4 = 7\n7 * 2 = 14", (2, 2)),
        ("3 + 4 = 8\n7 * 2 = 14\nSo it is 14.", (1, 2)),
        ("Step 1: 3 + 4 = 7", (1, 1)),
        ("99 + 1 = 100\n99 + 1 = 100", (2, 2)),  # arithmetic alone, wherever its numbers are from
        ("3 + 4 = 7; 7 * 2 = 15", (0, 1)),
        ("5 * 1 = 5\nThe answer is 5.", (0, 0)),
        ("3 * 5 = 15, 15 + 2 = 17", (1, 1)),
        ("3 * 5 = 15. 15 + 2 = 18", (0, 1)),
        ("Out of the 40, 40 x 1/10 = 4", (1, 1)),
        ("60 students x 2/3 = 40", (1, 1)),
        ("60 students x 2/3 = 41", (0, 1)),
        ("100 - 50 = 50% are left", (1, 1)),
        ("100 - 50 = 49%", (0, 1)),
        ("50% * 100 = 50%", (0, 1)),
        ("He works M + 4 + 2 = 8 hours", (0, 0)),
        ("4 - 2 = 2 hours = 120 minutes left", (1, 1)),  # a conversion: neither true nor false
        ("4 - 2 = 2 hours = 130 minutes", (1, 1)),
        ("25 x 4 = 100 cents = $1", (1, 1)),
        ("Lena = 3.5 hours = 210 minutes", (0, 0)),
        ("2 x = 120 y", (0, 0)),
        ("4 - 2 = 2 pears = 120 apples", (0, 1)),  # no units that are known
        ("4 - 2 = 2 hours = 120 hours", (0, 1)),
        ("4 - 2 = 2 hours = 120 miles", (0, 1)),
        ("4 - 2 = 2 hours = 120", (0, 1)),
        ("1 * 120 minutes = 2 hours", (0, 1)),  # a sum, not a number
        ("3 · 5 = 15", (1, 1)),
        ("", (0, 0)),
    ],
)
def test_true_lines_counts_the_lines_with_equations_and_those_with_only_true_ones(
    reasoning, expected
):
    assert true_lines(reasoning) == expected


@pytest.mark.parametrize(
    ("padding", "expected"),
    [("", 2 / 3), ("\n3 + 4 - 4 = 3", 2 / 3), ("\n24 / 8 * 4 / 4 = 3", 2 / 3)],
)
def test_an_equation_that_leads_back_to_its_own_number_is_no_further_step(padding, expected):
    prompt = "6 workers need 4 days. How many days do 8 workers need?"
    how = {"answer": "3", "prompt": prompt, "difficulty": "hard"}
    assert traced(f"6 * 4 = 24\n24 / 8 = 3{padding}", said="3", **how) == near(expected)


def test_a_conversion_gives_no_number_and_no_step():
    prompt = "Tom worked 4 hours, 2 of them at home, and 5 hours on Sunday. How many minutes?"
    how = {"answer": "125", "prompt": prompt}
    wrong = "4 - 2 = 2 hours = 120 minutes\n120 + 5 = 125"  # 120 stands nowhere else
    right = "4 - 2 = 2 hours = 120 minutes\n2 * 60 = 120\n120 + 5 = 125"
    assert traced(wrong, said="125", **how) == near(0.5 * 1 / 2)
    assert traced(right, said="125", **how) == near(1)


def test_a_question_with_a_number_of_five_thousand_digits_is_read():
    assert read_steps("3 + 4 = 7", f"3 and 4 and {'9' * 5000} and {'9' * 5000}%").equations


def test_a_wrong_answers_trace_is_worth_a_third():
    assert traced("3 * 4 = 12\n12 * 2 = 24", "24") == near(1 / 3)
    structure = lambda text: rewards.structure(sample(text))
    assert structure(GOOD) == 1 and structure(WRONG) == near(1 / 3)


def test_percentages_fractions_and_number_words_of_the_question_are_its_numbers():
    prompt = "A bag of twelve costs 80 coins, 25% off; half of them, 3/4 of a week. How much?"
    for line, answer in (
        ("25% of 80 = 20", "20"),
        ("25/100 * 80 = 20", "20"),
        ("80 * 0.75 = 60", "60"),
        ("80 / 12 = 20/3", "20/3"),
        ("12 / 2 = 6", "6"),
        ("3/4 * 80 = 60", "60"),
        ("12 * 7 = 84", "84"),
    ):
        assert traced(line, answer, prompt=prompt, answer=answer, difficulty="easy") == 1, line


@pytest.mark.parametrize(
    "text, digits",
    [
        ("twenty-one eggs, two hundred and five pens", "21 eggs, 205 pens"),
        ("three thousand four hundred", "3400"),
        ("one two people", "one two people"),
        ("five hundred hundred", "five hundred hundred"),
        ("two thousand three thousand", "two thousand three thousand"),
        ("zero thousand", "zero thousand"),
        ("a hundred", "a hundred"),
    ],
)
def test_words_become_one_number_or_stay_words(text, digits):
    assert to_digits(text) == digits


def test_explanations_without_numbers_are_traced_by_sentences_about_the_problem():
    prompt = "Explain why binary search needs a sorted list."
    of = lambda text: traced(text, "order", prompt=prompt, answer="order")
    first = "Binary search compares the middle of the sorted list with the key."
    second = "One comparison discards half the list, and the search goes on in the sorted rest."
    assert of(f"{first}\n{second}") == 1 and of(first) == 0.5
    assert of(f"{first}\n{first}") == 0.5
    assert of(prompt) == 0 and of("The moon is blue tonight.\nWe all like green cheese.") == 0


# --- confidence -----------------------------------------------------------------------------------

WRONG = GOOD.replace("\n14\n", "\n15\n")
GRID = [n / 20 for n in range(1, 20)]


def confident(completion: str, c: float) -> float:
    return rewards.confidence(sample(completion, answer_logps=(math.log(c),)))


def test_confidence_values_by_hand():
    # right: 1 - (1-c)^2/2; wrong: (1-c^2)/2
    assert confident(GOOD, 1.0) == 1.0
    assert confident(GOOD, 0.8) == near(0.98)
    assert confident(GOOD, 0.5) == near(0.875)
    assert confident(WRONG, 0.5) == near(0.375)
    assert confident(WRONG, 0.8) == near(0.18)
    assert confident(WRONG, 1.0) == 0.0


def test_confidence_rises_with_c_when_right_and_falls_with_c_when_wrong():
    for low, high in itertools.pairwise(GRID):
        assert confident(GOOD, low) < confident(GOOD, high)
        assert confident(WRONG, low) > confident(WRONG, high)


def test_no_wrong_answer_has_a_higher_confidence_score_than_a_right_one():
    assert max(confident(WRONG, c) for c in GRID) < 0.5 < min(confident(GOOD, c) for c in GRID)


def test_confidence_is_a_proper_score_so_honesty_pays_best():
    for p in GRID:
        expected = {c: p * confident(GOOD, c) + (1 - p) * confident(WRONG, c) for c in GRID}
        assert max(expected, key=expected.get) == p


def test_c_is_the_probability_of_the_whole_answer():
    # 0.9 * 0.4 = 0.36: 1 - 0.64^2/2 = 0.7952
    logps = (math.log(0.9), math.log(0.4))
    assert rewards.confidence(sample(answer_logps=logps)) == near(0.7952)


def test_more_tokens_never_raise_the_confidence_in_a_right_answer():
    of = lambda *ps: rewards.confidence(sample(answer_logps=tuple(map(math.log, ps))))
    assert of(0.4, 1.0, 1.0, 1.0) == near(of(0.4)) and of(0.4, 0.99, 0.99) < of(0.4)


@pytest.mark.parametrize("length", range(1, 9))
def test_truth_is_the_best_answer_distribution_for_answers_of_any_length(length):
    # Tokens 0 and 1, the right answer all ones with probability p^length. A sampler that says q
    # for every 1 has expected score, over all 2^length answers, at its best for q = p.
    p = 0.7
    right = p**length

    def expected(q: float) -> float:
        return right * confident(GOOD, q**length) + (1 - right) * confident(WRONG, q**length)

    grid = [n / 100 for n in range(1, 101)]
    assert max(grid, key=expected) == p
    by_enumeration = sum(
        math.prod(p if token else 1 - p for token in answer)
        * confident(GOOD if all(answer) else WRONG, p**length)
        for answer in itertools.product((0, 1), repeat=length)
    )
    assert by_enumeration == near(expected(p))


def test_confidence_without_an_answer_or_its_logps_is_the_lowest():
    for completion in ("", "14", "<answer>14", "<answer>14</answer><answer>14</answer>"):
        assert rewards.confidence(sample(completion)) == 0.0
    assert rewards.confidence(sample(answer_logps=())) == 0.0
    assert rewards.confidence(sample(WRONG, answer_logps=())) == 0.0


def test_confidence_bears_rounding_above_zero_and_impossible_tokens_but_shows_nan():
    assert rewards.confidence(sample(answer_logps=(1e-7,))) == 1.0
    assert rewards.confidence(sample(answer_logps=(-math.inf, -0.1))) == 0.5
    assert math.isnan(rewards.confidence(sample(answer_logps=(math.nan, -0.1))))


# --- verbosity, format ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difficulty", "points"),
    [  # free up to 50, 65, 80 of 100 tokens, then linear to 100
        ("easy", {0: 0, 50: 0, 60: 0.2, 75: 0.5, 100: 1, 120: 1}),
        ("medium", {0: 0, 65: 0, 72: 0.2, 86: 0.6, 100: 1}),
        ("hard", {0: 0, 80: 0, 85: 0.25, 95: 0.75, 100: 1}),
    ],
)
def test_verbosity_is_free_up_to_a_share_that_grows_with_difficulty_then_linear(difficulty, points):
    for tokens, expected in points.items():
        value = rewards.verbosity(sample(num_tokens=tokens, difficulty=difficulty))
        assert value == near(expected), tokens


def test_verbosity_is_a_share_of_the_budget_in_tokens_not_characters():
    a_long_text = GOOD.replace("7 * 2", "so " * 1000 + "7 * 2")
    assert rewards.verbosity(sample(a_long_text)) == 0.0
    assert rewards.verbosity(sample(num_tokens=150, max_tokens=200, difficulty="easy")) == near(0.5)


def test_a_truncated_completion_has_the_full_penalty_however_short():
    assert rewards.verbosity(sample(num_tokens=1, stopped=False)) == 1.0


def test_format_needs_both_a_well_formed_text_and_a_stop_token():
    assert rewards.format_ok(sample()) == 1.0
    assert rewards.format_ok(sample(stopped=False)) == 0.0
    assert rewards.format_ok(sample(GOOD + " bye")) == 0.0


def test_a_sample_with_unknown_difficulty_or_no_budget_is_refused():
    with pytest.raises(UserError, match="'extreme'.*easy, medium, hard"):
        sample(difficulty="extreme")
    with pytest.raises(UserError, match="max_tokens"):
        sample(max_tokens=0)
    with pytest.raises(UserError, match="num_tokens"):
        sample(num_tokens=-1)


# --- weights --------------------------------------------------------------------------------------


def test_default_weights_are_those_of_the_original_document_and_a_tenth_for_the_format():
    common = {"confidence": 0.15, "verbosity": -0.05, "format": 0.1}
    assert START_WEIGHTS.named() == {"correctness": 0.40, "trace": 0.45} | common
    assert END_WEIGHTS.named() == {"correctness": 0.60, "trace": 0.25} | common


def test_annealing_is_linear_with_exact_ends_and_constant_weights_stay_bit_equal():
    assert rewards.weights_at(START_WEIGHTS, END_WEIGHTS, 0.0) == START_WEIGHTS
    assert rewards.weights_at(START_WEIGHTS, END_WEIGHTS, 1.0) == END_WEIGHTS
    for progress, trace, correctness in ((0.25, 0.40, 0.45), (0.5, 0.35, 0.50), (0.75, 0.30, 0.55)):
        weights = rewards.weights_at(START_WEIGHTS, END_WEIGHTS, progress)
        assert weights.trace == near(trace) and weights.correctness == near(correctness)
    for progress in (n / 97 for n in range(98)):
        weights = rewards.weights_at(START_WEIGHTS, END_WEIGHTS, progress)
        assert (weights.confidence, weights.verbosity) == (0.15, -0.05)
    for first, last in itertools.product((n / 100 for n in range(1, 100, 7)), repeat=2):
        start, end = (replace(START_WEIGHTS, trace=trace) for trace in (first, last))
        assert rewards.weights_at(start, end, 1.0) == end


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, math.inf])
def test_progress_outside_the_run_is_refused(progress):
    with pytest.raises(UserError, match="progress"):
        rewards.weights_at(START_WEIGHTS, END_WEIGHTS, progress)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trace": math.nan}, "trace is nan"),
        ({"correctness": math.inf}, "correctness is inf"),
        ({"verbosity": 0.05}, "verbosity is 0.05.*give -0.05"),
        ({"confidence": -0.15}, "confidence is -0.15"),
        ({"correctness": 0.0, "trace": 0.0, "confidence": 0.0, "format": 0.0}, "sum to -0.05"),
    ],
)
def test_senseless_weights_are_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        replace(START_WEIGHTS, **changes)


# --- scoring --------------------------------------------------------------------------------------

DISTINCT = RewardWeights(correctness=0.5, trace=0.3, confidence=0.11, verbosity=-0.07, format=0.13)


def test_a_reward_is_binary_where_only_a_right_answer_is_paid():
    only_right = RewardWeights(
        correctness=1.0, trace=0.0, confidence=0.0, verbosity=0.0, format=0.0
    )
    binary = RewardConfig(start=only_right, end=only_right, extra=("seen.py:f=0",))
    assert binary.is_binary
    assert not RewardConfig().is_binary
    assert not replace(binary, end=END_WEIGHTS).is_binary
    assert not replace(binary, start=replace(only_right, verbosity=-0.1)).is_binary
    assert not replace(binary, extra=("paid.py:f",)).is_binary


def test_totals_are_the_weighted_sum_of_the_components_row_by_row():
    hard_and_long = sample(WRONG, difficulty="hard", num_tokens=85, answer_logps=(math.log(0.8),))
    first = sample(answer_logps=(math.log(0.5),))
    scores = rewards.score([first, hard_and_long], DISTINCT)
    expected = {
        "correctness": [1, 0],
        "trace": [1, 1 / 9],  # no step leads to 15: half of 2/3, and a third of that
        "confidence": [0.875, 0.18],
        "verbosity": [0, 0.25],
        "format": [1, 1],
    }
    assert list(scores.components) == list(expected)
    for name, values in expected.items():
        assert scores.components[name] == [near(value) for value in values]
    # 0.5 + 0.3 + 0.11*0.875 + 0.13 ; 0.3/9 + 0.11*0.18 - 0.07*0.25 + 0.13
    assert scores.totals == [near(1.02625), near(0.3 / 9 + 0.1323)]


def test_every_component_lies_in_its_range_on_arbitrary_completions():
    rng = random.Random(7)
    parts = [
        "<reasoning>",
        "</reasoning>",
        "<answer>",
        "</answer>",
        "14",
        "3 + 4 = 7\n",
        " so we add ",
    ]
    for _ in range(300):
        one = sample(
            "".join(rng.choices(parts, k=rng.randrange(9))),
            difficulty=rng.choice(["easy", "medium", "hard"]),
            num_tokens=rng.randrange(101),
            answer_logps=tuple(-rng.expovariate(1) for _ in range(rng.randrange(3))),
            stopped=rng.random() < 0.5,
        )
        for name, values in rewards.score([one], DISTINCT).components.items():
            assert 0.0 <= values[0] <= 1.0, name


def test_extra_rewards_get_their_own_column_and_weight():
    short = lambda one: -len(one.completion) / 10
    scores = rewards.score([sample("12345")], DISTINCT, extra=[("short", short, 0.4)])
    plain = rewards.score([sample("12345")], DISTINCT)
    assert scores.components["short"] == [-0.5]
    assert scores.totals[0] == near(plain.totals[0] - 0.2)


def test_no_samples_give_empty_columns():
    scores = rewards.score([], DISTINCT)
    assert scores.totals == [] and set(map(tuple, scores.components.values())) == {()}


def test_a_reward_that_raises_is_named_with_row_place_and_fix_and_chained():
    def picky(one: Sample) -> float:
        return 1 / (one.num_tokens - 9)

    with pytest.raises(UserError) as caught:
        rewards.score([sample(), sample(num_tokens=9)], DISTINCT, extra=[("picky", picky, 1.0)])
    message = str(caught.value)
    for part in (
        "'picky'",
        "row 1",
        "ZeroDivisionError",
        "test_rewards.py:",
        "fix",
        "Two baskets",
    ):
        assert part in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1.0", [1.0], 1j, 10**400])
def test_a_reward_that_returns_no_finite_number_is_named_with_its_row(bad):
    with pytest.raises(UserError) as caught:
        rewards.score([sample()], DISTINCT, extra=[("odd", lambda one: bad, 1.0)])
    assert "'odd'" in str(caught.value) and "row 0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ints_bools_fractions_and_numpy_scalars_are_numbers():
    numpy = pytest.importorskip("numpy")
    for value in (1, True, Fraction(1), numpy.float32(1), numpy.array(1.0)):
        scores = rewards.score([sample()], DISTINCT, extra=[("one", lambda one, v=value: v, 1.0)])
        assert scores.components["one"] == [1.0] and type(scores.components["one"][0]) is float


def test_a_nan_log_prob_is_reported_and_not_trained_on():
    with pytest.raises(UserError, match="'confidence' returned nan"):
        rewards.score([sample(answer_logps=(math.nan,))], DISTINCT)


def test_a_taken_name_and_a_bad_weight_are_refused():
    one = lambda _: 1.0
    with pytest.raises(UserError, match="'trace'"):
        rewards.score([sample()], DISTINCT, extra=[("trace", one, 1.0)])
    with pytest.raises(UserError, match="'mine'"):
        rewards.score([sample()], DISTINCT, extra=[("mine", one, 1.0), ("mine", one, 1.0)])
    with pytest.raises(UserError, match="'mine' has weight nan"):
        rewards.score([sample()], DISTINCT, extra=[("mine", one, math.nan)])


def per_token(one: Sample) -> float:
    return 1 / one.num_tokens


def test_within_a_run_a_completion_that_a_reward_fails_on_is_paid_its_group_s_mean(capsys):
    tolerant = TolerantReward("mine", per_token, may_fail_on_all=False)
    samples = [sample(num_tokens=number) for number in (2, 0, 4)]
    scores = rewards.score(samples, DISTINCT, extra=[("mine", tolerant, 1.0)])
    bare = rewards.score(samples, DISTINCT)
    assert scores.components["mine"] == [0.5, None, 0.25]
    paid = [total - without for total, without in zip(scores.totals, bare.totals, strict=True)]
    assert paid == near([0.5, 0.375, 0.25])
    assert tolerant.num_missing(samples, scores.components["mine"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: reward 'mine' raised ZeroDivision")
    assert "on row 1" in said and "missing/mine" in said


def test_a_reward_that_fails_on_all_completions_of_a_step_stops_the_run_and_no_evaluation():
    whole_batch = rewards.batch_reward(lambda samples: [per_token(one) for one in samples])
    samples = [sample(num_tokens=0), sample(num_tokens=0)]
    for reward in (per_token, whole_batch):
        with pytest.raises(UserError, match="all 2 completions of a step: reward 'mine' raised"):
            TolerantReward("mine", reward, may_fail_on_all=False)(samples)
        assert TolerantReward("mine", reward, may_fail_on_all=True)(samples) == [None, None]


def test_a_reward_that_does_not_return_is_named_while_the_run_waits_for_it(capsys, monkeypatch):
    monkeypatch.setattr(rewards.scores, "SLOW_SECONDS", 0.05)
    said = []

    def waits(one: Sample) -> float:
        for _ in range(1000):
            if line := capsys.readouterr().err:
                said.append(line)
                return 1.0
            time.sleep(0.01)
        return 0.0

    rewards.score([sample()], DISTINCT, extra=[("mine", waits, 1.0), ("fast", per_token, 1.0)])
    time.sleep(0.1)
    assert len(said) == 1 and said[0].count("\n") == 1 and capsys.readouterr().err == ""
    assert said[0].startswith("warning: reward 'mine' has not returned for 0.05 seconds; ")


# --- loading a user's reward ----------------------------------------------------------------------


def test_a_reward_is_loaded_from_a_file_and_scores(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Rule:\n    word: str\n"  # looks its module up while it is made
        "def polite(sample) -> float:\n    return float(Rule('please').word in sample.completion)\n"
    )
    polite = rewards.load_reward(f"{file}:polite")
    assert (polite(sample("please")), polite(sample("now"))) == (1.0, 0.0)


def test_two_files_of_the_same_name_stay_apart(tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"VALUE = {value}\ndef f(s): return VALUE\n")
    loaded = [rewards.load_reward(f"{tmp_path / folder / 'mine.py'}:f") for folder in "ab"]
    assert [reward(sample()) for reward in loaded] == [1.0, 2.0]
    assert [vars(sys.modules[reward.__module__])["VALUE"] for reward in loaded] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("source", "spec", "parts"),
    [
        ("def f(s): return 1.0", "mine.py", ["path/to/file.py:function"]),
        ("def f(s): return 1.0", "mine.py:", ["path/to/file.py:function"]),
        ("def f(s): return 1.0", ":f", ["path/to/file.py:function"]),
        ("def f(s): return 1.0", "other.py:f", ["no Python file", "other.py"]),
        ("def f(s): return 1.0\n_hidden = len", "mine.py:g", ["has no 'g'", "it has f"]),
        ("g = 3", "mine.py:g", ["'g' is of type int", "name a function"]),
        ("x = 1\nimport no_such_module_here", "mine.py:f", ["line 2", "no_such_module_here"]),
        ("x = 1\n\n1 / 0", "mine.py:f", ["line 3", "ZeroDivisionError"]),
        ("def f(s):\nreturn 1", "mine.py:f", ["line 2", "IndentationError"]),
        ("import sys\nsys.exit(3)", "mine.py:f", ["line 2", "SystemExit"]),
    ],
)
def test_a_reward_that_cannot_be_loaded_gives_one_line_that_says_why(
    tmp_path, monkeypatch, source, spec, parts
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    before = set(sys.modules)
    with pytest.raises(UserError) as caught:
        rewards.load_reward(spec)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    if "line" in parts[0]:
        assert caught.value.__cause__ is not None
        assert not {name for name in set(sys.modules) - before if "mine.py" in name}


def test_rewards_import_only_the_standard_library():
    code = (
        "import sys, json; before = set(sys.modules); import gemma_grpo.rewards.components;"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(out.stdout)) - set(sys.stdlib_module_names) == {"gemma_grpo"}


@pytest.mark.parametrize(
    ("specs", "part"),
    [
        (("ra.py:f", "rb.py:f"), "two rewards are named 'f'"),
        (("ra.py:f=nan",), "the weight is nan"),
        (("ra.py:trace",), "two rewards are named 'trace'"),
    ],
)
def test_clashing_names_and_senseless_weights_are_refused_when_loaded(
    tmp_path, monkeypatch, specs, part
):
    monkeypatch.chdir(tmp_path)
    for file in ("ra.py", "rb.py"):
        (tmp_path / file).write_text("def f(s): return 1.0\ntrace = f\n")
    with pytest.raises(UserError, match=part):
        rewards.load_extra_rewards(specs)


def test_a_batch_reward_sees_all_samples_and_must_return_a_value_for_each():
    longest = rewards.batch_reward(
        lambda samples: [one.num_tokens / max(s.num_tokens for s in samples) for one in samples]
    )
    two = [sample(num_tokens=10), sample(num_tokens=40)]
    scores = rewards.score(two, DISTINCT, extra=[("longest", longest, 1.0)])
    assert scores.components["longest"] == [0.25, 1.0]
    keyed = rewards.batch_reward(lambda samples: dict.fromkeys(range(len(samples)), 0.0))
    with pytest.raises(UserError, match="a dict in place of a list"):
        rewards.score([sample()], RewardWeights(), [("keyed", keyed, 1.0)])
    huge = lambda one: math.exp(100)
    with pytest.raises(UserError, match="return one finite float"):
        rewards.score([sample()], RewardWeights(), [("huge", huge, 1.0)])
    short = rewards.batch_reward(lambda samples: [1.0])
    with pytest.raises(UserError, match="'short' returned 1 values for 2 samples"):
        rewards.score(two, DISTINCT, extra=[("short", short, 1.0)])


@pytest.mark.parametrize(
    "text, named",
    [
        ("def f(completions, **kw)", "takes one gemma_grpo.Sample; use @batch_reward"),
        ("def f(prompts, completions)", "takes one gemma_grpo.Sample"),
        ("def f(sample, answer)", "has the parameters (sample, answer): a reward takes one"),
        ("def f()", "takes one gemma_grpo.Sample"),
        ("def f(*, sample)", "takes one gemma_grpo.Sample"),
        ("async def f(sample)", "is an async def, which nothing awaits: use def"),
    ],
)
def test_a_reward_that_does_not_take_one_sample_is_refused_where_it_is_loaded(
    tmp_path, text, named
):
    file = tmp_path / "mine.py"
    file.write_text(f"{text}:\n    return 1.0\n")
    with pytest.raises(UserError) as error:
        rewards.load_reward(f"{file}:f")
    assert named in str(error.value)
    with pytest.raises(UserError) as error:
        rewards.load_extra_rewards(["session:f"], {"f": runpy.run_path(str(file))["f"]})
    assert named in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "def f(sample, scale=2)",
        "def f(*samples)",
        "from gemma_grpo.rewards import batch_reward\n@batch_reward\ndef f(completions)",
    ],
)
def test_a_reward_that_can_be_called_with_one_argument_is_loaded(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(f"{text}:\n    return 1.0\n")
    assert rewards.load_reward(f"{file}:f")([]) == 1.0


def test_scores_tell_how_long_they_took():
    slow = lambda one: time.sleep(0.02) or 1.0
    assert rewards.score([sample(), sample()], DISTINCT, [("slow", slow, 1.0)]).seconds >= 0.04


def test_a_coroutine_is_no_number_and_leaves_no_warning_behind(recwarn):
    async def mine(sample):
        return 1.0

    with pytest.raises(UserError, match="'mine' returned <coroutine"):
        rewards.score([sample()], START_WEIGHTS, [("mine", mine, 1.0)])
    gc.collect()
    assert not recwarn.list


@pytest.mark.parametrize(
    "raised", [SystemExit(0), GeneratorExit(), type("Own", (BaseException,), {})()]
)
def test_whatever_a_reward_raises_is_its_own_fault_in_one_line(raised):
    def mine(sample):
        raise raised

    with pytest.raises(UserError, match=f"'mine' raised {type(raised).__name__}"):
        rewards.score([sample()], START_WEIGHTS, [("mine", mine, 1.0)])
