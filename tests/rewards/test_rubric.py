"""Rubrics: what a file may say, what verdicts earn, and what a missing one pays."""

import math
import os
import random
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_grpo import rewards
from gemma_grpo.errors import UserError
from gemma_grpo.objective.advantages import group_advantages
from gemma_grpo.rewards import START_WEIGHTS, RubricConfig, Sample
from gemma_grpo.rewards.judge import Judge
from gemma_grpo.rewards.rubric import Criterion, JudgedReward, load_rubric
from gemma_grpo.rewards.verdicts import Verdicts

RUBRIC = {"x": (Criterion("short?"), Criterion("polite?", 3.0))}


def sample(completion: str, prompt: str = "p", domain: str = "x") -> Sample:
    return Sample(prompt, completion, "a", "easy", 5, 60, (), True, domain)


def judged(ask) -> JudgedReward:
    return JudgedReward("judge", RUBRIC, Verdicts(Judge("judge", "1", ask), RubricConfig()))


def written(tmp_path, text: str, domains=("x", "y")):
    path = tmp_path / "rubric.yaml"
    path.write_text(text)
    return load_rubric(path, domains)


def test_a_criterion_is_a_text_or_a_text_with_a_weight(tmp_path):
    rubric = written(tmp_path, 'x:\n- short?\n- ask: polite?\n  weight: 3\ny: ["true?"]\n')
    assert rubric == RUBRIC | {"y": (Criterion("true?"),)}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "has no criteria"),
        ("x:\n", "domain 'x': has no criteria"),
        ("x: []\n", "domain 'x': has no criteria"),
        ("x: short?\n", "domain 'x': has no criteria"),
        ("- short?\n", "has no criteria"),
        ("z: ['short?']\n", "domain 'z': no problem is of this domain; the data has x, y"),
        ("x: [3]\n", "criterion 1: is 3"),
        ("x: [yes]\n", "criterion 1: is True"),
        ("x: ['']\n", "criterion 1: is ''"),
        ("x: [{weight: 2}]\n", "criterion 1: is None"),
        ("x: ['short?', {ask: b, wieght: 2}]\n", "criterion 2: has no field 'wieght'"),
        ("x:\n- Does it say: half?\n", "needs quotes"),
        ("x: [{ask: b, weight: 0}]\n", "weight is 0"),
        ("x: [{ask: b, weight: -1}]\n", "weight is -1"),
        ("x: [{ask: b, weight: .nan}]\n", "weight is nan"),
        ("x: [{ask: b, weight: .inf}]\n", "weight is inf"),
        ("x: [{ask: b, weight: two}]\n", "weight is 'two'"),
        ("x: ['short?', 'short?']\n", "asks the same twice"),
        ("x: [short?\n", "not YAML"),
        ("x: " + "[" * 1000, "not YAML"),
        ("x: [{ask: b, weight: " + "9" * 5000 + "}]\n", "not YAML"),
        ("x: [{ask: b, weight: 1" + "0" * 400 + "}]\n", "weight is 1000"),
        ("x: [a]\nx: [b]\n", "has a domain twice"),
    ],
)
def test_a_bad_rubric_is_one_line_that_names_file_domain_and_criterion(tmp_path, text, named):
    with pytest.raises(UserError) as caught:
        written(tmp_path, text)
    assert named in str(caught.value) and "rubric.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rubric_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: No such file"):
        load_rubric(tmp_path / "nowhere.yaml", ["x"])


def test_a_fifo_is_no_rubric_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="pipe.yaml: not a file"):
        load_rubric(tmp_path / "pipe.yaml", ["x"])


def test_the_value_is_the_weighted_mean_of_the_verdicts_by_hand():
    reward = judged(
        lambda qs: [0.5 if q.criterion == "short?" else q.completion == "b" for q in qs]
    )
    # (1 * 0.5 + 3 * 0) / 4 and (1 * 0.5 + 3 * 1) / 4; a domain without criteria has no value.
    assert reward([sample("a"), sample("b"), sample("b", domain="y")]) == [0.125, 0.875, None]


def test_a_completion_without_all_its_verdicts_is_missing_counted_and_said_once(capsys):
    fails = ("b", "short?")  # its other criterion has a verdict
    reward = judged(
        lambda qs: [math.nan if (q.completion, q.criterion) == fails else True for q in qs]
    )
    samples = [sample("a"), sample("b"), sample("c", domain="y")]
    values = reward(samples)
    assert values == [1.0, None, None] and reward.num_missing(samples, values) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "judge judge: 1 of 3 completions were not judged" in error


def advantages(totals, scale) -> np.ndarray:
    rewards_PG = jnp.reshape(jnp.asarray(totals, jnp.float32), (-1, 4))
    return np.asarray(group_advantages(rewards_PG, scale=scale, baseline="mean"))


@pytest.mark.parametrize("scale", ["none", "group"])
def test_a_missing_component_gives_no_advantage_and_takes_none_from_the_others(scale):
    """Everything else equal, the missing one's advantage is 0, and the others' are in the ratio
    that a group of the judged ones alone has."""
    scores = [0.1, 0.9, 0.5]
    values = iter([*scores, None, None, None, None, None])

    def given(samples):
        return [next(values) for _ in samples]

    given.takes_batch = given.may_be_missing = True
    samples = [sample("", prompt) for prompt in "pppp"] + [sample("", "q")] * 4
    result = rewards.score(samples, START_WEIGHTS, extra=[("judge", given, 0.5)])
    first, none_judged = advantages(result.totals, scale)
    assert first[3] == pytest.approx(0, abs=1e-6)
    centred = np.array(scores) - np.mean(scores)
    np.testing.assert_allclose(first[:3] / first[1], centred / centred[1], atol=1e-5)
    assert not none_judged.any()
    assert result.components["judge"] == [*scores, None, None, None, None, None]


def test_the_group_of_a_missing_value_is_the_samples_of_its_prompt_not_the_batch():
    def given(samples):
        return [0.0, None, 1.0, None]

    given.takes_batch = given.may_be_missing = True
    samples = [sample("", prompt) for prompt in "ppqq"]
    bare = rewards.score(samples, START_WEIGHTS).totals
    paid = rewards.score(samples, START_WEIGHTS, extra=[("judge", given, 0.5)]).totals
    assert np.subtract(paid, bare).tolist() == pytest.approx([0, 0, 0.5, 0.5])


def test_two_problems_of_one_question_are_two_groups_of_a_missing_value():
    def given(samples):
        return [0.0, None, 1.0, None]

    given.takes_batch = given.may_be_missing = True
    samples = [replace(sample(""), answer=answer) for answer in "5577"]
    bare = rewards.score(samples, START_WEIGHTS).totals
    paid = rewards.score(samples, START_WEIGHTS, extra=[("judge", given, 0.5)]).totals
    assert np.subtract(paid, bare).tolist() == pytest.approx([0, 0, 0.5, 0.5])


def test_weight_zero_records_the_score_and_changes_no_bit_of_the_total():
    draw = random.Random(1)
    samples = [
        replace(sample("x" * draw.randint(1, 9)), num_tokens=draw.randint(1, 60)) for _ in range(20)
    ]
    reward = judged(lambda qs: [len(q.completion) / 9 for q in qs])
    bare = rewards.score(samples, START_WEIGHTS)
    monitored = rewards.score(samples, START_WEIGHTS, extra=[("judge", reward, 0.0)])
    assert monitored.totals == bare.totals
    assert len(set(monitored.components["judge"])) > 3


def test_a_users_own_reward_may_not_be_missing():
    with pytest.raises(UserError, match="'mine' returned None"):
        rewards.score([sample("a")], START_WEIGHTS, extra=[("mine", lambda one: None, 1.0)])
