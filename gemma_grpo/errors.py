"""The two exceptions that the commands turn into one line, text cut to one, and paths with a ~."""

import signal
from pathlib import Path


class UserError(Exception):
    """Bad input from outside. Its message is one line: what is wrong, where, and the fix.

    The command lines print it without a traceback and exit with status 2. It is no ValueError,
    since the flag parser would catch that and draw a frame around it.
    """


class InterruptedRunError(Exception):
    """Training stopped for a signal, after it saved what it had."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


def one_line(text: str, limit: int) -> str:
    """The text without line breaks, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def expanded(path: str | Path) -> Path:
    """A path as the user wrote it, a leading ~ or ~NAME as that home. Raises UserError for none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: whose home ~ is cannot be found out; write the path in full, or set HOME"
        ) from None
