"""The GSM8K protocol's constants: what is asked, how, and within which budgets. Runs nothing.

docs/gsm8k-protocol.md gives the reasons, and what public figures did otherwise.
"""

NUM_TEST = 1319
"""Problems of the official test split."""

INSTRUCTION = (
    "Solve this problem. Write your steps between <reasoning> and </reasoning>, one on each line, "
    "then the final number alone between <answer> and </answer>."
)
"""Put before every question, on a line of its own, within the user's turn. No examples follow."""

MAX_PROMPT_LENGTH = 320
"""Tokens. The longest of the 7473 official training problems takes 258 with the instruction."""

MAX_COMPLETION_LENGTH = 768
"""Tokens, stop token included. The longest worked solution takes 360 in our format; chat models
write more than that, and 768 is what the public reports gave them."""
