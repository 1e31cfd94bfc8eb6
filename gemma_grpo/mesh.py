"""The device mesh and how arrays lie on it. Knows no model, config or training.

One axis, "data": rows of a batch are split over it, parameters are whole on every device.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_grpo.errors import UserError

DATA = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or the given ones, along the data axis."""
    # Not jax.make_mesh: its axes are Explicit by default, and shard_map then refuses other layouts.
    return Mesh(np.array(jax.devices() if devices is None else devices), (DATA,))


def rows(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(mesh: Mesh, *, name: str, size: int) -> None:
    """Raises UserError if `size` rows do not split evenly over the mesh."""
    if size % mesh.size:
        raise UserError(
            f"{name}={size} does not split over {mesh.size} devices; use a multiple of {mesh.size}"
        )
