"""Demonstrations from the model itself: who is asked, what is kept, what lies on file."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from stubs import tiny_runtime

from gemma_grpo import pipeline, rewards
from gemma_grpo.config import RunConfig
from gemma_grpo.data import jsonl
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.records import summary
from gemma_grpo.rewards import Sample
from gemma_grpo.training import demonstrations
from gemma_grpo.training.config import OwnConfig, SFTConfig
from gemma_grpo.training.deadline import Deadline, OutOfTimeError
from gemma_grpo.training.demonstrations import Own, select

RIGHT = "<reasoning>\n{0} + {0} = {1}\n</reasoning>\n<answer>\n{1}\n</answer>"


def problem(number, difficulty="easy", completion=None):
    return Problem(f"What is {number} + {number}?", f"{2 * number}", completion, difficulty)


def sample(text, stopped=True):
    return Sample("q", text, "1", "easy", 3, 9, (), stopped)


# --- what is shown and what is asked -------------------------------------------------------------

WORKED = [
    problem(1, "easy", "1"),
    problem(2, "easy", "2"),
    problem(3, "easy", None),
    problem(4, "hard", "4"),
    problem(5, "medium", "5"),
    problem(6, "medium", "6"),
]


def test_worked_problems_are_shown_of_each_difficulty_in_turn():
    shown = demonstrations.shots(WORKED, 5)
    assert [each.completion for each in shown] == ["1", "5", "4", "2", "6"]
    assert demonstrations.shots(WORKED, 0) == []


def test_too_few_worked_problems_are_said_with_the_fix():
    with pytest.raises(UserError, match="shots=6, but 5 training problems have a completion") as e:
        demonstrations.shots(WORKED, 6)
    assert "--model.instruction" in str(e.value) and "\n" not in str(e.value)


class FakeSampler:
    """Answers from a script; keeps what it was asked."""

    def __init__(self, num_samples, answers):
        self.num, self.answers, self.asked, self.keys = num_samples, answers, [], []

    def collect(self, params, problems, key, weights, extra):
        self.asked.append([each.prompt for each in problems])
        self.keys.append(jax.random.key_data(key).tolist())
        texts = [self.answers(each, k) for each in problems for k in range(self.num)]
        golds = [each.answer for each in problems for _ in range(self.num)]
        samples = [
            replace(sample(text), answer=gold) for text, gold in zip(texts, golds, strict=True)
        ]
        scores = rewards.score(samples, weights, extra)
        return SimpleNamespace(samples=samples, scores=scores)


RUNTIME = tiny_runtime(instruction="Solve it.", max_prompt_length=64, max_completion_length=60)


def sampled(monkeypatch, config, problems, answers, runtime=RUNTIME, **how):
    """What is kept, and the sampler with the examples that it was made with."""
    fake = FakeSampler(config.num_samples, answers)

    def make(config, runtime, examples):
        fake.examples = examples
        return fake

    monkeypatch.setattr(demonstrations, "make_sampler", make)
    return demonstrations.sample(config, runtime, problems, {}, **how), fake


def right(problem, k):
    """The right answer, in a form of its own for each sample."""
    half = int(problem.answer) // 2
    return RIGHT.format(half, 2 * half).replace("\n</reasoning>", f"\nSo {k}.\n</reasoning>")


def test_all_but_the_shown_problems_are_asked_in_batches_of_one_shape(monkeypatch):
    problems = [problem(n, completion=f"c{n}") for n in range(1, 10)]
    problems.append(problem(1))  # the question of a shown one again
    config = OwnConfig(shots=2, num_samples=2, batch_size=6)
    own, fake = sampled(monkeypatch, config, problems, right)
    assert fake.examples == ["What is 1 + 1?", "c1", "What is 2 + 2?", "c2"]
    asked = [f"What is {n} + {n}?" for n in range(3, 10)]
    assert fake.asked == [asked[:3], asked[3:6], [asked[6]] * 3]
    assert len(set(map(str, fake.keys))) == 3
    assert own.figures == {
        "asked": 7, "sampled": 14, "right": 14, "right_and_well_formed": 14,
        "kept": 14, "kept_problems": 7,
    }  # fmt: skip
    assert [each.prompt for each in own.problems] == [text for text in asked for _ in range(2)]
    assert own.problems[1].completion == right(problem(3), 1)


def test_only_the_first_problems_are_asked_if_wanted(monkeypatch):
    problems = [problem(n, completion=f"c{n}") for n in range(1, 10)]
    config = OwnConfig(shots=1, num_problems=3, num_samples=1, batch_size=8)
    own, fake = sampled(monkeypatch, config, problems, right)
    assert own.figures["asked"] == 3 and fake.asked[0][:3] == [
        f"What is {n} + {n}?" for n in (2, 3, 4)
    ]


def test_the_draws_depend_on_the_place_alone_and_are_not_those_of_grpo_or_evaluations(monkeypatch):
    problems = [problem(n) for n in range(1, 9)]
    config = OwnConfig(shots=0, num_samples=1, batch_size=4)
    keys = [sampled(monkeypatch, config, problems, right)[1].keys for _ in range(2)]
    others = [jax.random.key_data(jax.random.fold_in(RUNTIME.key, n)).tolist() for n in range(200)]
    assert keys[0] == keys[1] and not any(key in others for key in keys[0])


def test_what_ends_the_sampling_between_batches_ends_it(monkeypatch):
    problems, left = [problem(n) for n in range(1, 9)], [2]

    def before_batch():
        left[0] -= 1
        if left[0] < 0:
            raise OutOfTimeError("sft", 0, 4)

    config = OwnConfig(shots=0, num_samples=1, batch_size=2)
    with pytest.raises(OutOfTimeError):
        sampled(monkeypatch, config, problems, right, before_batch=before_batch)


def check(config, problems):
    demonstrations.check(config, RUNTIME, problems)


def test_worked_problems_that_take_too_many_tokens_are_counted_and_refused():
    """By hand: the prompt with them less the prompt without, by the tokenizer itself."""
    problems = [problem(n, completion=right(problem(n), 0)) for n in range(1, 9)]
    encode = RUNTIME.tokenizer.encode_turns
    behind = [f"Solve it.\n{problems[0].prompt}", problems[0].completion, problems[1].prompt]
    behind += [problems[1].completion, problems[2].prompt]
    taken = len(encode(behind)) - len(encode([f"Solve it.\n{problems[2].prompt}"]))
    check(OwnConfig(shots=2, shots_length=taken), problems)
    with pytest.raises(
        UserError, match=f"take {taken} tokens, .*shots_length is {taken - 1}; raise"
    ):
        check(OwnConfig(shots=2, shots_length=taken - 1), problems)


def test_a_prompt_behind_worked_problems_fits_wherever_it_fits_alone():
    """The room beside the longest prompt is that of the worked problems."""
    problems = [problem(n, completion=right(problem(n), 0)) for n in range(1, 9)]
    problems.append(Problem("How many apples and pens and coins? " * 3, "1"))
    config = OwnConfig(shots=2, shots_length=400)
    check(config, problems)
    length = len(RUNTIME.tokenizer.encode_prompt(f"Solve it.\n{problems[-1].prompt}"))
    runtime = replace(RUNTIME, max_prompt_length=length)
    sampler = demonstrations.make_sampler(config, runtime, ["a", "b"])
    assert (sampler.max_prompt_length, sampler.examples) == (length + 400, ["a", "b"])


def test_no_problem_left_to_ask_is_said():
    with pytest.raises(UserError, match="leaves no training problem to ask"):
        check(OwnConfig(shots=2), [problem(1, completion="1"), problem(2, completion="2")])


# --- what is kept --------------------------------------------------------------------------------


def test_only_what_is_right_and_well_formed_is_kept_each_text_once_and_the_first_ones():
    asked = [problem(1, "hard"), problem(2), problem(3)]
    texts = ["a", " b\n", "a", "wrong", "c"] + ["d", "e", "f", "g", "h"] + ["i"] * 5
    scored = [(1, 1), (1, 1), (1, 1), (0, 1), (1, 1)]
    scored += [(1, 0), (0, 0), (1, 1), (1, 1), (1, 0)] + [(0, 1)] * 5
    scored = [(float(right), float(formed)) for right, formed in scored]
    own = select(asked, [sample(text) for text in texts], scored, 2, lambda text: text != "g")
    assert own.problems == [
        replace(asked[0], completion="a"),
        replace(asked[0], completion="b"),
        replace(asked[1], completion="f"),  # "g" would not fit
    ]
    assert own.figures == {
        "asked": 3, "sampled": 15, "right": 8, "right_and_well_formed": 6,
        "kept": 3, "kept_problems": 2,
    }  # fmt: skip


def test_a_text_that_would_not_fit_takes_no_place_of_one_that_does():
    asked, good = [problem(1)], [(1.0, 1.0)] * 3
    texts = [sample(text) for text in ("too long", "a", "b")]
    own = select(asked, texts, good, 1, lambda text: text != "too long")
    assert own.problems == [replace(asked[0], completion="a")]


def test_what_is_kept_is_what_the_strict_parser_pays_in_full(monkeypatch):
    """A right answer in prose, twice, cut short or behind other text is no demonstration."""
    answers = [
        lambda p: right(p, 0),
        lambda p: f"It is {p.answer}.",
        lambda p: f"Well. {right(p, 0)}",
        lambda p: f"<answer>\n{p.answer}\n</answer>",
        lambda p: RIGHT.format(1, 3),
    ]
    config = OwnConfig(shots=0, num_samples=5, batch_size=5, max_per_problem=5)
    own, _ = sampled(monkeypatch, config, [problem(7)], lambda p, k: answers[k](p))
    assert [each.completion for each in own.problems] == [right(problem(7), 0)]


def test_a_text_that_would_not_fit_when_encoded_again_is_left_out(monkeypatch):
    runtime = replace(RUNTIME, max_completion_length=40)
    config = OwnConfig(shots=0, num_samples=2, batch_size=2)
    long = lambda p, k: right(p, 0).replace("So 0.", "So it is. " * (20 * k) + "So.")
    own, _ = sampled(monkeypatch, config, [problem(7)], long, runtime)
    assert own.figures["right_and_well_formed"] == 2 and own.figures["kept"] == 1


def test_fewer_than_an_update_takes_are_one_line_with_the_fix():
    figures = dict(
        zip(("asked", "sampled", "right", "right_and_well_formed"), (9, 36, 8, 4), strict=True)
    )
    own = Own([], figures | {"kept": 3, "kept_problems": 2})
    demonstrations.require_enough(own, 3, Path("here"))
    with pytest.raises(UserError, match="of 36 completions of 9 problems 8 are right, 4 of") as e:
        demonstrations.require_enough(own, 4, Path("here"))
    assert "3 of 2 problems kept, in here/demonstrations.jsonl; an update" in str(e.value)
    assert "sft.batch_size=4: begin a new run, ask for the format with" in str(e.value)
    assert "\n" not in str(e.value)


# --- on file -------------------------------------------------------------------------------------

OWN = Own(
    [replace(problem(n), completion=f"½ \u2028 {n}", domain="sums") for n in (1, 1, 2)],
    {
        "asked": 4,
        "sampled": 8,
        "right": 5,
        "right_and_well_formed": 4,
        "kept": 3,
        "kept_problems": 2,
    },
)


def test_what_is_written_is_read_back_and_is_a_data_source(tmp_path):
    assert demonstrations.read_back(tmp_path) is None
    demonstrations.write(tmp_path, OWN)
    assert demonstrations.read_back(tmp_path) == OWN
    rows = jsonl.read_rows(tmp_path / "demonstrations.jsonl")
    assert [jsonl.problem_from_row(row, at) for at, row in rows] == OWN.problems
    digest = hashlib.sha256((tmp_path / "demonstrations.jsonl").read_bytes()).hexdigest()
    figures = json.loads((tmp_path / "demonstrations.json").read_text())
    assert figures == OWN.figures | {"sha256": digest}
    assert sorted(path.name for path in tmp_path.iterdir()) == list(sorted(run_dirs.DEMONSTRATIONS))


def test_rows_without_their_figures_are_of_a_process_that_was_killed(tmp_path):
    demonstrations.write(tmp_path, OWN)
    (tmp_path / "demonstrations.json").unlink()
    assert demonstrations.read_back(tmp_path) is None
    demonstrations.write(tmp_path, OWN)
    assert demonstrations.read_back(tmp_path) == OWN


@pytest.mark.parametrize("harm", ["changed", "gone", "no digest"])
def test_rows_that_are_not_what_was_written_are_noticed(tmp_path, harm):
    demonstrations.write(tmp_path, OWN)
    rows, figures = tmp_path / "demonstrations.jsonl", tmp_path / "demonstrations.json"
    if harm == "changed":
        rows.write_text(rows.read_text().replace("sums", "songs"))
    elif harm == "gone":
        rows.unlink()
    else:
        figures.write_text(json.dumps(OWN.figures))
    with pytest.raises(UserError, match="demonstrations.jsonl is not what was sampled; put") as e:
        demonstrations.read_back(tmp_path)
    assert "\n" not in str(e.value)


def session(run_dir, **sft):
    run = RunConfig(sft=SFTConfig(demonstrations="own", **sft))
    return pipeline._Session(run, run_dir, Deadline(), pipeline.NOTHING_GIVEN)


TASK = pipeline.Task(RUNTIME, {}, [], [], rewards.GivenRewards(rewards.RewardConfig(), {}))


@pytest.mark.parametrize("end", ["deadline", "kill"])
def test_sampling_that_does_not_come_to_its_end_leaves_nothing(tmp_path, monkeypatch, end):
    of = session(tmp_path, batch_size=4)
    monkeypatch.setattr(of.deadline, "allows", lambda *_: end != "deadline")

    def stub(config, runtime, problems, params, before_batch):
        before_batch()
        if end == "kill":
            raise KeyboardInterrupt
        return OWN

    monkeypatch.setattr(demonstrations, "sample", stub)
    kinds = {"deadline": OutOfTimeError, "kill": KeyboardInterrupt}
    with pytest.raises(kinds[end]) as stop:
        of._own_demonstrations(TASK, {})
    assert list(tmp_path.iterdir()) == []
    if end == "deadline":
        unfinished = {"stage": stop.value.stage, "step": stop.value.step, "num_steps": 100}
        assert summary.unfinished_at(unfinished) == "sft step 0 of 100"


def test_too_few_stay_on_file_and_a_second_start_says_so_without_sampling_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(demonstrations, "sample", lambda *_: OWN)
    with pytest.raises(UserError, match="3 of 2 problems kept, in .*demonstrations.jsonl"):
        session(tmp_path, batch_size=4)._own_demonstrations(TASK, {})
    assert demonstrations.read_back(tmp_path) == OWN
    monkeypatch.setattr(demonstrations, "sample", None)
    with pytest.raises(UserError, match="3 of 2 problems kept, in .*demonstrations.jsonl"):
        session(tmp_path, batch_size=4)._own_demonstrations(TASK, {})


def test_what_is_on_file_is_imitated_without_being_sampled_again(tmp_path, monkeypatch, capsys):
    of = session(tmp_path, batch_size=3)
    monkeypatch.setattr(demonstrations, "sample", lambda *_: OWN)
    assert of._own_demonstrations(TASK, {}) == OWN.problems
    assert "of 8 completions of 4 problems 5 are right, 4 of them" in capsys.readouterr().err
    monkeypatch.setattr(demonstrations, "sample", None)
    assert of._own_demonstrations(TASK, {}) == OWN.problems
    assert "demonstrations" in json.loads((tmp_path / "seconds.json").read_text())


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"num_problems": -1}, "num_problems=-1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"shots": -1}, "shots=-1"),
        ({"shots_length": 0}, "shots_length=0"),
        ({"max_per_problem": 0}, "max_per_problem=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 6}, "batch_size=6 must be a multiple of num_samples=4"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_settings_without_sense_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=f"^sft.own: {named}"):
        OwnConfig(**settings)


def test_a_batch_that_does_not_divide_over_the_devices_is_seen_before_training():
    sizes = RunConfig(sft=SFTConfig(demonstrations="own")).batch_sizes
    assert sizes["sft.own.batch_size / num_samples"] == 16
    assert "sft.own.batch_size / num_samples" not in RunConfig().batch_sizes
    alone = RunConfig(stages="grpo", sft=SFTConfig(demonstrations="own"))
    assert not alone.samples_demonstrations and np.all(list(alone.batch_sizes.values()))
