"""The built-in task and the pretraining text: true, disjoint, in the format or out of it."""

import json
import random
import re

import pytest

from gemma_grpo import rewards
from gemma_grpo.data import curriculum
from gemma_grpo.rewards import blocks
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.training import pretraining
from gemma_grpo.training.config import PretrainConfig
from gemma_grpo.weights import assets

EQUATION = re.compile(r"(\d+)(%?) (\+|-|\*|/|of) (\d+) = (\d+)")


def first_drafts(split, num, seed=0):
    return [draft for draft, _ in zip(curriculum.drafts(split, seed), range(num), strict=False)]


def equations_hold(text):
    """Every "a sign b = c" of a text, worked out here; returns how many there were."""
    found = EQUATION.findall(text)
    for a, percent, sign, b, c in found:
        a, b, c = int(a), int(b), int(c)
        assert bool(percent) == (sign == "of")
        left = {"+": a + b, "-": a - b, "*": a * b, "/": a / b, "of": a / 100 * b}[sign]
        assert abs(left - c) < 1e-9, text
    return len(found)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_step_is_true_and_the_last_one_gives_the_answer(split):
    for _, _, draft in first_drafts(split, 900):
        assert equations_hold("\n".join(draft.steps)) == len(draft.steps)
        assert draft.steps[-1].endswith(f" = {draft.answer}")
        assert re.search(rf"\b{draft.answer}\b", draft.conclusion)
        assert 0 <= draft.answer <= 144


def test_each_step_uses_only_numbers_of_the_question_or_of_steps_before():
    for _, _, draft in first_drafts("train", 900):
        known = set(re.findall(r"\d+", draft.question))
        for step in draft.steps:
            *operands, result = re.findall(r"\d+", step)
            assert set(operands) <= known, draft
            known.add(result)


def test_no_problem_stands_on_both_sides_whatever_the_seed():
    train = {d.question for seed in range(2) for _, _, d in first_drafts("train", 2000, seed)}
    test = {d.question for seed in range(2) for _, _, d in first_drafts("test", 800, seed)}
    assert not train & test
    numbers = lambda split: {
        (family.__name__, draft.numbers)
        for seed in range(2)
        for _, family, draft in first_drafts(split, 800, seed)
    }
    assert not numbers("train") & numbers("test")


@pytest.mark.parametrize("seed", range(3))
def test_no_test_problem_shares_its_numbers_in_any_order_with_one_of_its_family(seed):
    keys = lambda problems: {
        (p.domain, tuple(sorted(re.findall(r"\d+", p.prompt)))) for p in problems
    }
    train = keys(curriculum.problems("train", 2000, seed))
    assert not train & keys(curriculum.problems("test", 400, 0))


def test_the_numbers_that_decide_the_split_are_those_of_the_question():
    for _, _, draft in first_drafts("train", 600):
        assert sorted(map(int, re.findall(r"\d+", draft.question))) == sorted(draft.numbers)


def test_harder_problems_take_more_steps():
    needed = {"easy": {1}, "medium": {2}, "hard": {2, 3}}
    for difficulty, _, draft in first_drafts("train", 900):
        assert len(draft.steps) in needed[difficulty]


def test_a_worked_solution_earns_full_marks_and_a_brief_one_shows_no_work():
    for difficulty, _, draft in first_drafts("train", 300):
        for solution, full in ((curriculum.worked(draft), True), (curriculum.brief(draft), False)):
            sample = rewards.Sample(
                draft.question, solution, str(draft.answer), difficulty, 30, 60, (), True
            )
            assert rewards.correctness(sample) == rewards.format_ok(sample) == 1
            assert rewards.trace(sample) == (1 if full else 0)


def test_problems_are_distinct_balanced_and_repeat_with_the_seed():
    problems = curriculum.problems("train", 300, seed=3)
    assert len({problem.prompt for problem in problems}) == 300
    counts = [sum(p.difficulty == name for p in problems) for name in ("easy", "medium", "hard")]
    assert min(counts) > 80
    assert problems == curriculum.problems("train", 300, seed=3)
    assert problems != curriculum.problems("train", 300, seed=4)


def test_about_half_of_the_demonstrations_skip_their_steps():
    problems = curriculum.problems("train", 600, seed=0)
    brief = sum(not EQUATION.search(problem.completion) for problem in problems)
    assert 240 < brief < 360  # 300, and five standard deviations


def test_the_pretraining_text_is_true_and_never_in_the_answer_format():
    rng, drafts = random.Random(0), curriculum.drafts("train", 0)
    texts = [pretraining.document(rng, drafts) for _ in range(3000)]
    assert sum(equations_hold(text) for text in texts) > 3000
    assert not any("reasoning" in text or "<answer" in text for text in texts)
    assert all(blocks.parse(text).answer is None for text in texts)


def test_the_pretraining_text_asks_no_held_out_question():
    held_out = {draft.question for _, _, draft in first_drafts("test", 2000)}
    tokenizer = Tokenizer(assets.NANO_TOKENIZER)
    rows = next(pretraining.batches(tokenizer, batch_size=400, length=200, seed=1))
    texts = ["".join(tokenizer.pieces(row.tolist())) for row in rows]
    question = re.compile(r"(?:user\n|Question: )(.*?)(?:<end_of_turn>|\nAnswer)")
    asked = {found for text in texts for found in question.findall(text)}
    assert len(asked) > 600 and not asked & held_out


def test_the_embedded_model_was_made_of_todays_text():
    record = json.loads((assets.NANO / "pretrain.json").read_text())
    options = PretrainConfig(steps=record["steps"], seed=record["seed"])
    today = pretraining.text_digest(Tokenizer(assets.NANO_TOKENIZER), options)
    assert record["text_sha256"] == today, "the curriculum has changed: make gemma3-nano again"


# The question's own words, read by other means than those that wrote it.
SOLVERS = [
    (r"has (\d+) \w+ and buys (\d+) more", lambda a, b: a + b),
    (r"There are (\d+) \w+ in one box and (\d+) in another", lambda a, b: a + b),
    (r"What is (\d+) \+ (\d+)", lambda a, b: a + b),
    (r"has (\d+) \w+ and gives away (\d+)\.", lambda a, b: a - b),
    (r"There were (\d+) \w+ in a box\. \w+ took (\d+)", lambda a, b: a - b),
    (r"What is (\d+) - (\d+)", lambda a, b: a - b),
    (r"has (\d+) boxes with (\d+) \w+ each\.", lambda a, b: a * b),
    (r"There are (\d+) bags\. Each bag holds (\d+)", lambda a, b: a * b),
    (r"What is (\d+) \* (\d+)", lambda a, b: a * b),
    (r"puts (\d+) \w+ into (\d+) boxes", lambda a, b: a / b),
    (r"(\d+) \w+ are shared by (\d+) friends", lambda a, b: a / b),
    (r"What is (\d+) / (\d+)", lambda a, b: a / b),
    (r"has (\d+) boxes with (\d+) \w+ each and buys (\d+) more", lambda a, b, c: a * b + c),
    (r"has (\d+) boxes with (\d+) \w+ each and gives away (\d+)", lambda a, b, c: a * b - c),
    (r"has (\d+) \w+, buys (\d+) more and gives away (\d+)", lambda a, b, c: a + b - c),
    (r"has (\d+) \w+ and \w+ has (\d+)\. They share .* with (\d+)", lambda a, b, c: (a + b) / c),
    (r"(\d+) \w+ an hour\. It runs (\d+) hours and then (\d+) more\. (\d+)",
     lambda a, b, c, d: a * (b + c) - d),
    (r"costs (\d+) coins\. The price goes up by (\d+)%", lambda a, b: a * (100 + b) / 100),
    (r"costs (\d+) coins\. The price falls by (\d+)%", lambda a, b: a * (100 - b) / 100),
    (r"(\d+) workers build a wall in (\d+) days\. .* (\d+) workers", lambda a, b, c: a * b / c),
]  # fmt: skip


def test_the_answer_is_what_the_question_asks_for():
    used = set()
    for _, _, draft in first_drafts("train", 900):
        matches = [
            (i, re.search(pattern, draft.question)) for i, (pattern, _) in enumerate(SOLVERS)
        ]
        ((i, match),) = [(i, match) for i, match in matches if match]
        assert SOLVERS[i][1](*map(int, match.groups())) == draft.answer, draft.question
        used.add(i)
    assert len(used) == len(SOLVERS)


def test_the_held_out_side_is_the_tenth():
    rng = random.Random(0)
    families = [family for group in curriculum.FAMILIES.values() for family in group]
    sides = [curriculum.side(family, family(rng)) for family in families for _ in range(300)]
    assert 0.07 < sides.count("test") / len(sides) < 0.13
    for split in ("train", "test"):
        drawn = first_drafts(split, 300)
        assert all(curriculum.side(family, draft) == split for _, family, draft in drawn)
