"""Writes docs/metrics.md from the table of `gemma_grpo/records/metric_notes.py`.

python -m benchmarks.metrics_page
"""

from pathlib import Path

from gemma_grpo.records import watch
from gemma_grpo.records.metric_notes import NOTES

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
HEAD = f"""# Metrics: what each one means

What each metric of a run means, what is healthy, and what to do if it is not. `metrics.jsonl` has
one line per step, and TensorBoard the same names:

```bash
tensorboard --logdir RUN/tensorboard
```

`pd.read_json("RUN/metrics.jsonl", lines=True)` reads them into pandas. `train` warns, with at most
one line in {watch.QUIET} steps, which names all metrics that are not healthy,

- when the mean over {watch.WINDOW} steps has left a range that is given in numbers below,
- when entropy was above {NOTES["entropy"].high:g} in one of {watch.WINDOW} steps,
- when the learning rate has been 0 for {watch.WINDOW} steps,
- when reward/mean rose by {watch.REWARD_RISE} in {watch.APART} steps and reward/correctness did \
not,
- when completions are {watch.LONGEST:g} or {watch.SHORTEST:g} times as long as in the first \
{watch.WINDOW} steps.

This page is written by `python -m benchmarks.metrics_page` from
`gemma_grpo/records/metric_notes.py`; edit that instead.

| metric | what it is | healthy | if not |
|---|---|---|---|
"""


def page() -> str:
    """The text of docs/metrics.md."""
    rows = (
        f"| `{name}` | {note.meaning} | {note.healthy} | {note.fix} |\n"
        for name, note in NOTES.items()
    )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
