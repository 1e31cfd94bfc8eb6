"""A small cut of the campaign: `python -m benchmarks.campaign` runs the rest."""

import pytest

from benchmarks.campaign import disks, flips, inputs, kills, runs


def test_flipped_bits_are_noticed_or_harmless(tmp_path):
    *found, total = flips.flips(tmp_path, 44, seed=1)
    assert not found, [line["said"] for line in found]
    assert total["subjects"] >= 20
    assert total["refused"] + total.get("the same", 0) == 44


def test_wrong_settings_are_one_line_or_accepted(tmp_path):
    *found, total = inputs.inputs(tmp_path, 40, seed=1)
    assert not found and total["held"] == total["inputs"] == 40


@pytest.mark.slow
def test_kills_lose_no_bit(tmp_path):
    *_, total = kills.kills(tmp_path, 2, seed=1)
    assert total["same"] and total["kills"] == 2 and not total["tracebacks"]


@pytest.mark.slow
def test_an_erring_disk_is_one_line_and_what_it_left_goes_on(tmp_path):
    *found, total = disks.disks(tmp_path, 2, seed=1)
    assert total["same"] == total["faults"] == 2, found


def test_a_tracebacks_first_line_is_found(tmp_path):
    log = tmp_path / "log"
    assert not runs.has_traceback(log)
    log.write_text("x\nTraceback (most recent call last):\n")
    assert runs.has_traceback(log)
