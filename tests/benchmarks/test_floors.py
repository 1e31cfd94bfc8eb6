"""Floors of a run: the machine's speed in the plan's units, and each part beside its floor."""

from benchmarks import floors
from gemma_grpo.planning import ledger


def test_speed_is_that_of_a_matmul_and_of_an_array_read_at_two_bytes_a_number(monkeypatch):
    monkeypatch.setattr(floors, "WIDTH", 8)
    monkeypatch.setattr(floors, "FLOATS", 64)
    monkeypatch.setattr(floors, "median_seconds", lambda run, repeats: (0.5, 0.4, 0.6))
    machine = floors.speed(cores=2)
    assert machine.flops == 2 * 8 * 8 * 8 / 0.5
    assert machine.bandwidth == 64 * 2 / 0.5


def test_a_part_stands_beside_the_plans_line_of_it_and_what_was_not_run_has_none():
    lines = [
        ledger.Line(name, likely, 9.0, "modelled", "")
        for name, likely in (("SFT steps", 2.0), ("base evaluation", 1.0), ("GRPO steps", 3.0))
    ]
    assert floors.parts({"sft": 20.0, "evaluate_base": 10.0, "compile": 5.0}, lines) == [
        {"part": "evaluate_base", "seconds": 10.0, "floor": 1.0},
        {"part": "sft", "seconds": 20.0, "floor": 2.0},
    ]
