"""Advantages. Expected values are by hand or from NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tolerances import F32

from gemma_grpo.errors import UserError
from gemma_grpo.objective import advantages

SETTINGS = [
    ("group", "mean"),
    ("batch", "mean"),
    ("mean", "mean"),
    ("none", "mean"),
    ("batch", "leave_one_out"),
    ("none", "leave_one_out"),
]


def random_rewards(num_prompts: int, num_generations: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 3, (num_prompts, num_generations))


def close(actual, expected) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=F32, atol=F32)


def test_group_scale_by_hand():
    # Rewards 1, 0, 0, 1: mean 1/2, squares 4 * 1/4 = 1, over 4 - 1: std = sqrt(1/3).
    # Rewards 0, 2, 4, 6: mean 3, squares 9 + 1 + 1 + 9 = 20, std = sqrt(20/3). Then + 1e-6.
    rewards_PG = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 4.0, 6.0]])
    actual_PG = advantages.group_advantages(rewards_PG, scale="group", baseline="mean")
    first, second = (1 / 3) ** 0.5 + 1e-6, (20 / 3) ** 0.5 + 1e-6
    close(
        actual_PG,
        [
            [0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first],
            [-3 / second, -1 / second, 1 / second, 3 / second],
        ],
    )


def test_no_scale_leaves_the_distance_from_the_group_mean():
    rewards_PG = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 4.0, 6.0]])
    actual_PG = advantages.group_advantages(rewards_PG, scale="none", baseline="mean")
    close(actual_PG, [[0.5, -0.5, -0.5, 0.5], [-3.0, -1.0, 1.0, 3.0]])


def test_the_mean_scale_weighs_a_group_by_how_rarely_it_is_right():
    # One right of four: mean 1/4, (1 - 1/4) / (1/4) = 3, (0 - 1/4) / (1/4) = -1. None right: 0.
    # A reward of 0.6 instead of 1 changes nothing.
    rewards_PG = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.6, 0.6, 0.0, 0.6], [0.0, 0.0, 0.0, 0.0]])
    actual_PG = advantages.group_advantages(rewards_PG, scale="mean", baseline="mean")
    third = 1 / 3
    close(actual_PG, [[3, -1, -1, -1], [third, third, -1, third], [0, 0, 0, 0]])


def test_leave_one_out_compares_each_reward_with_the_mean_of_the_others():
    rewards_PG = random_rewards(3, 5)
    expected_PG = np.empty_like(rewards_PG)
    for p in range(3):
        for g in range(5):
            others = [rewards_PG[p, j] for j in range(5) if j != g]
            expected_PG[p, g] = rewards_PG[p, g] - sum(others) / 4
    actual_PG = advantages.group_advantages(
        jnp.array(rewards_PG, jnp.float32), scale="none", baseline="leave_one_out"
    )
    close(actual_PG, expected_PG)


@pytest.mark.parametrize("baseline, factor", [("mean", 1.0), ("leave_one_out", 5 / 4)])
def test_batch_scale_divides_by_one_std_of_all_centred_rewards(baseline, factor):
    rewards_PG = random_rewards(3, 5)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    expected_PG = factor * centred_PG / (centred_PG.reshape(-1).std(ddof=1) + 1e-6)
    actual_PG = advantages.group_advantages(
        jnp.array(rewards_PG, jnp.float32), scale="batch", baseline=baseline
    )
    close(actual_PG, expected_PG)


@pytest.mark.parametrize("scale, baseline", SETTINGS)
@pytest.mark.parametrize("jitted", [False, True])
def test_equal_rewards_give_exactly_zero_advantage(scale, baseline, jitted):
    # For many of these the float32 mean of G equal numbers is not that number.
    def fn(rewards_PG):
        return advantages.group_advantages(rewards_PG, scale=scale, baseline=baseline)

    equal_P = np.random.default_rng(1).uniform(-1, 3, 50).astype(np.float32)
    rewards_PG = np.repeat(equal_P[:, None], 7, axis=1)
    rewards_PG[0] = np.arange(7)  # one group with a signal, so that the batch's std is not 0
    actual_PG = np.asarray((jax.jit(fn) if jitted else fn)(jnp.array(rewards_PG)))
    assert (actual_PG[1:] == 0).all()
    assert (actual_PG[0] != 0).any()


@pytest.mark.parametrize("scale, baseline", SETTINGS)
def test_a_batch_of_equal_rewards_gives_zero_not_nan(scale, baseline):
    rewards_PG = jnp.full((4, 6), 0.1)
    actual_PG = advantages.group_advantages(rewards_PG, scale=scale, baseline=baseline)
    np.testing.assert_array_equal(actual_PG, np.zeros((4, 6)))


def test_rewards_that_differ_by_rounding_are_no_signal():
    one_ulp = np.float32(0.3) + np.spacing(np.float32(0.3))
    rewards_PG = jnp.array([[0.3, 0.3, 0.3, one_ulp]], jnp.float32)
    actual_PG = advantages.group_advantages(rewards_PG, scale="group", baseline="mean")
    assert np.abs(actual_PG).max() < 0.05  # without the 1e-6 it would be 1.5


@pytest.mark.parametrize("scale, baseline", SETTINGS)
def test_advantages_sum_to_zero_in_each_group(scale, baseline):
    rewards_PG = jnp.array(random_rewards(6, 8), jnp.float32)
    actual_PG = advantages.group_advantages(rewards_PG, scale=scale, baseline=baseline)
    np.testing.assert_allclose(actual_PG.sum(axis=1), np.zeros(6), atol=8 * F32)


@pytest.mark.parametrize("scale, baseline", SETTINGS)
def test_eight_devices_give_what_one_gives(scale, baseline):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rewards_PG = jnp.array(random_rewards(16, 5), jnp.float32)
    one_PG = advantages.group_advantages(rewards_PG, scale=scale, baseline=baseline)
    eight_PG = advantages.sharded_group_advantages(rewards_PG, mesh, scale=scale, baseline=baseline)
    assert len(eight_PG.sharding.device_set) == 8
    close(eight_PG, np.asarray(one_PG))


def test_prompts_that_do_not_divide_over_the_devices_are_refused():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    with pytest.raises(UserError, match="12 prompts.*8 devices.*multiple of 8"):
        advantages.sharded_group_advantages(jnp.ones((12, 4)), mesh, scale="group", baseline="mean")


@pytest.mark.parametrize("scale, baseline", SETTINGS)
def test_one_generation_is_refused(scale, baseline):
    with pytest.raises(UserError, match="--grpo.num-generations 1"):
        advantages.group_advantages(jnp.ones((4, 1)), scale=scale, baseline=baseline)


def test_leave_one_out_with_the_group_std_is_refused():
    with pytest.raises(UserError, match="leave_one_out.*--grpo.scale group.*batch or none"):
        advantages.group_advantages(jnp.ones((4, 3)), scale="group", baseline="leave_one_out")


def test_leave_one_out_with_the_group_mean_is_refused():
    with pytest.raises(UserError, match="leave_one_out.*--grpo.scale mean.*--grpo.baseline mean"):
        advantages.group_advantages(jnp.ones((4, 3)), scale="mean", baseline="leave_one_out")


@pytest.mark.parametrize("wrong", [{"scale": "grup"}, {"baseline": "loo"}])
def test_a_misspelt_name_does_not_fall_through_to_a_default(wrong):
    fine = {"scale": "none", "baseline": "mean"}
    with pytest.raises((UserError, TypeError)):  # TypeError is beartype's, which stands in front
        advantages.group_advantages(jnp.ones((4, 3)), **(fine | wrong))


def test_groups_without_signal_are_those_with_equal_rewards():
    rewards_PG = jnp.array([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [0.2, 0.1, 0.1], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(
        advantages.zero_signal_groups(rewards_PG), [True, False, False, True]
    )


def test_a_group_whose_rewards_differ_by_a_thousandth_has_a_signal():
    rewards_PG = jnp.array([[1.0, 1.0], [1.0, 1.001]])
    np.testing.assert_array_equal(advantages.zero_signal_groups(rewards_PG), [True, False])
