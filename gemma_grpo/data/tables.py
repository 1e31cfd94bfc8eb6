"""Rows from parquet files and from the hub.

`datasets` takes seconds to import, so it and its `pyarrow` are imported where they are used.
"""

from pathlib import Path
from typing import Any

from gemma_grpo.errors import UserError


def read_parquet(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, each with where it stands ("FILE, row N"); never empty.

    Raises:
        UserError: no such file, not parquet, or no rows.
    """
    import pyarrow.parquet  # comes with datasets, whose own reader takes [ and * in paths for globs

    try:
        with open(Path(path).expanduser(), "rb") as file:
            rows = pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, pyarrow.ArrowException) as error:
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


def _numbered(rows: list[dict[str, Any]], origin: str) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{origin}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
