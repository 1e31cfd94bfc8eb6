"""What a run's seconds.json and summary.json say."""

import json

from gemma_grpo.records import summary


def test_times_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "seconds.json"
    path.write_text('{"sft": 3.5, "grpo": 7, "a": "x", "b": null, "c": NaN, "d": -1, "e": 1e30}')
    assert summary.seconds_of(tmp_path) == {"sft": 3.5, "grpo": 7}


def test_an_empty_seconds_file_does_not_stop_a_stage_from_being_saved(tmp_path, capsys):
    (tmp_path / "seconds.json").write_text("")
    summary.add_seconds(tmp_path, "sft", 2.0)
    summary.add_seconds(tmp_path, "sft", 1.5)
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"sft": 3.5}
    assert "damaged" in capsys.readouterr().err
