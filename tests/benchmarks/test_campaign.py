"""A small cut of the campaign: `python -m benchmarks.campaign` runs the rest."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.campaign import flips, inputs, runs
from benchmarks.campaign.doors.case import Case, written


def lines_of(part, number):
    """What a part prints, in a process that has started no device yet."""
    command = [sys.executable, "-m", "benchmarks.campaign", part, "--number", str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_flipped_bits_are_noticed_or_harmless(tmp_path):
    *found, total = flips.flips(tmp_path, 44, seed=1)
    assert not found, [line["said"] for line in found]
    assert total["subjects"] >= 20
    assert total["refused"] + total.get("the same", 0) == 44


def case(name, *arguments, wanted="", **options):
    return Case("test", name, ["rescore", *arguments], wanted=wanted, **options)


CASES = [  # and what must be said of each; `rescore` needs no device
    (case("good", "--help"), "accepted"),
    (case("no folder", "nowhere", wanted="refused"), "one line"),
    (case("no folder", "nowhere", wanted="accepted"), "refused, which is wrong"),
    (case("help", "--help", wanted="refused"), "accepted, which is wrong"),
    (case("dies", make=lambda folder: os.kill(os.getpid(), 9)), "crashed"),
    (case("waits", make=lambda folder: time.sleep(100)), "hung"),
    (Case("test", "no command", ["nothing"]), "traceback"),
    (case("a file that stays", "--help", make=written("x/y", "mine")), "accepted"),
]


def test_what_comes_of_an_input_is_judged_and_a_lost_worker_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_keep_models", lambda: None)
    monkeypatch.setattr(inputs, "IDLE", 2.0)
    found = list(inputs.met([each for each, _ in CASES], tmp_path))
    assert [each["what"] for each in found] == [verdict for _, verdict in CASES], found


@pytest.mark.parametrize(
    "before, after, what, changed",
    [
        ({"a": "1"}, {"a": "1", "b": "2"}, "accepted", []),
        ({"a": "1"}, {"a": "1", "b": "2"}, "one line", ["b"]),
        ({"a": "1"}, {"a": "1", "out/b": "2"}, "one line", []),
        ({"a": "1"}, {"a": "1", "r/.jax_cache/b": "2"}, "one line", []),  # kept on purpose
        ({"a": "1"}, {"a": "1", "b.jax_cache": "2"}, "one line", ["b.jax_cache"]),
        ({"a": "1"}, {"a": "3"}, "accepted", ["a"]),
        ({"a": "1"}, {}, "accepted", ["a"]),
        ({"out": "1"}, {}, "accepted", []),
    ],
)
def test_a_users_file_that_changes_or_a_half_made_one_is_noticed(before, after, what, changed):
    assert inputs.changes(case("x", writes=("out",)), before, after, what) == changed


def test_every_input_has_a_name_of_its_own(tmp_path):
    named = [
        (each.door, each.name)
        for door in (inputs.settings, inputs.problems, inputs.rewards)
        for each in door.cases(tmp_path)
    ]
    assert len(named) == len(set(named)) >= 4000


@pytest.mark.slow
def test_odd_inputs_at_every_door_are_one_line_or_accepted():
    *found, total = lines_of("inputs", 60)
    assert not found and total["held"] == total["inputs"] == 60 and total["of"] >= 1000


@pytest.mark.slow
def test_kills_lose_no_bit():
    *_, total = lines_of("kills", 2)
    assert total["same"] and total["kills"] == 2 and not total["tracebacks"]


@pytest.mark.slow
def test_an_erring_disk_is_one_line_and_what_it_left_goes_on():
    *found, total = lines_of("disks", 2)
    assert total["same"] == total["faults"] == 2, found


def test_a_tracebacks_first_line_is_found(tmp_path):
    log = tmp_path / "log"
    assert not runs.has_traceback(log)
    log.write_text("x\nTraceback (most recent call last):\n")
    assert runs.has_traceback(log)
