"""Problems to token ids: what does not fit is named."""

import pytest

from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.text.prompts import MAX_INSTRUCTION_CHARS, encode_prompts
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights.assets import NANO_TOKENIZER

TOKENIZER = Tokenizer(NANO_TOKENIZER)
PROBLEMS = [Problem(prompt="1 + 1?", answer="2"), Problem(prompt="1 + 1? " * 9, answer="2")]


def test_a_prompt_that_is_too_long_is_named_by_its_place_among_its_own_kind():
    with pytest.raises(UserError, match=r"^held-out problem 2 .* tokens, max_prompt_length is 20;"):
        encode_prompts(PROBLEMS, TOKENIZER, instruction="", max_prompt_length=20, kind="held-out ")


def test_an_instruction_as_long_as_a_book_is_refused_before_it_is_encoded(monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="the instruction has 20,001 characters"):
        encode_prompts(
            PROBLEMS,
            TOKENIZER,
            instruction="x" * (MAX_INSTRUCTION_CHARS + 1),
            max_prompt_length=10**9,
        )


def test_worked_examples_stand_before_each_prompt_and_the_instruction_before_the_first():
    chat = {
        "": ["2 + 2?", "4", "1 + 1?"],
        "Add.": ["Add.\n2 + 2?", "4", "1 + 1?"],
    }
    for instruction, turns in chat.items():
        (ids,) = encode_prompts(
            PROBLEMS[:1],
            TOKENIZER,
            instruction=instruction,
            max_prompt_length=200,
            examples=["2 + 2?", "4"],
        )
        assert ids == TOKENIZER.encode_turns(turns)
    with pytest.raises(UserError, match=f"takes {len(ids)} tokens, max_prompt_length is 20;"):
        encode_prompts(
            PROBLEMS[:1],
            TOKENIZER,
            instruction="Add.",
            max_prompt_length=20,
            examples=["2 + 2?", "4"],
        )
