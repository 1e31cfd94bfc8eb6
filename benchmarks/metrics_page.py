"""Writes docs/metrics.md from the table of `gemma_grpo/records/metric_notes.py`.

python -m benchmarks.metrics_page
"""

from pathlib import Path

from gemma_grpo.records import watch
from gemma_grpo.records.metric_notes import NOTES

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
HEAD = f"""# Metrics: what each one says

Written by `python -m benchmarks.metrics_page` from `gemma_grpo/records/metric_notes.py`: change
that, not this page.

`metrics.jsonl` has a line a step, TensorBoard the same names. `train` says a line, at most one in
{watch.QUIET} steps, which names what else is not healthy,

- when the mean of {watch.WINDOW} steps has left a range that has numbers below,
- when entropy was above {NOTES["entropy"].high:g} in one of {watch.WINDOW} steps,
- when the learning rate has been 0 for {watch.WINDOW} steps,
- when reward/mean rose by {watch.REWARD_RISE} in {watch.APART} steps and reward/correctness did \
not,
- when completions are {watch.LONGEST:g} or {watch.SHORTEST:g} times as long as in the first \
{watch.WINDOW} steps.

`pd.read_json("RUN/metrics.jsonl", lines=True)` reads them into pandas; TensorBoard draws them:

```bash
tensorboard --logdir RUN/tensorboard
```

| metric | what it is | healthy | else |
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
