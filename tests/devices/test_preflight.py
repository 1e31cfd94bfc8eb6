"""TPUs that cannot be used are recognised before they are touched; stubs stand for the machine."""

import os

import pytest

from gemma_grpo import cli
from gemma_grpo.devices import preflight
from gemma_grpo.errors import UserError

CHIPS = ["/dev/accel0", "/dev/accel1"]


@pytest.fixture
def machine(monkeypatch):
    """A TPU host with jax 0.10.2; returns a function that sets libtpu's version and the chips."""
    versions = {"jax": "0.10.2"}

    def version(name):
        if name not in versions:
            raise preflight.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    requires = ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(preflight.importlib.metadata, "version", version)
    monkeypatch.setattr(preflight.importlib.metadata, "requires", lambda _: requires)
    monkeypatch.setattr(preflight, "check_holder", lambda chips: None)

    def setup(libtpu=None, chips=CHIPS):
        monkeypatch.setattr(preflight, "device_files", lambda: list(chips))
        if libtpu:
            versions["libtpu"] = libtpu

    return setup


@pytest.mark.parametrize("libtpu", ["0.0.17", "0.0.41.9", "0.0.2"])
def test_a_libtpu_older_than_jax_wants_is_named_with_the_command(machine, libtpu):
    machine(libtpu)
    with pytest.raises(UserError) as error:
        preflight.check({})
    assert f"libtpu {libtpu} is too old for jax 0.10.2" in str(error.value)
    assert "pip install 'libtpu==0.0.42.*'" in str(error.value)


@pytest.mark.parametrize("libtpu", ["0.0.42", "0.0.42.1", "0.0.52", "0.1"])
def test_a_libtpu_that_is_new_enough_passes(machine, libtpu):
    machine(libtpu)
    preflight.check({})


def test_chips_without_libtpu_are_named(machine):
    machine()
    with pytest.raises(UserError, match=r"no libtpu: pip install 'libtpu==0\.0\.42"):
        preflight.check({})
    preflight.check({"JAX_PLATFORMS": "cpu"})
    preflight.check({"TPU_LIBRARY_PATH": "/own/libtpu.so"})


@pytest.mark.parametrize(
    "environment",
    [{"JAX_PLATFORMS": "tpu,cpu"}, {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, {"TPU_NAME": "x"}],
)
def test_a_tpu_session_without_a_tpu_says_so(machine, environment):
    machine("0.0.42.1", chips=[])
    with pytest.raises(UserError, match=f"{next(iter(environment))}=.* this host has no chip"):
        preflight.check(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_PLATFORMS": "cpu", "TPU_NAME": "x"},
        {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    ],
)
def test_a_host_that_never_meant_a_tpu_passes(machine, environment):
    machine("0.0.17", chips=[])
    preflight.check(environment)


def a_process(folder, pid, *files, command=b"python\0-m\0ipykernel\0"):
    descriptors = folder / str(pid) / "fd"
    descriptors.mkdir(parents=True)
    for number, file in enumerate(files):
        (descriptors / str(number)).symlink_to(file)
    (folder / str(pid) / "cmdline").write_bytes(command)


def test_the_process_that_holds_a_chip_is_named(tmp_path):
    a_process(tmp_path, 11, "/dev/null")
    a_process(tmp_path, os.getpid(), "/dev/accel0")  # ourselves
    preflight.check_holder(CHIPS, tmp_path)
    a_process(tmp_path, 4242, "/dev/null", "/dev/accel1")
    with pytest.raises(UserError, match=r"process 4242 \(python -m ipykernel\).*kill 4242"):
        preflight.check_holder(CHIPS, tmp_path)


def test_a_command_that_is_not_utf8_is_named_all_the_same(tmp_path):
    a_process(tmp_path, 11, "/dev/null", command=b"python\0caf\xe9.py\0")
    preflight.check_holder(CHIPS, tmp_path)
    a_process(tmp_path, 4242, "/dev/accel1", command=b"python\0caf\xe9.py\0")
    with pytest.raises(UserError, match=r"process 4242 \(python caf\ufffd.py\)"):
        preflight.check_holder(CHIPS, tmp_path)


@pytest.mark.parametrize(("vendor", "found"), [("0x1ae0", ["dev/vfio/3"]), ("0x10de", [])])
def test_a_device_passed_through_is_a_chip_only_beside_one_of_googles(tmp_path, vendor, found):
    for name, text in (
        ("dev/vfio/3", ""),
        ("dev/vfio/vfio", ""),
        ("sys/bus/pci/devices/0000:00:04.0/vendor", "0x8086\n"),
        ("sys/bus/pci/devices/0000:00:05.0/vendor", f"{vendor}\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert preflight.device_files(tmp_path) == [str(tmp_path / name) for name in found]


def test_a_process_of_which_nothing_can_be_read_is_passed_over(tmp_path):
    (tmp_path / "77").mkdir()
    preflight.check_holder(CHIPS, tmp_path)


def test_jax_on_the_cpu_beside_a_tpu_is_refused_unless_that_was_asked(machine):
    machine("0.0.42.1")
    with pytest.raises(UserError, match="uses the CPU"):
        preflight.check_backend("cpu", {})
    preflight.check_backend("cpu", {"JAX_PLATFORMS": "cpu"})
    preflight.check_backend("tpu", {})
    machine("0.0.42.1", chips=[])
    preflight.check_backend("cpu", {})


@pytest.mark.parametrize(
    "message, named",
    [
        (
            "Pallas TPU requires a libtpu version that's at most a month old. Found version "
            "string:\nPJRT C API\nTFRT TPU v5 lite",
            "pip install 'libtpu==0.0.42.*'",
        ),
        (
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process "
            "with pid 311. Not attempting to load libtpu.so in this process.",
            "kill 311",
        ),
        (
            "The TPU is already in use by another process probably owned by another user.",
            "in use by process unknown",
        ),
    ],
)
def test_errors_of_libtpu_become_one_line_with_the_fix(machine, capsys, message, named):
    machine("0.0.17")

    def fails():
        raise RuntimeError(message)

    assert cli.guarded(fails) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


def test_other_errors_of_jax_keep_their_traceback():
    def fails():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        cli.guarded(fails)
