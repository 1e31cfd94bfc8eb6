"""Chooses an op's implementation: the one named, or the best for the target chip."""

from collections.abc import Callable
from typing import Any

import jax

from gemma_grpo.errors import UserError

# MiB of VMEM per core, by jax.Device.device_kind. Source: `vmem_capacity_bytes` in jax's
# jax/_src/pallas/mosaic/tpu_info.py.
_VMEM = {"TPU v4": 16, "TPU v5": 64, "TPU v5p": 64, "TPU v5 lite": 128, "TPU v6 lite": 128}
_VMEM["TPU7x"] = 64
_DEFAULT_VMEM = 128  # a v5e's


def vmem_bytes() -> int:
    """Bytes of VMEM of the target chip: that of the mesh inside a `shard_map`, else the first
    device; of a v5e if that is no known TPU."""
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if mesh_device is None else mesh_device.device_kind
    return _VMEM.get(kind, _DEFAULT_VMEM) * 2**20


def dispatch(
    implementation: str | None,
    *operands: Any,
    pallas: Callable[..., Any],
    xla: Callable[..., Any],
    obstacle: str | None,
) -> Any:
    """`pallas(*operands)` or `xla(*operands)`.

    None takes the kernel if the program is compiled for a TPU and there is no obstacle.

    Args:
        operands: arrays, or trees of them.
        obstacle: why the kernel cannot run even on a TPU; None if it can.

    Raises:
        UserError: the name is unknown, or the named kernel cannot run here.
    """
    if implementation not in (None, "xla", "pallas"):
        raise UserError(f'implementation="{implementation}": must be None, "xla" or "pallas"')
    if implementation == "pallas":
        if jax.default_backend() != "tpu":
            raise UserError(
                f'implementation="pallas": needs a TPU, this is {jax.default_backend()}; '
                "None takes the kernel where the program is compiled for one"
            )
        if obstacle:
            raise UserError(f'implementation="pallas": {obstacle}; use None or "xla"')
        return pallas(*operands)
    if implementation == "xla" or obstacle:
        return xla(*operands)
    return jax.lax.platform_dependent(*operands, tpu=pallas, default=xla)
