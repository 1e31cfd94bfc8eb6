"""How a command starts and ends: the exceptions that it turns into one line, signals, streams.

Also errors and text as one line, and ~ paths. Does not import jax.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

MOST_CHARS = 1000  # of an error that is printed
MOST_SIMILAR = 4  # flags that one error names


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


class FlagParser(argparse.ArgumentParser):
    """Of a command that imports no jax: what is wrong with its flags is a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        beginning, _, unknown = message.partition("unrecognized arguments: ")
        if not beginning:
            message = unknown_flags(unknown, self.format_help())
        raise UserError(f"{message}; {self.prog} --help lists all")


def unknown_flags(
    given: str, help_text: str, other_names: Mapping[str, Sequence[str]] | None = None
) -> str:
    """One line that says of each flag in `given` that there is none, and which may be meant.

    Args:
        given: what a parser did not understand, flags and values.
        help_text: the command's, whose lines begin with its flags and arguments.
        other_names: flags of other programs, without their leading hyphens, and what they are here.
    """
    beginnings = r"^[│ ]*(--[a-z][\w.-]*|\[?(?:RUN|OUT)\b)"
    known = [each.lstrip("[") for each in re.findall(beginnings, help_text, re.MULTILINE)]
    known = list(dict.fromkeys(known))
    names, faults = other_names or {}, []
    for flag in dict.fromkeys(re.findall(r"(?<![^ ,])--?[A-Za-z][^ ,=]*", given)):
        name = flag.lstrip("-").replace("_", "-")
        ours = names.get(name) or names.get(name.rpartition(".")[2], ())
        close = [each for each in ours if each in known]
        close = (close or similar_flags(name, known))[:MOST_SIMILAR]
        close = [each if each.startswith("--") else f"the argument {each}" for each in close]
        meant = f"; perhaps you meant {' or '.join(close)}" if close else ""
        faults.append(f"no flag {flag.replace('_', '-')}{meant}")
    return "; ".join(faults) or f"{given}: unexpected; a flag begins with --"


def similar_flags(name: str, known: Sequence[str]) -> list[str]:
    """Of the flags `known` those that a flag, given without its hyphens, is most like: by
    spelling, by the name without its section, or by a word in it."""
    last = lambda flag: flag.lstrip("-").rpartition(".")[2]
    wanted = last(name)
    return (
        difflib.get_close_matches(f"--{name}", known, cutoff=0.8)
        or [flag for flag in known if last(flag) == wanted]
        or [flag for flag in known if last(flag).startswith(wanted) and len(wanted) > 2]
        or [flag for flag in known if difflib.get_close_matches(wanted, [last(flag)], cutoff=0.8)]
        or [flag for flag in known if f"-{wanted}-" in f"-{last(flag)}-"]
    )


# What PyYAML raises beside its own error: of a number of 5000 digits, 1000 brackets, `!!bool x`.
UNREADABLE = (ValueError, RecursionError, KeyError, IndexError, AttributeError, OverflowError)


def start(main: Callable[[], int], *, hint: str = "") -> NoReturn:
    """Runs a command as this process, to its exit status.

    Printing does not fail for the terminal's encoding or for streams that are closed. SIGINT and
    SIGTERM end the process at any moment with one line and 128 + the signal's number; whoever has
    something to save first handles them himself (`training.interrupt`). The process ends on the
    spot: files are written whole or not at all, and an exception raised within a compilation is
    lost, or crashes XLA.

    Args:
        hint: what the line says besides.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # this takes its number, which else the next file would get
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\nstopped by {signal.Signals(number).name}{hint}\n".encode())
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    sys.exit(main())


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns what the system says in the block into a UserError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        named = f"{error.filename}: " if error.filename is not None else ""
        raise UserError(f"{named}{error.strerror or error}") from error
    except MemoryError as error:
        raise UserError("out of memory on the host") from error


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; a user's or the system's error is one line (status 2), a signal another."""
    try:
        with user_errors():
            status = command()
            sys.stdout.flush()  # now, while a pipe that was closed is still one of our errors
            return status
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 2
    except InterruptedRunError as stop:
        print(f"{stop}; everything is saved, --resume goes on", file=sys.stderr)
        return 128 + stop.signal_number
    except BrokenPipeError:  # `| head -1` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT


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


def visible(text: str) -> str:
    """The text as one line: escapes in place of line breaks and of what moves a terminal's cursor,
    and the middle of a long one left out."""
    if len(text) > MOST_CHARS:
        text = f"{text[: MOST_CHARS // 2]} ... {text[-MOST_CHARS // 2 :]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def expanded(path: str | Path) -> Path:
    """A path as the user wrote it, a leading ~ or ~NAME as that home. Raises UserError for none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: whose home ~ is cannot be found out; write the path in full, or set HOME"
        ) from None
