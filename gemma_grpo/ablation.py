"""`python -m gemma_grpo.ablation`: the original design document's reward ablation, by our rewards.

That document prints four reward configurations over three outputs. Here the same twelve figures
come from `rewards.score` on three literal completions of one medium problem.
The completions, their token counts and their answer log-probs are written below by hand; no model
produced them, so the table shows what the rewards pay for, not what a policy does.

It does not say which weights it used per row. What its figures imply:

1. "+ Trace structure" gives 0.892, more than the 0.85 that correctness and trace weigh together at
   either end of the annealing. So the row was divided by its weights' sum; we do that in every row
   (by the sum of the positive weights: a penalty takes away from a full mark of 1).
2. Rows two and three together imply confidence scores 0.56, 0.52, 0.56: they hardly tell right
   from wrong. At the end weights (0.60, 0.25, 0.15) they imply trace scores 0.63, 0.23, 0.51; at
   the start weights (0.40, 0.45, 0.15) 0.80, 0.58, 0.28, which would give an output without a
   trace twice the marks of one with it. We use the end weights (`implied_by_original`).
3. "Annealed (early)" does not follow from the weights its document states. Good+Reasoning rises by
   0.048 from row three; but with the same scores, going from any point p of the annealing back to
   its start adds 0.20 p (trace - 1) - 0.05 verbosity, which is never above 0.
"""

import argparse
import json
from dataclasses import replace

from gemma_grpo.errors import FlagParser, guarded, start
from gemma_grpo.rewards import END_WEIGHTS, START_WEIGHTS, RewardWeights, Sample, hacks, score

PROMPT, ANSWER = hacks.PROMPT, hacks.ANSWER

# Sampler probabilities of the answer: 0.9 for the good output, 0.7 for the bare guess that is
# right, 0.6 for the wrong one. Each answer is taken as two tokens.
_GOOD = """<reasoning>
6 workers for 4 days is 6 * 4 = 24 days of work.
Shared by 8 workers that is 24 / 8 = 3 days.
</reasoning>
<answer>
3 days
</answer>"""
_NO_TRACE = "<answer>3 days</answer>"
# Two steps, both true, the second from a false idea: the most a trace to a wrong answer can earn.
_WRONG = """<reasoning>
There are 8 - 6 = 2 workers more than before.
So they need 4 + 2 = 6 days for the hall.
</reasoning>
<answer>
6 days
</answer>"""


def _sample(completion: str, num_tokens: int, answer_logps: tuple[float, ...]) -> Sample:
    return Sample(
        prompt=PROMPT,
        completion=completion,
        answer=ANSWER,
        difficulty="medium",
        num_tokens=num_tokens,
        max_tokens=256,
        answer_logps=answer_logps,
        stopped=True,
    )


OUTPUTS = {
    "Good+Reasoning": _sample(_GOOD, 62, (-0.07, -0.035)),  # sum -0.105: c = 0.90
    "Correct NoTrace": _sample(_NO_TRACE, 9, (-0.24, -0.115)),  # sum -0.355: c = 0.70
    "Wrong+Trace": _sample(_WRONG, 55, (-0.345, -0.165)),  # sum -0.510: c = 0.60
}


def _normalised(weights: RewardWeights) -> RewardWeights:
    """`weights` divided by the sum of the positive ones, so that a full mark is 1."""
    full = sum(weight for weight in weights.named().values() if weight > 0)
    return RewardWeights(**{name: weight / full for name, weight in weights.named().items()})


CONFIGS = {
    "Correctness only": RewardWeights(
        correctness=1.0, trace=0.0, confidence=0.0, verbosity=0.0, format=0.0
    ),
    "+ Trace structure": _normalised(
        replace(END_WEIGHTS, confidence=0.0, verbosity=0.0, format=0.0)
    ),
    "+ Confidence": _normalised(replace(END_WEIGHTS, verbosity=0.0, format=0.0)),
    "Annealed (early)": _normalised(replace(START_WEIGHTS, format=0.0)),
}

ORIGINAL = {  # the original design document's table, in the order of OUTPUTS
    "Correctness only": (1.000, 1.000, 0.000),
    "+ Trace structure": (0.892, 0.775, 0.150),
    "+ Confidence": (0.842, 0.737, 0.211),
    "Annealed (early)": (0.890, 0.680, 0.250),
}


def ours() -> dict[str, tuple[float, ...]]:
    """Configuration -> total reward of each output, in the order of OUTPUTS."""
    samples = list(OUTPUTS.values())
    return {config: tuple(score(samples, weights).totals) for config, weights in CONFIGS.items()}


def components() -> dict[str, list[float]]:
    """Component -> unweighted score of each output; the weights do not matter here."""
    return score(list(OUTPUTS.values()), START_WEIGHTS).components


def implied_by_original() -> dict[str, tuple[float, ...]]:
    """Trace and confidence scores that meet the original second and third row at our weights."""
    two, three = CONFIGS["+ Trace structure"], CONFIGS["+ Confidence"]
    right = ORIGINAL["Correctness only"]
    trace = tuple(
        (total - two.correctness * y) / two.trace
        for total, y in zip(ORIGINAL["+ Trace structure"], right, strict=True)
    )
    confidence = tuple(
        (total - three.correctness * y - three.trace * t) / three.confidence
        for total, y, t in zip(ORIGINAL["+ Confidence"], right, trace, strict=True)
    )
    return {"trace": trace, "confidence": confidence}


_TRACE_REASON = {
    "Good+Reasoning": "both steps are true and lead to the answer",
    "Correct NoTrace": "without a reasoning block there is nothing to score",
    "Wrong+Trace": "both steps are true, and a trace to a wrong answer is worth a third",
}
_CONFIDENCE_REASON = {
    "Good+Reasoning": "right at probability 0.90",
    "Correct NoTrace": "right at probability 0.70",
    "Wrong+Trace": "wrong at probability 0.60, which a proper score punishes",
}


def explanations() -> list[tuple[str, str, str]]:
    """(configuration, output, one sentence) for each figure that differs from the original."""
    mine, scores, implied = ours(), components(), implied_by_original()
    differing = []
    for config, weights in CONFIGS.items():
        for i, output in enumerate(OUTPUTS):
            if abs(mine[config][i] - ORIGINAL[config][i]) < 0.0005:
                continue
            sentence = (
                f"our trace score is {scores['trace'][i]:.2f}, since {_TRACE_REASON[output]};"
                f" the original figures imply {implied['trace'][i]:.2f}"
            )
            if weights.confidence:
                sentence += (
                    f"; our confidence score is {scores['confidence'][i]:.2f}"
                    f" ({_CONFIDENCE_REASON[output]}), theirs {implied['confidence'][i]:.2f}"
                )
            if config == "Annealed (early)":
                at_start = (
                    weights.correctness * scores["correctness"][i]
                    + weights.trace * implied["trace"][i]
                    + weights.confidence * implied["confidence"][i]
                )
                sentence += (
                    f", which at the start weights would be {at_start:.3f}, not"
                    f" {ORIGINAL[config][i]:.3f}: its last row does not follow from its own weights"
                )
            differing.append((config, output, sentence + "."))
    return differing


def _table() -> str:
    """The two tables side by side: ours (original)."""
    mine = ours()
    lines = [f"{'ours (original)':20}" + "".join(f"{output:>18}" for output in OUTPUTS)]
    for config in CONFIGS:
        pairs = zip(mine[config], ORIGINAL[config], strict=True)
        lines.append(f"{config:20}" + "".join(f"{f'{a:.3f} ({b:.3f})':>18}" for a, b in pairs))
    lines.append("")
    for name, values in components().items():
        lines.append(f"  {name:18}" + "".join(f"{value:>18.3f}" for value in values))
    return "\n".join(lines)


NOTES = """\
Each row's weights are divided by the sum of its positive ones, so that a full mark is 1; rows two
and three use the weights at the end of annealing, the last row those at its start. The outputs and
their answer log-probs are literals in this file; no model produced them.

The format's weight (0.10) is left out of the rows, as the original document has none. With it and
without it, at both ends of the annealing and for every confidence, Good+Reasoning is at least 0.10
above Correct NoTrace and that 0.10 above Wrong+Trace (tests/test_ablation.py)."""


def hack_totals() -> dict[str, tuple[float, float]]:
    """Way to be paid without being right -> its total at the start weights and at the end ones;
    the first entry is the plainest right answer."""
    samples = {"the plainest right answer": hacks.plainest_right_answer()} | hacks.samples()
    start, end = (
        score(list(samples.values()), weights).totals for weights in (START_WEIGHTS, END_WEIGHTS)
    )
    return dict(zip(samples, zip(start, end, strict=True), strict=True))


def _hack_table() -> str:
    lines = [f"{'paid without being right':42}{'start':>8}{'end':>8}"]
    lines += [f"{name:42}{a:>8.3f}{b:>8.3f}" for name, (a, b) in hack_totals().items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return guarded(lambda: _ablation(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="python -m gemma_grpo.ablation",
        description="Four reward configurations on three handwritten outputs.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _ablation(options: argparse.Namespace) -> int:
    """Prints the table, or with --json the same as one object."""
    if options.json:
        report = {
            "outputs": list(OUTPUTS),
            "weights": {config: weights.named() for config, weights in CONFIGS.items()},
            "ours": ours(),
            "original": ORIGINAL,
            "components": components(),
            "hacks": hack_totals(),
            "implied_by_original": implied_by_original(),
            "differences": [
                {"config": config, "output": output, "because": sentence}
                for config, output, sentence in explanations()
            ],
        }
        print(json.dumps(report, indent=2))
        return 0
    print(_table(), "", NOTES, "", "Why ours differ:", sep="\n")
    for config, output, sentence in explanations():
        print(f"- {config}, {output}: {sentence}")
    print("", _hack_table(), sep="\n")
    return 0


if __name__ == "__main__":
    start(main)
