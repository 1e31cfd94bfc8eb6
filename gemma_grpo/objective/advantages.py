"""Group-relative advantages: rewards in, advantages out.

A group is the G completions of one prompt; `rewards_PG` has a group in each row. A completion is
compared with the mean of its group, so no value network is needed.

Departures from the papers:

1. The standard deviation has ddof=1, as in every large implementation; DeepSeekMath (2402.03300)
   does not say. At G=2 the choice is a factor of 1.41, at G=8 of 1.07.
2. The group's first reward is subtracted from all of its rewards before anything else. The float
   mean of G equal numbers need not be that number (three times 0.1 is not 0.3), and dividing the
   rounding error by a tiny std would make noise a signal. With the subtraction, equal rewards give
   exactly zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from gemma_grpo.errors import UserError
from gemma_grpo.objective.checks import check_advantages
from gemma_grpo.objective.config import Baseline, Scale

_STD_EPS = 1e-6  # damps groups whose rewards differ only by rounding; far below any real reward


def group_advantages(
    rewards_PG: Float[Array, "P G"],
    *,
    scale: Scale,
    baseline: Baseline,
    axis_name: str | None = None,
) -> Float[Array, "P G"]:
    """How much better each completion did than its group, in the dtype of the rewards (float32).

        A_pg = (R_pg - mean_g R_pg) / s_p

    s_p is std_g R_p + 1e-6, the batch's std + 1e-6, mean_g R_p, or 1.

    `scale="group"` is GRPO (DeepSeekMath, 2402.03300); `"none"` is Dr.GRPO (2503.20783); `"batch"`
    keeps the group mean and divides by one std for the whole batch, that of the mean-centred
    rewards (REINFORCE++-baseline, 2501.03262). `"mean"` is MaxRL (2602.02710), for rewards that are
    either 0 or one positive number: the rarer a right completion in its group, the more it weighs,
    as in the gradient of log P(right); a group without one gives 0.
    `baseline="leave_one_out"` is RLOO (2402.14740), where a reward is compared with the mean
    of the *other* G-1, which equals G/(G-1) * (R - mean); the batch std is the same for both.

    Under `shard_map`, `axis_name` is the mesh axis that P is sharded over. Only "batch" uses it:
    its sum of squares and its count cover all devices.

    Raises UserError for G=1 and for leave_one_out with scale="group" or "mean".
    """
    num_generations = rewards_PG.shape[1]
    check_advantages(num_generations=num_generations, scale=scale, baseline=baseline)
    relative_PG = rewards_PG - rewards_PG[:, :1]
    centred_PG = relative_PG - relative_PG.mean(axis=1, keepdims=True)
    advantages_PG = centred_PG
    if baseline == "leave_one_out":
        advantages_PG = centred_PG * (num_generations / (num_generations - 1))
    # An equal group is 0 / (0 + eps), exactly zero: it needs no case of its own below.
    if scale == "group":
        return advantages_PG / (centred_PG.std(axis=1, ddof=1, keepdims=True) + _STD_EPS)
    if scale == "batch":
        return advantages_PG / (_batch_std(centred_PG, axis_name=axis_name) + _STD_EPS)
    if scale == "mean":
        mean_P1 = rewards_PG.mean(axis=1, keepdims=True)
        return jnp.where(mean_P1 > 0, advantages_PG / jnp.where(mean_P1 > 0, mean_P1, 1.0), 0.0)
    return advantages_PG


@functools.partial(jax.jit, static_argnames=("mesh", "scale", "baseline"))
def sharded_group_advantages(
    rewards_PG: Float[Array, "P G"], mesh: Mesh, *, scale: Scale, baseline: Baseline
) -> Float[Array, "P G"]:
    """`group_advantages` with P sharded over the mesh axis "data"; a group stays on one device.

    Raises UserError if P is not a multiple of the devices on that axis, or as `group_advantages`.
    """
    num_prompts, num_devices = rewards_PG.shape[0], mesh.shape["data"]
    if num_prompts % num_devices:
        raise UserError(
            f"{num_prompts} prompts per step do not divide over {num_devices} devices: "
            f"use a multiple of {num_devices} prompts"
        )
    over_prompts = PartitionSpec("data")
    on_each_device = functools.partial(
        group_advantages, scale=scale, baseline=baseline, axis_name="data"
    )
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=over_prompts, out_specs=over_prompts)(
        rewards_PG
    )


def zero_signal_groups(
    rewards_PG: Float[Array | np.ndarray, "P G"],
) -> Bool[Array | np.ndarray, "P"]:
    """True for groups whose rewards are all equal: they give no gradient, whatever the scale.

    DAPO (2503.14476) resamples them.
    """
    return (rewards_PG == rewards_PG[:, :1]).all(axis=1)


def _batch_std(centred_PG: Float[Array, "P G"], *, axis_name: str | None) -> Float[Array, ""]:
    """Std, ddof=1, over all devices of the axis. Each group has mean zero, so the batch has too."""
    sum_of_squares, count = jnp.square(centred_PG).sum(), centred_PG.size
    if axis_name is not None:
        sum_of_squares, count = jax.lax.psum((sum_of_squares, count), axis_name)
    return jnp.sqrt(sum_of_squares / (count - 1))
