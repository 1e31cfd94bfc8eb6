"""python -m gemma_grpo: the commands, a line each. Imports none of them."""

import sys

COMMANDS = {
    "train": "train a model: SFT, then GRPO, each stage measured",
    "evaluate": "measure a run's model, or a base model, on held-out problems",
    "generate": "complete a prompt or a file of prompts, or hold a conversation",
    "export": "write a run's model as a Hugging Face folder, or its adapters for PEFT",
    "view": "show a run's figures and completions, as a page or in the terminal",
    "plan": "say whether a run fits on given chips, and how long it takes there",
    "rescore": "score a run's completions again with other rewards, weights or readers",
    "ablation": "print what each reward component changes, on handwritten completions",
    "verify_kernels": "compare every kernel with its reference on this machine's devices",
    "pretrain": "rebuild gemma3-nano, the embedded base model",
}


def main() -> int:
    """Prints the commands; returns the exit status: 2 if arguments other than --help were given."""
    print("usage: python -m gemma_grpo.COMMAND [--help]\n")
    for name, what in COMMANDS.items():
        print(f"  {name:16}{what}")
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        return 0
    first = sys.argv[1]
    fix = f"python -m gemma_grpo.{first}" if first in COMMANDS else "one of the commands above"
    print(f"error: unknown argument {first!r}; use {fix}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
