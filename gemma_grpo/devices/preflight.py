"""Whether a TPU can be used here, found out before it is touched, and the command that fixes it.

Does not import jax.
"""

import importlib.metadata
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gemma_grpo.errors import UserError

_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
_ON_CPU = "JAX_PLATFORMS=cpu in the environment goes on without it"
_RESTART = "then start the process again (in a notebook: restart the kernel)"
LESS_MEMORY = (
    "lower grpo.pack_tokens and sft.pack_tokens, grpo.prompts_per_step, sft.batch_size, "
    "evaluation.batch_size or the lengths, set model.remat to full, or train adapters with "
    "model.lora.rank"
)
_TPU_VARIABLES = (  # a TPU host's; planning.topology sets some too, and ALLOW_MULTIPLE_LIBTPU_LOAD
    "TPU_NAME",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_ID",
    "TPU_CHIPS_PER_HOST_BOUNDS",
    "TPU_PROCESS_ADDRESSES",
    "COLAB_TPU_ADDR",
)


def check(environment: Mapping[str, str] | None = None) -> None:
    """Raises UserError for a TPU that is not there, is held by another process, or whose library
    is missing or too old for this jax. Says nothing where JAX_PLATFORMS leaves TPUs out.

    Args:
        environment: variables; None takes the process's own.
    """
    environment = os.environ if environment is None else environment
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return
    chips = device_files()
    if not chips:
        _check_no_tpu_was_promised(environment, platforms)
        return
    if "TPU_LIBRARY_PATH" not in environment:
        check_library(_version("libtpu"), _wanted_libtpu())
    if not any(name in environment for name in ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")):
        check_holder(chips)


def device_files(root: Path = Path("/")) -> list[str]:
    """Of this host's TPU chips. Files of VFIO are of whatever device is passed through, a TPU only
    where Google has made one."""
    patterns = ["dev/accel[0-9]*"]
    if any(map(_is_googles, root.glob("sys/bus/pci/devices/*/vendor"))):
        patterns.append("dev/vfio/[0-9]*")
    return sorted(str(path) for pattern in patterns for path in root.glob(pattern))


def _is_googles(vendor: Path) -> bool:
    try:
        return vendor.read_text(encoding="utf-8").strip() == _GOOGLE
    except OSError:  # a device that is gone, or may not be looked at
        return False


def check_library(installed: str | None, wanted: str | None) -> None:
    """Raises UserError if libtpu is missing, or older than jax wants.

    Args:
        installed: version of libtpu, None if it is not installed.
        wanted: the requirement of the installed jax, such as "libtpu==0.0.42.*"; None if unknown.
    """
    jax_version = _version("jax")
    fix = f"pip install '{wanted or f'jax[tpu]=={jax_version}'}', {_RESTART}"
    if installed is None:
        raise UserError(f"this host has a TPU but no libtpu: {fix}; {_ON_CPU}")
    if wanted and _numbers(installed) < _numbers(wanted):
        raise UserError(
            f"libtpu {installed} is too old for jax {jax_version}, which wants {wanted}: {fix}"
        )


def check_holder(chips: Iterable[str], processes: Path = Path("/proc")) -> None:
    """Raises UserError if another process has one of the chips' device files open; names it.

    Processes of other users cannot be seen.
    """
    chips = set(chips)
    for folder in processes.glob("[0-9]*"):
        if folder.name == str(os.getpid()):
            continue
        try:
            held = {os.readlink(file) for file in (folder / "fd").iterdir()}
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:  # another user's, or it has just ended
            continue
        if chips & held:
            raise UserError(in_use_by(folder.name, command.decode(errors="replace").strip()))


def check_backend(backend: str, environment: Mapping[str, str] | None = None) -> None:
    """Raises UserError if JAX, now initialised, fell back to another backend beside a TPU."""
    environment = os.environ if environment is None else environment
    if backend == "cpu" and device_files() and not environment.get("JAX_PLATFORMS"):
        raise UserError(
            "this host has a TPU, but JAX could not open it and uses the CPU: wait half a minute "
            "(chips stay claimed after a kill), and see why with JAX_PLATFORMS=tpu python -c "
            f"'import jax; jax.devices()'; {_ON_CPU}"
        )


def explain(message: str) -> str | None:
    """One line with the fix for an error of JAX or libtpu; None if it is none of these."""
    if "Pallas TPU requires a libtpu version" in message:
        fix = _wanted_libtpu() or f"jax[tpu]=={_version('jax')}"
        return (
            f"libtpu {_version('libtpu')} is too old for jax {_version('jax')}: "
            f"pip install '{fix}', {_RESTART}"
        )
    if "RESOURCE_EXHAUSTED" in message or "Out of memory" in message:
        wanted = re.search(r"[Aa]llocat\w* (\d[\d,.]* ?\w*)", message)
        tried = f" (it tried to allocate {wanted[1].rstrip('.')})" if wanted else ""
        return f"out of memory on the device{tried}; {LESS_MEMORY}"
    if match := re.search(r"TPU is already in use by process with pid (\d+)", message):
        return in_use_by(match[1])
    if "TPU is already in use" in message:
        return in_use_by("unknown, perhaps another user's")
    return None


def in_use_by(pid: str, command: str = "") -> str:
    """The message for a TPU that another process holds."""
    shown = f" ({command[:80]})" if command else ""
    return (
        f"the TPU is in use by process {pid}{shown}: end it with kill {pid}, or, if it is the "
        "notebook's kernel, restart that, or call gemma_grpo.train.main([...]) within it"
    )


def _check_no_tpu_was_promised(environment: Mapping[str, str], platforms: str) -> None:
    names = [name for name in _TPU_VARIABLES if environment.get(name)]
    if "ALLOW_MULTIPLE_LIBTPU_LOAD" in environment:  # this process compiled for a TPU, no more
        names = []
    if "tpu" in platforms:
        names.insert(0, "JAX_PLATFORMS")
    if names:
        raise UserError(
            f"{names[0]}={environment[names[0]]} says TPU, but this host has no chip (/dev/accel*, "
            "/dev/vfio/*): stop the session and start one with the accelerator TPU v5e-8; "
            f"{_ON_CPU}"
        )


def _wanted_libtpu() -> str | None:
    """What the installed jax requires of libtpu in its extra "tpu", such as "libtpu==0.0.42.*"."""
    try:
        requirements = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"libtpu[^;]*", line) for line in requirements)
    return next((match[0].strip().replace(" ", "") for match in found if match), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> list[int]:
    """The first three numbers of a version, or of a requirement's."""
    return [int(number) for number in re.findall(r"\d+", text)[:3]]
