"""A conversation in Gemma's turns, kept within the prompt budget. Knows no flags and no device."""

from collections.abc import Callable, Iterable, Iterator

from gemma_grpo.text.prompts import question
from gemma_grpo.text.tokenizer import Tokenizer

HELP = "/reset forgets the conversation, /exit or the end of input leaves, Ctrl-C stops a reply"


def converse(
    lines: Iterable[str],
    reply: Callable[[list[int]], Iterator[str]],
    tokenizer: Tokenizer,
    *,
    instruction: str,
    max_prompt_length: int,
    write: Callable[[str], object],
    note: Callable[[str], object],
) -> None:
    """Answers line after line until `/exit` or the last one.

    The whole conversation is the prompt of each reply. Where it outgrows the budget, its oldest
    turns are dropped, and that is said.

    Args:
        lines: what the user types; blank ones are skipped.
        reply: a prompt's ids -> the pieces of the model's text, as they come.
        instruction: put before the first turn that is kept, on a line of its own.
        max_prompt_length: tokens the conversation may take.
        write: takes the model's text.
        note: takes what is not the model's, a line at a time.
    """
    turns: list[str] = []
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
            turns = [*kept, _reply(reply(ids), write, note)]


def _within(
    budget: int, turns: list[str], tokenizer: Tokenizer, instruction: str
) -> tuple[list[int] | None, list[str]]:
    """The ids of the longest end of the conversation that fits, and its turns; None if none."""
    while turns:
        asked = [question(instruction, turns[0]), *turns[1:]]
        if len(ids := tokenizer.encode_turns(asked)) <= budget:
            return ids, turns
        turns = turns[2:]
    return None, turns


def _reply(pieces: Iterator[str], write: Callable, note: Callable) -> str:
    """The text that was written, all of it or as far as the user let it come."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            write(piece)
    except KeyboardInterrupt:
        write("\n")
        note("stopped; the conversation goes on")
    else:
        write("\n")
    return text
