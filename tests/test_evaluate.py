"""The evaluate command on the embedded model: what it writes, asks, records and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_grpo import cli, config, evaluate, weights
from gemma_grpo.config import DataConfig, RunConfig
from gemma_grpo.evaluation import evaluator, gsm8k_protocol
from gemma_grpo.evaluation.config import EvaluationConfig
from gemma_grpo.runtime import ModelConfig, load_model

FEW = ["--num", "5", "--batch-size", "16", "--num-samples", "2"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch, tmp_path):
    """This process has its devices already and wants no cache; results go to the test's folder."""
    monkeypatch.setattr(cli, "split_cpu", lambda *sizes: None)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda folder: None)
    monkeypatch.chdir(tmp_path)


NO_TOKENS = {
    "num_tokens": np.zeros(0, np.int32),
    "token_ids": np.zeros(0, np.uint32),
    "characters": np.zeros(0, np.uint16),
    "logps": np.zeros(0, np.float16),
}


@pytest.fixture
def unmeasured(monkeypatch):
    """No model runs: the evaluator says whether all weights are zero, as a finished run's are here,
    and the runtimes it was made with are kept."""
    seen = []

    class Nothing:
        def run(self, params, problems):
            zero = not any(leaf.any() for leaf in jax.tree.leaves(params))
            figures = {"n": len(problems), "zero": zero, "by_difficulty": {}, "by_domain": {}}
            return figures, [{"problem": i} for i in range(len(problems))], NO_TOKENS

    def make(settings, runtime, pay):
        seen.append(runtime)
        return Nothing()

    monkeypatch.setattr(evaluator, "make_evaluator", make)
    return seen


def gsm8k_folder(path, num, *, question="How many are {i} and {i}?"):
    path.mkdir()
    lines = [
        json.dumps({"question": question.format(i=i), "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"})
        for i in range(num)
    ]
    (path / "test.jsonl").write_text("\n".join(lines))
    return path


def finished_run(path, **model):
    """A run whose SFT has left zeros."""
    run = RunConfig(model=ModelConfig(**model), data=DataConfig(source="curriculum"))
    path.mkdir()
    (path / "config.yaml").write_text(config.to_yaml(run))
    (path / "weights").mkdir()
    _, params = load_model(run.model, seed=0)
    weights.save(path / "weights" / "sft.safetensors", jax.tree.map(jnp.zeros_like, params))
    return path


def test_every_generation_is_saved_and_the_result_with_its_protocol(capsys, tmp_path):
    out = tmp_path / "there"
    arguments = ["--weights", "gemma3-nano", *FEW, "--out", str(out)]
    arguments += ["--max-completion-length", "24", "--json"]
    assert evaluate.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "result.json").read_text()) == result
    assert result["n"] == 5 and result["k"] == 2
    for share in evaluate.SHARES + evaluate.SHARES_OF_SAMPLES:
        low, high = result[f"{share}_ci95"]
        assert 0 <= low <= result[share] <= high <= 1
    protocol = result["protocol"]
    assert protocol["weights"] == "gemma3-nano" and protocol["stage"] == "base"
    assert protocol["task"] == "curriculum" and protocol["n"] == 5
    assert protocol["dtype"] == "float32" and protocol["jax"] == jax.__version__
    assert protocol["samples"]["num_samples"] == 2 and protocol["samples"]["temperature"] == 1
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [row["greedy"] for row in rows] == [True] * 5 + [False] * 10
    assert [row["problem"] for row in rows] == [*range(5), *(i for i in range(5) for _ in "ab")]
    greedy = rows[:5]
    assert sum(row["correctness"] for row in greedy) / 5 == result["accuracy"]
    assert sum(row["lenient_correctness"] for row in greedy) / 5 == result["lenient_accuracy"]
    assert sum(not row["stopped"] for row in greedy) / 5 == result["truncation_rate"]
    assert all(row["logp"] < 0 < row["num_tokens"] for row in rows)
    files = ["generations.jsonl", "generations.npz", "result.json"]
    assert sorted(path.name for path in out.iterdir()) == files


def test_a_run_is_measured_with_its_own_settings_beside_its_evaluations(
    capsys, tmp_path, unmeasured
):
    run = finished_run(tmp_path / "run", instruction="Think.", max_completion_length=50)
    assert evaluate.main([str(run), *FEW]) == 0
    (runtime,) = unmeasured
    assert (runtime.instruction, runtime.max_completion_length) == ("Think.", 50)
    (folder,) = (run / "evaluations").iterdir()
    assert folder.name.startswith("curriculum-num=5")
    result = json.loads((folder / "result.json").read_text())
    assert result["protocol"]["stage"] == "sft" and result["protocol"]["base"] == "gemma3-nano"
    assert result["zero"]  # the stage's weights, not the base's
    assert str(folder / "generations.jsonl") in capsys.readouterr().out


def test_a_run_of_some_difficulties_is_measured_on_those_unless_a_task_is_named(tmp_path):
    run = finished_run(tmp_path / "run")
    path = run / "config.yaml"
    path.write_text(
        path.read_text().replace("difficulties: easy,medium,hard", "difficulties: easy")
    )
    of = lambda **flags: evaluate._problems(
        evaluate._subject(evaluate.Options(str(run), **flags)), 40
    )
    assert {problem.difficulty for problem in of()} == {"easy"}
    assert len({problem.difficulty for problem in of(task="curriculum")}) == 3


def test_a_base_model_on_gsm8k_gets_the_protocol_and_another_count_is_warned_of(
    capsys, tmp_path, unmeasured
):
    folder = gsm8k_folder(tmp_path / "data", 3)
    assert evaluate.main(["--weights", "gemma3-nano", "--task", f"gsm8k:{folder}"]) == 0
    (runtime,) = unmeasured
    assert runtime.instruction == gsm8k_protocol.INSTRUCTION
    assert runtime.max_prompt_length == gsm8k_protocol.MAX_PROMPT_LENGTH
    assert runtime.max_completion_length == gsm8k_protocol.MAX_COMPLETION_LENGTH
    result = json.loads((tmp_path / "evaluations/gemma3-nano-gsm8k/result.json").read_text())
    assert result["protocol"]["departures"] == ["3 problems, not 1319"]
    assert capsys.readouterr().err == "warning: not the GSM8K protocol: 3 problems, not 1319\n"


def test_the_whole_protocol_departs_in_nothing(capsys, tmp_path, unmeasured):
    folder = gsm8k_folder(tmp_path / "data", 1319)
    assert evaluate.main(["--weights", "gemma3-nano", "--task", f"gsm8k:{folder}"]) == 0
    result = json.loads((tmp_path / "evaluations/gemma3-nano-gsm8k/result.json").read_text())
    assert result["n"] == 1319 and result["protocol"]["departures"] == []
    assert capsys.readouterr().err == ""


def test_flags_win_over_the_protocol_and_are_recorded_as_departures(tmp_path, unmeasured):
    folder = gsm8k_folder(tmp_path / "data", 3)
    arguments = ["--weights", "gemma3-nano", "--task", f"gsm8k:{folder}", "--dtype", "bfloat16"]
    arguments += ["--instruction", "Go.", "--max-prompt-length", "100"]
    assert evaluate.main([*arguments, "--max-completion-length", "9", "--out", "x"]) == 0
    (runtime,) = unmeasured
    assert (runtime.instruction, runtime.dtype) == ("Go.", "bfloat16")
    assert (runtime.max_prompt_length, runtime.max_completion_length) == (100, 9)
    departures = json.loads((tmp_path / "x/result.json").read_text())["protocol"]["departures"]
    assert departures[1:] == ["the instruction is 'Go.'", "completions of 9 tokens, not 768"]


def test_a_run_asked_gsm8k_keeps_its_words_and_takes_the_protocols_budgets(tmp_path, unmeasured):
    run = finished_run(tmp_path / "run", instruction="Think.")
    folder = gsm8k_folder(tmp_path / "data", 3)
    assert evaluate.main([str(run), "--task", f"gsm8k:{folder}"]) == 0
    (runtime,) = unmeasured
    assert (runtime.instruction, runtime.max_completion_length) == ("Think.", 768)
    result = json.loads((run / "evaluations/gsm8k/result.json").read_text())
    assert "the instruction is 'Think.'" in result["protocol"]["departures"]


def test_a_file_is_a_task_and_its_longest_prompt_sets_the_budget(tmp_path, unmeasured):
    line = lambda i: json.dumps({"prompt": f"What is {i} + {i}?" + " no" * i, "answer": str(2 * i)})
    (tmp_path / "sums.jsonl").write_text("\n".join(line(i) for i in range(60)))
    assert evaluate.main(["--weights", "gemma3-nano", "--task", "sums.jsonl"]) == 0
    (runtime,) = unmeasured
    result = json.loads((tmp_path / "evaluations/gemma3-nano-sums/result.json").read_text())
    protocol = result["protocol"]
    assert protocol["n"] == 60
    assert runtime.max_prompt_length % 16 == 0 and "departures" not in protocol
    assert runtime.max_completion_length == evaluate.COMPLETION_LENGTH


def test_a_file_is_measured_whole_and_of_the_run_s_own_the_part_it_held_out(tmp_path, capsys):
    run = finished_run(tmp_path / "run")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("source: curriculum", "source: own.jsonl"))
    line = lambda i: json.dumps({"prompt": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n"
    (tmp_path / "own.jsonl").write_text("".join(line(i) for i in range(100)))
    (tmp_path / "other.jsonl").write_text("".join(line(i) for i in range(200, 208)))
    (tmp_path / "mixed.jsonl").write_text("".join(line(i) for i in range(200)))
    of = lambda task: evaluate._problems(
        evaluate._subject(evaluate.Options(str(run), task=task)), None
    )
    held_out = of("own.jsonl")
    assert 1 <= len(held_out) < 30 and of("./own.jsonl") == held_out
    assert len(of("other.jsonl")) == 8
    assert capsys.readouterr().err == ""
    assert len(of("mixed.jsonl")) == 200
    shared = 100 - len(held_out)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: mixed.jsonl: {shared} of 200 problems were trained on")
    path.write_text(path.read_text().replace("own.jsonl", "gone.jsonl"))
    assert len(of("mixed.jsonl")) == 200 and capsys.readouterr().err == ""
    assert len(of("other.jsonl,own.jsonl")) == 100  # two files keep their meaning


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--weights", "nowhere"], "nowhere"),
        (["nowhere"], "nowhere"),
        ([], "--weights"),
        (["run", "--weights", "gemma3-nano"], "name one model"),
        (["--weights", "gemma3-nano", "--task", "nothing"], "nothing"),
        (["--weights", "gemma3-nano", "--max-prompt-length", "4"], "max_prompt_length"),
        (["--weights", "gemma3-nano", "--num-samples", "2", "--batch-size", "6"], "batch_size"),
        (["--weights", "gemma3-nano", "--num", "-1"], "-1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, arguments, named):
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not list(tmp_path.iterdir())


def test_earlier_results_are_not_written_over(capsys, tmp_path, unmeasured):
    arguments = ["--weights", "gemma3-nano", *FEW, "--out", "there"]
    assert evaluate.main(arguments) == 0
    before = (tmp_path / "there/result.json").read_text()
    assert evaluate.main(arguments) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "there/result.json").read_text() == before


def test_a_second_measurement_under_other_conditions_has_a_folder_of_its_own(tmp_path):
    (tmp_path / "config.yaml").touch()
    options = evaluate.Options(run=str(tmp_path))
    others = [
        replace(options, seed=1),
        replace(options, num=50),
        replace(options, dtype="bfloat16"),
        replace(options, instruction="Think."),
        replace(options, instruction="Think!"),
        replace(options, evaluation=EvaluationConfig(temperature=0.5)),
    ]
    folders = [evaluate._folder(each, "gsm8k:here/data") for each in (options, *others)]
    assert folders[0] == tmp_path / "evaluations" / "gsm8k" and len(set(folders)) == 7
    assert folders[1].name == "gsm8k-seed=1" and folders[3].name == "gsm8k-dtype=bfloat16"
    assert {folder.parent for folder in folders} == {tmp_path / "evaluations"}
    again = replace(options, evaluation=EvaluationConfig(batch_size=8), json=True)
    assert evaluate._folder(again, "gsm8k:here/data") == folders[0]


def test_what_is_measured_of_a_model_is_not_written_into_its_folder(tmp_path):
    (tmp_path / "config.json").touch()
    folder = evaluate._folder(evaluate.Options(run=str(tmp_path)), "curriculum")
    assert folder == Path("evaluations") / f"{tmp_path.name}-curriculum"


def test_a_domain_named_as_a_difficulty_has_a_line_of_its_own():
    share = {"accuracy": 0.5, "accuracy_ci95": [0, 1], "format_rate": 1.0, "n": 4}
    result = share | {
        "by_difficulty": {"medium": {"accuracy": 1.0, "n": 3}},
        "by_domain": {"medium": {"accuracy": 0.0, "n": 1}},
    }
    lines = evaluate._table("x", result).splitlines()
    assert "  medium: 100.0% of 3" in lines and "  medium: 0.0% of 1" in lines


def test_the_table_says_how_many_samples_k_are():
    share = {"accuracy": 0.5, "accuracy_ci95": [0, 1], "format_rate": 1.0, "n": 4}
    result = share | {"lenient_accuracy": 0.5, "lenient_accuracy_ci95": [0.1, 0.9]}
    result |= {"by_difficulty": {}, "by_domain": {}}
    lenient = "lenient_accuracy 50.0% (95 % interval 10.0% to 90.0%)"
    assert evaluate._table("x", result).splitlines()[3:] == [lenient]
    result |= {"k": 3, "pass_at_1": 0.25, "pass_at_1_ci95": [0.0, 0.5]}
    result |= {"pass_at_k": 0.75, "pass_at_k_ci95": [0.5, 1.0]}
    assert evaluate._table("x", result).splitlines()[3:] == [
        lenient,
        "of k = 3 samples of each problem:",
        "pass_at_1 25.0% (95 % interval 0.0% to 50.0%)",
        "pass_at_k 75.0% (95 % interval 50.0% to 100.0%)",
    ]
