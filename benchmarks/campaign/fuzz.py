"""Parsers fuzzed by coverage (atheris): a user's error or a value, never another exception, more
than `SLOW` CPU seconds or more than 1 GB.

    python -m benchmarks.campaign.fuzz PARSER [--minutes 10] [libFuzzer's flags, its corpus]

The last line is JSON: how many inputs ran, and the CPU minutes that they took. libFuzzer keeps what
failed as crash-*, timeout-* or oom-* in the current folder.
"""

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

INSTRUMENTED = [f"gemma_grpo.{part}" for part in ("config", "data", "rewards", "text", "weights")]
with atheris.instrument_imports(include=[*INSTRUMENTED, "csv", "json", "yaml"]):
    from gemma_grpo import config
    from gemma_grpo.data import gsm8k, jsonl, tables
    from gemma_grpo.errors import UserError
    from gemma_grpo.rewards import answers, blocks, lenient, steps
    from gemma_grpo.weights import gguf_header, hf_config, sentencepiece_model, tensor_file

SLOW = 5.0  # CPU seconds for one input of at most 4 KB
FLAGS = ["-rss_limit_mb=1024", "-timeout=300", "-max_len=4096"]
SCRATCH = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}"


def _safetensors(data: bytes) -> None:
    """The file as it is; and with a right length before what is taken for its header."""
    header, _, tensors = data.partition(b"\0")
    for content in (data, len(header).to_bytes(8, "little") + header + tensors):
        SCRATCH.write_bytes(content)
        try:
            tensor_file.slots(SCRATCH)
        except UserError:
            pass


def _by_file(read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A parser of files as one of bytes."""

    def parse(data: bytes) -> None:
        SCRATCH.write_bytes(data)
        read(SCRATCH)

    return parse


def _config(data: bytes) -> None:
    config.to_yaml(config.from_text(data.decode("utf-8", "replace")))


def _hf_config(data: bytes) -> None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(fields, dict):
        hf_config.config_from_hf(fields, where=SCRATCH)


def _answers(data: bytes) -> None:
    text, _, gold = data.decode("utf-8", "replace").partition("\n\n")
    answers.answers_match(text, gold)
    lenient.lenient_answer(text)
    blocks.parse(text)
    steps.read_steps(text, gold)


def _jsonl(data: bytes) -> None:
    SCRATCH.write_bytes(data)
    for where, row in jsonl.read_rows(SCRATCH):
        for read in (jsonl.problem_from_row, gsm8k.problem_from_row):
            try:
                read(row, where)
            except UserError:
                pass


PARSERS = {
    "safetensors": _safetensors,
    "gguf": _by_file(gguf_header.read_header),
    "sentencepiece": _by_file(sentencepiece_model.rebuild),
    "config": _config,
    "hf-config": _hf_config,
    "answers": _answers,
    "jsonl": _jsonl,
    "csv": _by_file(tables.read_csv),
}


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf() -> bytes:
    """A header with a tokenizer's tables of five tokens and one tensor, by hand."""
    name, count = "tokenizer.ggml.", struct.pack("<Q", 5)
    tokens = b"".join(map(_string, ("<pad>", "<eos>", "<bos>", "<unk>", "a b")))
    fields = [
        _string(f"{name}model") + struct.pack("<I", 8) + _string("llama"),
        _string(f"{name}tokens") + struct.pack("<II", 9, 8) + count + tokens,
        _string(f"{name}scores") + struct.pack("<II", 9, 6) + count + struct.pack("<5f", *range(5)),
        _string(f"{name}token_type")
        + struct.pack("<II", 9, 5)
        + count
        + struct.pack("<5i", *[1] * 5),
    ]
    for place, kind in enumerate(("padding", "eos", "bos", "unknown")):
        fields.append(_string(f"{name}{kind}_token_id") + struct.pack("<II", 4, place))
    tensor = _string("x.weight") + struct.pack("<IQQIQ", 2, 4, 8, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, len(fields)) + b"".join(fields) + tensor


TENSORS = {"__metadata__": {"format": "pt"}}
TENSORS |= {
    n: {"dtype": "F32", "shape": [2], "data_offsets": [i * 8, i * 8 + 8]}
    for i, n in enumerate("ab")
}
HF_CONFIG = {
    "hidden_size": 64,
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
}
HF_CONFIG |= {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
SEEDS: dict[str, Sequence[bytes]] = {
    "safetensors": [json.dumps(TENSORS).encode() + b"\0" + bytes(16)],
    "gguf": [_gguf()],
    "sentencepiece": [_gguf()],
    "config": [config.to_yaml(config.RunConfig()).encode(), b"grpo:\n  num_steps: 3\n"],
    "hf-config": [json.dumps(HF_CONFIG).encode()],
    "answers": [
        text.encode()
        for text in (
            "<reasoning>\n3 * 4 = 12\n</reasoning>\n<answer>\n12\n</answer>\n\nWhat is 3 * 4?",
            "\\boxed{\\frac{1}{2}}\n\n0.5",
            "$1,234.50 per hour\n\n1234.5",
            "[1, 2), {3; 4}\n\n(1, 2)",
            "2(x+3)^2 = 2x^2\n\nx = 5e6 km/h",
            "twenty-one thousand and five\n\n1 May 2024",
        )
    ],
    "jsonl": [
        b'{"prompt": "What is 3 + 4?", "answer": "7", "difficulty": "easy"}\n',
        b'{"question": "q", "answer": "1 + 1 = <<1+1=2>>2\\n#### 2"}\n',
    ],
    "csv": [b'prompt,answer\n"What, ""now""?",7\n'],
}


def main() -> None:
    """Fuzzes one parser until it fails, or until its minutes are over."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.campaign.fuzz")
    arguments.add_argument("parser", choices=PARSERS)
    arguments.add_argument("--minutes", type=float, default=10.0, help="of CPU time")
    options, rest = arguments.parse_known_args()
    parse, executions = PARSERS[options.parser], 0
    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{options.parser}-"))
    for place, seed in enumerate(SEEDS[options.parser]):
        (corpus / str(place)).write_bytes(seed)
    started = time.process_time()

    def one_input(data: bytes) -> None:
        nonlocal executions
        began = time.process_time()
        try:
            parse(data)
        except UserError:
            pass
        ended = time.process_time()
        executions += 1
        if ended - began > SLOW:
            raise TimeoutError(f"{ended - began:.1f} CPU seconds")
        if ended - started > options.minutes * 60:
            minutes = round((ended - started) / 60, 1)
            line = {"parser": options.parser, "executions": executions, "cpu_minutes": minutes}
            print(json.dumps(line), flush=True)
            SCRATCH.unlink(missing_ok=True)
            os._exit(0)

    atheris.Setup([sys.argv[0], *FLAGS, *rest, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
