"""The optimizer: the schedule's ends, AdamW by hand, and the settings that are refused."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import F32

from gemma_grpo.errors import UserError
from gemma_grpo.training import state as train_state
from gemma_grpo.training.state import OptimizerConfig


def rates(num_updates, **settings):
    config = OptimizerConfig(learning_rate=2.0, final_rate=0.1, **settings)
    schedule = train_state.make_schedule(config, num_updates)
    return [float(schedule(number)) for number in range(num_updates)]


@pytest.mark.parametrize("warmup", [0.0, 0.3])
@pytest.mark.parametrize("decay, last", [("constant", 2.0), ("linear", 0.2), ("cosine", 0.2)])
def test_the_last_update_has_the_final_rate(decay, last, warmup):
    assert rates(10, decay=decay, warmup=warmup)[-1] == pytest.approx(last)


def test_the_linear_schedule_by_hand():
    # Three updates up to 2, then from 2 to 0.2 in six equal steps of 0.3.
    expected = [2 / 3, 4 / 3, 2.0, 2.0, 1.7, 1.4, 1.1, 0.8, 0.5, 0.2]
    np.testing.assert_allclose(rates(10, decay="linear", warmup=0.3), expected, rtol=F32)


def test_the_cosine_is_half_way_down_in_the_middle():
    assert rates(11, decay="cosine", warmup=0.0)[5] == pytest.approx((2.0 + 0.2) / 2)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_run_of_one_update_takes_it_at_the_peak(decay):
    assert rates(1, decay=decay, warmup=0.0) == [2.0]


def test_adamw_by_hand_decays_weights_and_not_the_norms_gains():
    # Adam's first step is lr * sign(gradient); the decay adds lr * 0.5 * weight.
    config = OptimizerConfig(
        learning_rate=0.1, warmup=0.0, decay="constant", weight_decay=0.5, max_grad_norm=100.0
    )
    params = {"norm": {"scale": jnp.array([2.0])}, "up": jnp.array([2.0])}
    grads = {"norm": {"scale": jnp.array([3.0])}, "up": jnp.array([-3.0])}
    optimizer = train_state.make_optimizer(config, num_updates=5)
    moved = train_state.apply_gradients(
        train_state.fresh_state(params, optimizer), grads, optimizer
    ).params
    np.testing.assert_allclose(moved["norm"]["scale"], [2.0 - 0.1], rtol=F32)
    np.testing.assert_allclose(moved["up"], [2.0 + 0.1 - 0.1 * 0.5 * 2.0], rtol=F32)


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", -1e-6),
        ("learning_rate", math.inf),
        ("warmup", 1.5),
        ("final_rate", -1.0),
        ("final_rate", 1.1),
        ("b1", 1.5),
        ("b2", 1.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        *[
            (name, math.nan)
            for name in ("learning_rate warmup final_rate b1 b2 weight_decay max_grad_norm".split())
        ],
    ],
)
def test_a_number_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"optimizer: {name}={value} must be"):
        OptimizerConfig(**{name: value})


def test_both_decays_of_adams_moments_are_the_configs():
    """b1 = 1/2, b2 = 0.9, gradients 1 and -1: the corrected moments are 1 and 1, then
    (1/4 - 1/2) / (3/4) = -1/3 and 1."""
    config = OptimizerConfig(
        **dict(learning_rate=1.0, warmup=0.0, decay="constant", max_grad_norm=10.0),
        **dict(b1=0.5, b2=0.9, weight_decay=0.0),
    )
    optimizer = train_state.make_optimizer(config, 3)
    params = {"w": jnp.zeros(1)}
    state, moves = optimizer.init(params), []
    for gradient in (1.0, -1.0):
        updates, state = optimizer.update({"w": jnp.full(1, gradient)}, state, params)
        moves.append(float(updates["w"][0]))
    np.testing.assert_allclose(moves, [-1, 1 / 3], rtol=1e-6)


def test_the_gradient_is_scaled_to_its_norm_and_keeps_its_direction():
    """(3, 4) of norm 5 becomes (0.6, 0.8), and the next a tenth of that: with b1 = 1/2 and
    b2 = 0.9 the corrected moments are (1/4 + 1/20) / (3/4) = 0.4 and (0.09 + 0.001) / 0.19 of the
    first gradient and its square, in both places."""
    config = OptimizerConfig(
        **dict(learning_rate=1.0, warmup=0.0, decay="constant", max_grad_norm=1.0, b1=0.5, b2=0.9)
    )
    optimizer = train_state.make_optimizer(config, 3)
    params = {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    for gradient in ([3.0, 4.0], [0.06, 0.08]):
        updates, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
    np.testing.assert_allclose(updates["w"], [-0.4 / math.sqrt(0.091 / 0.19)] * 2, rtol=1e-6)


def test_the_warm_up_is_the_nearest_whole_number_of_updates():
    # 0.05 of 38 updates is 1.9: half the peak, then all of it.
    assert rates(38, decay="constant", warmup=0.05)[:3] == [1.0, 2.0, 2.0]
