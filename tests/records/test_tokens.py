"""Token ids and log-probs beside the rows: what goes in comes out, and what is torn is none."""

import os

import numpy as np

from gemma_grpo.records import tokens
from gemma_grpo.records.metrics import MetricsWriter

DRAWN = {
    "num_tokens": np.array([2, 0, 3]),
    "token_ids": np.array([262_143, 5, 1, 2, 3]),
    "characters": np.array([300, 0, 1, 1, 0]),
    "logps": np.array([-0.25, -20.0, 0.0, -1.5, -100.0]),
    "gaps": np.array([1e-6, -0.5, 0.0, 0.0, 2.0]),
}


def test_each_row_gets_its_own_tokens_back(tmp_path):
    tokens.write(tmp_path / "a.npz", DRAWN)
    first, empty, last = tokens.read(tmp_path / "a.npz")
    assert first["token_ids"].tolist() == [262_143, 5] and first["characters"].tolist() == [300, 0]
    assert first["logps"].tolist() == [-0.25, -20.0]
    np.testing.assert_allclose(first["gaps"], [1e-6, -0.5], rtol=0.05)
    assert not len(empty["token_ids"])
    assert last["logps"].tolist() == [0.0, -1.5, -100.0]


def test_the_same_tokens_make_the_same_bytes(tmp_path):
    for name in "ab":
        tokens.write(tmp_path / f"{name}.npz", DRAWN)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_file_that_is_absent_torn_or_another_is_none(tmp_path):
    path = tmp_path / "a.npz"
    assert tokens.read(path) is None
    tokens.write(path, DRAWN)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert tokens.read(path) is None
    np.savez(path, num_tokens=np.array([4]), token_ids=np.arange(3))
    assert tokens.read(path) is None
    np.savez(path, other=np.arange(3))
    assert tokens.read(path) is None


def test_a_fifo_is_none_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    assert tokens.read(tmp_path / "a.npz") is None


def test_a_resumed_run_removes_the_tokens_beyond_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write_rollouts("grpo", step, [{"completion": "x"}], DRAWN)
        writer.write("grpo", step, {})
    writer.close()
    (tmp_path / "rollouts" / "grpo-000003.npz.tmp").write_bytes(b"torn")
    MetricsWriter(tmp_path, resume_from={"stage": "grpo", "step": 1}).close()
    left = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert left == ["grpo-000001.jsonl", "grpo-000001.npz"]
