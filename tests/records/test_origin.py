"""A run's origin: a digest tells other files from the same ones, wherever they are."""

import dataclasses
import json

import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records import origin


@dataclasses.dataclass
class Row:
    text: str
    number: float | None = None


def test_rows_have_the_digest_of_their_content_and_order():
    rows = [Row("a"), Row("b", 1.5)]
    assert origin.of_rows(rows) == origin.of_rows([Row("a"), Row("b", 1.5)])
    others = ([Row("a"), Row("b", 2.5)], rows[::-1], rows[:1], [Row("ab", 1.5)])
    assert len({origin.of_rows(rows), *map(origin.of_rows, others)}) == 5


def test_a_folders_digest_moves_with_it_and_changes_with_its_weights_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "_BLOCK", 8)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(5000))
    (folder / "config.json").write_text("{}")
    before = origin.of_files(folder)
    (folder / "README.md").write_text("more")
    moved = folder.rename(tmp_path / "b")
    assert origin.of_files(moved) == before
    for name, content in (
        ("model.safetensors", bytes(5001)),
        ("model.safetensors", bytes(4999) + b"1"),
        ("model.safetensors", b"1" + bytes(4999)),
        ("model.safetensors", bytes(range(250)) * 20),
        ("config.json", b"[]"),
    ):
        kept = (moved / name).read_bytes()
        (moved / name).write_bytes(content)
        assert origin.of_files(moved) != before
        (moved / name).write_bytes(kept)
    assert origin.of_files(moved) == before


def test_what_differs_is_named_and_what_is_not_known_is_let_pass(tmp_path):
    origin.check(tmp_path, {"tokenizer": "1"})
    origin.note(tmp_path, {"config": "seed: 1", "tokenizer": "1", "base weights": "2"})
    origin.check(tmp_path, {"tokenizer": "1", "base weights": "2", "held-out problems": "3"})
    with pytest.raises(UserError, match="its tokenizer and base weights are not what"):
        origin.check(tmp_path, {"tokenizer": "9", "base weights": "9"})
    origin.note(tmp_path, {"tokenizer": "9"})
    assert json.loads((tmp_path / origin.NAME).read_text())["config"] == "seed: 1"
