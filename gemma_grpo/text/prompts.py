"""Problems to token ids: the question as a chat turn, the worked solution with its stop token."""

from collections.abc import Sequence

from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.text.tokenizer import Tokenizer

MAX_INSTRUCTION_CHARS = 20_000  # before each of a thousand problems, a million would take gigabytes


def question(instruction: str, prompt: str) -> str:
    """The user's turn: the instruction, if any, on a line of its own before the prompt."""
    return f"{instruction}\n{prompt}" if instruction else prompt


def turns(instruction: str, examples: Sequence[str], prompt: str) -> list[str]:
    """A conversation that ends on the prompt: the instruction, if any, before its first question.

    Args:
        examples: a question, its answer, and so on.
    """
    first, *others = [*examples, prompt]
    return [question(instruction, first), *others]


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    *,
    instruction: str,
    max_prompt_length: int,
    kind: str = "",
    examples: Sequence[str] = (),
) -> list[list[int]]:
    """Each problem's prompt as one chat turn, the instruction before the question.

    Args:
        kind: which problems these are, for the message: "training ".
        examples: turns before each prompt, as in `turns`.

    Raises:
        UserError: a prompt is longer than the budget; it names the longest. The instruction is
            longer than any should be.
    """
    if len(instruction) > MAX_INSTRUCTION_CHARS:
        raise UserError(
            f"the instruction has {len(instruction):,} characters; at most "
            f"{MAX_INSTRUCTION_CHARS:,}: it stands before every problem"
        )
    encoded = [tokenizer.encode_turns(turns(instruction, examples, p.prompt)) for p in problems]
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    if len(encoded[longest]) > max_prompt_length:
        raise UserError(
            f"{kind}problem {longest + 1} ({problems[longest].prompt[:40]!r}...) takes "
            f"{len(encoded[longest])} tokens, max_prompt_length is {max_prompt_length}; "
            f"raise it to {len(encoded[longest])} or leave the problem out"
        )
    return encoded


def encode_completions(
    problems: Sequence[Problem], tokenizer: Tokenizer, *, max_completion_length: int
) -> list[list[int]]:
    """Each problem's worked solution with its stop token.

    Raises:
        UserError: a problem has none, or one is longer than the budget.
    """
    encoded = []
    for number, problem in enumerate(problems, start=1):
        if problem.completion is None:
            raise UserError(
                f"problem {number} ({problem.prompt[:40]!r}...) has no completion to imitate; "
                "add the field, or run with --stages grpo or --sft.demonstrations own"
            )
        encoded.append(tokenizer.encode_completion(problem.completion))
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    if len(encoded[longest]) > max_completion_length:
        raise UserError(
            f"the completion of problem {longest + 1} ({problems[longest].prompt[:40]!r}...) takes "
            f"{len(encoded[longest])} tokens, max_completion_length is {max_completion_length}; "
            f"raise it to {len(encoded[longest])} or leave the problem out"
        )
    return encoded
