"""A conversation in Gemma's turns, kept within the prompt budget."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from gemma_grpo.text.prompts import question
from gemma_grpo.text.tokenizer import Tokenizer

HELP = "/reset forgets the conversation, /exit or the end of input leaves, Ctrl-C stops a reply"


class Screen(NamedTuple):
    """Where a conversation is shown: `write` takes the model's text, `note` the program's lines."""

    write: Callable[[str], object]
    note: Callable[[str], object]


def converse(
    lines: Iterable[str],
    reply: Callable[[list[int]], Iterator[str]],
    screen: Screen,
    tokenizer: Tokenizer,
    *,
    instruction: str,
    max_prompt_length: int,
) -> None:
    """Answers line after line until `/exit` or the last one.

    The whole conversation is the prompt of each reply. When it outgrows the budget, its oldest
    turns are dropped and a note says so.

    Args:
        lines: what the user types; blank ones are skipped.
        reply: prompt ids -> the model's text in parts, as it is generated.
        instruction: put before the first turn that is kept, on a line of its own.
        max_prompt_length: the most tokens of the conversation.
    """
    turns: list[str] = []
    note = screen.note
    note(HELP)
    for line in lines:
        line = line.strip()
        if line == "/exit":
            return
        if line == "/reset":
            turns = []
            note("the conversation is forgotten")
        elif line.startswith("/"):
            note(f"{line.split()[0]} is no command: {HELP}")
        elif line:
            ids, kept = _within(max_prompt_length, [*turns, line], tokenizer, instruction)
            if ids is None:
                note(
                    f"this takes more than the {max_prompt_length} tokens of max_prompt_length, "
                    "and was left out: shorten it or raise --max-prompt-length"
                )
                continue
            if dropped := (len(turns) + 1 - len(kept)) // 2:
                note(f"the oldest {dropped} exchanges were dropped to stay within the budget")
            turns = [*kept, _reply(reply(ids), screen)]


def _within(
    budget: int, turns: list[str], tokenizer: Tokenizer, instruction: str
) -> tuple[list[int] | None, list[str]]:
    """The ids of the most recent turns that fit, and those turns; None if not even one fits."""
    while turns:
        instructed = [question(instruction, turns[0]), *turns[1:]]
        if len(ids := tokenizer.encode_turns(instructed)) <= budget:
            return ids, turns
        turns = turns[2:]
    return None, turns


def _reply(parts: Iterator[str], screen: Screen) -> str:
    """Writes the reply as it grows; returns its text, up to where the user stopped it."""
    text = ""
    try:
        for part in parts:
            text += part
            screen.write(part)
    except KeyboardInterrupt:
        screen.write("\n")
        screen.note("stopped; the conversation goes on")
    else:
        screen.write("\n")
    return text
