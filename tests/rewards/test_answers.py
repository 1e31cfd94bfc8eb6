"""The known traps of GSM8K parsers, each through the lenient reader and the comparison with the
gold answer. tests/test_rewards.py holds the readers' rules."""

import pytest

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
