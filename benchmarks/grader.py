"""Our grader beside math-verify on the table of the tests: verdicts, time, hostile input.

    python -m benchmarks.grader                 ours
    pip install "math-verify[antlr4_13_2]"; python -m benchmarks.grader     both

Prints one JSON object a line (of texts, which have no dtype): for each grader and kind of pair how
often it was wrong in each direction, then totals with CPU microseconds a pair, then what each
hostile input took.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.timing import cpus, print_row
from gemma_grpo.rewards.answers import answers_match, reading

PAIRS = Path(__file__).parent.parent / "tests" / "rewards" / "grader_pairs.tsv"
HOSTILE = {
    "a megabyte of digits": "9" * 10**6,
    "a megabyte of brackets": "(" * 10**6,
    "deep nesting": "(" * 400 + "1" + ")" * 400,
    "deep fractions": "\\frac{" * 150 + "1" + "}{2}" * 150,
    "9**9**9": "9**9**9",
    "9^9^9 in LaTeX": "$9^{9^{9}}$",
    "a huge exponent": "1e999999999",
    "a huge factorial": "(10^8)!",
    "half a surrogate pair": "\ud800",
}
PLAIN_NUMBERS = 20_000

Grader = Callable[[str, str], bool]


def table() -> list[tuple[str, bool, str, str]]:
    """(kind, right, given, gold) of each pair."""
    lines = PAIRS.read_text(encoding="utf-8").split("\n")
    rows = [line.split("\t") for line in lines if line and not line.startswith("# ")]
    return [(kind, right == "1", given, gold) for kind, right, given, gold in rows]


def math_verify(mark: str) -> Grader | None:
    """math-verify's grader with its own defaults; None where it is not installed.

    Args:
        mark: put around answers that have none, "$" or nothing: it looks for LaTeX in dollars, and
            for bare numbers.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        return None
    marked = lambda text: text if "$" in text or "\\boxed" in text else f"{mark}{text}{mark}"
    return lambda given, gold: verify(parse(marked(gold)), parse(marked(given)))


def verdicts(name: str, grader: Grader) -> Iterator[dict]:
    """Wrong verdicts by kind, then in all."""
    pairs, wrong, examples = table(), Counter(), []
    started = time.process_time()
    for kind, right, given, gold in pairs:
        said = bool(grader(given, gold))
        if said != right:
            wrong[kind, right] += 1
            examples.append([given, gold])
    micros = (time.process_time() - started) / len(pairs) * 1e6
    for kind in dict.fromkeys(pair[0] for pair in pairs):
        yield {
            "grader": name,
            "kind": kind,
            "pairs": sum(pair[0] == kind for pair in pairs),
            "wrong_said_right": wrong[kind, False],
            "right_said_wrong": wrong[kind, True],
        }
    yield {
        "grader": name,
        "pairs": len(pairs),
        "right_pairs": sum(pair[1] for pair in pairs),
        "wrong_said_right": sum(n for (_, right), n in wrong.items() if not right),
        "right_said_wrong": sum(n for (_, right), n in wrong.items() if right),
        "cpu_us_per_pair": round(micros, 1),
        "first_wrong_verdicts": examples[:5],
    }


def hostile(name: str, grader: Grader) -> Iterator[dict]:
    """What each hostile answer took, against a plain gold answer."""
    for label, text in HOSTILE.items():
        started = time.process_time()
        try:
            said = str(bool(grader(text, "5")))
        except Exception as error:
            said = type(error).__name__
        seconds = time.process_time() - started
        yield {"grader": name, "hostile": label, "said": said, "cpu_s": round(seconds, 4)}


def speed(name: str, grader: Grader, count: int) -> dict:
    """Comparisons a CPU second on plain numbers, every one of them new."""
    pairs = [(f"{1000 + 7 * i:,}", str(1000 + 7 * i + i % 2)) for i in range(count)]
    started = time.process_time()
    said = sum(bool(grader(*pair)) for pair in pairs)
    assert said == (count + 1) // 2
    per_second = count / (time.process_time() - started)
    return {"grader": name, "plain_numbers": count, "comparisons_per_cpu_s": round(per_second)}


def main() -> None:
    """Print everything."""
    graders = {
        "ours": answers_match,
        "math-verify": math_verify(""),
        "math-verify, answers in dollars": math_verify("$"),
    }
    for name, grader in graders.items():
        about: dict[str, Any] = {"benchmark": "grader", "device": cpus()}
        if grader is None:
            print_row(**about, grader=name, missing='pip install "math-verify[antlr4_13_2]"')
            continue
        if name != "ours":
            about["versions"] = {"math-verify": metadata.version("math-verify")}
        reading.cache_clear()
        for row in verdicts(name, grader):
            print_row(**about, **row)
        print_row(**about, **speed(name, grader, PLAIN_NUMBERS if name == "ours" else 500))
        for row in hostile(name, grader):
            print_row(**about, **row)


if __name__ == "__main__":
    main()
