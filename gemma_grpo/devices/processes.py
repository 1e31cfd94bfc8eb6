"""Many processes that run one program together, on JAX's distributed runtime: joining and agreeing.

All processes take the same steps, and their devices make one mesh. Work that only one of them does
(write a file, take a decision), or that they divide (score their own rows), goes through the
functions below: every process calls them at the same point, and all go on with the same value or
stop with the same error. In a job of one process they just call the given function.
"""

import atexit
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from gemma_grpo.errors import UserError

AUTO = "auto"
CONNECT_TIMEOUT = 120  # seconds for the coordinator to be there
HEARTBEAT_TIMEOUT = 60  # seconds; a process that is silent for longer is gone, the others stop
_SMALLEST = 1 << 12  # bytes exchanged; sizes are powers of two, so that few programs are compiled

Value = TypeVar("Value")


def join(
    coordinator: str = "", num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the job's other processes, if it has any. Call it before JAX initialises its devices.

    Args:
        coordinator: host:port of process 0; "auto" lets JAX ask the TPU pod's or the cluster's
            environment; "" does so only if environment variables name several processes
            (`JAX_COORDINATOR_ADDRESS`, a SLURM step's tasks, the workers of a TPU pod).
        num_processes, process_id: with host:port; else from the environment.

    Raises:
        UserError: settings are missing, or the other processes were not reached.
    """
    if not coordinator and _variable_of_several():
        coordinator = AUTO
    if not coordinator:
        if num_processes is not None or process_id is not None:
            raise UserError("--num-processes and --process-id: give --coordinator host:port too")
        return
    process_id = process_id if process_id is not None else _number("JAX_PROCESS_ID")
    if coordinator != AUTO:
        host, port = _address(coordinator)
        if process_id:
            _wait_for(host, port)
    try:
        jax.distributed.initialize(
            None if coordinator == AUTO else coordinator,
            num_processes if num_processes is not None else _number("JAX_NUM_PROCESSES"),
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--coordinator {coordinator}: {' '.join(str(error).split())[:200]}; give "
            "--coordinator host:port, --num-processes and --process-id"
        ) from error
    # Not jax.process_index(): it would start JAX's devices before their number is set.
    _watch("this process" if process_id is None else f"process {process_id}")


def require_alone(command: str) -> None:
    """Raises UserError if environment variables name several processes, for a command that runs in
    one: it would wait for the others, or write what they write too."""
    if variable := _variable_of_several():
        raise UserError(
            f"{command} runs in one process, but {variable}={os.environ[variable]} names several: "
            f"start it once, with env -u {variable} before the command"
        )


def _watch(name: str) -> None:
    """Starts a process that says a line should this one end without having left in order: where
    another one is lost, JAX's runtime may abort, of which Python hears nothing."""
    line = (
        f"error: {name} has ended early: another one was lost, or this one was killed; start all "
        "of them again, with --resume\n"
    )
    program = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"
    watcher = subprocess.Popen(
        [sys.executable, "-ISc", program, line],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is not for it
    )

    def leave() -> None:
        try:
            jax.distributed.shutdown()  # waits for the others
        except RuntimeError:
            return  # they are lost, which the watcher says
        watcher.communicate("in order")

    atexit.register(leave)


def _address(coordinator: str) -> tuple[str, int]:
    """Host and port. Raises UserError for what JAX would crash on."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator {coordinator}: write host:port, or auto")
    return host.strip("[]"), int(port)


def _wait_for(host: str, port: int) -> None:
    """Returns when the coordinator answers; JAX would wait in silence, and then abort.

    Raises:
        UserError: it does not within `CONNECT_TIMEOUT`.
    """
    end, said = time.monotonic() + CONNECT_TIMEOUT, False
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise UserError(
                f"--coordinator {host}:{port}: not reached in {CONNECT_TIMEOUT} s ({reason}); "
                "start process 0 there, and see that the port is open"
            )
        if not said:
            print(f"waiting for the coordinator at {host}:{port} ({reason})", file=sys.stderr)
            said = True
        time.sleep(min(1.0, CONNECT_TIMEOUT / 10))


def is_primary() -> bool:
    """Whether this is the primary process, the one that writes files and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather_from_all(make: Callable[[], Value]) -> list[Value]:
    """What `make` returns in each process, in the processes' order; it must pickle.

    Raises:
        UserError, OSError: what `make` raised, in the lowest process where it did.
    """
    if not jax.distributed.is_initialized():
        return [make()]
    own: tuple[Any, UserError | OSError | None]
    try:
        own = (make(), None)
    except (UserError, OSError) as error:
        own = (None, error)
    outcomes = _exchange(own)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [value for value, _ in outcomes]


def in_all(make: Callable[[], Value]) -> Value:
    """What `make` returns here; every process calls it, and it need not pickle. Raises as
    `gather_from_all`: where it fails in one process, all stop with its error."""
    kept = list[Value]()
    gather_from_all(lambda: kept.append(make()))
    return kept[0]


def require_same(values: Mapping[str, Any], *, fix: str) -> None:
    """Raises UserError in all processes where the values of one are not the primary's; it names
    them and the process."""
    first, *others = gather_from_all(lambda: dict(values))
    for number, other in enumerate(others, start=1):
        if differing := [name for name in first if other.get(name) != first[name]]:
            raise UserError(
                f"process {number} has another {' and '.join(differing)} than process 0; {fix}"
            )


def broadcast_from_primary(make: Callable[[], Value]) -> Value:
    """What `make` returns in the primary process, the only one that calls it.

    Raises as `gather_from_all`.
    """
    first: Any = gather_from_all(lambda: make() if is_primary() else None)[0]
    return first


def run_on_primary(make: Callable[[], Value]) -> Value | None:
    """What `make` returns in the primary process, the only one that calls it; None in the others,
    which wait for it. Raises as `gather_from_all`, in every process."""
    kept = []
    broadcast_from_primary(lambda: kept.append(make()))
    return kept[0] if kept else None


def _variable_of_several() -> str:
    """The environment variable that says that this process is one of several, or ""."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "SLURM_STEP_NUM_TASKS"
    return "TPU_WORKER_HOSTNAMES" if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") else ""


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise UserError(f"{variable}={text}: must be a number")
    return None if text is None else int(text)


def _exchange(value: Any) -> list[Any]:
    """Every process's value, over the devices' own network."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).tolist()
    room = max(_SMALLEST, 1 << (max(sizes) - 1).bit_length())
    everyone = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]
