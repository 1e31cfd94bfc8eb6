"""Run folders written by hand, as `train` leaves them, without a model."""

import json
from pathlib import Path

import numpy as np

from gemma_grpo.records import tokens

PROMPT = "Ann has 3 apples and buys 4 more. How many apples does she have?"
RIGHT = "<reasoning>\n3 + 4 = 7\nAnn has 7 apples.\n</reasoning>\n<answer>\n7\n</answer>"
FALSE = "<reasoning>\n3 + 4 = 8\n</reasoning>\n<answer>\n8\n</answer>"
PROSE = "She has 7 apples."
# What a model may write and a page, a terminal or a file must stand.
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script> ",
    "<img src=x onerror=alert(1)>",
    "x" * 100_000,
    "a\x00b\x1b[31m",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "😀" * 5 + "\u2028 \u2029",
    "\ud800 half a pair",
    "@@script@@ @@data@@",
]


def prompt(number: int) -> str:
    """The question of a problem; each is another one."""
    return PROMPT if not number else f"{PROMPT} ({number})"


def row(text: str, number: int = 0, **changes) -> dict:
    """What evaluations and rollouts have in common."""
    right = float(text.count("<answer>\n7\n") == 1)
    return {
        "prompt": prompt(number),
        "answer": "7",
        "difficulty": ("easy", "medium", "hard")[number % 3],
        "domain": ("addition", "sharing")[number % 2],
        "completion": text,
        "num_tokens": len(text.split()) + 1,
        "stopped": True,
        "correctness": right,
        "trace": 0.5 * right,
        "confidence": 0.25,
        "verbosity": 0.0,
        "format": float("<answer>" in text),
    } | changes


def held_out(texts: list[str], samples: list[str] = ()) -> list[dict]:
    """Rows of an evaluation: a greedy completion of each problem, then samples of each."""
    greedy = [row(t, n, problem=n, sample=0, greedy=True) for n, t in enumerate(texts)]
    sampled = [
        row(text, n, problem=n, sample=k, greedy=False)
        for n in range(len(texts))
        for k, text in enumerate(samples)
    ]
    return greedy + sampled


def rollout(texts: list[str], group: int = 0, **changes) -> list[dict]:
    """Rows of one group of a training step."""
    return [
        row(text, group, group=group, reward=0.1 * k, advantage=k - 1.0) | changes
        for k, text in enumerate(texts)
    ]


def write_rows(path: Path, rows: list[dict], *, with_tokens: bool = True) -> None:
    """A .jsonl file and, as if each word were a token of log-prob -k, the tokens beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in rows]
    path.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    if with_tokens:
        counts = [each["num_tokens"] for each in rows]
        lengths = [_lengths(each["completion"], each["num_tokens"]) for each in rows]
        tokens.write(
            tokens.path_beside(path),
            {
                "num_tokens": np.array(counts),
                "token_ids": np.arange(sum(counts)),
                "characters": np.array(sum(lengths, [])),
                "logps": -np.concatenate([np.arange(count) for count in counts]).astype(float),
                "gaps": np.full(sum(counts), 1e-3),
            },
        )


def write_run(folder: Path, *, steps: int = 2, problems: int = 3, summary: bool = True) -> Path:
    """A run of base, SFT and GRPO: SFT is wrong on all problems, GRPO right on all but the first,
    which the base model had right."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    stages = {
        "base": [RIGHT] + [PROSE] * (problems - 1),
        "sft": [FALSE] * problems,
        "grpo": [FALSE] + [RIGHT] * (problems - 1),
    }
    for name, texts in stages.items():
        write_rows(folder / "evaluations" / f"{name}.jsonl", held_out(texts, [RIGHT, PROSE]))
        accuracy = sum(text == RIGHT for text in texts) / problems
        result = {"accuracy": accuracy, "accuracy_ci95": [0.1, 0.9], "n": problems}
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(result))
    lines = [{"stage": "sft", "step": 1, "loss": 2.0}]
    for step in range(1, steps + 1):
        rows = rollout([PROSE, FALSE, RIGHT]) + rollout([RIGHT, RIGHT], group=1, reward=1.0)
        write_rows(folder / "rollouts" / f"grpo-{step:06d}.jsonl", rows)
        lines.append({"stage": "grpo", "step": step, "loss": 0.0, "reward/mean": 0.1 * step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "seconds.json").write_text(json.dumps({"sft": 3.0, "grpo": 5.0}))
    if summary:
        (folder / "summary.json").write_text(json.dumps({"unfinished": None, "paired": {}}))
    return folder


def _lengths(text: str, count: int) -> list[int]:
    """Characters of each word with the white space behind it, and 0 for the stop token."""
    ends = [0]
    for word in text.split():
        ends.append(text.index(word, ends[-1]) + len(word))
    ends[-1] = len(text)
    lengths = np.diff(ends).tolist()
    return (lengths + [0] * count)[:count]
