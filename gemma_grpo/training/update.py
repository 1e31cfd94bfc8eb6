"""Losses and updates on the mesh: rows split over the devices, weights sharded (FSDP).

All of it runs in a `shard_map`, so that every collective is explicit. The embedding is gathered
once a pass, the blocks layer by layer as the scan reaches them, in the compute dtype. The gradient
of each gather is a reduce-scatter: each device gets the gradient of its shard, summed over all
rows. The gradients of replicated parameters are summed by one all-reduce.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.model import Gather, Params, Remat, in_dtype, join
from gemma_grpo.training.state import TrainState, apply_gradients

BATCH, REPLICATED = PartitionSpec(meshes.DATA), PartitionSpec()
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class UpdateConfig:
    """How losses and log-probs are computed, not what they are.

    Attributes:
        dtype: of the parameters while computing; master weights are float32.
        remat: see `model.forward_groups`.
        num_rows: B, if GRPO's update is to return the log-probs of the whole batch; else 0.
    """

    dtype: str
    remat: Remat
    num_rows: int = 0


class GatheredParams(NamedTuple):
    """Parameters to compute with on one device: all but the blocks gathered, and the function that
    gathers a layer of the blocks (`model.forward_groups`' argument)."""

    params: Params
    gather: Gather


LossFn = Callable[[GatheredParams, Batch], tuple[jax.Array, Metrics]]
Packs = tuple[Batch, ...]  # for each pack shape, its packs stacked along the rows: `packing.pack`


def make_score(
    values: Callable[[GatheredParams, Batch], jax.Array], mesh: Mesh, *, dtype: str
) -> Callable[[Params, Params, Packs], tuple[jax.Array, ...]]:
    """The jitted (params, frozen, packs) -> `values(gathered, pack)` of all packs, one array per
    pack shape with a row for each completion row; 0 in unused packs."""

    def score(params: Params, frozen: Params, packs: Packs) -> tuple[jax.Array, ...]:
        layout = meshes.fsdp_specs(mesh, params)

        def on_device(params, frozen, packs):
            def pack_values(pack: Batch) -> jax.Array:
                return values(_gather_params(params, frozen, layout, dtype), pack)

            return tuple(_map_packs(pack_values, batch) for batch in packs)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(layout, REPLICATED, BATCH),
            out_specs=BATCH,
            check_vma=False,
        )(params, frozen, packs)

    return jax.jit(score)


def make_update(
    loss_fn: LossFn,
    means: Callable[[Metrics], Metrics],
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    config: UpdateConfig,
) -> Callable[[TrainState, Params, Packs], tuple[TrainState, Metrics]]:
    """The jitted (state, frozen, packs) -> (state, metrics), which donates the state.

    The state is sharded by `mesh.fsdp_shardings` before and after, the packs by rows. A device's
    packs are computed one after another and their gradients summed: neither the memory nor the
    program depends on how many there are.

    Args:
        loss_fn: (gathered, pack) -> (loss, sums), both of which add over rows. The loss is a sum
            with weights from the whole batch, so the packs' gradients add up to that of the batch:
            there is no mean of means.
        means: from the sums over the whole batch to metrics.

    The metrics also hold `grad_norm`, before clipping.
    """

    def update(state: TrainState, frozen: Params, packs: Packs) -> tuple[TrainState, Metrics]:
        layout = meshes.fsdp_specs(mesh, state.params)

        def on_device(params, frozen, packs):
            def pack_loss(params: Params, pack: Batch) -> tuple[jax.Array, Metrics]:
                return loss_fn(_gather_params(params, frozen, layout, config.dtype), pack)

            def reduced(spec: PartitionSpec, grad: jax.Array) -> jax.Array:
                """The sum over devices; a sharded gradient was reduce-scattered already."""
                return jax.lax.psum(grad, meshes.DATA) if spec == REPLICATED else grad

            def pack_grads(pack: Batch) -> tuple[Params, Metrics]:
                has_shards, is_cast = mesh.size > 1, config.dtype != "float32"
                used = _changing(params, pack) if has_shards and is_cast else params
                return jax.grad(pack_loss, has_aux=True)(used, pack)

            grads, sums = _sum_over_packs(pack_grads, packs)
            return jax.tree.map(reduced, layout, grads), jax.lax.psum(sums, meshes.DATA)

        grads, sums = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(layout, REPLICATED, BATCH),
            out_specs=(layout, REPLICATED),
            check_vma=False,
        )(state.params, frozen, packs)
        metrics = means(sums) | {"grad_norm": optax.tree.norm(grads)}
        state = apply_gradients(state, grads, optimizer)
        state = jax.lax.with_sharding_constraint(state, meshes.fsdp_shardings(mesh, state))
        return state, jax.lax.with_sharding_constraint(metrics, meshes.replicated(mesh))

    options = meshes.training_options(mesh.devices.flat[0].platform)
    return jax.jit(update, donate_argnums=0, compiler_options=options)


def _changing(params: Params, pack: Batch) -> Params:
    """The same values, but XLA cannot see that the embedding's are the same for every pack: else it
    casts this device's shard once, before the loop, and keeps it beside the gathered one."""
    if "embedding" not in params or "slots" not in pack:
        return params
    one = jnp.where(pack["slots"].reshape(-1)[0] < 0, 0.0, 1.0)  # no slot is negative
    return params | {"embedding": params["embedding"] * one}


def _gather_params(params: Params, frozen: Params, layout: Any, dtype: str) -> GatheredParams:
    """What to compute with, from this device's shards of the trained parameters, laid out by the
    `PartitionSpec`s of `layout`, and the replicated frozen ones."""
    shards = in_dtype(params, dtype)
    others = {name: value for name, value in shards.items() if name != "layers"}
    others = jax.tree.map(_gathered, others, {name: layout[name] for name in others})
    layer_axes = {  # less 1: a scanned layer lacks the leading axis of the stack
        path: tuple(spec).index(meshes.DATA) - 1
        for path, spec in jax.tree.leaves_with_path(layout.get("layers", {}))
        if spec != REPLICATED
    }

    def gather(layer):
        def gather_leaf(path, leaf):
            # An nnx.State's paths end in one more key, of the variable's value.
            path = tuple(key for key in path if isinstance(key, jax.tree_util.DictKey))
            return _all_gather(leaf, layer_axes[path]) if path in layer_axes else leaf

        return jax.tree.map_with_path(gather_leaf, layer)

    return GatheredParams(join(shards | others, frozen), gather)


def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return leaf if spec == REPLICATED else _all_gather(leaf, tuple(spec).index(meshes.DATA))


def _all_gather(leaf: jax.Array, axis: int) -> jax.Array:
    return jax.lax.all_gather(leaf, meshes.DATA, axis=axis, tiled=True)


def _sum_over_packs(fn: Callable[[Batch], Any], packs: Packs) -> Any:
    """The sum of `fn(pack)` over a device's packs of all shapes."""
    fn, total = jax.jit(fn), None  # jitted: traced once per shape
    for batch in packs:
        if "count" not in batch:
            return fn(batch)  # the only pack
        count, stacked = _stack_packs(batch)
        # Without the barrier XLA moves the reduce-scatter of the embedding's gradient behind the
        # loop: each device would hold the whole sum over packs, not a shard.
        add = lambda k, total, stacked=stacked: jax.tree.map(
            jnp.add, total, jax.lax.optimization_barrier(fn(_take_pack(stacked, k)))
        )
        if total is None:
            shapes = jax.eval_shape(fn, _take_pack(stacked, 0))
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total = jax.lax.fori_loop(0, count, add, total)
    return total


def _map_packs(fn: Callable[[Batch], jax.Array], batch: Batch) -> jax.Array:
    """`fn(pack)` of a device's packs of one shape, concatenated along the rows."""
    if "count" not in batch:
        return fn(batch)
    count, stacked = _stack_packs(batch)
    fn = jax.jit(fn)  # traced once
    out = jax.eval_shape(fn, _take_pack(stacked, 0))
    most = jax.tree.leaves(stacked)[0].shape[0]
    zeros = jnp.zeros((most, *out.shape), out.dtype)
    write = lambda k, values: values.at[k].set(fn(_take_pack(stacked, k)))
    values = jax.lax.fori_loop(0, count, write, zeros)
    return values.reshape(-1, *out.shape[1:])


def _stack_packs(batch: Batch) -> tuple[jax.Array, Batch]:
    """How many packs are used, and the arrays with a leading axis of packs."""
    arrays = {name: x for name, x in batch.items() if name != "count"}
    most = len(arrays["slots"])
    split = lambda x: x.reshape(most, -1, *x.shape[1:])
    return batch["count"][0], jax.tree.map(split, arrays)


def _take_pack(stacked: Batch, k: jax.Array | int) -> Batch:
    return jax.tree.map(lambda x: x[k], stacked)
