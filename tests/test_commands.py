"""The generate command on the embedded model."""

import json

import pytest

from gemma_grpo import cli, generate


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """This process has its devices already, and wants no cache beside the package."""
    monkeypatch.setattr(cli, "split_cpu", lambda *sizes: None)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda folder: None)


def test_generate_answers_a_sum_and_says_how_likely_it_was(capsys):
    arguments = ["gemma3-nano", "--prompt", "What is 12 + 7?", "--json"]
    assert generate.main(arguments) == 0
    line = json.loads(capsys.readouterr().out)
    assert "19" in line["completion"] and line["stopped"] and line["logp"] < 0


def test_generate_draws_as_many_as_asked_and_repeats_with_the_seed(capsys):
    arguments = ["gemma3-nano", "--prompt", "What is 12 + 7?", "--num", "3"]
    arguments += ["--temperature", "1.5", "--json"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert generate.main([*arguments, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(outputs[0].splitlines()) == 3
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    "command, arguments, named",
    [
        (generate, ["nowhere", "--prompt", "x"], "nowhere"),
        (generate, ["gemma3-nano", "--prompt", "x " * 99], "max_prompt_length"),
        (generate, ["gemma3-nano", "--prompt", "x", "--num", "0"], "--num"),
        (generate, ["gemma3-nano", "--prompt", "x", "--top-p", "2"], "top_p"),
    ],
)
def test_bad_input_is_one_line(capsys, command, arguments, named):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
