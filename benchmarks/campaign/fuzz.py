"""Parsers fuzzed by coverage (atheris): a user's error or a value, never another exception.

    python -m benchmarks.campaign.fuzz PARSER -max_total_time=600 -rss_limit_mb=1024 -timeout=30

PARSER: safetensors, gguf, sentencepiece, config, answers, jsonl. libFuzzer's own flags follow it.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gemma_grpo.weights", "gemma_grpo.rewards", "json"]):
    from gemma_grpo.data import jsonl
    from gemma_grpo.errors import UserError
    from gemma_grpo.rewards import answers, blocks, lenient, steps
    from gemma_grpo.weights import gguf_header, sentencepiece_model, tensor_file


def _by_file(read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A parser of files as one of bytes."""
    path = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return parse


def _config(data: bytes) -> None:
    from gemma_grpo import config

    config.from_text(data.decode("utf-8", "replace"))


def _answers(data: bytes) -> None:
    text, _, gold = data.decode("utf-8", "replace").partition("\n\n")
    answers.answers_match(text, gold)
    lenient.lenient_answer(text)
    blocks.parse(text)
    steps.read_steps(text, gold)


PARSERS = {
    "safetensors": _by_file(tensor_file.slots),
    "gguf": _by_file(gguf_header.read_header),
    "sentencepiece": _by_file(sentencepiece_model.rebuild),
    "config": _config,
    "answers": _answers,
    "jsonl": _by_file(jsonl.read_rows),
}


def main() -> None:
    """Fuzzes one parser until libFuzzer's limits; exits as libFuzzer does."""
    parse = PARSERS[sys.argv[1]]

    def one_input(data: bytes) -> None:
        try:
            parse(data)
        except UserError:
            pass

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
