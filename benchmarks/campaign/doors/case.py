"""One input: files in a folder of its own, and a command with its arguments that meets them."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path


def _nothing(folder: Path) -> None:
    """No files."""


@dataclass(frozen=True)
class Case:
    """An input, and what must come of it.

    Attributes:
        door: what kind of input it is.
        name: which one.
        arguments: the command's module, and its flags; the folder is the current one.
        make: writes the files.
        wanted: "refused" or "accepted" where only that is right; "" for either.
        writes: the files and folders that it may change, or leave though it was refused.
    """

    door: str
    name: str
    arguments: Sequence[str]
    make: Callable[[Path], None] = _nothing
    wanted: str = ""
    writes: Sequence[str] = ()

    def run(self, folder: Path) -> int:
        """The command's exit status; SystemExit is one too."""
        command, *flags = self.arguments
        if command == "config":
            return _read_config(folder)
        main = import_module(f"gemma_grpo.{command}").main
        try:
            return main(list(flags))
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1


def _read_config(folder: Path) -> int:
    """Reads the folder's config.yaml, and what would be written of it."""
    from gemma_grpo import config, errors

    def both_ways() -> int:
        config.from_text(config.to_yaml(config.from_yaml(folder / "config.yaml")))
        return 0

    return errors.guarded(both_ways)


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Writes one file, its folders included."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        )

    return make


def copied(source: Path, name: str, *changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Copies a folder or a file, and changes the copy."""

    def make(folder: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
        for change in changes:
            change(folder / name)

    return make


def all_of(*makes: Callable[[Path], None]) -> Callable[[Path], None]:
    """One after the other."""

    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


# --- damages that any file can take ---------------------------------------------------------------


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": _bytes(lambda content: b""),
    "cut in half": _bytes(lambda content: content[: len(content) // 2]),
    "a byte short": _bytes(lambda content: content[:-1]),
    "a byte more": _bytes(lambda content: content + b"x"),
    "twice": _bytes(lambda content: content * 2),
    "zeros": _bytes(lambda content: bytes(len(content))),
    "bytes of 0xff": _bytes(lambda content: b"\xff" * len(content)),
    "another text": _bytes(lambda content: b"hello\n"),
    "a list": _bytes(lambda content: b"[1, 2]\n"),
    "null": _bytes(lambda content: b"null\n"),
    "an empty object": _bytes(lambda content: b"{}\n"),
    "deep": _bytes(lambda content: b"[" * 100_000),
    "a number of 5,000 digits": _bytes(lambda content: b"9" * 5000),
    "UTF-16": _bytes(lambda content: content.decode("latin-1").encode("utf-16")),
    "a byte order mark": _bytes(lambda content: b"\xef\xbb\xbf" + content),
    "Windows line ends": _bytes(lambda content: content.replace(b"\n", b"\r\n")),
    "a folder": _folder,
    "a FIFO": _fifo,
    "a link to nowhere": _link("nowhere"),
    "a link to itself": lambda path: _link(path.name)(path),
    "the null device": _link(os.devnull),
}

# What a field of JSON is replaced by.
VALUES = (None, True, -1, 0, 1.5, 2**40, 10**400, float("nan"), "x", "", [], [1], {}, {"a": 1})


def shown(values: Iterable[object]) -> list[tuple[str, object]]:
    """Each with a short name."""
    return [(repr(value)[:20], value) for value in values]


@contextlib.contextmanager
def into(log: Path):
    """Both streams, also of other languages' code, go into a file; the input is empty."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in range(3)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, stream in enumerate((nothing, file, file)):
        os.dup2(stream, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, stream in enumerate(kept):
            os.dup2(stream, number)
            os.close(stream)
        os.close(file)
        os.close(nothing)
