"""A file or folder appears complete or not at all; a failure to write is one line with a fix."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

from gemma_grpo.errors import UserError
from gemma_grpo.records import files

ROOT = Path(__file__).parents[2]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_written_in_utf_8_with_its_folders(tmp_path):
    files.write_text(tmp_path / "a" / "b" / "note.txt", "Größe\n")
    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == b"Gr\xc3\xb6\xc3\x9fe\n"
    assert names_in(tmp_path / "a" / "b") == ["note.txt"]


def test_until_the_block_ends_the_old_file_is_there(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with files.atomic_write(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_the_block_raises_passes_and_nothing_half_written_stays(tmp_path, error, is_folder):
    (tmp_path / "out").write_text("old")
    with pytest.raises(type(error)), files.atomic_write(tmp_path / "out") as unfinished:
        if is_folder:
            unfinished.mkdir()
            (unfinished / "inside").touch()
        else:
            unfinished.write_text("half")
        raise error
    assert names_in(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "old"


def test_a_folder_replaces_an_empty_one_and_no_other(tmp_path):
    def write():
        with files.atomic_write(tmp_path / "out") as unfinished:
            unfinished.mkdir()
            (unfinished / "ours").touch()

    (tmp_path / "out").mkdir()
    write()
    assert names_in(tmp_path / "out") == ["ours"]
    (tmp_path / "out" / "ours").rename(tmp_path / "out" / "theirs")
    with pytest.raises(UserError, match="out: Directory not empty; something else has that name"):
        write()
    assert names_in(tmp_path) == ["out"] and names_in(tmp_path / "out") == ["theirs"]


def test_what_a_killed_process_left_is_removed_and_not_added_to(tmp_path):
    script = (
        "import os, signal; from pathlib import Path; from gemma_grpo.records import files\n"
        "with files.atomic_write(Path('OUT')) as unfinished:\n"
        "    unfinished.mkdir(); (unfinished / 'leftover').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    ).replace("OUT", str(tmp_path / "out"))
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert child.returncode == -signal.SIGKILL
    assert names_in(tmp_path) == ["out.tmp"]
    with files.atomic_write(tmp_path / "out") as unfinished:
        unfinished.mkdir()
    assert names_in(tmp_path) == ["out"] and names_in(tmp_path / "out") == []


def test_of_two_processes_that_make_one_folder_the_first_wins_and_neither_fails(tmp_path):
    with files.atomic_write(tmp_path / "out", shared=True) as unfinished:
        assert str(os.getpid()) in unfinished.name
        unfinished.mkdir()
        (unfinished / "later").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "first").touch()
    assert names_in(tmp_path) == ["out"] and names_in(tmp_path / "out") == ["first"]


def test_bytes_and_then_the_name_are_synced_before_it_returns(tmp_path, monkeypatch):
    order, replace = [], Path.replace

    def fsync(descriptor):
        mode = os.fstat(descriptor).st_mode
        order.append("folder" if stat.S_ISDIR(mode) else "file")

    def renamed(path, target):
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write_text(tmp_path / "note.txt", "x")
    assert order == ["file", "rename", "folder"]
    order.clear()
    with files.atomic_write(tmp_path / "out") as unfinished:
        unfinished.mkdir()
        (unfinished / "a").touch()
    assert order == ["file", "folder", "rename", "folder"]
    order.clear()
    files.write_text(tmp_path / "note.txt", "y", durable=False)
    assert order == ["rename"]


SPACE, PLACE = "free some space, then try again", "name another folder"


@pytest.mark.parametrize(
    "error, reason, fix",
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device", SPACE),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded", SPACE),
        (PermissionError(errno.EACCES, "x"), "Permission denied", PLACE),
        (OSError(errno.EROFS, "x"), "Read-only file system", PLACE),
        (IsADirectoryError(errno.EISDIR, "x"), "Is a directory", "something else has that name"),
        (OSError("a device of its own words"), "a device of its own words", PLACE),
        (ValueError("Error [os_error_code='28']"), "No space left on device", SPACE),
        (
            safetensors.SafetensorError("Error: I/O error: (os error 13)"),
            "Permission denied",
            PLACE,
        ),
    ],
)
def test_the_message_has_the_path_the_systems_reason_and_a_fix_for_it(tmp_path, error, reason, fix):
    with pytest.raises(UserError) as caught, files.write_errors(tmp_path / "out"):
        raise error
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path}/out: {reason}; {fix}")
    assert "\n" not in message
    if fix == SPACE:
        assert PLACE not in message


def test_a_full_cache_may_be_put_into_another_folder():
    message = files.explain(Path("c"), OSError(errno.ENOSPC, ""), another_place="set CACHE")
    assert message == "cannot write c: No space left on device; free some space, or set CACHE"


def test_errors_that_are_not_the_systems_pass_unchanged(tmp_path):
    for error in (UserError("rows (os error 28)"), ValueError("a shape")):
        with pytest.raises(type(error)) as caught, files.write_errors(tmp_path):
            raise error
        assert caught.value is error


# --- what is no plain file ---


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "disk" / "real.txt")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    files.write_text(tmp_path / "link.txt", "x")
    with files.atomic_write(tmp_path / "link") as unfinished:
        unfinished.mkdir()
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "link").is_symlink()
    assert names_in(tmp_path / "disk") == ["folder", "real.txt"]
    assert (tmp_path / "disk" / "real.txt").read_text() == "x"


def test_a_fifo_or_a_device_is_written_through_and_stays(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write_text(fifo, "x")
        assert os.read(reader, 10) == b"x"
    finally:
        os.close(reader)
    assert names_in(tmp_path) == ["fifo"] and stat.S_ISFIFO(fifo.stat().st_mode)
    files.require_new_file(fifo)
    files.require_new_file(Path("/dev/null"))
    with pytest.raises(OSError, match="is no file"):  # reading it would wait for a writer
        files.read_bytes(fifo)
    with pytest.raises(UserError, match="cannot write /: it is a folder"):
        files.write_text(Path("/"), "x")


def test_what_is_there_is_refused_before_the_work_and_not_after(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "inside").touch()
    (tmp_path / "empty").mkdir()
    for path in ("new", "new/below", "empty"):
        files.require_new_folder(tmp_path / path)
    files.require_new_file(tmp_path / "new")
    for require, path, words in (
        (files.require_new_folder, "file", "is there already"),
        (files.require_new_folder, "full", "is there already"),
        (files.require_new_folder, "file/below", "Not a directory"),
        (files.require_new_file, "file", "is there already"),
        (files.require_new_file, "empty", "is a folder"),
        (files.require_new_file, "file/below", "Not a directory"),
    ):
        with pytest.raises(UserError, match=words):
            require(tmp_path / path)
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="the folder you are in"):
        files.require_new_folder(Path("."))
