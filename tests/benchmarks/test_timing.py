"""What every row of a benchmark says of its making."""

import ast
import json
import re
from pathlib import Path

import jax
import pytest

from benchmarks import timing

FOLDER = Path(timing.__file__).parent
PRINTING = [path for path in sorted(FOLDER.glob("*.py")) if "print_row(" in path.read_text()]


def test_a_row_names_device_version_and_commit_and_its_own_values_win(capsys):
    timing.print_row(benchmark="mine", ms=1.5, device="2 x TPU v5e")
    row = json.loads(capsys.readouterr().out)
    assert row.keys() == {"device", "jax", "commit", "benchmark", "ms"}
    assert (row["device"], row["jax"], row["ms"]) == ("2 x TPU v5e", jax.__version__, 1.5)
    assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", row["commit"])  # none outside a checkout


@pytest.mark.parametrize("path", PRINTING, ids=lambda path: path.stem)
def test_every_row_printed_names_its_benchmark_and_its_dtype(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    of = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print_row"]
    wanted = set() if path.stem == "grader" else {"benchmark", "dtype"}  # texts have no dtype
    for call in of:
        assert wanted <= {keyword.arg for keyword in call.keywords}, f"line {call.lineno}"


def test_rows_are_printed_in_one_place():
    """But for what a benchmark's child tells its parent."""
    printing = {path.stem for path in FOLDER.glob("*.py") if "print(json" in path.read_text()}
    assert printing == {"timing", "decode", "load_weights", "house"}
