"""python -m gemma_grpo: the commands, a line each. Imports none of them."""

import sys

COMMANDS = {
    "train": "train a model: SFT, then GRPO, each stage measured",
    "evaluate": "measure a run's model, or a base model, on held-out problems",
    "generate": "completions of a prompt or of a file of prompts, or a conversation",
    "export": "write a run's model as a Hugging Face folder, or its adapters for PEFT",
    "view": "a run's figures and completions, as a page or in the terminal",
    "plan": "will a run fit on given chips, and what will it take there",
    "rescore": "a run's completions under other rewards, weights or readers",
    "ablation": "the reward ablation of the original design document",
    "verify_kernels": "compare every kernel with its reference on the devices here",
    "pretrain": "make gemma3-nano, the embedded base model, again",
}


def main() -> int:
    """Prints the commands; returns the exit status: 2 where arguments were given."""
    print("usage: python -m gemma_grpo.COMMAND [--help]\n")
    for name, what in COMMANDS.items():
        print(f"  {name:16}{what}")
    return 2 if sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
