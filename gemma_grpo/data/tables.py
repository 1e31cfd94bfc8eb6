"""Rows of files, in JSONL, CSV and parquet, and of the hub's data sets.

`datasets` takes seconds to import, so it and its `pyarrow` are imported where they are used.
"""

import csv
import io
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_grpo.data import jsonl
from gemma_grpo.errors import UserError, expanded

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".csv", ".parquet")


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file in one of `SUFFIXES`, each with where it stands; never empty.

    Raises:
        UserError: what the reader of its kind raises.
    """
    if (place := expanded(path)).exists() and not (place.is_file() or place.is_dir()):
        raise UserError(f"{path} is no file (a FIFO can be read only once): copy it into one")
    readers = {".csv": read_csv, ".parquet": read_parquet}
    return readers.get(Path(path).suffix, jsonl.read_rows)(path)


def read_csv(path: str | Path) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, each with where it stands ("FILE, row N"); never empty.

    The first row names the columns; row 1 is the one after it. Fields are separated by commas;
    one with a comma, a quote or a line break stands in double quotes, its own quotes doubled. An
    empty field is absent from its row. A byte order mark and blank lines are skipped.

    Raises:
        UserError: no such file, not UTF-8, not CSV, a column name twice, no rows, or a row of more
            or fewer fields than the first.
    """
    rows = _csv_rows(path)
    if not rows:
        raise UserError(f"no problems in {path}: the file is empty")
    columns = [name.strip() for name in rows[0]]
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: its first row names a column twice ({', '.join(columns)})")
    if len(rows) == 1:
        raise UserError(f"no problems in {path}: no rows after the names of the columns")
    named = []
    for number, fields in enumerate(rows[1:], start=1):
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, row {number}: {len(fields)} fields, but {len(columns)} columns "
                f"({', '.join(columns)}): a field with a comma in it needs double quotes"
            )
        named.append({name: field for name, field in zip(columns, fields, strict=True) if field})
    return _numbered(named, str(path))


def _csv_rows(path: str | Path) -> list[list[str]]:
    """The fields of all rows that are not blank."""
    content = jsonl.read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8: save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    try:
        for fields in reader:
            if fields:
                rows.append(fields)
    except csv.Error as error:
        raise UserError(
            f"{path}, row {max(len(rows), 1)}, line {reader.line_num}: not CSV ({error})"
        ) from None
    return rows


def read_parquet(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, each with where it stands ("FILE, row N"); never empty.

    Raises:
        UserError: no such file, not parquet, or no rows.
    """
    import pyarrow.parquet  # comes with datasets, whose own reader takes [ and * in paths for globs

    try:
        with open(expanded(path), "rb") as file:
            rows = _rows(pyarrow.parquet.ParquetFile(file).read())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        # Text that is not UTF-8 is a ValueError, a time that Python cannot hold an OverflowError.
        raise UserError(f"cannot read {path} as parquet: {_first_line(error)}") from error
    if not rows:
        raise UserError(f"no problems in {path}: it has no rows")
    return _numbered(rows, str(path))


def download(name: str, config: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of one split of a hub data set, each with where it stands ("NAME SPLIT, row N").

    Raises:
        UserError: it could not be fetched, from the hub or its local cache.
    """
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # no network, a proxy, no such name, a full disk: one fix for all
        raise UserError(
            f"cannot fetch {name} from the hub ({_first_line(error)}): "
            f"give a local copy's file or folder instead"
        ) from error
    return _numbered(table.to_list(), f"{name} {split}")


def _rows(table: "pyarrow.Table") -> list[dict[str, Any]]:
    """The rows of an Arrow table. Numbers of 16 and 32 bits come as the shortest decimal that
    rounds to them: float32 0.1 as 0.1, not as 0.10000000149011612."""
    import pyarrow

    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"it names a column twice ({', '.join(table.column_names)})")
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        columns[name] = column.to_pylist()
        if pyarrow.types.is_float16(column.type) or pyarrow.types.is_float32(column.type):
            width = np.float16 if pyarrow.types.is_float16(column.type) else np.float32
            columns[name] = [_shortest(value, width) for value in columns[name]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _shortest(value: float | None, width: type[np.floating]) -> float | Decimal | None:
    if value is None or not np.isfinite(value):
        return value
    return Decimal(np.format_float_positional(width(value), unique=True, trim="0"))


def _numbered(rows: list[dict[str, Any]], origin: str) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{origin}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
