"""The table of injected bugs fits the code, and what runs it tells those that live."""

import pytest

from benchmarks.campaign import bugs


def test_each_bug_has_its_text_once_and_its_tests():
    table = bugs.read_table()
    assert len(table) >= 60
    bugs.require_texts(table, bugs.ROOT)


def test_a_text_that_is_gone_ends_the_run(tmp_path):
    (tmp_path / "gemma_grpo").mkdir()
    (tmp_path / "gemma_grpo" / "x.py").write_text("a\na\n")
    for old in ("b", "a"):
        with pytest.raises(ValueError, match=r"x.py: .* stands there \d times"):
            bugs.require_texts([bugs.Bug("x.py", old, "c", "")], tmp_path)


def test_a_bug_is_in_the_tree_only_while_it_is_tried(tmp_path):
    (tmp_path / "gemma_grpo").mkdir()
    (tmp_path / "gemma_grpo" / "__init__.py").touch()
    path = tmp_path / "gemma_grpo" / "x.py"
    path.write_text("one = 1\n")
    (tmp_path / "test_x.py").write_text("from gemma_grpo.x import one\ndef test(): assert one == 1")
    for new, verdict in (("1 ", "lived"), ("2", "caught")):
        bug = bugs.Bug("x.py", "1", new, "test_x.py")
        with bugs.injected(bug, tmp_path):
            assert bugs.tried(bug, tmp_path, tmp_path / "log")[0] == verdict
    assert path.read_text() == "one = 1\n"
