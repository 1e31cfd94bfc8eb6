"""Processes that tests start: what they find in their environment, and a quick way to start one."""

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import compiling

# As a user has them, but for programs that are compiled quickly: they run a few times. The cache of
# programs is that of the session, as conftest.py names it.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.QUICKLY}
# A run imports for three seconds, as long as it traces: one process does so for all, and is forked.
# JAX has not looked at its devices there, nothing checks types, and no test has run.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["gemma_grpo.pipeline", "matplotlib.backends.backend_agg", "tensorboardX", "orbax.checkpoint"]
)
TRAIN = "import runpy; runpy.run_module('gemma_grpo.train', run_name='__main__')"


class Forked:
    """`python -c SCRIPT ARGUMENTS` in a fork of a process that has imported the package already.

    `returncode`, `poll`, `kill`, `send_signal` and `communicate` are those of `subprocess.Popen`.
    With `stderr=subprocess.STDOUT` both streams are one, as there.
    """

    def __init__(self, script, *arguments, cwd=".", env=None, stderr=subprocess.PIPE):
        self._streams = [tempfile.NamedTemporaryFile()]
        if stderr == subprocess.PIPE:
            self._streams.append(tempfile.NamedTemporaryFile())
        names = [each.name for each in self._streams]
        given = (script, arguments, names, str(Path(cwd).absolute()), ENVIRONMENT | (env or {}))
        self._process = _FORKS.Process(target=_run, args=given)
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def communicate(self, timeout=None):
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise subprocess.TimeoutExpired("a forked process", timeout)
        said = [each.read().decode() for each in self._streams]
        return said[0], said[1] if len(said) == 2 else None


def _run(script, arguments, streams, folder, environment):
    """In the forked process: the script, as the interpreter runs it."""
    for number, name in ((1, streams[0]), (2, streams[-1])):
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    try:
        exec(script, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a fork ends without them
