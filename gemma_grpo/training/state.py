"""What training carries from step to step, and the optimizer that updates it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.model import Params
from gemma_grpo.training.config import OptimizerConfig


class TrainState(NamedTuple):
    """Master weights, optimizer moments, and the number of optimizer updates so far.

    Attributes:
        params: float32, whatever the compute dtype: in bfloat16 an update of 1e-6 is rounded away.
        opt_state: optax's, float32 moments.
        num_updates: optimizer updates made.
    """

    params: Params
    opt_state: optax.OptState
    num_updates: Int[Array, ""]


def make_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Learning rate as a function of the update, for a run of `num_updates`."""
    warmup = round(config.warmup * num_updates)
    rest = max(num_updates - warmup - 1, 1)  # from the first update after the warm-up to the last
    peak, final = config.learning_rate, config.learning_rate * config.final_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_rate),
    }[config.decay]
    # The first update already moves: it gets 1/warmup of the peak rather than 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def learning_rates(config: OptimizerConfig, num_updates: int) -> Float[np.ndarray, "num_updates"]:
    """The learning rate of each update of a run, float32 on the host: for its metrics."""
    schedule = make_schedule(config, num_updates)
    return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(num_updates)), np.float32)


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """The optax chain for a run of `num_updates`."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.chain(  # `optax.adamw`, and its state's structure, but no decay of the norms
            optax.scale_by_adam(b1=config.b1, b2=config.b2),
            optax.stateless(partial(_decay, weight_decay=config.weight_decay)),
            optax.scale_by_learning_rate(make_schedule(config, num_updates)),
        ),
    )


def _decay(updates: Params, params: Params, *, weight_decay: float) -> Params:
    """The updates with the decay of each parameter, except for the norms' gains (`scale`)."""

    def decayed(path, update, param):
        is_gain = jax.tree_util.DictKey("scale") in path
        return update if is_gain else update + weight_decay * param

    return jax.tree.map_with_path(decayed, updates, params)


def fresh_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at update 0 with float32 master weights, a copy that updates may donate."""
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def init_train_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """`fresh_state`, created sharded (`mesh.fsdp_shardings`): no device ever holds all of it."""
    return make_init(params, optimizer, mesh)(params)


def make_init(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[Params], TrainState]:
    """The jitted program of `init_train_state`; only the shapes of `params` are used."""
    make = partial(fresh_state, optimizer=optimizer)
    layout = meshes.fsdp_shardings(mesh, jax.eval_shape(make, params))
    return jax.jit(make, out_shardings=layout)


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state after one optimizer update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.num_updates + 1)
