"""What every row of a benchmark says of its making."""

import json
import re

import jax

from benchmarks import timing


def test_a_row_names_device_version_and_commit_and_its_own_values_win(capsys):
    timing.print_row(benchmark="mine", ms=1.5, device="2 x TPU v5e")
    row = json.loads(capsys.readouterr().out)
    assert row.keys() == {"device", "jax", "commit", "benchmark", "ms"}
    assert (row["device"], row["jax"], row["ms"]) == ("2 x TPU v5e", jax.__version__, 1.5)
    assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", row["commit"])  # none outside a checkout
