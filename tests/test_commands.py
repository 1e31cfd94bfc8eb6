"""The evaluate and generate commands on the embedded model, and its weights file."""

import json

import numpy as np
import pytest
import safetensors.numpy

from gemma_grpo import assets, cli, evaluate, generate, model, weights
from gemma_grpo.errors import UserError

SHAPES = model.abstract(model.CONFIGS["gemma3-nano"])[1]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """This process has its devices already, and wants no cache beside the package."""
    monkeypatch.setattr(cli, "one_cpu_device_per_core", lambda *sizes: None)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda folder: None)


def test_generate_answers_a_sum_and_says_how_likely_it_was(capsys):
    arguments = [str(assets.NANO_WEIGHTS), "--prompt", "What is 12 + 7?", "--json"]
    assert generate.main(arguments) == 0
    line = json.loads(capsys.readouterr().out)
    assert "19" in line["completion"] and line["stopped"] and line["logp"] < 0


def test_generate_draws_as_many_as_asked_and_repeats_with_the_seed(capsys):
    arguments = [str(assets.NANO_WEIGHTS), "--prompt", "What is 12 + 7?", "--num", "3"]
    arguments += ["--temperature", "1.5", "--json"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert generate.main([*arguments, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(outputs[0].splitlines()) == 3
    assert outputs[0] == outputs[1] != outputs[2]


def test_evaluate_reports_and_saves_every_completion(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["--data.num-test", "10", "--evaluation.batch-size", "16", "--out", str(out)]
    arguments += ["--evaluation.num-samples", "2", "--json"]
    assert evaluate.main([str(assets.NANO_WEIGHTS), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 10 and result["k"] == 2 and result["format_rate"] == 0
    assert len(out.read_text().splitlines()) == 10


@pytest.mark.parametrize(
    "command, arguments, named",
    [
        (generate, ["nowhere", "--prompt", "x"], "nowhere"),
        (generate, [str(assets.NANO_WEIGHTS), "--prompt", "x " * 99], "max_prompt_length"),
        (generate, [str(assets.NANO_WEIGHTS), "--prompt", "x", "--num", "0"], "--num"),
        (generate, [str(assets.NANO_WEIGHTS), "--prompt", "x", "--top-p", "2"], "top_p"),
        (evaluate, ["nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(capsys, command, arguments, named):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


def test_weights_survive_the_file_bit_for_bit(tmp_path):
    params = weights.load(assets.NANO_WEIGHTS, SHAPES)
    weights.save(tmp_path / "again.safetensors", params)
    assert (tmp_path / "again.safetensors").read_bytes() == assets.NANO_WEIGHTS.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def damaged(tensors, how):
    if how == "missing":
        del tensors["embedding"]
    if how == "extra":
        tensors["bias"] = np.zeros(3, np.float32)
    if how == "shape":
        tensors["embedding"] = tensors["embedding"][:-1]
    return tensors


@pytest.mark.parametrize(
    "how, named", [("missing", "embedding"), ("extra", "bias"), ("shape", "embedding")]
)
def test_weights_of_another_model_are_refused_by_tensor(tmp_path, how, named):
    path = tmp_path / "other.safetensors"
    tensors = safetensors.numpy.load_file(assets.NANO_WEIGHTS)
    safetensors.numpy.save_file(damaged(tensors, how), path)
    with pytest.raises(UserError, match=named):
        weights.load(path, SHAPES)


def test_a_disk_that_cannot_be_written_is_one_clear_error(tmp_path):
    params = weights.load(assets.NANO_WEIGHTS, SHAPES)
    with pytest.raises(UserError, match="cannot write"):
        weights.save(tmp_path / "no such folder" / "model.safetensors", params)


def test_a_torn_weights_file_is_named(tmp_path):
    path = tmp_path / "torn.safetensors"
    path.write_bytes(assets.NANO_WEIGHTS.read_bytes()[:1000])
    with pytest.raises(UserError, match="torn.safetensors"):
        weights.load(path, SHAPES)
