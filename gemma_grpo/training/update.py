"""Losses and updates on the mesh: every device its rows, weights in pieces between uses. Knows no
loss, batch or stage.

All of it is a `shard_map`, so that each collective is one that stands here: the embedding is
gathered once a pass, the blocks layer by layer as the scans come to them, in the dtype computed in;
the gradient of each gather is a reduce-scatter, which leaves the piece's own gradient, summed over
all rows. What is whole on every device has its gradient summed by one all-reduce.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.model import Gather, Params, in_dtype, join
from gemma_grpo.training.state import TrainState, apply_gradients

BATCH, REPLICATED = PartitionSpec(meshes.DATA), PartitionSpec()
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class GatheredParams(NamedTuple):
    """Parameters to compute with on one device: everything but the blocks whole, and what makes a
    layer of those whole (`model.forward_groups`' argument)."""

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
    *,
    accumulation_steps: int,
    dtype: str,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The jitted (state, frozen, batch) -> (state, metrics), which donates the state.

    The state comes and goes in `mesh.fsdp_shardings`'s layout, the batch comes split by rows.

    Args:
        loss_fn: (gathered, rows) -> (loss, sums), both of which add over rows.
        means: from the sums over the whole batch to metrics.
        accumulation_steps: passes that a batch's prompts are taken in.
        dtype: computed in.

    The metrics also hold `grad_norm`, before clipping.
    """

    def update(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        layout = meshes.fsdp_specs(mesh, state.params)

        def on_device(params, frozen, rows):
            grads, sums = accumulate(
                lambda params, rows: loss_fn(_gather_params(params, frozen, layout, dtype), rows),
                params,
                rows,
                num_prompts=rows["prompt_ids"].shape[0],
                passes=accumulation_steps,
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
    """From this device's pieces; `layout` has the trained parameters' `PartitionSpec`s."""
    pieces = in_dtype(params, dtype)
    others = {name: value for name, value in pieces.items() if name != "layers"}
    others = jax.tree.map(_gathered, others, {name: layout[name] for name in others})
    # In: one layer of the stack, its leading axis gone.
    layer_axes = {
        path: tuple(spec).index(meshes.DATA) - 1
        for path, spec in jax.tree.leaves_with_path(layout.get("layers", {}))
        if spec != REPLICATED
    }

    def gather(layer):
        def whole(path, leaf):
            # An nnx.State's paths end in one more key, of the variable's value.
            path = tuple(key for key in path if isinstance(key, jax.tree_util.DictKey))
            return _all_gather(leaf, layer_axes[path]) if path in layer_axes else leaf

        return jax.tree.map_with_path(whole, layer)

    return GatheredParams(join(pieces | others, frozen), gather)


def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return leaf if spec == REPLICATED else _all_gather(leaf, tuple(spec).index(meshes.DATA))


def _all_gather(leaf: jax.Array, axis: int) -> jax.Array:
    return jax.lax.all_gather(leaf, meshes.DATA, axis=axis, tiled=True)


def split_batch(batch: Batch, *, num_prompts: int, passes: int) -> Batch:
    """Arrays of `rows` leading rows to [passes, rows / passes], whole groups staying together.

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
