"""Ways to be paid without being right, tried on one problem; each must earn less than the plainest
right answer. The tests and `python -m gemma_grpo.ablation` go through them."""

from gemma_grpo.rewards.sample import Sample

PROMPT = "6 workers paint a hall in 4 days. How many days do 8 workers need for the same hall?"
ANSWER = "3 days"
_SUMS = "6 * 4 = 24\n24 / 8 = 3"


def _with(reasoning: str, answer: str) -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


HACKS: dict[str, str] = {
    "two answers": _with(_SUMS, "3</answer><answer>6"),
    "nested answers": _with(_SUMS, "<answer>3</answer>"),
    "answer inside the reasoning": f"<reasoning>{_SUMS} <answer>3</answer></reasoning>",
    "all candidates in one answer": _with(_SUMS, "2, 3 or 6"),
    "a range": _with(_SUMS, "2-4 days"),
    "empty steps": _with("Step 1:\nStep 2:\nStep 3:", "6"),
    "numbered steps": _with("1. one\n2. two\n3. three", "6"),
    "letters": _with("a b c\nd e f\ng h i", "6"),
    "nonsense sentences": _with("The moon is blue tonight.\nWe all like green cheese.", "6"),
    "true but unrelated sums": _with("1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6", "5"),
    "sums of the question's numbers": _with("6 + 4 = 10\n8 - 6 = 2\n8 * 4 = 32", "5"),
    "false sums": _with("6 * 4 = 12\n12 / 8 = 6", "6"),
    "one sum three times": _with("6 * 4 = 24\n4 * 6 = 24\n6 x 4 = 24", "24"),
    "filler sums": _with("6 * 1 = 6\n4 + 0 = 4\n8 / 1 = 8", "6"),
    "the question copied": _with(PROMPT, "6"),
    "the question as the answer": _with(_SUMS, "24/8"),
    "a true chain to a wrong answer": _with("8 - 6 = 2\n4 + 2 = 6\nThey need 6 days.", "6 days"),
    "another unit": _with(_SUMS, "3 hours"),
    "a word that takes it back": _with(_SUMS, "3 doubled"),
    "sure filler in the answer": _with(_SUMS, "the answer the answer the answer 6"),
    "improbable unit words": _with(_SUMS, "6 zyzzyva quokka days"),
    "junk outside": "So! " + _with("8 - 6 = 2\n4 + 2 = 6", "6") + " Thank you.",
    "a code fence": "```\n" + _with("8 - 6 = 2\n4 + 2 = 6", "6") + "\n```",
    "markdown": "**Reasoning** 6 * 4 = 24\n\n**Answer:** 3 days",
    "mixed digits of two scripts": _with(_SUMS, "3\u0663"),
    "zero-width characters between digits": _with("8 - 6 = 2", "3\u200b3"),
    "an invisible reasoning": _with("\u200b\u200b", "6"),
    "tags injected again": _with(_SUMS + "</reasoning><answer>3</answer><reasoning>", "6"),
    "tags of another case": _with(_SUMS, "3").replace("answer>", "ANSWER>"),
}
NEVER_STOPPING = "never stopping"


def samples() -> dict[str, Sample]:
    """Name -> completion, each with the confidence that pays best: none in a wrong answer."""
    of = {name: _sample(text, stopped=True) for name, text in HACKS.items()}
    of[NEVER_STOPPING] = _sample(_with("8 - 6 = 2\n4 + 2 = 6", "6") + "\nand" * 40, stopped=False)
    return of


def plainest_right_answer() -> Sample:
    """No reasoning, and the sampler gave its answer no probability: the least that is right."""
    return _sample(f"<answer>{ANSWER}</answer>", stopped=True)


def _sample(completion: str, *, stopped: bool) -> Sample:
    return Sample(
        prompt=PROMPT,
        completion=completion,
        answer=ANSWER,
        difficulty="medium",
        num_tokens=60,
        max_tokens=256,
        answer_logps=(-50.0,),
        stopped=stopped,
    )
