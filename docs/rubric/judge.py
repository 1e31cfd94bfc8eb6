"""A judge without a model: words that an explanation of binary search cannot do without.

It is easily fooled, as a policy will find out; a real judge reads (docs/rewards.md).
"""

WORDS = {  # a word of the criterion -> words of which the completion needs one
    "drops": ("half", "halves", "halved"),
    "order": ("sorted", "order", "smaller", "larger"),
    "ends": ("found", "empty", "nothing is left", "one is left"),
}


def judge(questions):
    """True or False for each question."""
    return [
        any(
            word in question.completion.lower()
            for key, words in WORDS.items()
            if key in question.criterion
            for word in words
        )
        for question in questions
    ]
