"""The evaluate and generate commands on the embedded model."""

import json

import pytest

from gemma_grpo import cli, evaluate


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """This process has its devices already, and wants no cache beside the package."""
    monkeypatch.setattr(cli, "split_cpu", lambda *sizes: None)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda folder: None)


def test_evaluate_reports_and_saves_every_completion(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["--data.num-test", "10", "--evaluation.batch-size", "16", "--out", str(out)]
    arguments += ["--evaluation.num-samples", "2", "--json"]
    assert evaluate.main(["gemma3-nano", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 10 and result["k"] == 2 and result["format_rate"] == 0
    assert len(out.read_text().splitlines()) == 10


@pytest.mark.parametrize(
    "command, arguments, named",
    [
        (evaluate, ["nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(capsys, command, arguments, named):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
