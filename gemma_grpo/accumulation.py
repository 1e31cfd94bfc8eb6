"""Gradients of one batch taken in several passes. Knows no loss, model or optimizer.

The loss is a sum over rows whose weights were computed from the whole batch, so that k passes add
up to the same gradient as one: there is no mean of means.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]


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
    loss_fn: LossFn, params: Any, batch: Batch, *, num_prompts: int, passes: int
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients and metric sums of `loss_fn(params, batch)`, in `passes` passes one after another.

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
