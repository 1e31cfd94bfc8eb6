"""What a person sees of a stage while it trains: a live line of metrics, a sample every tenth.

On a terminal the line moves with a bar; in a notebook that is a widget; anywhere else a line is
printed every tenth of the way. Does not import jax.
"""

import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_grpo.errors import one_line
from gemma_grpo.records.trace import printable

SAMPLE_CHARS = 240  # of a sample's completion, and of its question
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
# Metrics by what the line calls them. The loss of GRPO is about 0 however it goes: not shown.
SHOWN = (
    ("reward/mean", "reward {:.3f}"),
    ("reward/correctness", "right {:.0%}"),
    ("reward/trace", "trace {:.2f}"),
    ("entropy", "entropy {:.2f}"),
    ("completion_length/mean", "length {:.0f}"),
    ("evaluation/accuracy", "held out {:.1%}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
)


class Progress:
    """A stage's progress on stderr."""

    def __init__(self, total: int, label: str, done: int = 0, *, quiet: bool = False):
        """`done` of the `total` steps lie behind already, as after a resume. `quiet` shows nothing
        but what is said."""
        self._total, self._label, self._done, self._quiet = total, label, done, quiet
        self._first, self._began = done + 1, 0.0  # the first step compiles: it tells no speed
        self._held_out: Mapping[str, Any] = {}
        self._bar = None
        if not quiet and (sys.stderr.isatty() or _has_widgets()):
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=total, desc=label, initial=done, dynamic_ncols=True, bar_format=BAR
            )

    def update(self, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """One step is done, with the rows of its rollouts. What was not measured is not shown; the
        last snapshot stays."""
        self._done += 1
        if self._done == self._first:
            self._began = time.monotonic()
        if "evaluation/accuracy" in metrics:
            self._held_out = {"evaluation/accuracy": metrics["evaluation/accuracy"]}
        if self._quiet:
            return
        shown = ", ".join([*_shown({**metrics, **self._held_out}), *self._left()])
        is_tenth = self._done * 10 // self._total > (self._done - 1) * 10 // self._total
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update()
        elif is_tenth:
            share = f"{100 * self._done // self._total} %"
            self.say(f"{self._label} {self._done}/{self._total} ({share}), {shown}".rstrip(", "))
        if is_tenth and rows:
            self.say(sample_text(rows[0]))

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def _left(self) -> list[str]:
        """The time left at the speed of the steps after the first; nothing before there are any."""
        if self._done == self._first:
            return []
        a_step = (time.monotonic() - self._began) / (self._done - self._first)
        left = round(a_step * (self._total - self._done))
        hours = f"{left // 3600}:{left // 60 % 60:02d}" if left >= 3600 else f"{left // 60}"
        return [f"{hours}:{left % 60:02d} left"]


def sample_text(row: Mapping[str, Any]) -> str:
    """A rollout's row in two lines, line breaks as |, without what a terminal would obey."""
    said = lambda name: printable(str(row.get(name) or ""))
    question = one_line(said("prompt"), SAMPLE_CHARS)
    completion = one_line("|".join(said("completion").splitlines()), SAMPLE_CHARS)
    reward = row.get("reward")
    paid = "" if reward is None else f"  reward {reward:.3f}"
    return f"  {question}  answer {one_line(said('answer'), 60)}\n  > {completion}{paid}"


def _shown(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of the line that were measured, each with its name."""
    names = SHOWN if "reward/mean" in metrics else (("loss", "loss {:.3f}"), *SHOWN)
    return [
        text.format(float(metrics[name])) for name, text in names if metrics.get(name) is not None
    ]


def _has_widgets() -> bool:
    """Whether this is a notebook that can show them."""
    return "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None
