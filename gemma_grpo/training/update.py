"""Losses and updates on the mesh: rows split over the devices, weights sharded (FSDP).

All of it runs in a `shard_map`, so that every collective is explicit: the embedding is gathered
once a pass, the blocks layer by layer as the scans reach them, in the compute dtype; the gradient
of each gather is a reduce-scatter, which leaves each shard's gradient, summed over all rows. The
gradients of replicated parameters are summed by one all-reduce.
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
    """How losses and log-probs are computed; none of it changes what they are.

    Attributes:
        dtype: of the parameters while computing; master weights are float32.
        remat: see `model.forward_groups`.
        accumulation_steps: passes that a batch's prompts are taken in.
    """

    dtype: str
    remat: Remat
    accumulation_steps: int = 1


class GatheredParams(NamedTuple):
    """Parameters to compute with on one device: all but the blocks gathered, and the function that
    gathers a layer of the blocks (`model.forward_groups`' argument)."""

    params: Params
    gather: Gather


LossFn = Callable[[GatheredParams, Batch], tuple[jax.Array, Metrics]]


def make_score(
    values: Callable[[GatheredParams, Batch], jax.Array], mesh: Mesh, *, dtype: str
) -> Callable[[Params, Params, Batch], jax.Array]:
    """The jitted (params, frozen, batch) -> values(gathered, rows) of every device's rows."""

    def score(params: Params, frozen: Params, batch: Batch) -> jax.Array:
        layout = meshes.fsdp_specs(mesh, params)

        def on_device(params, frozen, rows):
            return values(_gather_params(params, frozen, layout, dtype), rows)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(layout, REPLICATED, BATCH),
            out_specs=BATCH,
            check_vma=False,
        )(params, frozen, batch)

    return jax.jit(score)


def make_update(
    loss_fn: LossFn,
    means: Callable[[Metrics], Metrics],
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    config: UpdateConfig,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The jitted (state, frozen, batch) -> (state, metrics), which donates the state.

    The state is sharded by `mesh.fsdp_shardings` before and after, the batch by rows.

    Args:
        loss_fn: (gathered, rows) -> (loss, sums), both of which add over rows.
        means: from the sums over the whole batch to metrics.

    The metrics also hold `grad_norm`, before clipping.
    """

    def update(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        layout = meshes.fsdp_specs(mesh, state.params)

        def on_device(params, frozen, rows):
            grads, sums = accumulate(
                lambda params, rows: loss_fn(
                    _gather_params(params, frozen, layout, config.dtype), rows
                ),
                params,
                rows,
                num_prompts=rows["prompt_ids"].shape[0],
                passes=config.accumulation_steps,
            )
            in_all = lambda spec, grad: (
                jax.lax.psum(grad, meshes.DATA) if spec == REPLICATED else grad
            )
            return jax.tree.map(in_all, layout, grads), jax.lax.psum(sums, meshes.DATA)

        grads, sums = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(layout, REPLICATED, BATCH),
            out_specs=(layout, REPLICATED),
            check_vma=False,
        )(state.params, frozen, batch)
        metrics = means(sums) | {"grad_norm": optax.tree.norm(grads)}
        state = apply_gradients(state, grads, optimizer)
        state = jax.lax.with_sharding_constraint(state, meshes.fsdp_shardings(mesh, state))
        return state, jax.lax.with_sharding_constraint(metrics, meshes.replicated(mesh))

    return jax.jit(update, donate_argnums=0)


def _gather_params(params: Params, frozen: Params, layout: Any, dtype: str) -> GatheredParams:
    """From this device's shards; `layout` has the trained parameters' `PartitionSpec`s."""
    shards = in_dtype(params, dtype)
    others = {name: value for name, value in shards.items() if name != "layers"}
    others = jax.tree.map(_gathered, others, {name: layout[name] for name in others})
    # In: one layer of the stack, its leading axis gone.
    layer_axes = {
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


def split_batch(batch: Batch, *, num_prompts: int, passes: int) -> Batch:
    """Arrays of `rows` leading rows to [passes, rows / passes]; groups are not split.

    Pass j takes the prompts p with p % passes == j rather than a run of neighbours, so that every
    device has work in every pass when prompts are split over devices.
    """

    def split(x: jax.Array) -> jax.Array:
        per_prompt = x.shape[0] // num_prompts
        x = x.reshape(num_prompts // passes, passes, per_prompt, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(passes, -1, *x.shape[3:])

    return jax.tree.map(split, batch)


def accumulate(
    loss_fn: Callable[[Any, Batch], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
    *,
    num_prompts: int,
    passes: int,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients and metric sums of `loss_fn(params, batch)`, in `passes` passes one after another.

    The loss is a sum over rows whose weights were computed from the whole batch, so that k passes
    add up to the same gradient as one: there is no mean of means.

    Args:
        loss_fn: returns (loss, sums), both of which add over rows.
        num_prompts: P, leading rows of the prompt arrays; other arrays have a multiple of it.
        passes: divides P.
    """
    if passes == 1:
        grads, sums = jax.grad(loss_fn, has_aux=True)(params, batch)
        return grads, sums
    micro_batches = split_batch(batch, num_prompts=num_prompts, passes=passes)

    def one_pass(total, micro_batch):
        part = jax.grad(loss_fn, has_aux=True)(params, micro_batch)
        return jax.tree.map(jnp.add, total, part), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(jax.grad(loss_fn, has_aux=True), params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(one_pass, zeros, micro_batches)
    return grads, sums
