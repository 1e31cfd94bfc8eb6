"""A job of many processes: it computes what one process does, and ends together.

Real processes on this machine, which talk over the loopback (gloo).
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import time

import children
import jax
import numpy as np
import pytest
import tolerances

from gemma_grpo import cli, evaluate, export, generate
from gemma_grpo.devices import mesh, processes
from gemma_grpo.errors import UserError

# The embedded model is so small that its arrays would be replicated, and be packed.
TRAIN = """
import sys
from gemma_grpo import train
from gemma_grpo.devices import mesh
from gemma_grpo.records import checkpoint
mesh.FSDP_FROM = 1
checkpoint.PACK_BELOW = 1 << 14
sys.exit(train.main(sys.argv[1:]))
"""
SMALL = [
    "--sft.num-steps", "2", "--sft.batch-size", "4",
    "--grpo.num-steps", "4", "--grpo.prompts-per-step", "4", "--grpo.num-generations", "4",
    "--grpo.checkpoint-every", "2", "--grpo.loss.beta", "0.01", "--grpo.scale", "batch",
    "--grpo.curriculum", "pass_rate", "--grpo.skip-uniform", "0.9",  # all must draw the same
    "--data.num-train", "24", "--data.num-test", "6",
    "--evaluation.batch-size", "4", "--evaluation.num-samples", "0",
    "--evaluation.every", "2", "--evaluation.snapshot-problems", "3",
]  # fmt: skip


def forked(program, *arguments):
    return children.Forked(program, *arguments, stderr=subprocess.STDOUT)


def spawned(program, *arguments):
    """Its pipe is open until its watcher has ended too, whose line comes after its own end."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=children.ENVIRONMENT,
    )


class Job:
    """Processes that run one program together; their number is that of `--process-id`s."""

    def __init__(self, program, num_processes, *arguments, start=forked):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        self.processes = [
            start(
                program,
                *arguments,
                *("--coordinator", address, "--num-processes", str(num_processes)),
                *("--process-id", str(process_id)),
            )
            for process_id in range(num_processes)
        ]

    def finish(self, *, within=500):
        """(exit status, output) of every process."""
        deadline = time.monotonic() + within
        try:
            outputs = [
                process.communicate(timeout=deadline - time.monotonic())[0]
                for process in self.processes
            ]
        finally:
            for process in self.processes:
                process.kill()
        return [
            (process.returncode, output)
            for process, output in zip(self.processes, outputs, strict=True)
        ]


def trained_alone(run_dir, *arguments):
    process = forked(TRAIN, "--run-dir", str(run_dir), *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return run_dir


def trained(num_processes, run_dir, *arguments):
    job = Job(TRAIN, num_processes, "--run-dir", str(run_dir), *arguments)
    for status, output in job.finish():
        assert status == 0, output
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def small(one_layer):
    """Flags of a small run."""
    return ["--model.weights", one_layer, "--grpo.teacher", "gemma3-nano", *SMALL]


@pytest.fixture(scope="module")
def alone(runs, small):
    """One process with four devices."""
    return trained_alone(runs / "alone", "--model.cpu-devices", "4", *small)


@pytest.fixture(scope="module")
def two(runs, small):
    """Two processes with two devices each."""
    return trained(2, runs / "two", "--model.cpu-devices", "2", *small)


@pytest.fixture(scope="module")
def killed(runs, small):
    """What is left of a job of two, one of which was killed in the third GRPO step; how the other
    one ended."""
    run_dir = runs / "killed"
    flags = "--run-dir", str(run_dir), "--model.cpu-devices", "2", *small
    job = Job(TRAIN, 2, *flags, start=spawned)
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:  # two SFT, two GRPO
        assert job.processes[1].poll() is None, job.finish()
        time.sleep(0.02)
    while not (run_dir / "checkpoints" / "grpo" / "000002" / "SHA256SUMS").exists():
        time.sleep(0.02)
    job.processes[1].kill()
    started = time.monotonic()
    (status, output), _ = job.finish(within=2 * processes.HEARTBEAT_TIMEOUT)
    return run_dir, status, output, time.monotonic() - started


def steps_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not name.startswith(("time/", "tokens_per_s"))
        }
        for line in lines
    ]


def assert_like(run_dir, other):
    """The same samples, and the same numbers but for the order of sums."""
    for ours, theirs in zip(steps_of(run_dir), steps_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, theirs[name], **tolerances.METRICS, err_msg=name)
            else:
                assert value == theirs[name], name
    files = sorted((other / "rollouts").glob("*.jsonl"))
    names = lambda folder: sorted(path.name for path in (folder / "rollouts").iterdir())
    assert names(run_dir) == names(other)
    for file in files:
        texts = [
            [json.loads(line)["completion"] for line in path.read_text().splitlines()]
            for path in (file, run_dir / "rollouts" / file.name)
        ]
        assert texts[0] == texts[1] and len(texts[0]) == 16


def test_two_processes_train_as_one_does(alone, two):
    assert_like(two, alone)


def test_every_file_is_written_once_snapshots_too(alone, two):
    names = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*.json*")) for d in (two, alone)]
    assert names[0] == names[1]
    snapshots = dict.fromkeys(("grpo-step-000002", "grpo-step-000004"), 3)
    for stage, problems in {"base": 6, "sft": 6, "grpo": 6, **snapshots}.items():
        of = [
            [
                json.loads(line)["completion"]
                for line in (d / "evaluations" / f"{stage}.jsonl").open()
            ]
            for d in (two, alone)
        ]
        assert of[0] == of[1] and len(of[0]) == problems


def test_when_a_process_is_killed_the_others_end_in_time_and_say_so(killed):
    _, status, output, seconds = killed
    assert status != 0
    assert "start all of them again, with --resume" in output
    assert seconds < processes.HEARTBEAT_TIMEOUT + 30


def test_a_killed_job_resumes_to_the_same_bits(killed, two, runs):
    run_dir = shutil.copytree(killed[0], runs / "resumed")
    trained(2, run_dir, "--resume")
    assert steps_of(run_dir) == steps_of(two)
    for stage in ("sft", "grpo"):
        weights = f"weights/{stage}.safetensors"
        assert (run_dir / weights).read_bytes() == (two / weights).read_bytes()


@pytest.mark.parametrize("number", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_with_what_two_have_saved(killed, alone, runs, number):
    run_dir = shutil.copytree(killed[0], runs / f"by-{number}")
    settings = run_dir / "config.yaml"
    text = settings.read_text().replace("cpu_devices: 2", f"cpu_devices: {4 // number}")
    settings.write_text(text)
    if number == 1:
        trained_alone(run_dir, "--resume")
    else:
        trained(number, run_dir, "--resume")
    assert_like(run_dir, alone)


JOIN = """
import argparse, pathlib, sys
from gemma_grpo.devices import processes

flags = argparse.ArgumentParser()
for name in ("run-dir", "coordinator", "num-processes", "process-id"):
    flags.add_argument(f"--{name}")
flags = flags.parse_args()
processes.join(flags.coordinator, int(flags.num_processes), int(flags.process_id))
"""

AGREE = (
    JOIN
    + """
import jax
from gemma_grpo import cli
from gemma_grpo.errors import UserError

own = jax.process_index()
assert processes.gather_from_all(lambda: "x" * own * 5000) == ["", "x" * 5000, "x" * 10_000]
assert processes.broadcast_from_primary(lambda: {"of": own}) == {"of": 0}
assert processes.run_on_primary(lambda: print) == (print if own == 0 else None)
assert processes.in_all(lambda: own) == own

def fails_on(number):
    if own == number:
        raise UserError(f"only process {number} fails")

def main():
    try:
        processes.run_on_primary(lambda: fails_on(0))
    except UserError as error:
        assert str(error) == "only process 0 fails"
    processes.gather_from_all(lambda: fails_on(2))

sys.exit(cli.guarded(main))
"""
)


def test_processes_agree_on_values_and_stop_together_with_the_first_error():
    for status, output in Job(AGREE, 3).finish(within=100):
        assert status == 2 and "error: only process 2 fails" in output, output


UNLIKE = (
    JOIN
    + """
import jax
from gemma_grpo import pipeline, train
from gemma_grpo.config import DataConfig, RunConfig
from gemma_grpo.errors import UserError

own, folder = jax.process_index(), pathlib.Path(flags.run_dir)
here = RunConfig(data=DataConfig(source=str(folder / f"{own}.jsonl"), num_train=2, num_test=2))

def attempt(name, act):
    try:
        act()
        print(name, "goes on")
    except UserError as error:
        print(name, error)

attempt("settings:", lambda: train._require_same_settings(RunConfig(seed=own)))
attempt("paths:", lambda: train._require_same_settings(here))
attempt("files:", lambda: processes.require_same({"tokenizer": own, "base": 1}, fix="copy it"))
attempt("folder:", lambda: pipeline._require_shared(folder / str(own)))
attempt("input:", lambda: pipeline.load_task(here))  # process 1 has no such file
"""
)


def test_what_differs_between_processes_stops_all_of_them_with_the_same_line(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.yaml").touch()
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(6)]
    (tmp_path / "0.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    said = [output for _, output in Job(UNLIKE, 2, "--run-dir", str(tmp_path)).finish(within=100)]
    for output in said:
        # Among lines of the runtime's own.
        lines = dict(re.findall(r"^(settings|paths|files|folder|input): (.*)$", output, re.M))
        assert "process 1 has other settings than process 0 (seed 0 -> 1)" in lines["settings"]
        assert lines["paths"] == "goes on"
        assert lines["files"] == "process 1 has another tokenizer than process 0; copy it"
        assert "process 1 does not see" in lines["folder"]
        assert lines["input"] == f"no such file: {tmp_path / '1.jsonl'}"


GUARDED = (
    JOIN
    + """
import jax
import jax.numpy as jnp
from gemma_grpo.records.metrics import MetricsWriter
from gemma_grpo.training import rollback
from gemma_grpo.training.config import GuardConfig
from gemma_grpo.training.interrupt import Interrupt
from gemma_grpo.training.loop import RunFiles, StepResult
from gemma_grpo.training.state import TrainState

run_dir = pathlib.Path(flags.run_dir)

def begin(factor):
    def step(state, number):
        weight = float(state.params["w"])
        seen = weight if processes.is_primary() else 0.0  # the others know of no collapse
        moved = TrainState({"w": jnp.float32(weight + 4 * factor)}, (), state.num_updates + 1)
        return moved, StepResult({"loss": 0.0, "kl": seen})

    return step, lambda: TrainState({"w": jnp.float32(0)}, (), jnp.int32(0))

files = RunFiles(run_dir, processes.run_on_primary(lambda: MetricsWriter(run_dir)), Interrupt())
guard = GuardConfig(action="rollback", patience=2, max_kl=10.0)
state = rollback.run_guarded("grpo", begin, files, guard, num_steps=6, checkpoint_every=2)
print("weight", float(state.params["w"]))
"""
)


def test_a_guard_takes_all_processes_back_when_the_primary_sees_a_collapse(tmp_path):
    """As `training/test_rollback.py` has it by hand: back to step 2 twice, 8 + 4 steps of 1."""
    for status, output in Job(GUARDED, 2, "--run-dir", str(tmp_path)).finish(within=200):
        assert status == 0 and output.rstrip().endswith("weight 12.0"), output
    noted = json.loads((tmp_path / "rollbacks.json").read_text())
    assert [(each["at"], each["to"]) for each in noted] == [(5, 2), (6, 2)]


WATCHED = """
import atexit, os, sys
from gemma_grpo.devices import processes
processes._watch("process 1")
if sys.argv[1] == "abort":
    os.abort()
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how, is_said", [("abort", True), ("kill", True), ("return", False)])
def test_a_process_that_is_ended_from_below_is_said_and_one_that_leaves_is_not(how, is_said):
    run = [sys.executable, "-c", WATCHED, how]
    done = subprocess.run(run, env=children.ENVIRONMENT, capture_output=True, text=True)
    line = "error: process 1 has ended early: "
    assert done.stderr.startswith(line) == is_said and done.stderr.count(line) == is_said


def test_a_process_alone_just_calls():
    calls = []
    assert processes.gather_from_all(lambda: calls.append(1) or 7) == [7]
    assert processes.broadcast_from_primary(lambda: 8) == 8
    assert processes.run_on_primary(lambda: 9) == 9
    assert processes.is_primary() and calls == [1]


@pytest.mark.parametrize(
    "settings, message",
    [
        (("", 2, 0), "give --coordinator host:port too"),
        (("somewhere", 2, 0), "write host:port, or auto"),
        (("localhost:1", None, 0), "give --coordinator host:port, --num-processes"),
    ],
)
def test_half_of_a_job_s_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        processes.join(*settings)


@pytest.mark.parametrize(
    "variables, named",
    [
        ({}, ""),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_COORDINATOR_ADDRESS=host:1"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b"),
    ],
)
def test_where_the_environment_names_several_train_joins_them_and_the_other_commands_refuse(
    monkeypatch, tmp_path, capsys, variables, named
):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_ID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(cli, "use_compilation_cache", lambda folder: None)
    monkeypatch.setattr(processes, "_watch", lambda _: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: joined.append(given))
    processes.join()
    assert joined == [(None, None, None)] * bool(named)
    run = str(tmp_path / "none")
    for command, *arguments in (
        (evaluate, run), (generate, run, "--prompt", "2 + 2?"), (export, run, str(tmp_path / "out"))
    ):  # fmt: skip
        assert command.main(arguments) == 2
        said = capsys.readouterr().err
        assert (f"runs in one process, but {named} names several" in said) == bool(named)
        assert said.count("\n") == 1


def test_devices_of_processes_that_are_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(
        UserError, match="process 0 of 4, not joined to the others: .* --coordinator"
    ):
        mesh.data_mesh()
    assert mesh.data_mesh(jax.devices()).size == len(jax.devices())


# --- addresses ---


@pytest.mark.parametrize("address, host", [("[::1]:65535", "::1"), ("10.0.0.1:65535", "10.0.0.1")])
def test_an_address_of_version_six_is_reached_without_its_brackets(address, host):
    assert processes._address(address) == (host, 65535)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:x", "host:0", "host:65536"])
def test_an_address_that_is_none_is_refused_before_jax_sees_it(address):
    with pytest.raises(UserError, match="write host:port, or auto"):
        processes.join(address, 2, 1)


def test_a_coordinator_that_is_not_there_is_said_at_once_and_refused_in_the_end(
    monkeypatch, capsys
):
    monkeypatch.setattr(processes, "CONNECT_TIMEOUT", 0.05)
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: not reached in"):
            processes.join(f"127.0.0.1:{port}", 2, 1)
    assert capsys.readouterr().err.count("waiting for the coordinator") == 1


def test_a_number_in_the_environment_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=one: must be a number"):
        processes.join("localhost:1234", 2)
