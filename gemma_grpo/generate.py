"""The generation command: completes a prompt or a file of prompts, or holds a conversation.

    python -m gemma_grpo.generate RUN --prompt "What is 12 + 7?"     a run's last finished stage
    python -m gemma_grpo.generate --weights ~/gemma-3-1b-it --chat   a checkpoint, turn by turn
    python -m gemma_grpo.generate --weights gemma3-270m --raw --prompt "The capital of France is"
    python -m gemma_grpo.generate RUN --prompts questions.txt --out answers.jsonl

Prints completions, or with --prompts or --json JSON lines, which --out writes to a file.
"""

import contextlib
import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gemma_grpo import cli
from gemma_grpo.cli import UserError
from gemma_grpo.data import jsonl
from gemma_grpo.generation import chat
from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.records import files

if TYPE_CHECKING:  # --help does not wait for JAX
    import jax

    from gemma_grpo.generation.generator import Generator

    Key = jax.Array
else:
    Generator = Key = Any

MAX_COMPLETION_LENGTH = 512  # of a model that comes without a run's own budget


@dataclass(frozen=True)
class Options:
    """What is completed, how, and where it goes."""

    run_or_weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = ""
    """The model, as for --weights."""
    weights: str = ""
    """The model: a run directory (its last finished stage), gemma3-nano (embedded), gemma3-270m
    (its installed package), a Hugging Face or Kaggle folder, or a .gguf file."""
    prompt: str | None = None
    """The user's turn."""
    prompts: Path | None = None
    """A file of prompts: .jsonl with a field "prompt", or text with one per line. The answers are
    JSON lines."""
    chat: bool = False
    """A conversation, read line by line from standard input."""
    raw: bool = False
    """No chat turns: the model continues the prompt as it is (for base models)."""
    instruction: str | None = None
    """Text put before the question on its own line; by default the run's own."""
    num: int = 1
    """Number of completions of each prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens with this total probability; 1: from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the likeliest one's probability; 0: from
    all."""
    seed: int = 0
    """Random seed of the samples."""
    max_prompt_length: int = 2048
    """Most tokens of a prompt or a conversation."""
    max_completion_length: int = 0
    """Most tokens of a completion; 0: the run's own budget, or 512."""
    batch_size: int = 16
    """Prompts of a file that are completed at a time."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype. By default the run's own, or float32."""
    stream: Literal["auto", "yes", "no"] = "auto"
    """Show text while it is generated; auto does so if a single completion goes to a terminal."""
    json: bool = False
    """Print one JSON line per completion, with its log-prob, instead of the text."""
    out: Path | None = None
    """A new file for the JSON lines, which are then not printed."""

    def __post_init__(self):
        if min(self.num, self.batch_size, self.max_prompt_length) < 1:
            raise UserError("--num, --batch-size and --max-prompt-length must be at least 1")
        if self.max_completion_length < 0:
            raise UserError("--max-completion-length must be at least 0")
        if (self.prompt is not None) + (self.prompts is not None) + self.chat != 1:
            raise UserError("give one of --prompt TEXT, --prompts FILE and --chat")
        if self.chat and (self.raw or self.num > 1 or self.writes_json):
            raise UserError("--chat goes without --raw, --num, --json and --out")
        if self.raw and self.instruction:
            raise UserError("--raw takes the prompt as it stands: put the --instruction into it")
        if self.stream == "yes" and (self.num > 1 or self.writes_json):
            raise UserError("--stream yes shows one completion: leave --num, --json and --out out")

    @property
    def writes_json(self) -> bool:
        """Whether completions go out as JSON lines."""
        return self.json or self.out is not None or self.prompts is not None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(
        lambda: _generate(cli.parse(Options, arguments, command="generate", description=__doc__))
    )


def _generate(options: Options) -> int:
    if options.out is not None:
        files.require_new_file(options.out)
    where = cli.one_model(options.run_or_weights, options.weights)
    asked = _read_prompts(options.prompts) if options.prompts is not None else [options.prompt]
    cli.require_one_process("generate")
    cli.use_compilation_cache(cli.cache_for(where))
    generator = _load(where, options)
    key = generator.runtime.key
    if options.chat:
        _converse(generator, key)
    elif options.writes_json:
        _write_lines(options, _answers(generator, asked, options, key))
    elif options.stream == "yes" or (
        options.stream == "auto" and options.num == 1 and sys.stdout.isatty()
    ):
        for text in _stream(generator, _encode(generator, asked[0], options), key):
            print(text, end="", flush=True)
        print()
    else:
        for completion in generator.complete([_encode(generator, asked[0], options)], key)[0]:
            print(completion.text)
    return 0


def _load(where: str, options: Options) -> Generator:
    from gemma_grpo.generation.generator import make_generator
    from gemma_grpo.runtime import load_model

    run, trained = cli.trained(where)
    own_length = run.model.max_completion_length if trained else MAX_COMPLETION_LENGTH
    own_instruction = run.model.instruction
    model = replace(
        run.model,
        instruction=own_instruction if options.instruction is None else options.instruction,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length or own_length,
        dtype=options.dtype or run.model.dtype,
        rollout_layout="data",  # streaming runs on one device
    )
    runtime, params = load_model(model, seed=options.seed, trained=trained)
    return make_generator(
        runtime,
        params,
        num=options.num,
        sampling=SamplingConfig(options.temperature, options.top_k, options.top_p, options.min_p),
    )


def _read_prompts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [jsonl.required_text(row, "prompt", where) for where, row in jsonl.read_rows(path)]
    if path.suffix in (".csv", ".parquet"):
        raise UserError(f"{path}: prompts are a .jsonl file's, or text with one a line")
    try:
        text = jsonl.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    # Not str.splitlines, which also cuts at form feeds, NEL and U+2028.
    lines = re.split(r"[\r\n]+", text)
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path}: no prompt in it: write one a line")
    return prompts


def _encode(generator: Generator, prompt: str, options: Options) -> list[int]:
    if options.raw:
        return generator.runtime.tokenizer.encode_raw(prompt)
    return generator.runtime.encode_question(prompt)


def _answers(generator: Generator, asked: list[str], options: Options, key: Key) -> Iterator[dict]:
    """A line for each completion, batch by batch."""
    encoded = [_encode(generator, prompt, options) for prompt in asked]
    groups = generator.complete_all(encoded, key, options.batch_size)
    for prompt, group in zip(asked, groups, strict=True):
        for completion in group:
            line = completion._asdict()
            yield {"prompt": prompt, "completion": line.pop("text"), **line}


def _write_lines(options: Options, lines: Iterator[dict]) -> None:
    """To the standard output, or to a file that appears complete or not at all."""
    with contextlib.ExitStack() as stack:
        file = None
        if options.out is not None:
            unfinished = stack.enter_context(files.atomic_write(options.out))
            file = stack.enter_context(unfinished.open("w", encoding="utf-8"))
        for line in lines:
            # Escapes of JSON's own pass whatever encoding the terminal has.
            print(json.dumps(line, ensure_ascii=file is None), file=file, flush=True)


def _stream(generator: Generator, ids: list[int], key: Key) -> Iterator[str]:
    """The text of one completion, as it is drawn."""
    shown = ""
    for (completion,) in generator.stream(ids, key):
        yield completion.text[len(shown) :]
        shown = completion.text


def _converse(generator: Generator, key: Key) -> None:
    with contextlib.suppress(ValueError):  # in a thread that is not the main one
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it stops a reply, no more
    import jax

    replies = 0

    def reply(ids: list[int]) -> Iterator[str]:
        nonlocal replies
        replies += 1
        return _stream(generator, ids, jax.random.fold_in(key, replies))

    chat.converse(
        _typed(),
        reply,
        chat.Screen(
            write=lambda text: print(text, end="", flush=True),
            note=lambda text: print(f"({text})", file=sys.stderr, flush=True),
        ),
        generator.runtime.tokenizer,
        instruction=generator.runtime.instruction,
        max_prompt_length=generator.runtime.max_prompt_length,
    )


def _typed() -> Iterator[str]:
    """The user's lines, with a prompt mark and line editing at a terminal."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (its import gives `input` an editable line)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # under LANG=C Python lets any byte pass
    with contextlib.suppress(EOFError):
        while True:
            try:
                yield input("> " if sys.stdin.isatty() else "")
            except UnicodeDecodeError as error:
                raise UserError(f"the standard input is not {error.encoding}") from error


if __name__ == "__main__":
    cli.start(main)
