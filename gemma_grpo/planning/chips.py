"""What TPU chips can do, by their published figures: memory, matmul FLOPs, HBM bandwidth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from gemma_grpo.errors import UserError

# Seconds. No latency is published and none was measured: this one is assumed for every chip.
LATENCY = 8e-6


@dataclass(frozen=True)
class Chip:
    """What one JAX device can do.

    Attributes:
        memory: bytes of HBM.
        flops: a second, in bfloat16.
        bandwidth: bytes a second from HBM.
        latency: seconds that a small collective with its neighbours takes.
    """

    memory: float
    flops: float
    bandwidth: float
    latency: float = LATENCY


# Whole chips, by the name that topologies begin with. Source: cloud.google.com/tpu/docs/ and v4,
# v5e, v5p, v6e or tpu7x.
CHIPS = {
    "v4": Chip(memory=32 * 2.0**30, flops=275e12, bandwidth=1200e9),
    "v5e": Chip(memory=16e9, flops=197e12, bandwidth=819e9),
    "v5p": Chip(memory=95e9, flops=459e12, bandwidth=2765e9),
    "v6e": Chip(memory=32e9, flops=918e12, bandwidth=1638e9),
    "tpu7x": Chip(memory=192 * 2.0**30, flops=2307e12, bandwidth=7380e9),
}
_NAMES = {  # jax.Device.device_kind
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(topology: str, devices: Sequence[jax.Device]) -> Chip:
    """One of a topology's devices. Raises UserError for a chip that is not in the table."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"topology {topology!r}: no figures of {kind}; use {', '.join(CHIPS)}")
    return _share(CHIPS[kind], devices)


def chip_here(devices: Sequence[jax.Device]) -> Chip | None:
    """One of the devices that are here, with the memory that its runtime gives to programs.

    A device that is not in the table has NaN for speeds, so that its times come out as NaN; None
    where its memory is not known either.
    """
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    name = _NAMES.get(devices[0].device_kind)
    if name is None:
        return Chip(float(memory), math.nan, math.nan, math.nan) if memory else None
    chip = _share(CHIPS[name], devices)
    return replace(chip, memory=float(memory)) if memory else chip


def _share(chip: Chip, devices: Sequence[jax.Device]) -> Chip:
    """A device's share of its chip: on some chips each core is a device of its own."""
    first = devices[0].coords
    sharing = sum(device.coords == first for device in devices)
    return replace(
        chip,
        memory=chip.memory / sharing,
        flops=chip.flops / sharing,
        bandwidth=chip.bandwidth / sharing,
    )
