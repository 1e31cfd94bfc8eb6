"""The reasoning-gym adapter, on a stub package everywhere and on the real one where installed."""

import random
import sys
import types

import pytest

from gemma_grpo.data import reasoning_gym
from gemma_grpo.errors import UserError


class StubTask:
    """Item i follows from seed + i, as in the package; `space` different prompts."""

    def __init__(self, seed, size, space):
        self.seed, self.size, self.space = seed, size, space

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        number = random.Random(self.seed + index).randrange(self.space)
        return {"question": f" number {number}?\n", "answer": f"{number} ", "metadata": {}}


class NoGold(StubTask):
    def __getitem__(self, index):
        return {"question": "prove it", "answer": None, "metadata": {}}


class OftenBlank(StubTask):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item if index % 2 else {**item, "answer": ""}


class Careless(StubTask):
    def __getitem__(self, index):
        number = random.randrange(10**9)
        return {"question": f"number {number}?", "answer": "1", "metadata": {}}


TASKS = {
    "counting": (StubTask, 10**9),
    "tiny_counting": (StubTask, 12),
    "proving": (NoGold, 1),
    "erasing": (OftenBlank, 10**9),
    "careless": (Careless, 1),
    "word_ladder": (StubTask, 10**9),
    "codeio": (StubTask, 10**9),
}


@pytest.fixture
def gym(monkeypatch):
    def create_dataset(name, seed, size):
        if name == "broken":
            raise AssertionError("min must be below max")
        task, space = TASKS[name]
        return task(seed, size, space)

    package, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    package.create_dataset = create_dataset
    factory.DATASETS = {**TASKS, "broken": None}
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


def draw(task, split="train", num=30, seed=0):
    return reasoning_gym.reasoning_gym_problems(task, split=split, num=num, seed=seed)


def prompts(*args, **options) -> set[str]:
    return {problem.prompt for problem in draw(*args, **options)}


def test_items_become_problems_of_the_tasks_domain(gym):
    problem = draw("counting", num=1)[0]
    assert problem.prompt == f"number {problem.answer}?"
    assert (problem.completion, problem.difficulty) == (None, "medium")
    assert problem.domain == "counting"


def test_draws_repeat_for_a_seed_and_differ_between_seeds(gym):
    assert draw("counting") == draw("counting")
    assert draw("counting", num=5) == draw("counting")[:5]
    assert len(prompts("counting", num=200)) == 200
    assert len(prompts("counting", "test", num=150)) == 150  # some 450 draws are of the other side
    assert not prompts("counting", seed=0, num=200) & prompts("counting", seed=1, num=200)


def test_more_problems_than_a_chunk_are_drawn(gym, monkeypatch):
    monkeypatch.setattr(reasoning_gym, "CHUNK", 10)
    assert len(prompts("counting", num=35)) == 35


def test_train_and_test_never_share_a_prompt_whatever_the_seeds(gym):
    train = set().union(*(prompts("tiny_counting", num=4, seed=seed) for seed in range(20)))
    test = set().union(*(prompts("tiny_counting", "test", num=2, seed=seed) for seed in range(20)))
    assert train and test
    assert not train & test


def test_a_small_task_says_how_many_different_problems_it_has(gym):
    with pytest.raises(UserError, match="too few different train problems: found [0-9]+ of the 13"):
        draw("tiny_counting", num=13)


def test_a_task_without_gold_answers_is_refused_by_name(gym):
    with pytest.raises(UserError, match='"proving" gives no gold answers'):
        draw("proving")


def test_items_with_a_blank_answer_are_passed_over(gym):
    assert all(problem.answer for problem in draw("erasing"))


def test_an_unknown_task_names_close_matches(gym):
    with pytest.raises(UserError, match='no reasoning_gym task named "countin".* counting'):
        draw("countin")
    with pytest.raises(UserError, match='no reasoning_gym task named "zzz": did you mean'):
        draw("zzz")


def test_a_task_that_cannot_be_drawn_says_why(gym):
    with pytest.raises(UserError, match='"broken" cannot be drawn: min must be below max'):
        draw("broken")


def test_tasks_that_would_not_resume_exactly_are_refused(gym, monkeypatch):
    with pytest.raises(UserError, match="set PYTHONHASHSEED=0"):
        draw("word_ladder")
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    with pytest.raises(UserError, match="set PYTHONHASHSEED=0"):
        draw("word_ladder")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(draw("word_ladder")) == 30
    with pytest.raises(UserError, match='"codeio" draws other problems in every process'):
        draw("codeio")


def test_a_task_that_uses_the_global_random_repeats(gym):
    random.seed(99)
    first = draw("careless", seed=1)
    random.seed(100)
    assert draw("careless", seed=1) == first
    assert draw("careless", seed=2) != first


def test_the_global_random_is_left_as_it_was():
    # Not through draw: the checked return value would let beartype draw from it too.
    before = random.getstate()
    with pytest.raises(KeyError), reasoning_gym._global_random_seeded(1):
        random.random()
        raise KeyError
    assert random.getstate() == before


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r'pip install "gemma_grpo\[tasks\]"'):
        draw("chain_sum")


def test_the_real_package_answers_its_own_questions():
    pytest.importorskip("reasoning_gym")
    for problem in draw("chain_sum", num=20):
        # "...arithmetic problem: 4 - 1 - 7 =": a sum that Python can do.
        expression = problem.prompt.rpartition(":")[2].strip().rstrip("=")
        assert eval(expression, {}) == int(problem.answer)
    with pytest.raises(UserError, match='"propositional_logic" gives no gold answers'):
        draw("propositional_logic")
    with pytest.raises(UserError, match="chain_sum"):
        draw("chainsum")
    assert not prompts("chain_sum", num=300, seed=3) & prompts("chain_sum", "test", num=50, seed=4)
