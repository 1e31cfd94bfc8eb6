"""The model of a run, loaded: what does not belong together is refused."""

import dataclasses
from pathlib import Path

import pytest

from gemma_grpo import runtime
from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS
from gemma_grpo.runtime import ModelConfig
from gemma_grpo.weights import Source, assets


@pytest.mark.parametrize("rows, fits", [(511, False), (512, True), (576, True), (577, False)])
def test_a_tokenizer_fits_a_model_of_its_size_or_of_the_known_few_rows_more(rows, fits):
    sizes = dataclasses.replace(CONFIGS["gemma3-nano"], vocab_size=rows)
    source = Source(Path("model"), sizes, {}, tokenizer=assets.NANO_TOKENIZER)
    if fits:
        assert runtime._tokenizer(ModelConfig(), source).vocab_size == 512
    else:
        with pytest.raises(UserError, match=f"512 tokens, but model has {rows}"):
            runtime._tokenizer(ModelConfig(), source)
