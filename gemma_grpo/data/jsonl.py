"""Rows of a JSONL file, one object a line, and problems from rows of any file.

A row holds `prompt` and `answer`, and if it likes `completion`, `difficulty` and `domain`;
other fields are ignored, and `sources.fields_not_read` names them. A fault is named by file, line
and field, as `FILE:LINE: ...`.
"""

import codecs
import json
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.errors import UserError, expanded

FIELDS = ("prompt", "answer", "completion", "difficulty", "domain")
MAX_ANSWER_CHARS = 10_000  # of a gold answer; more is a solution or a mistake


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with where it stands ("FILE:LINE"); never empty.

    Fractions come as `Decimal`, so that 0.10 keeps its digits. Blank lines and a UTF-8 byte order
    mark are skipped.

    Raises:
        UserError: the file cannot be read, a line is not a JSON object, or there is none.
    """
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        if text := _decoded(line, where).strip():
            rows.append((where, _parsed(text, where)))
    if not rows:
        raise UserError(f"no problems in {path}: it needs one JSON object a line")
    return rows


def problems_from(given: Iterable[Any]) -> list[Problem]:
    """Problems from Python objects: `Problem`s, or rows as in a file, such as a data set's. Both
    are checked by `problem_from_row`.

    Raises:
        UserError: none, something else, or what `problem_from_row` refuses; it names the row.
    """
    if isinstance(given, Mapping):
        splits = ", ".join(map(repr, given)) or "none"
        raise UserError(f"problems are one list, not a mapping of several ({splits}): give one")
    if isinstance(given, str | Path) or not isinstance(given, Iterable):
        raise UserError(
            f"problems are a list, not of type {type(given).__name__}: of a file or another source "
            'set data.source, as in run.replace({"data.source": "problems.jsonl"})'
        )
    found = []
    for number, row in enumerate(given, start=1):
        fields = vars(row) if isinstance(row, Problem) else row
        if isinstance(fields, Mapping):
            found.append(problem_from_row(fields, f"problem {number}"))
        else:
            raise UserError(
                f"problem {number} is of type {type(row).__name__}: give a gemma_grpo.Problem, or "
                'a dict with prompt and answer (of a pandas frame, df.to_dict("records"))'
            )
    if not found:
        raise UserError("no problems: give at least two")
    return found


def problem_from_row(row: Mapping[str, Any], where: str) -> Problem:
    """One problem from named fields; null counts as absent.

    Args:
        row: `prompt` (text; without one, `question`) and `answer` (text, or a number, which is
            written out); optional `completion`, `difficulty` and `domain` (text). Text is stripped
            of outer white space.
        where: what the message of an error begins with.

    Raises:
        UserError: a field is missing, blank, of the wrong type, or an unknown difficulty; a
            `question` whose answer is a worked solution of GSM8K's.
    """
    answer = row.get("answer")
    if row.get("prompt") is None and row.get("question") is not None:
        if isinstance(answer, str) and "####" in answer:
            raise UserError(f'{where}: field "answer" is GSM8K\'s (####): give gsm8k:FILE')
        row = {**row, "prompt": row["question"]}
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        if isinstance(answer, float) and not math.isfinite(answer):
            raise UserError(f'{where}: field "answer" is {answer}: give a finite number or text')
        try:
            row = {**row, "answer": str(answer)}
        except ValueError as error:  # Python writes no integer of more than 4300 digits
            raise UserError(f'{where}: field "answer" is a number of too many digits') from error
    if len(required_text(row, "answer", where)) > MAX_ANSWER_CHARS:
        raise UserError(
            f'{where}: field "answer" has {len(row["answer"]):,} characters; give the result '
            f"alone, at most {MAX_ANSWER_CHARS:,}"
        )
    difficulty = _optional_text(row, "difficulty", where) or Problem.difficulty
    if difficulty not in DIFFICULTIES:
        raise UserError(
            f'{where}: field "difficulty" is "{difficulty}": use one of {", ".join(DIFFICULTIES)}'
        )
    return Problem(
        prompt=required_text(row, "prompt", where),
        answer=required_text(row, "answer", where),
        completion=_optional_text(row, "completion", where),
        difficulty=difficulty,
        domain=_optional_text(row, "domain", where) or Problem.domain,
    )


def read_bytes(path: str | Path) -> bytes:
    """What is in a text file, without a UTF-8 byte order mark.

    Raises:
        UserError: no such file, a folder, or it cannot be read.
    """
    try:
        return expanded(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name a file in it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def required_text(row: Mapping[str, Any], field: str, where: str) -> str:
    """The stripped text of a field that must be there.

    Raises:
        UserError: it is missing, null, blank or not text.
    """
    text = _optional_text(row, field, where)
    if text is None:
        found = ", ".join(sorted(map(str, row))) or "none"
        raise UserError(f'{where}: field "{field}" is missing (fields found: {found})')
    return text


def _optional_text(row: Mapping[str, Any], field: str, where: str) -> str | None:
    value = row.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f'{where}: field "{field}" must be text, not {_kind(value)}')
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise UserError(f'{where}: field "{field}" holds half a surrogate pair') from None
    if not any(char.isprintable() and not char.isspace() for char in value):
        raise UserError(f'{where}: field "{field}" is blank')
    return value.strip()


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float | Decimal):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else type(value).__name__


def _lines(path: str | Path) -> list[bytes]:
    # Split at line feeds alone: str.splitlines would also cut at U+2028, which JSON text may hold.
    return read_bytes(path).split(b"\n")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1}): "
            f"save the file as UTF-8"
        ) from None


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text, parse_float=Decimal)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}): write one object a line"
        ) from None
    except (ValueError, ArithmeticError, RecursionError) as error:
        # An integer of thousands of digits, an absurd exponent, brackets a thousand deep.
        raise UserError(f"{where}: JSON that cannot be read ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with prompt and answer, not {_kind(row)}")
    return row
