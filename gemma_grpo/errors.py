"""The two exceptions that commands turn into one line, errors and text as one line, and ~ paths."""

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


def described(error: BaseException) -> str:
    """Type and message of any error in one line, also of one whose message cannot be had."""
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be shown"
    return f"{type(error).__name__}: {one_line(message, 120)}"


def shown(value: object) -> str:
    """The repr of any value in one line, cut short; its type where it has none."""
    try:
        return one_line(repr(value), 40)
    except Exception:
        return f"a {type(value).__name__}"


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
