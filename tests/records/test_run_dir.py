"""Run folders are made and copied whole; what a kill has left is begun again."""

import errno
import shutil

import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, lock, origin, read, run_dir


def a_run(folder):
    """A run as a read-only mount shows it."""
    kept = "metrics.jsonl rollouts/grpo-000001.jsonl verdicts/judge-0.jsonl"
    for name in (*kept.split(), "checkpoints/grpo/000002/index"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "rollouts" / "grpo-000002.jsonl.tmp").write_text("half")
    (folder / lock.NAME).touch()
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_copy_has_what_is_needed_and_may_be_written(tmp_path):
    source, new = a_run(tmp_path / "old"), tmp_path / "new"
    checkpoints = {new / "checkpoints/grpo/000002": source / "checkpoints/grpo/000002"}
    run_dir.copy(source, new, "seed: 1", checkpoints)
    assert names(new) == [
        "checkpoints/grpo/000002/index",
        "config.yaml",
        "metrics.jsonl",
        "rollouts/grpo-000001.jsonl",
        "verdicts/judge-0.jsonl",
    ]
    assert all(path.stat().st_mode & 0o200 for path in new.rglob("*"))


def test_a_copy_cut_short_is_begun_again_and_a_whole_one_is_not(tmp_path):
    source, new = a_run(tmp_path / "old"), tmp_path / "new"
    new.mkdir()
    for name in (run_dir.COPYING, "torn", lock.NAME):
        (new / name).touch()
    run_dir.copy(source, new, "seed: 1", {})
    assert "torn" not in names(new) and lock.NAME in names(new)
    (new / run_dir.COPYING).touch()
    with pytest.raises(UserError, match="is there already"):
        run_dir.copy(source, new, "seed: 1", {})


def test_a_checkpoint_in_another_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    source, another_disk = a_run(tmp_path / "old"), tmp_path / "disk" / "grpo" / "000002"
    checkpoints = {another_disk: source / "checkpoints/grpo/000002"}

    def full(path, target):
        if "000002" in str(target):
            target.write_text("half")
            raise OSError(errno.ENOSPC, "no space")
        return copyfile(path, target)

    with monkeypatch.context() as patch:
        copyfile = shutil.copyfile
        patch.setattr(run_dir.shutil, "copyfile", full)
        with pytest.raises(UserError):
            run_dir.copy(source, tmp_path / "new", "seed: 1", checkpoints)
    assert not another_disk.exists()
    run_dir.copy(source, tmp_path / "new", "seed: 1", checkpoints)
    assert names(another_disk) == ["index"]


def test_a_folder_with_a_lock_alone_is_free_and_one_with_a_file_is_not(tmp_path):
    (tmp_path / lock.NAME).touch()
    run_dir.write_config(tmp_path, "seed: 1")
    with pytest.raises(UserError, match="--resume goes on"):
        run_dir.write_config(tmp_path, "seed: 1")


def test_a_start_that_the_disk_cut_short_is_begun_again(tmp_path, monkeypatch):
    def full(path, text):
        raise UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(origin, "note", lambda folder, _: (folder / origin.NAME).write_text("{}"))
        patch.setattr(files, "write_text", full)
        with pytest.raises(UserError, match="no space"):
            run_dir.write_config(tmp_path, "seed: 1")
    (tmp_path / f"{run_dir.CONFIG}.1{files.TEMPORARY}").touch()  # of a kill
    run_dir.write_config(tmp_path, "seed: 2")
    assert names(tmp_path) == [run_dir.CONFIG, origin.NAME]
    assert "seed: 2" in (tmp_path / origin.NAME).read_text()


def test_compiled_programs_beside_a_run_come_along_and_replace_none(tmp_path):
    for folder, text in (("mount", "theirs"), ("runs", "ours")):
        (tmp_path / folder / run_dir.CACHE).mkdir(parents=True)
        (tmp_path / folder / run_dir.CACHE / "both").write_text(text)
    (tmp_path / "mount" / run_dir.CACHE / "one").write_text("theirs")
    run_dir.copy_cache(tmp_path / "mount" / "run", tmp_path / "runs")
    cache = tmp_path / "runs" / run_dir.CACHE
    assert {path.name: path.read_text() for path in cache.iterdir()} == {
        "both": "ours",
        "one": "theirs",
    }
    run_dir.copy_cache(tmp_path / "none" / "run", tmp_path / "runs")


@pytest.mark.parametrize("name", ["run[1]", "a*b", "why?", "back\\slash"])
def test_a_name_that_orbax_takes_for_a_pattern_is_refused_before_training(tmp_path, name):
    with pytest.raises(UserError, match="name another folder"):
        run_dir.require_free(tmp_path / name)


def test_the_last_weights_are_the_last_stages_or_the_latest_that_a_deadline_left_of_it(tmp_path):
    with pytest.raises(UserError, match="no stage has finished; go on with --resume"):
        read.last_weights(tmp_path)
    (tmp_path / "weights").mkdir()
    names = ("sft-step-000007", "sft", "grpo-step-000080", "grpo-step-000120", "grpo")
    for name in names:
        (tmp_path / "weights" / f"{name}.safetensors").touch()
        assert read.last_weights(tmp_path).stem == name
    (tmp_path / "weights" / "grpo.safetensors").unlink()
    (tmp_path / "weights" / "grpo-step-000100.safetensors").touch()
    assert read.last_weights(tmp_path).stem == "grpo-step-000120"
