"""A trace of completion lengths that benchmarks share, so that their figures are of the same work.

Synthetic: no histogram of Gemma 3 1B's lengths on GSM8K is published. Eight prompts of eight
completions with a budget of 800 tokens, drawn once and frozen here:

    drawn = np.random.default_rng(61).lognormal(np.log(269), 0.58, 64)
    np.minimum(np.rint(drawn), 800)

Median and width are those of a lognormal with 3 % of its mass above 800 and mean 312 after the cut;
61 is the first seed whose draw has its mean within 1 of 312 (311.06) and 3 % (2 of 64) at the cap.
Prompts as long as GSM8K's, 40 to 120 tokens: np.random.default_rng(61).integers(40, 121, 8).
"""

PROMPTS, GENERATIONS, BUDGET = 8, 8, 800
PROMPT_LENGTHS = (74, 70, 101, 102, 78, 94, 100, 97)

# Group-major: a line is a group. Tokens, the stop token included; 800 was cut off.
LENGTHS = (
    194, 146, 498, 140, 96, 393, 438, 155,
    194, 800, 149, 201, 533, 414, 685, 432,
    212, 288, 196, 429, 361, 132, 356, 167,
    281, 216, 317, 60, 348, 118, 531, 135,
    199, 178, 312, 497, 304, 266, 296, 253,
    278, 175, 249, 632, 514, 100, 238, 303,
    199, 184, 263, 485, 504, 279, 443, 257,
    342, 241, 112, 183, 339, 537, 331, 800,
)  # fmt: skip


def scaled(budget: int) -> tuple[int, ...]:
    """The trace for another budget: the same shares of it, rounded, at least one token each."""
    return tuple(max(1, round(length * budget / BUDGET)) for length in LENGTHS)
