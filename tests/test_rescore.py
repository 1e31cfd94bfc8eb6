"""Re-scoring a finished run: figures worked by hand, and the runs that kills and years leave."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from gemma_grpo import config, rescore
from gemma_grpo.config import RunConfig
from gemma_grpo.errors import UserError
from gemma_grpo.rewards import END_WEIGHTS, rescoring, weights_at

ROOT = Path(__file__).parent.parent
NAMES = ("correctness", "trace", "confidence", "verbosity", "format")
RIGHT = "<reasoning>\n2 + 3 = 5\n</reasoning>\n<answer>\n5\n</answer>"
LOOSE = "The answer is 5."  # a generous reader finds it
WRONG = "<reasoning>\n2 + 3 = 6\n</reasoning>\n<answer>\n6\n</answer>"


def row(completion, group=0, num_tokens=10, **values):
    components = dict.fromkeys(NAMES, 0.0) | values
    return {
        "group": group,
        "prompt": "Ann has 2 and 3 apples. How many?",
        "answer": "5",
        "difficulty": "easy",
        "completion": completion,
        "num_tokens": num_tokens,
        "stopped": True,
        **components,
    }


def right(**more):
    return row(RIGHT, correctness=1.0, trace=1.0, format=1.0, **more)


def paid(rows, step, num_steps):
    """The rows with the reward of their step."""
    weights = weights_at(
        RunConfig().reward.start, RunConfig().reward.end, (step - 1) / max(num_steps - 1, 1)
    ).named()
    return [r | {"reward": sum(weights[name] * r[name] for name in NAMES)} for r in rows]


def make_run(folder, steps, evaluations=(), num_steps=None, **settings):
    """A run directory: `steps` are the rows of each rollout, `evaluations` (name, rows)."""
    num_steps = num_steps or max(len(steps), 1)
    values = yaml.safe_load(config.to_yaml(RunConfig()))
    values["grpo"]["num_steps"] = num_steps
    values["reward"] |= settings
    for name in ("rollouts", "evaluations"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    for step, rows in enumerate(steps, start=1):
        write(folder / "rollouts" / f"grpo-{step:06d}.jsonl", paid(rows, step, num_steps))
    for name, rows in evaluations:
        write(folder / "evaluations" / f"{name}.jsonl", rows)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def reward_file(folder, body):
    path = folder / "mine.py"
    path.write_text(f"def f(sample):\n    {body}\n")
    return f"{path}:f"


def report(capsys, *arguments):
    assert rescore.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys, *arguments):
    assert rescore.main(list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_without_a_change_nothing_moves(tmp_path, capsys):
    wrong = row(WRONG, trace=1 / 3)
    make_run(tmp_path / "run", [[right(), wrong], [wrong, right()]])
    found = report(capsys, tmp_path / "run")
    figures = found["rollouts"]
    assert found["moved"] == [] and found["off"] == 0
    # 0.40 + 0.45 + 0.10 at the first step, 0.60 + 0.25 + 0.10 at the last; a third of a trace.
    for part, reward in zip(found["parts"], [0.95 + 0.15, 0.95 + 0.25 / 3], strict=True):
        assert part["columns"]["reward"] == {
            "old": pytest.approx(reward / 2),
            "new": pytest.approx(reward / 2),
            "rank_correlation": 1.0,
        }
    assert figures["groups"] == 2
    changed = ("best_changed", "signal_gained", "signal_lost", "lenient_unpaid")
    assert [figures[name] for name in changed] == [0, 0, 0, 0]


def test_evaluations_come_in_the_order_of_training(tmp_path, capsys):
    names = ["base", "sft", "grpo-step-000040", "grpo-step-000200", "grpo"]
    rows = [row(WRONG, problem=0, greedy=True, reward=0.0)]
    make_run(tmp_path / "run", [], [(name, rows) for name in reversed(names)])
    assert [part["stage"] for part in report(capsys, tmp_path / "run")["parts"]] == names


def test_other_weights_pay_the_saved_components_at_every_step(tmp_path, capsys):
    make_run(tmp_path / "run", [[right(), row(WRONG, trace=1 / 3)], [right(), row(WRONG)]])
    found = report(capsys, tmp_path / "run", "--weights", "correctness=2,trace=-3")
    first, second = (part["columns"]["reward"]["new"] for part in found["parts"])
    assert first == pytest.approx((2 - 3 + 0.1 - 1) / 2)
    assert second == pytest.approx((2 - 3 + 0.1) / 2)
    # In the second group the wrong one, which earns 0, is now the best.
    assert [part["best_changed"] for part in found["parts"]] == [0, 1]
    assert found["parts"][1]["columns"]["reward"]["rank_correlation"] == pytest.approx(-1)


def test_a_new_reward_can_give_a_group_its_signal_and_zero_weights_take_it(tmp_path, capsys):
    flat, mixed = [right(num_tokens=10), right(num_tokens=20)], [right(group=1), row(WRONG, 1)]
    make_run(tmp_path / "run", [flat + mixed])
    spec = reward_file(tmp_path, "return sample.num_tokens / sample.max_tokens")
    found = report(capsys, tmp_path / "run", "--reward", spec)["rollouts"]
    assert (found["signal_gained"], found["signal_lost"]) == (1, 0)
    # 10, 20, 10 and 10 tokens of 60.
    assert found["columns"]["f"] == {
        "old": None,
        "new": pytest.approx(50 / 60 / 4),
        "rank_correlation": None,
    }
    nothing = ",".join(f"{name}=0" for name in NAMES)
    found = report(capsys, tmp_path / "run", "--weights", nothing)["rollouts"]
    assert (found["signal_gained"], found["signal_lost"]) == (0, 1)


def test_a_reward_whose_name_the_run_knows_takes_its_place(tmp_path, capsys):
    rows = [right() | {"f": 1.0}, row(WRONG) | {"f": 0.5}]
    run = make_run(tmp_path / "run", [], extra=["old.py:f=0.2"], num_steps=1)
    rows = [
        r
        | {
            "reward": 0.2 * r["f"]
            + sum(w * r[n] for n, w in RunConfig().reward.start.named().items())
        }
        for r in rows
    ]
    write(run / "rollouts" / "grpo-000001.jsonl", rows)
    spec = reward_file(tmp_path, "return 2.0")
    found = report(capsys, run, "--reward", f"{spec}=0.5")
    assert found["off"] == 0
    assert found["rollouts"]["columns"]["f"]["old"] == 0.75
    assert found["rollouts"]["columns"]["f"]["new"] == 2.0
    reward = found["rollouts"]["columns"]["reward"]
    assert reward["new"] - reward["old"] == pytest.approx(0.5 * 2.0 - 0.2 * 0.75)


def test_what_a_generous_reader_finds_right_and_the_strict_pays_0_is_counted(tmp_path, capsys):
    make_run(tmp_path / "run", [[right(), row(LOOSE), row(WRONG)]])
    strict = report(capsys, tmp_path / "run")["rollouts"]
    assert strict["lenient_unpaid"] == 1
    generous = report(capsys, tmp_path / "run", "--reader", "lenient")["rollouts"]
    assert generous["lenient_unpaid"] == 0
    assert generous["columns"]["correctness"]["old"] == pytest.approx(1 / 3)
    assert generous["columns"]["correctness"]["new"] == pytest.approx(2 / 3)


def test_the_strict_reader_reads_the_text_again(tmp_path, capsys):
    make_run(tmp_path / "run", [[row(RIGHT), row(WRONG, correctness=1.0)]])  # another grader's
    columns = report(capsys, tmp_path / "run", "--reader", "strict")["rollouts"]["columns"]
    assert columns["correctness"] == {"old": 0.5, "new": 0.5, "rank_correlation": -1.0}
    assert columns["format"]["new"] == 1.0 and columns["trace"]["new"] == 0.5


def test_evaluations_are_paid_by_the_weights_that_measured_them(tmp_path, capsys):
    rows = [right(), row(WRONG)]
    problems = [
        {name: value for name, value in r.items() if name != "group"}
        | {"problem": n, "sample": 0, "greedy": True}
        for n, r in enumerate(rows)
    ]
    make_run(tmp_path / "run", [], [("base", problems)])
    found = report(capsys, tmp_path / "run", "--weights", "format=1")
    assert found["rollouts"] is None
    (part,) = found["parts"]
    assert (part["stage"], part["step"], part["groups"]) == ("base", None, 0)
    weights = END_WEIGHTS.named()
    assert part["columns"]["reward"]["old"] == pytest.approx(
        (weights["correctness"] + weights["trace"] + weights["format"]) / 2
    )
    assert part["columns"]["reward"]["new"] == pytest.approx(
        (weights["correctness"] + weights["trace"] + 1) / 2
    )


def test_what_a_judge_or_a_reward_failed_on_was_paid_its_group_s_mean(tmp_path, capsys):
    """A file's name may hold an equals sign, and a model's may be a path."""
    judges = {"file": "r.yaml", "judges": ["model:models/tiny=0.5", "j.py:judge=0.1"]}
    run = make_run(tmp_path / "run", [], extra=["a=b.py:f=0.2"], rubric=judges, num_steps=1)
    rows = [row(WRONG, f=f, tiny=0.0, judge=None) for f in (0.5, None, 1.0)]
    for each, f in zip(rows, (0.5, 0.75, 1.0), strict=True):
        each["reward"] = 0.2 * f
    write(run / "rollouts" / "grpo-000001.jsonl", rows)
    found = report(capsys, run, "--weights", "f=2")
    columns = found["rollouts"]["columns"]
    assert found["off"] == 0 and columns["f"]["old"] == 0.75 and columns["judge"]["new"] is None
    assert columns["reward"]["old"] == pytest.approx(0.15)
    assert columns["reward"]["new"] == pytest.approx(1.5)
    assert found["rollouts"]["groups"] == 1


def test_a_reward_sees_the_domain(tmp_path, capsys):
    make_run(tmp_path / "run", [[right(domain="sharing"), right(domain="rate")]])
    spec = reward_file(tmp_path, "return float(sample.domain == 'rate')")
    found = report(capsys, tmp_path / "run", "--reward", spec)["rollouts"]
    assert found["columns"]["f"]["new"] == 0.5


def test_an_evaluation_with_totals_was_paid_by_the_run_s_own_end_weights(tmp_path, capsys):
    end = dict.fromkeys(NAMES, 0.0) | {"correctness": 2.0}
    rows = [right(reward=2.0 + 0.5 * 0.2, f=0.2), row(WRONG, reward=0.0, f=0.0)]
    problems = [
        {name: value for name, value in r.items() if name != "group"}
        | {"problem": n, "sample": 0, "greedy": True}
        for n, r in enumerate(rows)
    ]
    make_run(tmp_path / "run", [], [("base", problems)], end=end, extra=["x.py:f=0.5"])
    (part,) = report(capsys, tmp_path / "run", "--weights", "f=1")["parts"]
    assert part["columns"]["reward"]["old"] == pytest.approx(2.1 / 2)
    assert part["columns"]["reward"]["new"] == pytest.approx(2.2 / 2)


def test_a_problems_samples_are_a_group_and_its_greedy_completion_is_not_in_it(tmp_path, capsys):
    of = lambda r, greedy: r | {"problem": 7, "greedy": greedy, "group": None}
    rows = [of(right(num_tokens=50), True), of(right(), False), of(right(), False)]
    rows = [{name: value for name, value in r.items() if name != "group"} for r in rows]
    make_run(tmp_path / "run", [], [("sft", rows)])
    spec = reward_file(tmp_path, "return float(sample.num_tokens)")
    (part,) = report(capsys, tmp_path / "run", "--reward", spec)["parts"]
    assert (part["groups"], part["signal_gained"]) == (1, 0)


def test_what_moved_most_against_its_group_comes_first(tmp_path, capsys):
    rows = [right(), right(num_tokens=60), right(), right()]
    make_run(tmp_path / "run", [rows, [right(), right()]])
    spec = reward_file(tmp_path, "return 5.0 + (sample.num_tokens == 60)")
    moved = report(capsys, tmp_path / "run", "--reward", spec)["moved"]
    assert len(moved) == 4  # all of the first group; in the second all rose alike
    assert moved[0]["shift"] == pytest.approx(0.75) and moved[1]["shift"] == pytest.approx(-0.25)
    assert moved[0]["file"] == "rollouts/grpo-000001.jsonl"


def test_beside_a_group_of_one_the_others_move_against_their_own_mean(tmp_path, capsys):
    rows = [right(), right(num_tokens=60), right(group=1, num_tokens=60)]
    make_run(tmp_path / "run", [rows])
    spec = reward_file(tmp_path, "return float(sample.num_tokens == 60)")
    moved = report(capsys, tmp_path / "run", "--reward", spec)["moved"]
    assert [each["shift"] for each in moved] == pytest.approx([-0.5, 0.5])


def test_a_group_in_which_one_of_the_best_stays_the_best_has_not_changed_it(tmp_path, capsys):
    rows = [right(), right(num_tokens=60), row(WRONG)]
    make_run(tmp_path / "run", [rows])
    spec = reward_file(tmp_path, "return float(sample.num_tokens == 60)")
    assert report(capsys, tmp_path / "run", "--reward", spec)["rollouts"]["best_changed"] == 0


def test_a_reward_that_raises_on_one_completion_is_counted_and_the_rest_goes_on(tmp_path, capsys):
    steps = [[right(), row(WRONG, num_tokens=n)] for n in range(10, 60)]
    run = make_run(tmp_path / "run", steps)
    spec = reward_file(tmp_path, "return 1 / (sample.num_tokens - 17)")
    found = report(capsys, run, "--reward", spec)
    failure = found["failures"]["f"]
    assert failure["count"] == 1
    assert failure["first"].startswith("rollouts/grpo-000008.jsonl: reward 'f' raised ZeroDivision")
    assert found["rollouts"]["groups"] == 49
    assert rescore.main([str(run), "--reward", spec]) == 0
    assert (
        "note: 1 of 100 completions are left out: rollouts/grpo-000008" in capsys.readouterr().out
    )


def test_a_reward_that_reads_what_was_not_saved_is_one_line(tmp_path, capsys):
    make_run(tmp_path / "run", [[right(), row(WRONG)]])
    spec = reward_file(tmp_path, "return sum(sample.answer_logps)")
    said = error(capsys, tmp_path / "run", "--reward", spec)
    assert said.startswith(
        "error: all 2 completions: rollouts/grpo-000001.jsonl: reward 'f' raised"
    )
    assert "answer_logps were not saved" in said


def test_a_batch_reward_that_reads_what_was_not_saved_is_named(tmp_path, capsys):
    make_run(tmp_path / "run", [[right(), row(WRONG)]])
    (tmp_path / "mine.py").write_text(
        "from gemma_grpo.rewards import batch_reward\n"
        "@batch_reward\ndef f(samples):\n    return [sum(s.answer_logps) for s in samples]\n"
    )
    said = error(capsys, tmp_path / "run", "--reward", f"{tmp_path / 'mine.py'}:f")
    assert "reward 'f' raised LookupError: answer_logps were not saved with the run" in said


@pytest.mark.parametrize(
    "body",
    ["return len({sample, sample})", "return sample == sample", "return 'easy' in repr(sample)"],
)
def test_a_reward_may_hash_compare_and_print_its_sample(tmp_path, capsys, body):
    make_run(tmp_path / "run", [[right(), row(WRONG)]])
    spec = reward_file(tmp_path, body)
    found = report(capsys, tmp_path / "run", "--reward", spec)
    assert found["rollouts"]["columns"]["f"]["new"] == 1.0 and not found["failures"]


def test_saved_samples_are_told_apart_by_all_that_was_saved():
    of = lambda completion: rescoring._sample(row(completion), max_tokens=60)
    assert of(RIGHT) == of(RIGHT) and len({of(RIGHT), of(RIGHT), of(WRONG)}) == 2


def test_a_batch_reward_sees_a_step_at_once(tmp_path, capsys):
    make_run(tmp_path / "run", [[right(), right()], [right()] * 3])
    path = tmp_path / "mine.py"
    path.write_text(
        "from gemma_grpo.rewards import batch_reward\n"
        "@batch_reward\ndef f(samples):\n    return [len(samples)] * len(samples)\n"
    )
    found = report(capsys, tmp_path / "run", "--reward", f"{path}:f")
    assert [part["columns"]["f"]["new"] for part in found["parts"]] == [2.0, 3.0]


def test_the_text_says_what_the_json_does_and_is_safe_for_a_terminal(tmp_path, capsys):
    nasty = "\x1b[2J\x00</script>\u202eabc\U0001f600" + "x" * 10**5
    run = make_run(tmp_path / "run", [[right(), row(nasty)]] * 25)
    spec = reward_file(tmp_path, "return float('script' in sample.completion)")
    assert rescore.main([str(run), "--reward", spec]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x00" not in said and "\u202e" not in said
    assert "</script>" in said and len(said) < 20_000
    assert "grpo 1-3" in said and "grpo 25" in said
    assert said.count("x ...") == 5  # of the ten, in five groups
    assert "-0.000" not in said and "reward 0.950 -> 0.950" in said


def test_a_run_killed_in_mid_line_holds(tmp_path, capsys):
    run = make_run(tmp_path / "run", [[right(), row(WRONG)]] * 2)
    path = run / "rollouts" / "grpo-000002.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    (run / "rollouts" / "grpo-000003.jsonl.tmp").write_text("{")
    found = report(capsys, run)
    assert (found["n"], found["torn"]) == (3, ["rollouts/grpo-000002.jsonl"])


def test_other_folders_and_other_versions_are_one_line(tmp_path, capsys):
    assert "not a run directory" in error(capsys, tmp_path)
    run = make_run(tmp_path / "run", [])
    settings = (run / "config.yaml").read_text()
    assert "holds no completions yet" in error(capsys, run)
    path = run / "rollouts" / "grpo-000001.jsonl"
    path.write_text('{"completion": "old"}\n')
    assert f"{path}:1: no 'prompt' of type str: another version" in error(capsys, run)
    path.write_text("{\n")
    assert f"{path}:1: not JSON" in error(capsys, run)
    write(path, [{name: v for name, v in right(reward=1.0).items() if name != "format"}])
    assert "grpo-000001.jsonl has no 'format'" in error(capsys, run)
    for name, value, words in (
        ("format", [], "1: format is \\[\\], no number"),
        ("trace", 10**400, "1: trace is 1000+\\.\\.\\., no number"),
        ("group", "a", "1: 'group' is no number from 0"),
        ("problem", -1, "1: 'problem' is no number from 0"),
    ):
        write(path, [right(reward=1.0) | {name: value}])
        assert re.search(words, error(capsys, run)), name
    path.write_text("[" * 100_000 + "\n")
    assert f"{path}:1: not JSON" in error(capsys, run)
    (run / "config.yaml").write_text("a: " + "[" * 1000)
    assert "config.yaml: not YAML" in error(capsys, run)
    (run / "config.yaml").write_text("reward: {start: {correctness: 1, style: 2}}")
    assert "config.yaml is of another version" in error(capsys, run)
    (run / "config.yaml").write_text("a: [")
    assert "config.yaml: not YAML" in error(capsys, run)
    (run / "config.yaml").write_text("[a]")
    assert "config.yaml: must be a mapping" in error(capsys, run)
    path.unlink()
    path.mkdir()
    (run / "config.yaml").write_text(settings)
    assert f"{path}: not a file; move it away" in error(capsys, run)


def test_wrong_flags_are_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", [[right(), row(WRONG)]])
    assert "no such component; use confidence, " in error(capsys, run, "--weights", "style=1")
    assert "write NAME=NUMBER" in error(capsys, run, "--weights", "trace")
    assert "no Python file" in error(capsys, run, "--reward", "none.py:f")
    assert "--help lists all" in error(capsys, run, "--reader", "kind")


def test_fields_of_later_versions_are_read_over(tmp_path, capsys):
    make_run(tmp_path / "run", [[right() | {"token_logps": "AAA="}, row(WRONG)]])
    assert report(capsys, tmp_path / "run")["n"] == 2


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    old, new = rng.integers(0, 4, (2, 6, 8)).astype(float)
    old[0] = 1.0
    with np.errstate(all="ignore"):
        expected = [stats.spearmanr(*pair).statistic for pair in zip(old[1:], new[1:], strict=True)]
    found = rescoring.rank_correlations(old, new)
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], expected, atol=1e-12)


def test_a_failure_is_no_value_of_its_neighbours():
    from gemma_grpo.rewards import Sample, scores

    samples = [Sample("p", "c", "a", "easy", n, 60, (), True) for n in (1, 2, 3)]
    values, failures = scores.tolerant_column(
        "f", lambda sample: {1: 0.5, 3: float("nan")}[sample.num_tokens], samples
    )
    assert values[0] == 0.5 and np.isnan(values[1:]).all()
    assert "raised KeyError" in failures[0] and "returned nan on row 2" in failures[1]


def test_it_starts_without_jax_within_a_second_and_a_half():
    script = (
        "import sys; from gemma_grpo import rescore; "
        "print({'jax', 'flax', 'scipy', 'tyro'} & {name.split('.')[0] for name in sys.modules})"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert child.stdout == "set()\n", child.stderr


def different(n):
    """A row whose texts no other has: right, false in its step, or loose, of two to five steps."""
    steps = [f"{n + k} + {k} = {n + 2 * k}" for k in range(2, 3 + n % 4)]
    answer = steps[-1].rpartition(" ")[2]
    if n % 3 == 1:
        steps[0] += "0"
    trace = "".join(f"{step}\n" for step in steps)
    completion = f"<reasoning>\n{trace}</reasoning>\n<answer>\n{answer}\n</answer>"
    if n % 3 == 2:
        completion = f"{trace}The answer is {answer}."
    prompt = f"Ann has {n} apples and is given more, step by step. How many?"
    return row(completion, group=n // 8) | {"prompt": prompt, "answer": answer}


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["strict", "lenient"])
def test_a_hundred_thousand_different_completions_take_less_than_thirty_seconds(tmp_path, reader):
    """Of CPU time, in a process without the type checks of the tests."""
    steps = [[different(512 * step + n) for n in range(512)] for step in range(196)]
    run = make_run(tmp_path / "run", steps)
    spec = reward_file(tmp_path, "return 1 - sample.num_tokens / sample.max_tokens")
    arguments = ["-m", "gemma_grpo.rescore", str(run), "--reward", spec, "--json"]
    arguments += ["--reader", reader]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    child = subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
    assert json.loads(child.stdout)["n"] >= 100_000
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 30


def test_unknown_weights_are_refused_by_the_library_too():
    with pytest.raises(UserError):
        rescoring.RunSettings.of({"reward": {}})
