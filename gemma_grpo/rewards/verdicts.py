"""A judge's verdicts, each asked for once and kept on file. Does not import jax."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.rewards.judge import Calls, Judge, Question
from gemma_grpo.rewards.weights import RubricConfig


class Verdicts:
    """A judge's verdicts, from its file or from the judge.

    A line of the file is a JSON object: the digest of the judge's name and version and of all that
    the question holds, and the verdict. A call's verdicts are written when it returns, so a run
    that was killed and goes on sees those it had. What got no verdict is asked again when it comes
    again.

    Args:
        judge, limits: who is asked, and how.
        path: the file to write to; all .jsonl files beside it are read. None keeps none on disk.

    Raises:
        UserError: the folder or a file cannot be used.
    """

    def __init__(self, judge: Judge, limits: RubricConfig, path: Path | None = None):
        self._judge, self._calls, self._path = judge, Calls(judge, limits), path
        self._known: dict[str, float] = {}
        if path is None:
            return
        with _errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise UserError(f"verdicts {path}: not a file; move it away")
            for other in sorted(path.parent.glob("*.jsonl")):
                self._known |= _read(other) if other.is_file() else {}
            if path.exists():  # without what a killed process left of a line
                whole = path.read_bytes().rpartition(b"\n")
                with path.open("r+b") as file:
                    file.truncate(len(whole[0]) + len(whole[1]))

    def of(self, questions: Sequence[Question]) -> tuple[list[float | None], str]:
        """A verdict in [0, 1] for each question, or None; and why the first has none, or ""."""
        keys = [self._key(question) for question in questions]
        new = {
            key: question
            for key, question in zip(keys, questions, strict=True)
            if key not in self._known
        }
        asked, reasons = list(new), []
        for answered in self._calls.ask(list(new.values())) if new else ():
            fresh = zip((asked[i] for i in answered.questions), answered.verdicts, strict=True)
            self._keep({key: verdict for key, verdict in fresh if verdict is not None})
            reasons += [answered.reason] if answered.reason else []
        return [self._known.get(key) for key in keys], reasons[0] if reasons else ""

    def _key(self, question: Question) -> str:
        content = json.dumps([self._judge.name, self._judge.version, *astuple(question)])
        return hashlib.sha256(content.encode()).hexdigest()

    def _keep(self, fresh: dict[str, float]) -> None:
        self._known |= fresh
        if self._path is not None:
            lines = [json.dumps({"question": key, "verdict": v}) + "\n" for key, v in fresh.items()]
            with _errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))


def _read(path: Path) -> dict[str, float]:
    """The verdicts of a file; a line that was cut short is none."""
    verdicts = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            verdicts[row["question"]] = float(row["verdict"])
    return verdicts


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"verdicts {path}: {error.strerror}; make room for it") from error
