"""The Python API: what a notebook does, in processes of its own, on the embedded model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import children
import pytest
from run_folders import write_run
from tolerances import F32

import gemma_grpo
from gemma_grpo import api, config, model, pipeline, train, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.rewards import custom
from gemma_grpo.view import page

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
TINY = {
    "sft.num_steps": 2,
    "sft.batch_size": 4,
    "grpo.num_steps": 2,
    "grpo.prompts_per_step": 2,
    "grpo.num_generations": 4,
    "data.num_train": 60,
    "data.num_test": 8,
    "evaluation.batch_size": 8,
    "evaluation.num_samples": 0,
}


def python(script, folder, status=0):
    """What a script prints, and its errors' lines, in a process of its own, which checks no types,
    as a user's does not."""
    child = children.Forked(script, cwd=folder)
    said, errors = child.communicate(timeout=900)
    assert child.returncode == status, errors
    return said, errors


def test_importing_the_package_imports_no_library():
    script = (
        "import sys; import gemma_grpo; gemma_grpo.UserError, dir(gemma_grpo); "
        "print({'jax', 'numpy', 'flax', 'yaml'} & {name.split('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_all_names_are_there_and_the_page_names_them():
    text = PAGE.read_text()
    for name in gemma_grpo.__all__:
        assert getattr(gemma_grpo, name) is not None and f"`{name}" in text, name
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = gemma_grpo.fitt


def test_a_run_on_disk_is_viewed_inline(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(config.to_yaml(gemma_grpo.preset("gemma3-nano")))
    shown = gemma_grpo.load(run).view(height=300)
    assert shown.html == page.html([run], 4) and "srcdoc" in shown._repr_html_()
    with pytest.raises(UserError, match="megabytes"):
        gemma_grpo.load(run).view(megabytes=0)


def test_what_a_run_has_not_written_yet_is_named_in_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text(config.to_yaml(gemma_grpo.preset("gemma3-nano")))
    result = gemma_grpo.load(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has no summary yet: gemma_grpo.resume"):
        print(result)
    for name, ask in (
        ("metrics.jsonl", result.metrics),
        ("rollouts/grpo-000007.jsonl", lambda: result.rollouts(7)),
        ("evaluations/sft.jsonl", lambda: result.evaluations("sft")),
    ):
        with pytest.raises(UserError, match=f"{name} is not there"):
            ask()
    assert result.generate([]) == []  # nothing is loaded for no prompt


def brevity(sample):
    return 0.5


def test_the_commands_keep_their_names():
    assert train.__name__ == "gemma_grpo.train" and callable(train.main)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda result: result.generate("What is 2 + 2?"), "prompts: give a list"),
        (lambda result: result.metrics("gprp"), "no stage is named 'gprp': use sft or grpo"),
        (lambda _: gemma_grpo.preset("gemma3-nano").replace({"sft": {}}), "such as sft."),
        (
            lambda _: gemma_grpo.preset("gemma3-nano").replace({"grpo": {"num_steps": 5}}),
            "name its settings, such as grpo.num_steps",
        ),
    ],
)
def test_what_is_no_list_and_no_settings_is_refused_in_one_line(tmp_path, call, message):
    run_dir = tmp_path / "run"
    pipeline.new_run_dir(run_dir, gemma_grpo.preset("gemma3-nano"))
    with pytest.raises(gemma_grpo.UserError, match=message):
        call(gemma_grpo.load(run_dir))


REFUSED = {
    "fit('gemma3-nano')": "run: give settings",
    "fit(gemma_grpo.preset('gemma3-nano'), rewards=len)": "rewards: give a list",
    "fit(gemma_grpo.preset('gemma3-nano'), rewards=3)": "rewards: give a list",
    "fit(gemma_grpo.preset('gemma3-nano'), rewards=[{len: 1}])": "reward {<built-in",
    "fit(gemma_grpo.preset('gemma3-nano'), rewards={len: 'x'})": (
        "reward len: its weight is 'x': give a number"
    ),
    "fit(gemma_grpo.preset('gemma3-nano'), problems=3)": "problems are a list, not of type int",
    "fit(gemma_grpo.preset('gemma3-nano'), hours='8')": "--hours 8: give",
    "load('.').generate(['2 + 2?', [{'role': 'user', 'content': '2 + 2?'}]])": (
        "prompt 2 is of type list: give the question as text"
    ),
    "preset('gemma3-nano').replace({1: 2})": "there is no setting 1",
    "resume('.', may_change='data')": (
        "may_change: 'data'; give a list of some of 'data', 'base', 'rewards'"
    ),
}
CALL_EACH = """
import json, traceback
import gemma_grpo
said = {}
for call in CALLS:
    try:
        eval(f"gemma_grpo.{call}")
    except Exception as error:
        said[call] = traceback.format_exception(error)[-1]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What a call said as it failed, by the call: all in one process, which checks no types."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "config.yaml").write_text(config.to_yaml(RunConfig()))
    said, _ = python(CALL_EACH.replace("CALLS", repr(list(REFUSED))), folder)
    return json.loads(said)


@pytest.mark.parametrize("call", REFUSED)
def test_arguments_of_another_kind_are_refused_in_one_line(refusals, call):
    error = f"gemma_grpo.errors.UserError: {REFUSED[call]}"
    assert refusals[call].startswith(error) and refusals[call].count("\n") == 1


def test_a_model_s_folder_is_no_run_and_the_line_says_what_takes_it(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml\)$"):
        gemma_grpo.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"generate --weights {tmp_path}, or evaluate --weights"):
        gemma_grpo.load(tmp_path)


def test_the_settings_name_their_sections():
    said = re.findall(r"`(\w+(?:\.\w+)?)`", RunConfig.__doc__)
    flat = config.flat(RunConfig())
    sections = {name.rpartition(".")[0] for name in flat} - {""}
    alone = {name for name in flat if "." not in name}
    assert sections | alone == {*said} - {"replace", "grpo.num_steps"}


def test_a_run_is_found_again_from_another_folder(tmp_path, monkeypatch):
    pipeline.new_run_dir(tmp_path / "run", gemma_grpo.preset("gemma3-nano"))
    monkeypatch.chdir(tmp_path)
    result = gemma_grpo.load("run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert result.run_dir == gemma_grpo.load("~/run").run_dir == tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": {brevity: 0.5}}, "begun with another weight"),
        ({"rewards": {brevity: 0.1}, "hours": -1.0}, "a number above 0"),
    ],
)
def test_a_run_is_resumed_as_it_was_begun(tmp_path, arguments, message):
    specs, _ = pipeline.given_objects({brevity: 0.1}, None, None)
    run = pipeline.with_objects(gemma_grpo.preset("gemma3-nano"), specs, pipeline.NOTHING_GIVEN)
    pipeline.new_run_dir(tmp_path / "run", run)
    with pytest.raises(gemma_grpo.UserError, match=message):
        gemma_grpo.resume(tmp_path / "run", **arguments)


def test_a_run_is_copied_with_moved_files_and_no_other_setting(tmp_path):
    pipeline.new_run_dir(tmp_path / "run", gemma_grpo.preset("gemma3-nano"))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\n')
    before, result = sorted((tmp_path / "run").iterdir()), gemma_grpo.load(tmp_path / "run")
    with pytest.raises(gemma_grpo.UserError, match=r"other settings \(seed 0 -> 1\)"):
        result.copy(tmp_path / "next", {"seed": 1})
    with pytest.raises(gemma_grpo.UserError, match="is there already"):
        result.copy(tmp_path / "run")
    assert not (tmp_path / "next").exists()
    copy = result.copy(
        tmp_path / "next", {"data.source": "moved.jsonl", "grpo.guard.action": "stop"}
    )
    assert copy.metrics("sft") == [{"stage": "sft", "step": 1}]
    assert gemma_grpo.load(tmp_path / "next").run == copy.run
    assert (copy.run.data.source, copy.run.grpo.guard.action) == ("moved.jsonl", "stop")
    assert sorted((tmp_path / "run").iterdir()) == before


def test_a_run_that_could_not_start_leaves_its_name_free(tmp_path):
    run = gemma_grpo.preset("gemma3-nano").replace({"data.num-test": 8})
    problems = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]  # no completion
    for _ in range(2):
        with pytest.raises(gemma_grpo.UserError, match="completion"):
            gemma_grpo.fit(run, problems=problems, run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_settings_are_replaced_by_the_names_of_the_flags():
    run = RunConfig().replace({"grpo.loss.beta": 0.1, "seed": 3, "reward.extra": ["a.py:f"]})
    assert (run.grpo.loss.beta, run.seed, run.reward.extra) == (0.1, 3, ("a.py:f",))
    assert RunConfig().replace({}) == RunConfig()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grpo.stepz": 1}, "grpo has no field 'stepz'"),
        ({"grpoo.num_steps": 1}, "no setting 'grpoo.num_steps'"),
        ({"seed.x": 1}, "no setting 'seed.x'"),
        ({"grpo.num_steps": "many"}, "grpo.num_steps is 'many'; use an int"),
        ({"grpo.num_steps": 0}, "must be at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig().replace(settings)


@pytest.fixture
def trained(tmp_path, one_layer):
    """A run folder whose SFT has left the base's own weights."""
    run = gemma_grpo.preset("gemma3-nano").replace({"model.weights": one_layer, "stages": "sft"})
    source = weights.open_source(one_layer)
    shapes = model.abstract(source.config)[1]
    base = weights.assemble(source, shapes, dtype="float32", sharding=None)
    pipeline.new_run_dir(tmp_path / "run", run)
    (tmp_path / "run" / "weights").mkdir()
    weights.save(tmp_path / "run" / "weights" / "sft.safetensors", base)
    yield tmp_path / "run"
    gemma_grpo.load(tmp_path / "run").unload()


def test_a_model_is_loaded_once_and_given_back_on_demand_and_before_training(trained, monkeypatch):
    loads, asked = [], []
    load = api.load_model
    monkeypatch.setattr(
        api, "load_model", lambda *a, **k: loads.append(k["trained"]) or load(*a, **k)
    )
    monkeypatch.setattr(
        pipeline, "measure", lambda run, runtime, params, given: asked.append(runtime) or {}
    )
    result = gemma_grpo.load(trained)
    for instruction in (None, "Think.", None):
        result.evaluate(instruction=instruction)
    assert result.generate(["1 + 2?"], seed=5) == result.generate(["1 + 2?"], seed=6)
    with_instruction = result.generate(["1 + 2?"], instruction="Add.")
    assert with_instruction == result.generate(["Add.\n1 + 2?"], instruction="")
    with pytest.raises(gemma_grpo.UserError, match="prompt 1 takes"):
        result.generate(["1 + 2?"], instruction="Add. " * 60)
    assert len(loads) == 1
    of_run = result.run.model.instruction
    assert [runtime.instruction for runtime in asked] == [of_run, "Think.", of_run]
    path = trained / "weights" / "sft.safetensors"
    os.utime(path, ns=(0, 1))  # written again meanwhile
    result.evaluate()
    result.unload()
    assert not api._kept
    result.evaluate()
    assert len(loads) == 3
    monkeypatch.setattr(pipeline, "execute", lambda *_: 1 / len(api._kept))
    with pytest.raises(ZeroDivisionError):
        gemma_grpo.resume(trained)


def test_functions_are_recorded_by_name_and_weight_and_wanted_again():
    specs, given = pipeline.given_objects({brevity: 0.25}, None, None)
    assert specs == ("session:brevity=0.25",)
    assert custom.load_extra_rewards(specs, given.rewards) == [("brevity", brevity, 0.25)]
    with pytest.raises(UserError, match=r"function of a Python session.*rewards=\[brevity\]"):
        custom.load_extra_rewards(specs)


def test_problems_may_be_rows_or_problems_and_a_tenth_is_held_out():
    rows = [{"prompt": f"{n} + 1?", "answer": n + 1} for n in range(50)]
    _, given = pipeline.given_objects([], [*rows, Problem("2 + 2?", "4")], None)
    learnt, held_out = given.load_problems(RunConfig())
    assert len(learnt) + len(held_out) == 51 and 1 <= len(held_out) <= 12
    assert not {p.prompt for p in learnt} & {p.prompt for p in held_out}


def test_a_file_is_measured_whole_and_what_was_trained_on_is_named(tmp_path, capsys):
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(50)]
    file = tmp_path / "e.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measured(run, given, problems=str(file)):
        run, given = pipeline.to_measure(problems, None, run, given)
        return given.load_problems(run)

    learnt, held_out = measured(RunConfig(), pipeline.NOTHING_GIVEN)
    assert (len(learnt), len(held_out)) == (0, 50) and capsys.readouterr().err == ""
    _, given = pipeline.given_objects([], rows[:20], None)
    assert len(measured(RunConfig(), given)[1]) == 50
    shared = len(given.load_problems(RunConfig())[0])
    assert f"{file}: {shared} of 50 problems were trained on" in capsys.readouterr().err
    few = RunConfig().replace({"data.num_test": 5, "data.difficulties": "hard"})  # of its own
    assert len(measured(few, given)[1]) == len(measured(few, given, rows)[1]) == 50
    own = RunConfig().replace({"data.source": str(file)})
    assert measured(own, pipeline.NOTHING_GIVEN)[1] == pipeline.NOTHING_GIVEN.load_problems(own)[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([lambda sample: 1.0], None, None), "no named function: use def"),
        (([], [{"prompt": "2?"}], None), 'problem 1: field "answer" is missing'),
        (([], [3], None), "problem 1 is of type int"),
        (([], ["prompt", "answer"], None), r'type str: .*pandas frame, df\.to_dict\("records"\)'),
        (([], "x.jsonl", None), "problems are a list, not of type str: .* set data.source"),
        (([], [], None), "no problems"),
        (([], None, [{"prompt": "2?", "answer": "2"}]), "held_out goes with problems"),
    ],
)
def test_wrong_objects_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        pipeline.given_objects(*arguments)


def test_objects_that_a_run_was_begun_without_are_refused():
    _, given = pipeline.given_objects([brevity], None, None)
    with pytest.raises(UserError, match="begun without the reward 'brevity'"):
        pipeline.require_objects(RunConfig(), given)
    _, given = pipeline.given_objects([], [{"prompt": "2?", "answer": "2"}], None)
    with pytest.raises(UserError, match="begun with curriculum"):
        pipeline.require_objects(RunConfig(), given)


def test_a_command_cannot_go_on_with_objects_of_python(tmp_path, capsys):
    run = RunConfig().replace({"data.source": "session"} | TINY)
    (tmp_path / "config.yaml").write_text(config.to_yaml(run))
    assert train.main(["--resume", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the problems were objects of a Python session")


def test_the_example_of_the_page_runs(tmp_path):
    example = EXAMPLES[0]
    settings = json.dumps(TINY)
    small = re.sub(r"replace\(\n.*?\n\)", f"replace({settings})", example, flags=re.S)
    assert small != example
    said, _ = python(small.replace("num=50", "num=8"), tmp_path)
    assert re.search(r"^grpo +[\d.]+ %", said, re.M)
    run_dir = tmp_path / "runs" / "brief"
    rows = [json.loads(line) for line in (run_dir / "rollouts/grpo-000001.jsonl").open()]
    assert all(row["brevity"] == 1 - row["num_tokens"] / 60 for row in rows)
    saved = config.from_yaml(run_dir / "config.yaml")
    assert saved.reward.extra == ("session:brevity=0.1",)
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert f"{summary['stages']['grpo']['accuracy']}" in said.split("\n")


def test_the_loss_of_the_page_is_what_hand_arithmetic_gives(tmp_path):
    """Advantages 1/2 and -1/2 over three tokens of one third each, at a ratio of 1."""
    said, _ = python(EXAMPLES[1], tmp_path)
    loss, *gradient = (float(number) for number in re.findall(r"-?\d+\.\d*", said))
    assert loss == pytest.approx(-1 / 6, abs=F32)
    assert gradient == pytest.approx([-1 / 6, -1 / 6, 1 / 6, 0], abs=F32)


STOPPED = """
import os, pathlib, signal, threading
import jax.numpy as jnp
jnp.zeros(3).block_until_ready()  # JAX runs already, on one device
import gemma_grpo
from gemma_grpo.data import curriculum
run = gemma_grpo.preset("gemma3-nano").replace(SETTINGS)
problems = curriculum.problems("train", 40, 0)
calls = []
def pay(sample):
    calls.append(sample)
    # Four gold completions, four held-out ones of the base, then in the second of three steps.
    if len(calls) == 4 + 4 + 12:
        os.kill(os.getpid(), signal.SIGINT)
    return len(calls) / 100
try:
    gemma_grpo.fit(run, rewards=[pay], problems=problems, run_dir="run")
except gemma_grpo.InterruptedRunError as stop:
    print("stopped:", stop)
print(len(gemma_grpo.load("run").metrics()))
for wrong in ({}, {"problems": problems}, {"rewards": [pay]}):
    try:
        gemma_grpo.resume("run", **wrong)
    except gemma_grpo.UserError as error:
        print("refused:", error)
results = []
gemma_grpo.load("run").copy("next")
def go_on():
    results.append(gemma_grpo.resume("next", rewards=[pay], problems=problems))
thread = threading.Thread(target=go_on)
thread.start(); thread.join()
print(len(results[0].metrics()), len(calls), results[0].summary["unfinished"])
print(len(gemma_grpo.load("run").metrics()), pathlib.Path("next/weights/grpo.safetensors").exists())
held_out = [{"prompt": p.prompt, "answer": p.answer} for p in problems[:8]]
print(results[0].evaluate(held_out)["n"])
"""


def test_a_run_is_stopped_saved_and_resumed_in_a_thread_after_jax_was_used(tmp_path, one_layer):
    settings = TINY | {"grpo.num_steps": 3, "stages": "grpo", "model.weights": one_layer}
    said, warned = python(STOPPED.replace("SETTINGS", repr(settings)), tmp_path)
    stopped, steps, *refused, done, copied, measured = said.splitlines()
    assert stopped == "stopped: stopped by SIGINT" and steps == "2"
    assert "/run') goes on" in warned
    assert "the problems were objects" in refused[0]
    assert "reward 'pay' was a function" in refused[1]
    assert "the problems were objects" in refused[2]
    # Three steps of eight, four gold completions before each session, and two evaluations of a
    # tenth of the problems.
    assert done == f"3 {3 * 8 + 2 * 4 + 2 * 4} None" and measured == "8"
    assert copied == "2 True"  # the run went on in its copy, and was only read
