"""Rewards and judges as a user gives them to the training command: what is wrong with them is one
line before anything is trained, and the example of docs/rubric runs."""

import json
import shutil
from pathlib import Path

import children
import pytest

from gemma_grpo import cli, train
from gemma_grpo.config import RunConfig
from gemma_grpo.rewards.custom import split_weight
from gemma_grpo.rewards.judge import Question, load_judge
from gemma_grpo.rewards.rubric import load_rubric

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "rubric"
FEW = ["--data.num-train", "12", "--data.num-test", "4"]
FILES = {
    "ra.py": "def f(sample): return 1.0\ntrace = reward = mean = f\nnumber = 3\n",
    "rb.py": "def f(sample): return 0.5\n",
    "raises.py": "def f(sample): return 1 / 0\n",
    "short.py": (
        "from gemma_grpo.rewards import batch_reward\n@batch_reward\ndef f(samples): return [1.0]\n"
    ),
    "nan.py": "def f(sample): return float('nan')\n",
    "leaves.py": "import sys\ndef f(sample): sys.exit(0)\n",
    "leaves_on_import.py": "import sys\nsys.exit(0)\ndef f(sample): return 1.0\n",
    "mute.py": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\n"
        "def f(sample): raise Mute\n"
    ),
    "shy.py": (
        "class Shy:\n    def __repr__(self): raise ValueError\ndef f(sample): return Shy()\n"
    ),
    "sibling.py": "import helper_beside\ndef f(sample): return 1.0\n",
    "helper_beside.py": "",
    "a=b.py": "def f(sample): return 1.0\n",
    "judge.py": (
        "def judge(questions): return [True for _ in questions]\nnumber = 3\n"
        "def few(questions): return []\n"
        "def nan(questions): return [float('nan') for _ in questions]\n"
        "def dice(questions):\n    import random\n"
        "    return [random.random() for _ in questions]\n"
        "def fails(questions): return 1 / 0\n"
        "def hangs(questions):\n    import time\n    time.sleep(600)\n"
    ),
    "broken_judge.py": "import nowhere_at_all\n",
    "rubric.yaml": "addition:\n- Is it short?\n",
    "empty.yaml": "",
    "no_criteria.yaml": "addition: []\n",
    "unknown.yaml": "poetry:\n- Does it rhyme?\n",
}


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch, tmp_path):
    """The user's files, seen from another folder; JAX's devices stay as they are."""
    monkeypatch.setattr(cli, "split_cpu", lambda *sizes: None)
    (tmp_path / "user").mkdir()
    for name, text in FILES.items():
        (tmp_path / "user" / name).write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def dry_run(capsys, *arguments) -> tuple[int, str, str]:
    status = train.main([*FEW, "--grpo.prompts-per-step", "8", "--dry-run", *arguments])
    assert list(Path().iterdir()) == []
    return status, *capsys.readouterr()


def rewards_of(*specs):
    return [word for spec in specs for word in ("--reward", f"../user/{spec}")]


def judged(rubric, judge, *more):
    return ["--rubric", f"../user/{rubric}", "--judge", f"../user/{judge}", *more]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (rewards_of("ra.py:f", "rb.py:f"), "two rewards are named 'f'"),
        (rewards_of("ra.py:f=nan"), "the weight is nan"),
        (rewards_of("ra.py:f=inf"), "the weight is inf"),
        (rewards_of("ra.py:f=much"), "'much' is no weight"),
        (rewards_of("ra.py:f="), "'' is no weight"),
        (rewards_of("ra.py:trace"), "two rewards are named 'trace'"),
        (rewards_of("ra.py:reward"), "have a column 'reward'"),
        (rewards_of("ra.py:mean"), "have a column 'mean'"),
        (rewards_of("raises.py:f"), "'f' raised ZeroDivisionError"),
        (rewards_of("short.py:f"), "'f' returned 1 values for 4 samples"),
        (rewards_of("nan.py:f"), "'f' returned nan"),
        (rewards_of("leaves.py:f"), "'f' raised SystemExit: 0"),
        (rewards_of("leaves_on_import.py:f"), "leaves_on_import.py, line 2: SystemExit"),
        (rewards_of("mute.py:f"), "'f' raised Mute"),
        (rewards_of("shy.py:f"), "'f' returned a Shy"),
        (rewards_of("sibling.py:f"), "helper_beside lies beside it: set PYTHONPATH="),
        (rewards_of("a=c.py:f=1"), "no Python file '../user/a=c.py'"),
        (["--rubric", "../user/rubric.yaml"], "give both"),
        (["--judge", "../user/judge.py:judge"], "give both"),
        (judged("nowhere.yaml", "judge.py:judge"), "nowhere.yaml: No such file"),
        (judged("empty.yaml", "judge.py:judge"), "empty.yaml: has no criteria"),
        (judged("no_criteria.yaml", "judge.py:judge"), "'addition': has no criteria"),
        (judged("unknown.yaml", "judge.py:judge"), "domain 'poetry': no problem is of this"),
        (judged("rubric.yaml", "nowhere.py:judge"), "no Python file"),
        (judged("rubric.yaml", "judge.py:judge=nan"), "--judge"),
        (judged("rubric.yaml", "judge.py:number"), "'number' is of type int; name a function"),
        (judged("rubric.yaml", "judge.py:nothing"), "has no 'nothing'"),
        (judged("rubric.yaml", "broken_judge.py:judge"), "judge file ../user/broken_judge.py"),
        (judged("rubric.yaml", "judge.py:few"), "judge few, tried on a gold completion: gave 0"),
        (judged("rubric.yaml", "judge.py:nan"), "judge nan, tried on a gold completion: gave nan"),
        (judged("rubric.yaml", "judge.py:fails"), "raised ZeroDivisionError"),
        (
            judged("rubric.yaml", "judge.py:hangs", "--reward.rubric.timeout", "0.3"),
            "no verdict within 0.3 seconds",
        ),
        (
            [*judged("rubric.yaml", "judge.py:judge"), "--judge", "../user/judge.py:judge"],
            "two rewards are named 'judge'",
        ),
        (
            ["--rubric", "../user/rubric.yaml", "--judge", "model:nowhere=0.1"],
            "nowhere",
        ),
        (judged("rubric.yaml", "judge.py:judge", "--reward.rubric.parallel", "0"), "parallel"),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_line_before_anything_is_trained(
    capsys, arguments, named
):
    status, out, error = dry_run(capsys, *arguments)
    assert status == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error, error


def test_what_a_reward_prints_is_no_part_of_the_result(capsys, tmp_path):
    (tmp_path / "user" / "loud.py").write_text(
        "print('loaded')\ndef f(sample):\n    print('asked')\n    return 1.0\n"
    )
    status, out, error = dry_run(capsys, *rewards_of("loud.py:f"))
    assert status == 0 and out.startswith("model ")
    assert "asked" not in out and "loaded" not in out and "asked" in error


def test_good_rewards_pass_with_equals_signs_in_their_path_and_judges_beside_them(capsys):
    arguments = [*rewards_of("a=b.py:f=0.5"), *judged("rubric.yaml", "judge.py:judge=0")]
    status, out, _ = dry_run(capsys, *arguments)
    assert status == 0 and "all checks passed" in out


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ('""', 'field "answer" is blank'),
        ("[1, 2]", "must be text, not a list"),
        ("NaN", 'field "answer" is nan'),
        ('"' + "9" * 10**6 + '"', "1,000,000 characters"),
    ],
)
def test_a_gold_answer_that_is_none_is_one_line(capsys, tmp_path, answer, named):
    path = tmp_path / "user" / "data.jsonl"
    path.write_text(f'{{"prompt": "p", "answer": {answer}}}\n')
    status, _, error = dry_run(capsys, "--data.source", str(path))
    assert status == 2 and error.count("\n") == 1 and named in error and f"{path}:1" in error


def test_a_file_of_golds_that_are_not_what_they_seem_is_counted_before_training(capsys, tmp_path):
    paths = [tmp_path / "user" / f"{name}.jsonl" for name in ("train", "test")]
    for path in paths:
        row = {"prompt": f"{path.stem}?", "answer": "1.234.567", "completion": "c"}
        path.write_text(f"{json.dumps(row)}\n" * 8)
    status, _, error = dry_run(capsys, "--data.source", ",".join(map(str, paths)))
    assert status == 0, error
    golds, completions, words = error.splitlines()
    assert "12 of 12 gold answers look like numbers" in golds
    assert "8 of 8 completions lack <reasoning>" in completions
    assert "gemma3-nano knows only the words of its own curriculum" in words


def test_the_examples_judge_finds_each_criterion_by_its_own_words():
    judge = load_judge(f"{EXAMPLE / 'judge.py'}:judge")
    criteria = load_rubric(EXAMPLE / "rubric.yaml", ["explanation"])["explanation"]
    for text, expected in (
        ("Half of it drops out.", [True, False, False]),
        ("The list is sorted.", [False, True, False]),
        ("It goes on until the word is found.", [False, False, True]),
    ):
        asked = [Question("p", text, "half", criterion.ask) for criterion in criteria]
        assert judge.ask(asked) == expected


def test_the_rubric_example_runs_a_model_watches_and_a_resumed_run_sees_the_same_verdicts(
    tmp_path, one_layer
):
    run_dir = tmp_path / "run"
    arguments = [
        "--model.weights", one_layer,
        "--data.source", f"{EXAMPLE / 'train.jsonl'},{EXAMPLE / 'test.jsonl'}",
        "--data.num-train", "0", "--data.num-test", "0", "--stages", "grpo",
        "--rubric", str(EXAMPLE / "rubric.yaml"), "--judge", f"{EXAMPLE / 'judge.py'}:judge=0.5",
        "--judge", f"model:{one_layer}=0", "--reward.rubric.question-tokens", "384",
        "--judge", f"{tmp_path / 'user' / 'judge.py'}:dice=0.25",
        "--keep-checkpoints", "--grpo.checkpoint-every", "1",
        "--reward.trace", "structure", "--model.max-prompt-length", "72",
        "--model.max-completion-length", "24", "--grpo.num-steps", "2",
        "--grpo.prompts-per-step", "4", "--grpo.num-generations", "4",
        "--evaluation.batch-size", "8", "--evaluation.num-samples", "0",
        "--run-dir", str(run_dir), "--model.cpu-devices", "1",
    ]  # fmt: skip
    run = children.Forked(children.TRAIN, *arguments)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [
        json.loads(line)
        for line in (run_dir / "rollouts" / "grpo-000001.jsonl").read_text().splitlines()
    ]
    assert len(steps) == 2 and len(rows) == 16
    for step in steps:
        assert step["missing/judge"] == step["missing/one_layer"] == 0
    weights = {name: steps[0][f"weight/{name}"] for name in ("correctness", "trace", "confidence")}
    for row in rows:
        assert 0 < row["one_layer"] < 1  # recorded, and not in the total
        others = 0.1 * row["format"] - 0.05 * row["verbosity"]
        total = sum(weight * row[name] for name, weight in weights.items()) + others
        assert row["reward"] == pytest.approx(total + 0.5 * row["judge"] + 0.25 * row["dice"])
    for judge in ("judge", "one_layer"):
        lines = (run_dir / "verdicts" / f"{judge}-0.jsonl").read_text().splitlines()
        assert len({json.loads(line)["question"] for line in lines}) == len(lines) > 3
    # Resumed before its second step, it sees the verdicts it had, though the dice fall differently.
    ends = [run_dir / "weights/grpo.safetensors", run_dir / "rollouts/grpo-000002.jsonl"]
    before = [path.read_bytes() for path in ends]
    for name in ("weights", "evaluations/grpo.json", "checkpoints/grpo/000002"):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = children.Forked(children.TRAIN, "--resume", "--run-dir", str(run_dir))
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    assert [path.read_bytes() for path in ends] == before


def test_a_reward_flag_adds_one_to_the_setting_and_the_setting_is_all_of_them():
    def of(*arguments):
        before = RunConfig().replace({"reward.extra": ["a.py:f"]})
        options, run = cli.parse_run(
            arguments, train.Options(), before, command="train", description=""
        )
        return cli.with_rewards(run, options.reward, options.rubric, options.judge).reward

    assert of("--reward", "b.py:g").extra == ("a.py:f", "b.py:g")
    assert of("--reward.extra", "b.py:g").extra == ("b.py:g",)
    assert of("--reward.extra").extra == ()
    one, two = "--judge=j.py:k", "--judge=j.py:l"
    short = of("--rubric=r.yaml", one, two).rubric
    long = of("--reward.rubric.file=r.yaml", "--reward.rubric.judges", "j.py:k", "j.py:l").rubric
    assert short == long and long.judges == ("j.py:k", "j.py:l")


def test_a_rewards_path_may_hold_the_signs_that_stand_behind_it():
    assert split_weight("a=1:b/c.py:f=0.5", "--reward") == ("a=1:b/c.py:f", 0.5)
    assert split_weight("a:b=1/c.py:f", "--reward") == ("a:b=1/c.py:f", 1.0)
