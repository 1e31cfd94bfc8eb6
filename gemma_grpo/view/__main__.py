"""`python -m gemma_grpo.view`."""

import sys

from gemma_grpo.view import main

if __name__ == "__main__":
    sys.exit(main())
