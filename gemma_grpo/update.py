"""One optimizer update, whatever the loss: weights to compute with, gradients, the move. Knows no
loss, batch or stage."""

from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh

from gemma_grpo import mesh as meshes
from gemma_grpo.accumulation import Batch, accumulate
from gemma_grpo.model import Params, join
from gemma_grpo.train_state import TrainState, apply_gradients, in_dtype

Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Params, Batch], tuple[jax.Array, Metrics]]


def computing(params: Params, frozen: Params, mesh: Mesh, dtype: str) -> Params:
    """All parameters in the dtype computed in, for a loss over rows that are split over the mesh.

    Of spread parameters, the embedding is gathered here, once for both of its uses; the blocks are
    gathered layer by layer, as the scan over them comes to each.
    """
    params = join(in_dtype(params, dtype), frozen)
    embedding = jax.lax.with_sharding_constraint(params["embedding"], meshes.whole(mesh))
    return params | {"embedding": embedding}


def make_update(
    loss_fn: LossFn,
    means: Callable[[Metrics], Metrics],
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    *,
    accumulation_steps: int,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The jitted (state, frozen, batch) -> (state, metrics), which donates the state.

    The state comes and goes in `mesh.spread`'s layout and the batch comes split by rows; gradients
    are summed straight into the state's layout.

    Args:
        loss_fn: (params, frozen, batch) -> (loss, sums), both of which add over rows.
        means: from the sums over the whole batch to metrics.
        accumulation_steps: passes that a batch's prompts are taken in.

    The metrics also hold `grad_norm`, before clipping.
    """

    def update(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        def placed_loss(params: Params, rows: Batch) -> tuple[jax.Array, Metrics]:
            return loss_fn(params, frozen, rows)

        grads, sums = accumulate(
            placed_loss,
            state.params,
            batch,
            num_prompts=batch["prompt_ids"].shape[0],
            passes=accumulation_steps,
        )
        grads = jax.lax.with_sharding_constraint(grads, meshes.spread(mesh, grads))
        metrics = means(sums) | {"grad_norm": optax.tree.norm(grads)}
        state = apply_gradients(state, grads, optimizer)
        state = jax.lax.with_sharding_constraint(state, meshes.spread(mesh, state))
        return state, jax.lax.with_sharding_constraint(metrics, meshes.whole(mesh))

    return jax.jit(update, donate_argnums=0)
