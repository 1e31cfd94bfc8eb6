"""The device mesh, the shardings of arrays on it, and transfers between host and devices.

The mesh has one axis, "data". A batch is sharded over it by rows. What training keeps (float32
master weights, Adam's moments, a KL reference) is sharded over it too, each large array along one
of its own axes: FSDP, or ZeRO stage 3, Rajbhandari et al., arXiv 1910.02054. Weights that are only
read (the rollout's, a frozen base) are replicated, so that the decode loop needs no collective, or
sharded as `model/layout.py` says.

The devices may belong to many processes. Each process then holds the shards and the rows of its
own devices.
"""

from collections.abc import Sequence
from functools import cache, partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from gemma_grpo.errors import UserError

DATA = "data"
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
FSDP_FROM = 1 << 20  # elements; smaller arrays are replicated: sharding them saves little memory


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or the given ones, along the data axis, ordered by process: the rows of a batch
    that belong to one process are contiguous.

    Raises:
        UserError: other processes have some of all devices, and this one has not joined them.
    """
    if devices is None and jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is process {jax.process_index()} of {jax.process_count()}, not joined to the "
            "others: start train with --coordinator auto, other commands on a host of its own"
        )
    given = jax.devices() if devices is None else devices
    ordered = sorted(given, key=lambda device: device.process_index)
    # Not jax.make_mesh: its axes are Explicit by default, and shard_map then refuses other layouts.
    return Mesh(np.array(ordered), (DATA,))


def training_options(platform: str) -> dict[str, str] | None:
    """XLA's options for a program that trains on such devices, `jax.jit`'s `compiler_options`.

    On a CPU the many small sums of a backward pass are XLA's own: its library for them, YNNPACK,
    takes several times as long where rows are short. Its matmuls stay.
    """
    return _known_cpu_options() if platform == "cpu" else None


@cache
def _known_cpu_options() -> dict[str, str] | None:
    """`CPU_OPTIONS`, or None where this XLA does not know them."""
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return CPU_OPTIONS


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shards the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keeps a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def fsdp_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """A tree of FSDP shardings for `tree` (arrays or shapes), for what training keeps.

    An array is sharded along its longest axis that divides evenly, the first if several tie. The
    leading axis of stacked layers is never sharded, since layers are used one at a time. Arrays of
    fewer than `FSDP_FROM` elements, and those with no such axis, are replicated.
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
    """`fsdp_shardings` as `PartitionSpec`s, for `shard_map`."""
    return jax.tree.map(lambda place: place.spec, fsdp_shardings(mesh, tree))


def named_shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """A tree of `PartitionSpec`s as shardings on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def with_shardings(shapes: PyTree, layout: PyTree) -> PyTree:
    """The shapes as `jax.ShapeDtypeStruct`s with the shardings of `layout`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        layout,
    )


def sharding_of(leaf: jax.Array | jax.ShapeDtypeStruct) -> Sharding | None:
    """The sharding that an array made in place of `leaf` should have; None: the default device.

    An uncommitted array gives None: jit may compile another program for a committed one, and
    refuses to mix it with arrays on several devices.
    """
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None


def place(array: np.ndarray, sharding: Sharding | None, *, may_alias: bool = False) -> jax.Array:
    """Puts a host array on the devices; without a sharding, on the default device.

    If some of the devices belong to other processes, all processes pass the same array and each
    places its own shards.

    Args:
        may_alias: the host's copy will not change, so the device array may share its memory.
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
    if moving := to_move(tree, shardings, dtype):
        moved = resharded(
            [leaves[n] for n in moving], dtype=dtype, shardings=tuple(moving.values())
        )
        for n, leaf in zip(moving, moved, strict=True):
            leaves[n] = leaf
    return jax.tree.unflatten(structure, leaves)


def to_move(tree: PyTree, shardings: PyTree, dtype: str) -> dict[int, Sharding]:
    """Which leaves of `tree` (arrays or shapes), by their number, `reshard` moves, and whereto."""
    leaves, structure = jax.tree.flatten(tree)
    is_so = lambda leaf, sharding: (
        leaf.dtype == dtype and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    )
    pairs = enumerate(zip(leaves, structure.flatten_up_to(shardings), strict=True))
    return {n: sharding for n, (leaf, sharding) in pairs if not is_so(leaf, sharding)}


@partial(jax.jit, static_argnames=("dtype", "shardings"))
def resharded(leaves: list[jax.Array], *, dtype: str, shardings: tuple) -> list[jax.Array]:
    """The program of `reshard`: casts arrays, and moves each to its sharding."""
    # Cast first: in bfloat16 half the bytes cross between the devices.
    cast = [leaf.astype(dtype) for leaf in leaves]
    return jax.lax.with_sharding_constraint(cast, list(shardings))


def place_rows(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts a host batch on the devices, sharded by rows."""
    return jax.tree.map(lambda leaf: place(leaf, batch_sharding(mesh)), batch)


def own_slice(mesh: Mesh, num_rows: int) -> slice:
    """The rows of a batch that lie on this process's devices."""
    on_each = num_rows // mesh.size
    is_own = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    first = is_own.index(True)
    return slice(first * on_each, (first + sum(is_own)) * on_each)


def place_own_rows(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts a batch on the devices, sharded by rows; each process passes its own (`own_slice`)."""
    make = jax.make_array_from_process_local_data
    return jax.tree.map(lambda leaf: make(batch_sharding(mesh), leaf), batch)


def own_rows(batch: PyTree) -> PyTree:
    """Fetches this process's rows of a batch to the host."""

    def own(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable:
            return jax.device_get(leaf)
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    for leaf in jax.tree.leaves(batch):
        leaf.copy_to_host_async()  # all at once, not one after the other
    return jax.tree.map(own, batch)


def to_host(tree: PyTree) -> PyTree:
    """Fetches full arrays to the host of every process; host arrays pass unchanged."""
    from jax.experimental import multihost_utils

    def fetch(leaf: jax.Array | np.ndarray) -> np.ndarray:
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def check_divisible(mesh: Mesh, *, name: str, size: int) -> None:
    """Raises UserError if `size` rows cannot be sharded evenly over the mesh."""
    if size % mesh.size:
        raise UserError(
            f"{name}={size} does not split over {mesh.size} devices; use a multiple of {mesh.size}"
        )
