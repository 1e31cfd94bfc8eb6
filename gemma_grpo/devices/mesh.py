"""The device mesh, how arrays lie on it, and their way between host and devices. Knows no model,
config or training.

One axis, "data". Rows of a batch are split over it. What training keeps (float32 master weights,
Adam's moments, a KL reference) is spread over it, each large array along one of its own axes: FSDP,
or ZeRO stage 3, Rajbhandari et al., arXiv 1910.02054. What only computes (the rollout's weights, a
frozen base) is whole on every device, so that the decode loop needs no collective, or lies as
`model/layout.py` has it.

The devices may be those of many processes. Each then holds the pieces, and the rows, of its own.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from gemma_grpo.errors import UserError

DATA = "data"
FSDP_FROM = 1 << 20  # elements; smaller arrays are whole, as gathering them saves no memory


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or the given ones, along the data axis; those of a process stand together, so
    that its rows of a batch follow one another."""
    given = jax.devices() if devices is None else devices
    ordered = sorted(given, key=lambda device: device.process_index)
    # Not jax.make_mesh: its axes are Explicit by default, and shard_map then refuses other layouts.
    return Mesh(np.array(ordered), (DATA,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def fsdp_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """The layout of what training keeps: a tree of shardings for `tree` (arrays or shapes).

    An array is split along its longest axis that divides evenly, the first of several, and never
    along the axis of layers that blocks' matrices are stacked by: layers are used one at a time.
    Arrays of fewer than `FSDP_FROM` elements, and those with no such axis, are whole.
    """

    def layout(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        first = 1 if leaf.ndim > 2 else 0
        axes = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % mesh.size == 0]
        if leaf.size < FSDP_FROM or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, DATA))

    return jax.tree.map(layout, tree)


def fsdp_specs(mesh: Mesh, tree: PyTree) -> PyTree:
    """`fsdp_shardings` as `PartitionSpec`s, which `shard_map` wants."""
    return jax.tree.map(lambda place: place.spec, fsdp_shardings(mesh, tree))


def named_shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Shardings from `PartitionSpec`s."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def with_shardings(shapes: PyTree, layout: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct`s that also say where each array lies."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        layout,
    )


def sharding_of(leaf: jax.Array | jax.ShapeDtypeStruct) -> Sharding | None:
    """Where a counterpart of `leaf` shall live; None is the default device, as for a fresh array.

    An uncommitted array must stay so: jit may compile another program for a committed one, and
    refuses to mix it with arrays on several devices.
    """
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None


def place(array: np.ndarray, sharding: Sharding | None, *, may_alias: bool = False) -> jax.Array:
    """A host array on the devices; None is the default one.

    Where other processes hold some of them, all give the same array and each places its own pieces.

    Args:
        may_alias: the host's copy will not change, and may be used as it lies.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding, may_alias=may_alias or None)
    # jax.device_put would first compare the array among all processes.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def reshard(tree: PyTree, shardings: PyTree, dtype: str) -> PyTree:
    """The arrays in `dtype` and in the given shardings of the same devices.

    They move by a compiled program, between the devices: `jax.device_put` between two shardings of
    one process's devices goes through the host. Arrays that are so already are not copied.
    """
    leaves, structure = jax.tree.flatten(tree)
    wanted = structure.flatten_up_to(shardings)
    is_so = lambda leaf, sharding: (
        leaf.dtype == dtype and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    )
    moving = [n for n in range(len(leaves)) if not is_so(leaves[n], wanted[n])]
    moved = _resharded(
        [leaves[n] for n in moving], dtype=dtype, shardings=tuple(wanted[n] for n in moving)
    )
    for n, leaf in zip(moving, moved, strict=True):
        leaves[n] = leaf
    return structure.unflatten(leaves)


@partial(jax.jit, static_argnames=("dtype", "shardings"))
def _resharded(leaves: list[jax.Array], *, dtype: str, shardings: tuple) -> list[jax.Array]:
    # Cast first: in bfloat16 half the bytes cross between the devices.
    cast = [leaf.astype(dtype) for leaf in leaves]
    return jax.lax.with_sharding_constraint(cast, list(shardings))


def place_rows(mesh: Mesh, batch: PyTree) -> PyTree:
    """A host batch on the devices, split by rows."""
    return jax.tree.map(lambda leaf: place(leaf, batch_sharding(mesh)), batch)


def own_slice(mesh: Mesh, num_rows: int) -> slice:
    """Which of a batch's rows lie on this process's devices."""
    on_each = num_rows // mesh.size
    is_own = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    first = is_own.index(True)
    return slice(first * on_each, (first + sum(is_own)) * on_each)


def place_own_rows(mesh: Mesh, batch: PyTree) -> PyTree:
    """A batch split by rows, of which every process gives its own (`own_slice`)."""
    make = jax.make_array_from_process_local_data
    return jax.tree.map(lambda leaf: make(batch_sharding(mesh), leaf), batch)


def own_rows(batch: PyTree) -> PyTree:
    """This process's rows of a batch on the devices, on the host."""

    def own(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable:
            return jax.device_get(leaf)
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    for leaf in jax.tree.leaves(batch):
        leaf.copy_to_host_async()  # all at once, rather than one when the one before has come
    return jax.tree.map(own, batch)


def to_host(tree: PyTree) -> PyTree:
    """Arrays of the devices (or of the host already), whole, on the host of every process."""
    from jax.experimental import multihost_utils

    def fetch(leaf: jax.Array | np.ndarray) -> np.ndarray:
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def check_divisible(mesh: Mesh, *, name: str, size: int) -> None:
    """Raises UserError if `size` rows do not split evenly over the mesh."""
    if size % mesh.size:
        raise UserError(
            f"{name}={size} does not split over {mesh.size} devices; use a multiple of {mesh.size}"
        )
