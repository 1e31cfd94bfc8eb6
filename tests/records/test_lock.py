"""One process at a time in a run's folder."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from gemma_grpo.errors import UserError
from gemma_grpo.records import lock

HOLD = """
import sys, time
from pathlib import Path
from gemma_grpo.records import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_another_process_is_refused_by_name_until_the_holder_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"), lock.hold(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    (tmp_path / lock.NAME).write_text("12345678901234\n")  # of a machine with larger numbers
    with lock.hold(tmp_path):
        assert (tmp_path / lock.NAME).read_text() == f"{os.getpid()}\n"


def test_a_second_run_in_the_same_process_is_refused_too(tmp_path):
    with lock.hold(tmp_path):
        with pytest.raises(UserError, match="in use"), lock.hold(tmp_path):
            pass
    with lock.hold(tmp_path):
        pass


def test_a_read_only_folder_is_one_line_that_names_the_way_on(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=f"--resume-from {tmp_path} --run-dir"), lock.hold(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.hold(tmp_path):
        pass
    assert "without locks" in capsys.readouterr().err
