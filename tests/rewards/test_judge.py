"""Judges: asked in parallel, for a limited time, once a question; a failure stops nothing."""

import asyncio
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.rewards import RubricConfig
from gemma_grpo.rewards.judge import Calls, Judge, Question, load_judge
from gemma_grpo.rewards.verdicts import Verdicts

LIMITS = RubricConfig(timeout=20.0, parallel=2, per_call=3)
QUESTIONS = [Question("p", f"completion {i}", "a", "is it even?") for i in range(7)]
EVEN = [float(i % 2 == 0) for i in range(7)]


def is_even(questions):
    return [int(question.completion[-1]) % 2 == 0 for question in questions]


def verdicts(ask, path=None, version="1", **limits) -> Verdicts:
    return Verdicts(Judge("judge", version, ask), replace(LIMITS, **limits), path)


def test_every_question_gets_its_own_verdict_in_calls_of_the_size_asked_for():
    sizes = []

    def ask(questions):
        sizes.append(len(questions))
        return is_even(questions)

    assert verdicts(ask).of(QUESTIONS) == (EVEN, "")
    assert sorted(sizes) == [1, 3, 3]


def test_calls_run_at_the_same_time_and_never_more_than_allowed():
    now, most, lock, both = [0], [0], threading.Lock(), threading.Barrier(2, timeout=20)

    def ask(questions):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        both.wait()  # passes only if two calls are under way
        with lock:
            now[0] -= 1
        return is_even(questions)

    assert verdicts(ask, per_call=2).of(QUESTIONS)[0] == EVEN
    assert most == [2]


def test_a_coroutine_is_a_judge_and_is_cancelled_in_time():
    async def ask(questions):
        await asyncio.sleep(0)
        return is_even(questions)

    assert verdicts(ask).of(QUESTIONS)[0] == EVEN
    ended = threading.Event()

    async def slow(questions):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    values, reason = verdicts(slow, timeout=0.2).of(QUESTIONS[:1])
    assert values == [None] and ("0.2 seconds" in reason or "TimeoutError" in reason)
    assert ended.wait(20)


def test_the_same_question_is_asked_once_in_a_batch_in_a_run_and_after_a_resume(tmp_path):
    asked = []

    def ask(questions):
        asked.extend(questions)
        return is_even(questions)

    path = tmp_path / "verdicts" / "judge-0.jsonl"
    first = verdicts(ask, path)
    assert first.of([*QUESTIONS, *QUESTIONS])[0] == [*EVEN, *EVEN]
    assert first.of(QUESTIONS)[0] == EVEN and len(asked) == 7
    assert verdicts(ask, path).of(QUESTIONS)[0] == EVEN and len(asked) == 7
    # Another process of the run reads it too; another version or another criterion is asked anew.
    assert verdicts(ask, path.with_name("judge-1.jsonl")).of(QUESTIONS)[0] == EVEN
    assert len(asked) == 7
    verdicts(ask, path, version="2").of(QUESTIONS)
    assert len(asked) == 14
    for field in ("prompt", "completion", "answer", "criterion"):
        verdicts(ask, path).of([replace(QUESTIONS[0], **{field: "other 3"})])
    assert len(asked) == 18


def test_a_fifo_among_the_verdicts_is_not_waited_for(tmp_path):
    judge = Judge("judge", "1", lambda questions: [1.0] * len(questions))
    os.mkfifo(tmp_path / "other.jsonl")
    Verdicts(judge, LIMITS, tmp_path / "own.jsonl")
    with pytest.raises(UserError, match="other.jsonl: not a file"):
        Verdicts(judge, LIMITS, tmp_path / "other.jsonl")


def test_a_verdict_comes_back_from_the_file_to_the_bit(tmp_path):
    path, third = tmp_path / "v.jsonl", 1 / 3
    assert verdicts(lambda qs: [third for _ in qs], path).of(QUESTIONS[:2])[0] == [third, third]
    assert verdicts(lambda qs: [], path).of(QUESTIONS[:2])[0] == [third, third]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_kill_cut_short_is_asked_again_and_spoils_no_other(tmp_path, cut):
    path = tmp_path / "v.jsonl"
    verdicts(is_even, path).of(QUESTIONS)
    path.write_bytes(path.read_bytes()[:-cut])
    assert verdicts(is_even, path).of(QUESTIONS)[0] == EVEN
    lines = path.read_text().splitlines()
    assert len({json.loads(line)["question"] for line in lines}) == len(lines) == 7


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "verdicts").write_text("a file")
    with pytest.raises(UserError, match="verdicts .*judge-0.jsonl"):
        verdicts(is_even, tmp_path / "verdicts" / "judge-0.jsonl")


class NoMessageError(Exception):
    def __str__(self):
        raise ValueError("no message either")


def failing(error, questions):
    raise error


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (partial(failing, ZeroDivisionError("no")), "raised ZeroDivisionError: no"),
        (partial(failing, SystemExit(0)), "raised SystemExit"),
        (partial(failing, NoMessageError()), "raised NoMessageError"),
        (lambda questions: is_even(questions)[1:], "gave 2 verdicts for 3 questions"),
        (lambda questions: None, "raised TypeError"),
        (lambda questions: 0.5, "raised TypeError"),
        (lambda questions: dict.fromkeys(range(3), True), "a dict in place of a list"),
        (lambda questions: {0, 1, 0.5}, "a set in place of a list"),
        (lambda questions: [math.nan] * len(questions), "gave nan"),
        (lambda questions: [1.1] * len(questions), "gave 1.1"),
        (lambda questions: ["yes"] * len(questions), "gave 'yes'"),
        (lambda questions: [None] * len(questions), "gave None"),
    ],
)
def test_a_judge_that_fails_gives_no_verdict_and_one_reason_and_is_asked_again(ask, reason):
    asked = verdicts(ask)
    values, why = asked.of(QUESTIONS[:3])
    assert values == [None] * 3 and reason in why and "\n" not in why
    asked._calls = Calls(Judge("judge", "1", is_even), LIMITS)
    assert asked.of(QUESTIONS[:3]) == (EVEN[:3], "")


def test_one_bad_verdict_takes_no_other_with_it():
    values, why = verdicts(lambda qs: [True, math.nan, False]).of(QUESTIONS[:3])
    assert values == [1.0, None, 0.0] and "nan" in why


def test_a_judge_that_hangs_costs_its_timeout_once_and_the_rest_of_the_calls_come_through():
    release = threading.Event()

    def ask(questions):
        if questions[0] == QUESTIONS[0]:
            release.wait(60)
        return is_even(questions)

    asked = verdicts(ask, timeout=1.0)
    started = time.monotonic()
    values, why = asked.of(QUESTIONS)
    assert values == [None, None, None, *EVEN[3:]] and "no verdict within 1 second" in why
    hung = verdicts(lambda qs: release.wait(60), timeout=0.3, parallel=1)
    assert hung.of(QUESTIONS)[0] == [None] * 7
    assert time.monotonic() - started < 20
    # Its only call hangs still: no step waits for it again.
    started = time.monotonic()
    values, why = hung.of(QUESTIONS)
    assert values == [None] * 7 and "hang" in why and time.monotonic() - started < 0.2
    release.set()


def test_calls_that_hang_since_different_steps_add_up():
    release = threading.Event()
    hung = verdicts(lambda _: release.wait(60), timeout=0.05, parallel=2, per_call=7)
    reasons = [hung.of(QUESTIONS)[1] for _ in range(3)]
    release.set()
    late = "no verdict within 0.05 seconds"
    assert reasons == [late, late, "all 2 parallel calls hang since earlier steps"]


def test_a_generator_is_a_judge_and_its_time_counts():
    def ask(questions):
        for _ in questions:
            time.sleep(1.0)
            yield True

    started = time.monotonic()
    values, why = verdicts(ask, timeout=0.3).of(QUESTIONS)
    assert values == [None] * 7 and "no verdict within" in why
    assert time.monotonic() - started < 0.9
    assert verdicts(lambda questions: map(bool, questions)).of(QUESTIONS)[0] == [1.0] * 7


def test_a_judge_that_is_no_more_leaves_no_thread():
    before = set(threading.enumerate())
    several = [verdicts(is_even) for _ in range(5)]
    started = set(threading.enumerate()) - before
    assert len(started) == 10
    del several
    gc.collect()
    for thread in started:
        thread.join(20)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize(
    "ask", ["lambda qs: time.sleep(600)", "lambda qs: asyncio.to_thread(time.sleep, 600)"]
)
def test_a_process_ends_although_a_judge_hangs(ask):
    code = (
        "import asyncio, time; from gemma_grpo.rewards import RubricConfig;"
        "from gemma_grpo.rewards.judge import *; from gemma_grpo.rewards.verdicts import Verdicts;"
        f"j = Judge('j', '1', {ask});"
        "print(Verdicts(j, RubricConfig(timeout=0.2)).of([Question('p', 'c', 'a', 'q')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no verdict within" in done.stdout


def test_a_judge_is_a_function_of_a_file_and_its_version_is_the_files_content(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def judge(questions): return [True for _ in questions]\nnumber = 3\n")
    judge = load_judge(f"{file}:judge")
    assert (judge.name, judge.in_threads) == ("judge", True)
    assert judge.version == load_judge(f"{file}:judge").version
    file.write_text(file.read_text() + "# another\n")
    assert judge.version != load_judge(f"{file}:judge").version
    with pytest.raises(UserError, match="judge .*'number' is of type int; name a function"):
        load_judge(f"{file}:number")
    file.write_text("1 / 0\n")
    with pytest.raises(UserError, match="judge file .*mine.py, line 1: ZeroDivisionError"):
        load_judge(f"{file}:judge")


@pytest.mark.parametrize(
    "settings", [{"timeout": math.nan}, {"timeout": 0.0}, {"parallel": 0}, {"per_call": 0}]
)
def test_senseless_limits_are_refused_by_name(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        RubricConfig(**settings)


def test_a_rubric_without_a_judge_and_a_judge_without_a_rubric_are_refused():
    for settings in ({"file": "rubric.yaml"}, {"judges": ("judge.py:judge",)}):
        with pytest.raises(UserError, match="give both"):
            RubricConfig(**settings)
