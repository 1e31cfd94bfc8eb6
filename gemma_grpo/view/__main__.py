"""`python -m gemma_grpo.view`."""

from gemma_grpo.errors import start
from gemma_grpo.view import main

if __name__ == "__main__":
    start(main)
