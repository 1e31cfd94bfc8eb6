"""The losses: by hand, against float64 loops in NumPy, and against TRL's values.

`reference_losses` below is the whole loss once more, in plain loops over rows and tokens. Where a
paper stops a gradient, it reads a second, frozen copy of the log-probs, so that finite differences
by the first are the gradient that is meant.
"""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import F32, GRAD_F32

from gemma_grpo.errors import UserError
from gemma_grpo.objective import checks as loss_checks
from gemma_grpo.objective import losses
from gemma_grpo.objective.config import LossConfig

MAX_LENGTH = 9  # distinct from T, the padded width
NUMBERS = {"epsilon": 0.2, "epsilon_high": 0.3, "dual_clip": 2.5, "beta": 0.07, "tis_cap": 1.6}
PLAIN = NUMBERS | {  # the whole loss with everything switched on; tests switch off what they vary
    "objective": "clip",
    "level": "token",
    "kl_estimator": "k3",
    "tis_level": "token",
}
LEVELS = ["token", "sequence", "sequence_token"]
AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]
ESTIMATORS = ["k2", "k3", "k3_k2grad", "k3_unbiased"]


def make_batch() -> dict[str, np.ndarray]:
    """Ten rows of six slots, float32. Every sign of A is in every region of the ratio.

    Rows 0-3 have A > 0 and rows 4-7 A < 0, with ratios near 0.6 (below the range), 1.1 (inside),
    1.5 (above) and 3.2 (above dual clip); row 8 has A = 0 and row 9 is masked out whole. Single
    tokens stray by 3 % from their row's ratio, so no token and no row lies at an edge.
    """
    generator = np.random.default_rng(3)
    shape = (10, 6)
    lengths_B1 = np.array([[6], [3], [5], [1], [4], [6], [2], [5], [3], [0]])
    old_BT = generator.uniform(-3.5, -1.3, shape)
    step_B1 = np.log([[0.6], [1.1], [1.5], [3.2]] * 2 + [[1.4], [0.5]])
    logps_BT = old_BT + step_B1 + generator.uniform(-0.03, 0.03, shape)
    batch = {
        "logps": logps_BT,
        "old": old_BT,
        "ref": logps_BT + generator.normal(0, 0.4, shape),
        "sampler": old_BT + generator.normal(0, 0.5, shape),
        "advantages": np.array([1.3, 0.9, 0.6, 1.1, -0.7, -1.2, -0.5, -1.5, 0.0, 2.0]),
        "mask": np.arange(6)[None] < lengths_B1,
    }
    return {name: array.astype(np.float32) for name, array in batch.items()}


def reference_weight(mask, i, aggregation) -> float:
    """The weight of a counted token of row i."""
    lengths = [int(sum(row)) for row in mask]
    if aggregation == "token_mean":
        return 1 / sum(lengths)
    if aggregation == "sequence_mean":
        return 1 / (lengths[i] * sum(length > 0 for length in lengths))
    return 1 / (len(mask) * MAX_LENGTH)


def reference_ratio(new, frozen, old, t, level) -> float:
    """pi / pi_old of token t, from the lists of one row's counted tokens."""
    if level == "token":
        return math.exp(new[t] - old[t])
    if level == "sequence":
        return math.exp(sum(a - b for a, b in zip(new, old, strict=True)) / len(old))
    s_i = math.exp(sum(a - b for a, b in zip(frozen, old, strict=True)) / len(old))
    return s_i * math.exp(new[t] - frozen[t])


def reference_policy(new, frozen, old, t, advantage, s) -> float:
    """The loss of one token before weights: a case for each region, no min needed."""
    ratio = reference_ratio(new, frozen, old, t, s["level"])
    low, high = 1 - s["epsilon"], 1 + s["epsilon_high"]
    if s["objective"] == "cispo":
        ratio = reference_ratio(frozen, frozen, old, t, s["level"])
        return -min(max(ratio, low), high) * advantage * new[t]
    if advantage > 0:
        return -advantage * (high if ratio > high else ratio)
    if s["dual_clip"] is not None and ratio > s["dual_clip"]:
        return -advantage * s["dual_clip"]
    return -advantage * (low if ratio < low else ratio)


def reference_kl(new, old, ref, estimator) -> float:
    gap = ref - new
    k2, k3 = gap**2 / 2, math.exp(gap) - gap - 1
    return {"k2": k2, "k3": k3, "k3_unbiased": math.exp(new - old) * k3}[estimator]


def reference_tis(trainer, sampler, t, s) -> float:
    if s["tis_cap"] is None:
        return 1.0
    gaps = [a - b for a, b in zip(trainer, sampler, strict=True)]
    return min(math.exp(gaps[t] if s["tis_level"] == "token" else sum(gaps)), s["tis_cap"])


def reference_losses(logps, batch, aggregation, s, on_policy=False) -> np.ndarray:
    """Each row's sum over tokens of weight * (tis * policy + beta * kl), in float64."""
    totals = np.zeros(len(logps))
    for i, mask in enumerate(batch["mask"]):
        counted = [t for t in range(len(mask)) if mask[t]]
        new, frozen, old, ref, sampler = (
            [float(array[i, t]) for t in counted]
            for array in (logps, batch["logps"], batch["old"], batch["ref"], batch["sampler"])
        )
        old = frozen if on_policy else old
        for t in range(len(counted)):
            loss = reference_policy(new, frozen, old, t, float(batch["advantages"][i]), s)
            loss *= reference_tis(old, sampler, t, s)
            if s["beta"] > 0:
                loss += s["beta"] * reference_kl(new[t], old[t], ref[t], s["kl_estimator"])
            totals[i] += reference_weight(batch["mask"], i, aggregation) * loss
    return totals


def reference_gradient(batch, aggregation, s, on_policy=False) -> np.ndarray:
    """Central differences by each log-prob, a column at once: rows do not affect each other."""
    logps, step = batch["logps"].astype(np.float64), 1e-5
    columns = []
    for nudge in step * np.eye(logps.shape[1]):
        up, down = (
            reference_losses(logps + signed, batch, aggregation, s, on_policy)
            for signed in (nudge, -nudge)
        )
        columns.append((up - down) / (2 * step))
    return np.stack(columns, axis=1)


def loss_and_gradient(arrays, weights_BT, on_policy, **s):
    """((loss, metrics), gradient by the log-probs); what the settings do not need is left out."""

    def loss_fn(logps_BT):
        inputs = losses.LossInputs(
            arrays["advantages"],
            arrays["mask"],
            weights_BT,
            old_logps=None if on_policy else arrays["old"],
            ref_logps=arrays["ref"] if s["beta"] > 0 else None,
            sampler_logps=arrays["sampler"] if s["tis_cap"] is not None else None,
        )
        return losses.policy_loss(logps_BT, inputs, LossConfig(**s))

    return jax.value_and_grad(loss_fn, has_aux=True)(arrays["logps"])


jitted_loss_and_gradient = jax.jit(loss_and_gradient, static_argnames=("on_policy", *PLAIN))


def run(batch, aggregation, s, on_policy=False, rows=slice(None), jit=False):
    """Our loss, its gradient by the log-probs, and its metrics; weights of the whole batch.

    Eager is the quicker of the two, except for shapes that few tests share.
    """
    weights_BT = losses.token_weights(
        jnp.array(batch["mask"]), aggregation=aggregation, max_completion_length=MAX_LENGTH
    )
    arrays = {name: jnp.array(array[rows]) for name, array in batch.items()}
    fn = jitted_loss_and_gradient if jit else loss_and_gradient
    (loss, metrics), gradient_BT = fn(arrays, weights_BT[rows], on_policy, **s)
    return float(loss), np.asarray(gradient_BT), metrics


def close(actual, expected, tolerance=F32) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


# Compiling one small function is quicker than compiling each of its operations.
jitted_policy_loss = jax.jit(losses.policy_loss, static_argnames="config")
jitted_ratio = jax.jit(losses.importance_ratio, static_argnames="level")
jitted_tis = jax.jit(losses.truncated_importance_weights, static_argnames=("cap", "level"))


# --- the whole loss against float64 loops -------------------------------------------------------


def agrees_with_reference(aggregation, s, on_policy=False) -> None:
    batch = make_batch()
    loss, gradient_BT, _ = run(batch, aggregation, s, on_policy)
    straight_through = s["kl_estimator"] == "k3_k2grad"  # the value of one, the gradient of another
    of_value = s | ({"kl_estimator": "k3"} if straight_through else {})
    of_gradient = s | ({"kl_estimator": "k2"} if straight_through else {})
    expected_B = reference_losses(batch["logps"], batch, aggregation, of_value, on_policy)
    close(loss, expected_B.sum())
    close(gradient_BT, reference_gradient(batch, aggregation, of_gradient, on_policy), GRAD_F32)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_value_and_gradient_agree_with_float64_loops(objective, level, aggregation):
    off = {"beta": 0.0, "tis_cap": None}
    agrees_with_reference(aggregation, PLAIN | off | {"objective": objective, "level": level})


@pytest.mark.parametrize("level", LEVELS)
def test_without_dual_clip_too(level):
    off = {"beta": 0.0, "tis_cap": None, "dual_clip": None}
    agrees_with_reference("sequence_mean", PLAIN | off | {"level": level})


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_in_the_loss_agrees_with_float64_loops(estimator, on_policy):
    settings = PLAIN | {"tis_cap": None, "kl_estimator": estimator}
    agrees_with_reference("token_mean", settings, on_policy)


@pytest.mark.parametrize("level", LEVELS)
def test_the_unbiased_kl_uses_the_token_ratio_at_every_level(level):
    settings = PLAIN | {"tis_cap": None, "kl_estimator": "k3_unbiased", "level": level}
    agrees_with_reference("sequence_mean", settings)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("tis_level", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_tis_weighs_the_policy_term_and_not_the_kl(objective, tis_level, on_policy):
    settings = PLAIN | {"objective": objective, "tis_level": tis_level}
    agrees_with_reference("constant", settings, on_policy)


def test_jit_changes_nothing():
    eager, jitted = (run(make_batch(), "token_mean", PLAIN, jit=jit) for jit in (False, True))
    jax.tree.map(close, eager, jitted)


# --- weights ------------------------------------------------------------------------------------

MASK_BT = jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    "aggregation, per_token_B",
    [
        ("token_mean", [1 / 6, 1 / 6, 0, 1 / 6]),  # 6 tokens count
        ("sequence_mean", [1 / 9, 1 / 3, 0, 1 / 6]),  # 3 rows count, of 3, 1 and 2 tokens
        ("constant", [1 / 40, 1 / 40, 0, 1 / 40]),  # 4 rows, budget 10: the empty row is counted
    ],
)
def test_weights_by_hand(aggregation, per_token_B):
    actual_BT = losses.token_weights(MASK_BT, aggregation=aggregation, max_completion_length=10)
    close(actual_BT, np.array(per_token_B)[:, None] * np.asarray(MASK_BT))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_masked_out_whole_has_weight_zero_not_nan(aggregation):
    mask_BT = jnp.zeros((4, 4))
    actual_BT = losses.token_weights(mask_BT, aggregation=aggregation, max_completion_length=10)
    np.testing.assert_array_equal(actual_BT, mask_BT)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_ignores_how_much_padding_a_row_carries(aggregation):
    batch = make_batch()
    wider = {
        name: array if array.ndim == 1 else np.pad(array, [(0, 0), (0, 2)])
        for name, array in batch.items()
    }
    loss, gradient_BT, _ = run(batch, aggregation, PLAIN)
    wider_loss, wider_gradient_BT, _ = run(wider, aggregation, PLAIN, jit=True)
    close(wider_loss, loss)
    close(wider_gradient_BT[:, :6], gradient_BT)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_micro_batches", [2, 5, 10])  # the last of 10 is masked out whole
def test_micro_batches_add_up_to_the_whole_batch(num_micro_batches, aggregation):
    batch, size = make_batch(), 10 // num_micro_batches
    whole = run(batch, aggregation, PLAIN, jit=True)
    parts = [
        run(batch, aggregation, PLAIN, rows=slice(first, first + size), jit=True)
        for first in range(0, 10, size)
    ]
    close(sum(part[0] for part in parts), whole[0])
    close(np.concatenate([part[1] for part in parts]), whole[1])
    summed = jax.tree.map(lambda *xs: sum(xs), *(part[2] for part in parts))
    jax.tree.map(close, losses.metric_means(summed), losses.metric_means(whole[2]))


# --- the ratio ----------------------------------------------------------------------------------

OLD_BT = jnp.log(jnp.array([[0.5, 0.2, 0.4], [0.1, 0.9, 0.9]]))
NEW_BT = jnp.log(jnp.array([[0.6, 0.1, 0.4], [0.4, 0.9, 0.9]]))
RATIO_MASK_BT = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "level, expected_BT",
    [
        ("token", [[1.2, 0.5, 1.0], [4.0, 1.0, 1.0]]),
        ("sequence", [[0.6 ** (1 / 3)] * 3, [4.0, 1.0, 1.0]]),  # 1.2 * 0.5 * 1 = 0.6
        ("sequence_token", [[0.6 ** (1 / 3)] * 3, [4.0, 1.0, 1.0]]),
    ],
)
def test_ratios_by_hand(level, expected_BT):
    actual_BT = jitted_ratio(NEW_BT, OLD_BT, RATIO_MASK_BT, level=level)
    close(actual_BT, expected_BT)


def ratio_jacobian(level):
    """d ratio[0, t] / d logps[0, u] as a matrix (t, u)."""
    jacobian_BTBT = jax.jacrev(lambda x: jitted_ratio(x, OLD_BT, RATIO_MASK_BT, level=level))(
        NEW_BT
    )
    return np.asarray(jacobian_BTBT)[0, :, 0, :]


def test_gspo_spreads_its_gradient_evenly_and_gspo_token_keeps_it_with_the_token():
    s = 0.6 ** (1 / 3)
    close(ratio_jacobian("token"), np.diag([1.2, 0.5, 1.0]), GRAD_F32)
    close(ratio_jacobian("sequence"), np.full((3, 3), s / 3), GRAD_F32)
    close(ratio_jacobian("sequence_token"), np.diag([s, s, s]), GRAD_F32)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_a_sequence_ratio_is_held_at_e_to_the_tenth(level):
    new_BT, old_BT, mask_BT = (
        jnp.zeros((2, 2)),
        jnp.array([[-11.0, -11], [-9, -9]]),
        jnp.ones((2, 2)),
    )
    actual_BT = jitted_ratio(new_BT, old_BT, mask_BT, level=level)
    np.testing.assert_allclose(actual_BT, np.exp([[10.0, 10], [9, 9]]), rtol=F32)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_on_policy_the_gradient_is_reinforce(objective, level, aggregation):
    batch = make_batch()
    off = {"beta": 0.0, "tis_cap": None}
    settings = PLAIN | off | {"objective": objective, "level": level}
    _, gradient_BT, metrics = run(batch, aggregation, settings, on_policy=True)
    rows = range(10)
    weight_B = [reference_weight(batch["mask"], i, aggregation) if i < 9 else 0 for i in rows]
    expected_BT = -(batch["advantages"] * weight_B)[:, None] * batch["mask"]
    close(gradient_BT, expected_BT, GRAD_F32)
    assert metrics["clipped_tokens"] == 0


# --- clipping -----------------------------------------------------------------------------------


@jax.jit
@jax.value_and_grad
def surrogate_and_slope(ratio_BT, advantages_B):
    return losses.clipped_surrogate(
        ratio_BT, advantages_B, epsilon=0.2, epsilon_high=0.3, dual_clip=2.5
    )[0, 0]


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [  # epsilon 0.2, epsilon_high 0.3, dual clip 2.5; loss is -J, slope is d loss / d ratio
        (2.0, 0.5, -1.0, -2.0),  # good and less likely than before: pull it back up
        (2.0, 1.1, -2.2, -2.0),
        (2.0, 1.25, -2.5, -2.0),  # beyond 1 + epsilon, within 1 + epsilon_high
        (2.0, 1.5, -2.6, 0.0),  # good and far enough: stop
        (2.0, 4.0, -2.6, 0.0),
        (-2.0, 0.5, 1.6, 0.0),  # bad and far enough: stop
        (-2.0, 0.75, 1.6, 0.0),  # below 1 - epsilon, within 1 - epsilon_high
        (-2.0, 0.9, 1.8, 2.0),
        (-2.0, 1.5, 3.0, 2.0),  # bad and more likely than before: push it back down
        (-2.0, 4.0, 5.0, 0.0),  # dual clip: 2.5 * 2
    ],
)
def test_clipping_stops_only_steps_already_taken_too_far(advantage, ratio, loss, slope):
    actual, actual_slope_BT = surrogate_and_slope(jnp.array([[ratio]]), jnp.array([advantage]))
    close(actual, loss)
    close(actual_slope_BT[0, 0], slope)


def test_without_dual_clip_the_loss_of_a_bad_token_grows_with_its_ratio():
    arguments = (jnp.array([[40.0]]), jnp.array([-2.0]))
    loss_BT = losses.clipped_surrogate(*arguments, epsilon=0.2, epsilon_high=0.3, dual_clip=None)
    close(loss_BT, [[80.0]])


def test_cispo_by_hand():
    # Ratios 0.5, 1.1, 9 in [0.8, 1.3] are weights w = 0.8, 1.1, 1.3. The loss is -w A logp; its
    # slope by logp is -w A, and by the ratio it is none.
    @jax.jit
    def fn(logps_BT, ratio_BT):
        arguments = (logps_BT, ratio_BT, jnp.array([2.0]))
        return losses.cispo(*arguments, epsilon=0.2, epsilon_high=0.3)

    arguments = (jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[0.5, 1.1, 9.0]]))
    loss_BT, vjp = jax.vjp(fn, *arguments)
    close(loss_BT, [[1.6, 4.4, 7.8]])
    by_logps_BT, by_ratio_BT = vjp(jnp.ones((1, 3)))
    close(by_logps_BT, [[-1.6, -2.2, -2.6]])
    np.testing.assert_array_equal(by_ratio_BT, np.zeros((1, 3)))


RATIOS_BT = jnp.array([[0.75, 1.25, 1.4, 1.4], [0.75, 0.5, 1.4, 0.5], [0.5, 1.4, 1.0, 1.0]])
CLIP_MASK_BT = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
CLIP_ADVANTAGES_B = jnp.array([1.0, -1.0, 0.0])


@pytest.mark.parametrize("objective, clipped", [("clip", 3), ("cispo", 7)])
def test_the_loss_reports_clipped_tokens(objective, clipped):
    # Clip: A > 0: 1.4 binds (1.25 < 1.3). A < 0: 0.75 and 0.5 bind (< 0.8). A = 0: none. 3 of 8.
    # CISPO bounds the weight whatever the sign of A: all but 1.25 of the 8 lie outside [0.8, 1.3].
    settings = PLAIN | {"objective": objective, "beta": 0.0, "tis_cap": None}
    logps_BT = jnp.log(RATIOS_BT) - 5
    inputs = losses.LossInputs(
        CLIP_ADVANTAGES_B, CLIP_MASK_BT, CLIP_MASK_BT, old_logps=jnp.full((3, 4), -5.0)
    )
    _, metrics = jitted_policy_loss(logps_BT, inputs, LossConfig(**settings))
    assert set(metrics) == {"tokens", "clipped_tokens", "policy_loss"}
    assert metrics["tokens"] == 8
    assert metrics["clipped_tokens"] == clipped
    close(losses.metric_means(metrics)["clip_fraction"], clipped / 8)


# --- KL, by exact enumeration of a vocabulary of seven ----------------------------------------

THETA_V, REF_V, OLD_V = (
    np.random.default_rng(seed).normal(0, 0.8, 7).astype(np.float32) for seed in (11, 12, 13)
)


def softmax(logits_V) -> np.ndarray:
    powers_V = np.exp(logits_V.astype(np.float64))
    return powers_V / powers_V.sum()


PI_V, PI_REF_V, PI_OLD_V = softmax(THETA_V), softmax(REF_V), softmax(OLD_V)  # float64
EXACT_KL = float((PI_V * np.log(PI_V / PI_REF_V)).sum())
# By a logit: d KL(pi||ref) = pi * (log pi/ref - KL);  d KL(ref||pi) = pi - ref.
GRADIENT_TO_REF = PI_V * (np.log(PI_V / PI_REF_V) - EXACT_KL)
GRADIENT_FROM_REF = PI_V - PI_REF_V


@functools.partial(jax.jit, static_argnames="estimator")
def expected_kl(theta_V, sampled_from_V, *, estimator):
    """The estimator's exact expectation over one token drawn from the given probabilities."""
    logps_BT = jax.nn.log_softmax(theta_V)[None]
    ratio_BT = jnp.exp(logps_BT - jnp.log(sampled_from_V)[None])
    ref_BT = jax.nn.log_softmax(jnp.array(REF_V))[None]
    kl_BT = losses.kl(logps_BT, ref_BT, ratio_BT, estimator=estimator)
    return (sampled_from_V[None] * kl_BT).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_k2grad", "k3_unbiased"])
def test_the_kl_estimate_is_unbiased(estimator):
    close(expected_kl(THETA_V, PI_V, estimator=estimator), EXACT_KL)


def test_the_unbiased_estimate_stays_so_on_tokens_of_another_policy():
    close(expected_kl(THETA_V, PI_OLD_V, estimator="k3_unbiased"), EXACT_KL)


@pytest.mark.parametrize(
    "estimator, sampled_from_V, expected_V",
    [
        ("k1", PI_V, np.zeros(7)),
        ("k2", PI_V, GRADIENT_TO_REF),
        ("k3", PI_V, GRADIENT_FROM_REF),
        ("k3_k2grad", PI_V, GRADIENT_TO_REF),
        ("k3_unbiased", PI_V, GRADIENT_TO_REF),
        ("k3_unbiased", PI_OLD_V, GRADIENT_TO_REF),
    ],
)
def test_the_gradient_each_kl_estimator_has_as_a_loss(estimator, sampled_from_V, expected_V):
    actual_V = jax.grad(expected_kl)(THETA_V, sampled_from_V, estimator=estimator)
    close(actual_V, expected_V, GRAD_F32)


@pytest.mark.parametrize("estimator", ["k1", *ESTIMATORS])
def test_the_kl_is_zero_at_the_reference(estimator):
    logps_BT = jnp.log(jnp.array([[0.3, 1e-6, 1.0]]))
    kl_BT = losses.kl(logps_BT, logps_BT, jnp.ones((1, 3)), estimator=estimator)
    np.testing.assert_array_equal(kl_BT, np.zeros((1, 3)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_is_never_negative_and_keeps_its_digits_near_the_reference(estimator):
    gap_BT = np.array([[-3.0, -1e-2, -1e-3, -1e-4, 1e-4, 1e-3, 1e-2, 3.0]], np.float32)
    kl_BT = losses.kl(
        jnp.zeros_like(gap_BT), jnp.array(gap_BT), jnp.ones_like(gap_BT), estimator=estimator
    )
    exact_BT = np.expm1(gap_BT.astype(np.float64)) - gap_BT
    exact_BT = np.square(gap_BT.astype(np.float64)) / 2 if estimator == "k2" else exact_BT
    assert (np.asarray(kl_BT) > 0).all()
    # In parts of x, for the value itself goes as x^2. Written e^x - 1 - x it errs by 1e-7 whatever
    # the x, which at 1e-4 is 20 times the value.
    assert (np.abs(kl_BT - exact_BT) <= F32 * np.abs(gap_BT)).all()


# --- sampler against trainer --------------------------------------------------------------------


def tis(trainer_BT, sampler_BT, mask_BT, **settings):
    return jitted_tis(jnp.array(trainer_BT), jnp.array(sampler_BT), jnp.array(mask_BT), **settings)


def test_tis_by_hand():
    trainer_BT = np.log(np.array([[0.6, 0.3, 0.5], [0.2, 0.2, 0.9]], np.float32))
    sampler_BT = np.log(np.array([[0.5, 0.5, 0.1], [0.1, 0.4, 0.1]], np.float32))
    mask_BT = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
    # token ratios 1.2, 0.6, 5 and 2, 0.5; products 3.6 and 1
    token_BT = tis(trainer_BT, sampler_BT, mask_BT, cap=1.5, level="token")
    close(token_BT, [[1.2, 0.6, 1.5], [1.5, 0.5, 1.0]])
    sequence_BT = tis(trainer_BT, sampler_BT, mask_BT, cap=3.0, level="sequence")
    close(sequence_BT, [[3.0, 3.0, 3.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_wild_gap_between_sampler_and_trainer_stays_finite(level):
    trainer_BT, sampler_BT = [[0.0], [-200.0]], [[-200.0], [0.0]]
    weight_BT = tis(trainer_BT, sampler_BT, [[1.0], [1.0]], cap=1e30, level=level)
    np.testing.assert_allclose(weight_BT, [[math.exp(20.0)], [0.0]], rtol=F32)


def test_tis_gives_no_gradient():
    def fn(trainer_BT, sampler_BT):
        return tis(trainer_BT, sampler_BT, jnp.ones((1, 1)), cap=2.0, level="token").sum()

    assert jax.grad(fn, argnums=(0, 1))(jnp.full((1, 1), -1.0), jnp.full((1, 1), -1.1)) == (0, 0)


def test_tis_metrics_by_hand():
    # weights 1.2, 0.6, 1.5 (of 5) and 1.5 (of 2), 0.5: they sum to 5.3, two of five at the cap
    trainer_BT = jnp.log(jnp.array([[0.6, 0.3, 0.5], [0.2, 0.2, 0.9]]))
    sampler_BT = jnp.log(jnp.array([[0.5, 0.5, 0.1], [0.1, 0.4, 0.1]]))
    mask_BT = jnp.array([[1.0, 1, 1], [1, 1, 0]])
    settings = PLAIN | {"beta": 0.0, "tis_cap": 1.5}
    inputs = losses.LossInputs(jnp.array([1.0, 2.0]), mask_BT, mask_BT, sampler_logps=sampler_BT)
    loss, metrics = jitted_policy_loss(trainer_BT, inputs, LossConfig(**settings))
    means = losses.metric_means(metrics)
    assert set(means) == {"policy_loss", "clip_fraction", "tis_weight", "tis_capped_fraction"}
    close(means["tis_weight"], 5.3 / 5)
    close(means["tis_capped_fraction"], 2 / 5)
    close(loss, -(1.2 + 0.6 + 1.5) - 2 * (1.5 + 0.5))
    close(means["policy_loss"], loss)


def test_of_no_counted_token_every_metric_is_zero_not_nan():
    zeros_BT = jnp.zeros((1, 2))
    settings = PLAIN | {"beta": 0.1, "tis_cap": 1.5}
    inputs = losses.LossInputs(jnp.ones(1), zeros_BT, zeros_BT, None, zeros_BT, zeros_BT, zeros_BT)
    loss, metrics = jitted_policy_loss(zeros_BT - 1, inputs, LossConfig(**settings))
    means = losses.metric_means(metrics)
    assert loss == 0 and len(means) == 8 and set(map(float, means.values())) == {0.0}


def test_the_reported_kl_is_k3_per_token_whatever_the_estimator():
    batch = make_batch()
    gap = (batch["ref"].astype(np.float64) - batch["logps"])[batch["mask"] > 0]
    for estimator in ("k2", "k3_unbiased"):
        _, _, metrics = run(batch, "sequence_mean", PLAIN | {"kl_estimator": estimator})
        close(losses.metric_means(metrics)["kl"], (np.exp(gap) - gap - 1).mean())


def test_a_reference_at_beta_zero_measures_the_kl_and_leaves_the_loss_alone():
    batch = make_batch()
    logps_BT, *rest = (jnp.array(batch[name]) for name in batch)
    old_BT, ref_BT, sampler_BT, advantages_B, mask_BT = rest
    inputs = losses.LossInputs(advantages_B, mask_BT, mask_BT, old_BT, ref_BT, sampler_BT)
    settings = PLAIN | {"beta": 0.0, "kl_estimator": "k1"}
    loss, metrics = jitted_policy_loss(logps_BT, inputs, LossConfig(**settings))
    assert loss == metrics["policy_loss"]
    assert metrics["kl_sum"] > 0


# --- what stands in padding ---------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_whatever_stands_in_padding_cannot_leak(objective, level):
    batch = make_batch()
    poison_BT = np.resize(np.array([np.nan, np.inf, -np.inf, np.nan], np.float32), (10, 6))
    poisoned = {
        name: np.where(batch["mask"] > 0, array, np.roll(poison_BT, shift))
        if name in ("logps", "old", "ref", "sampler")  # shifted: inf - inf and inf - nan both occur
        else array
        for shift, (name, array) in enumerate(batch.items())
    }
    settings = PLAIN | {
        "objective": objective,
        "level": level,
        "kl_estimator": "k3_unbiased",
        "tis_level": "sequence" if level == "sequence" else "token",
    }
    clean, dirty = (run(b, "token_mean", settings) for b in (batch, poisoned))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.isfinite(dirty[1]).all()
    assert (dirty[1][batch["mask"] == 0] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_and_tis_weight_ignore_padding_on_their_own(level):
    poison_BT = jnp.array([[-1.0, jnp.nan], [-jnp.inf, -jnp.inf]])
    mask_BT = jnp.array([[1.0, 0.0], [0.0, 0.0]])

    def ratio(x_BT):
        return jitted_ratio(x_BT, poison_BT, mask_BT, level=level)

    np.testing.assert_array_equal(ratio(poison_BT), np.ones((2, 2)))
    gradient_BT = jax.grad(lambda x_BT: ratio(x_BT).sum())(poison_BT)
    np.testing.assert_array_equal(gradient_BT, [[1.0, 0.0], [0.0, 0.0]])
    tis_level = "sequence" if level == "sequence" else "token"
    weight_BT = tis(poison_BT, poison_BT, mask_BT, cap=2.0, level=tis_level)
    np.testing.assert_array_equal(weight_BT, np.ones((2, 2)))


def test_a_nan_on_a_counted_token_is_not_hidden():
    batch = make_batch()
    batch["logps"][0, 0] = np.nan
    assert np.isnan(run(batch, "token_mean", PLAIN)[0])


# --- log-probs far apart --------------------------------------------------------------------------


def test_a_token_ratio_is_held_at_e_to_the_twentieth():
    # Log ratios 19, 25, 200 and -200. Within the bound the gradient is the ratio itself.
    new_BT, ones_BT = jnp.array([[-1.0, -1.0, -1.0, -201.0]]), jnp.ones((1, 4))
    old_BT = jnp.array([[-20.0, -26.0, -201.0, -1.0]])
    ratio_BT, vjp = jax.vjp(lambda x_BT: jitted_ratio(x_BT, old_BT, ones_BT, level="token"), new_BT)
    e19, e20 = math.exp(19.0), math.exp(20.0)
    np.testing.assert_allclose(ratio_BT, [[e19, e20, e20, 0.0]], rtol=F32)
    np.testing.assert_allclose(vjp(ones_BT)[0], [[e19, 0.0, 0.0, 0.0]], rtol=GRAD_F32)


def test_k3_is_held_where_the_policy_is_far_below_the_reference_and_nowhere_else():
    # x = ref - logps = 19, 25, 200, -25, -200: k3 = e^x - x - 1 with slope 1 - e^x by logps.
    logps_BT = jnp.array([[-20.0, -26.0, -201.0, -1.0, -1.0]])
    ref_BT = jnp.array([[-1.0, -1.0, -1.0, -26.0, -201.0]])
    k3_BT, vjp = jax.vjp(lambda x_BT: losses.kl(x_BT, ref_BT, estimator="k3"), logps_BT)
    e19, e20 = math.exp(19.0), math.exp(20.0)
    np.testing.assert_allclose(k3_BT, [[e19 - 20, e20 - 21, e20 - 21, 24.0, 199.0]], rtol=F32)
    slope_BT = vjp(jnp.ones_like(k3_BT))[0]
    np.testing.assert_allclose(slope_BT, [[1 - e19, 0.0, 0.0, 1.0, 1.0]], rtol=GRAD_F32)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("change", [{}, {"dual_clip": None}, {"objective": "cispo"}])
def test_loss_and_gradient_are_finite_however_far_apart_the_log_probs_are(change, estimator, level):
    # Each of logps, old, ref and sampler at 0 or far below it, in all 16 ways, for each sign of A.
    far_B4 = -1e12 * (np.arange(16)[:, None] >> np.arange(4) & 1).repeat(2, axis=0)
    names = ("logps", "old", "ref", "sampler")
    batch = {name: column_B[:, None] for name, column_B in zip(names, far_B4.T, strict=True)}
    batch |= {"advantages": np.resize([1.0, -1.0], 32), "mask": np.ones((32, 1))}
    batch = {name: array.astype(np.float32) for name, array in batch.items()}
    tis_level = "sequence" if level == "sequence" else "token"
    settings = PLAIN | {"level": level, "kl_estimator": estimator, "tis_level": tis_level}
    loss, gradient_BT, metrics = run(batch, "token_mean", settings | change)
    assert np.isfinite([loss, *map(float, metrics.values())]).all()
    assert np.isfinite(gradient_BT).all()


# --- TRL's own figures --------------------------------------------------------------------------

TRL = json.loads((Path(__file__).parents[1] / "oracles" / "trl_losses.json").read_text())
TRL_AGGREGATION = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "constant",
}


@pytest.mark.parametrize("name", TRL["cases"])
def test_value_and_gradient_agree_with_trl(name):
    case = TRL["cases"][name]
    arrays = {key: jnp.array(value, jnp.float32) for key, value in TRL["inputs"].items()}
    is_cispo = case["loss_type"] == "cispo"
    beta, tis_cap = case["settings"].get("beta", 0.0), case["settings"].get("tis_cap")
    settings = {
        "objective": "cispo" if is_cispo else "clip",
        "level": case["level"],
        # TRL's CISPO has no lower bound, and its epsilon_high is the cap itself
        "epsilon": 1.0 if is_cispo else TRL["epsilon"],
        "epsilon_high": TRL["cispo_cap"] - 1 if is_cispo else TRL["epsilon_high"],
        "dual_clip": None,
        "beta": beta,
        "kl_estimator": "k3_unbiased" if case["settings"].get("unbiased") else "k3",
        "tis_cap": tis_cap,
        "tis_level": "token",
    }
    weights_BT = losses.token_weights(
        arrays["mask"],
        aggregation=TRL_AGGREGATION[case["loss_type"]],
        max_completion_length=TRL["max_completion_length"],
    )

    def loss_fn(logps_BT):
        inputs = losses.LossInputs(
            arrays["advantages"],
            arrays["mask"],
            weights_BT,
            old_logps=None if case["on_policy"] else arrays["old_logps"],
            ref_logps=arrays["ref_logps"] if beta else None,
            sampler_logps=arrays["sampler_logps"] if tis_cap else None,
        )
        return losses.policy_loss(logps_BT, inputs, LossConfig(**settings))

    (loss, sums), gradient_BT = jax.value_and_grad(loss_fn, has_aux=True)(arrays["logps"])
    close(loss, case["loss"])
    close(gradient_BT, case["gradient"], GRAD_F32)
    means = losses.metric_means(sums)
    if case["kl"] is not None and settings["kl_estimator"] == "k3":
        close(means["kl"], case["kl"])
    if case["clip_fraction"] is not None and case["level"] == "token":  # TRL counts rows for GSPO
        close(means["clip_fraction"], case["clip_fraction"])


# --- a teacher ---------------------------------------------------------------------------------


def distilled(logps_BT, teacher_BT, old_BT=None, mask_BT=None, **settings):
    """((loss, metrics), gradient by the log-probs) of a token mean, with advantages that would pull
    hard if they counted."""
    logps_BT, teacher_BT = jnp.array(logps_BT), jnp.array(teacher_BT)
    mask_BT = jnp.ones(logps_BT.shape) if mask_BT is None else jnp.array(mask_BT)
    inputs = losses.LossInputs(
        jnp.full(len(logps_BT), 50.0),
        mask_BT,
        mask_BT / mask_BT.sum(),
        old_logps=None if old_BT is None else jnp.array(old_BT),
        teacher_logps=teacher_BT,
    )
    config = LossConfig(**({"policy_weight": 0.0} | settings))
    loss_fn = lambda x_BT: losses.policy_loss(x_BT, inputs, config)
    return jax.value_and_grad(loss_fn, has_aux=True)(logps_BT)


def test_the_distillation_loss_by_hand():
    """Two tokens: pi = 1/2 of one that the teacher gives 1/4, and 1/4 of one that it gives 1/2:
    k3 = 1/2 - 1 + log 2 and 2 - 1 - log 2, each half of the mean; the gradient is -x of each."""
    logps_BT, teacher_BT = np.log([[0.5, 0.25, 0.1]]), np.log([[0.25, 0.5, 0.9]])
    (loss, sums), gradient_BT = distilled(
        logps_BT, teacher_BT, mask_BT=[[1.0, 1.0, 0.0]], distill_weight=3.0
    )
    log2 = math.log(2)
    close(loss, 3 * ((log2 - 0.5) + (1 - log2)) / 2)
    close(gradient_BT, 3 * np.array([[log2, -log2, 0]]) / 2, GRAD_F32)
    means = losses.metric_means(sums)
    close(means["teacher_kl"], 0.25)
    close(means["teacher_kl_loss"], 0.25)
    close(means["policy_loss"], -50.0)


@pytest.mark.parametrize("estimator", ["k2", "k3_k2grad", "k3_unbiased"])
def test_summed_over_a_vocabulary_the_gradient_is_that_of_the_reverse_kl(estimator):
    """Of KL(pi || teacher) by the logits of pi: pi * (log pi / teacher - KL), in NumPy."""
    logits_V, teacher_V = np.array([0.3, -0.7, 1.1]), np.array([0.2, 0.5, 0.3])
    pi_V = np.exp(logits_V) / np.exp(logits_V).sum()
    ratio_V = np.log(pi_V / teacher_V)
    expected_V = pi_V * (ratio_V - (pi_V * ratio_V).sum())
    jacobian_VV = np.eye(3) - pi_V  # of the log-prob of each token by the logits
    _, gradient_V1 = distilled(
        np.log(pi_V)[:, None], np.log(teacher_V)[:, None], kl_estimator=estimator
    )
    drawn_V = 3 * np.asarray(gradient_V1)[:, 0]  # the mean is over three tokens
    close(pi_V * drawn_V @ jacobian_VV, expected_V, GRAD_F32)


def test_tokens_of_an_older_policy_give_the_gradient_of_the_reverse_kl_too():
    pi_V, old_V, teacher_V = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.6, 0.3]])
    ratio_V = np.log(pi_V / teacher_V)
    expected_V = pi_V * (ratio_V - (pi_V * ratio_V).sum())
    column = lambda x_V: np.log(x_V)[:, None]
    _, gradient_V1 = distilled(column(pi_V), column(teacher_V), column(old_V))
    close(3 * old_V * np.asarray(gradient_V1)[:, 0] @ (np.eye(3) - pi_V), expected_V, GRAD_F32)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_student_that_is_the_teacher_has_loss_and_gradient_of_exactly_zero(estimator):
    logps_BT = make_batch()["logps"]
    (loss, _), gradient_BT = distilled(logps_BT, logps_BT, kl_estimator=estimator)
    assert loss == 0 and not np.any(gradient_BT)


def test_a_teacher_adds_what_a_reference_of_its_log_probs_would():
    """All at once: half of the policy's loss, the KL to a reference, and that to the teacher."""
    batch = make_batch()
    teacher_BT = batch["logps"] + np.random.default_rng(8).normal(0, 0.3, batch["logps"].shape)
    teacher_BT = teacher_BT.astype(np.float32)
    weights_BT = losses.token_weights(
        jnp.array(batch["mask"]), aggregation="token_mean", max_completion_length=MAX_LENGTH
    )
    arrays = {name: jnp.array(array) for name, array in batch.items()}
    inputs = losses.LossInputs(
        arrays["advantages"],
        arrays["mask"],
        weights_BT,
        old_logps=arrays["old"],
        ref_logps=arrays["ref"],
        teacher_logps=jnp.array(teacher_BT),
        sampler_logps=arrays["sampler"],
    )
    config = LossConfig(**PLAIN, policy_weight=0.5, distill_weight=0.3)
    loss, _ = losses.policy_loss(arrays["logps"], inputs, config)
    of_rows = lambda ref, beta: reference_losses(
        batch["logps"].astype(np.float64),
        batch | {"ref": ref},
        "token_mean",
        PLAIN | {"beta": beta},
    ).sum()
    policy = of_rows(batch["ref"], 0.0)
    of_reference = of_rows(batch["ref"], PLAIN["beta"]) - policy
    close(loss, 0.5 * policy + of_reference + of_rows(teacher_BT, 0.3) - policy, GRAD_F32)


# --- combinations -------------------------------------------------------------------------------

FINE_GROUPS = {"num_generations": 8, "scale": "group", "baseline": "mean", "num_iterations": 1}
FINE_GROUPS["has_teacher"] = False
FINE_LOSS = {"beta": 0.04, "kl_estimator": "k3", "tis_cap": 2.0}


def warnings_of(change):
    """Of sensible settings with a change."""
    groups = {name: change.get(name, value) for name, value in FINE_GROUPS.items()}
    of_loss = {name: value for name, value in change.items() if name not in groups}
    return loss_checks.check_combination(LossConfig(**(FINE_LOSS | of_loss)), **groups)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_generations": 4},
        {"num_generations": 2, "scale": "none"},
        {"epsilon_high": 0.1},  # narrower above than below: odd, but it means something
        {"beta": 0.0, "kl_estimator": "k1"},  # no loss is made of it
        {"level": "sequence", "aggregation": "sequence_mean"},
        {"level": "sequence_token", "aggregation": "sequence_mean"},
        {"dual_clip": 3.0, "num_iterations": 2},
        {"objective": "cispo", "num_iterations": 2},
        {"baseline": "leave_one_out", "scale": "none"},
        {"has_teacher": True, "policy_weight": 0.0},
        {"baseline": "leave_one_out", "scale": "batch"},
        {"tis_cap": None},
        {"tis_cap": 1.0},
    ],
)
def test_sensible_combinations_pass_in_silence(change):
    assert warnings_of(change) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_generations": 1}, "--grpo.num-generations 1 .*at least 2"),
        ({"num_iterations": 0}, "--grpo.num-iterations 0"),
        ({"epsilon": 0.0}, "--grpo.loss.epsilon 0.0 must be above 0"),
        ({"epsilon": -0.2}, "--grpo.loss.epsilon -0.2"),
        ({"epsilon": math.nan}, "--grpo.loss.epsilon nan"),
        ({"epsilon_high": -0.28}, "--grpo.loss.epsilon-high -0.28"),
        ({"epsilon_high": math.nan}, "--grpo.loss.epsilon-high nan"),
        ({"beta": -0.1}, "--grpo.loss.beta -0.1"),
        ({"beta": math.nan}, "--grpo.loss.beta nan"),
        ({"dual_clip": 1.0}, "--grpo.loss.dual-clip 1.0 must be above 1"),
        ({"dual_clip": math.nan}, "--grpo.loss.dual-clip nan"),
        ({"tis_cap": 0.5}, "--grpo.loss.tis-cap 0.5 must be at least 1"),
        ({"tis_cap": math.nan}, "--grpo.loss.tis-cap nan"),
        ({"kl_estimator": "k1"}, "k1.*gradient is zero.*k2"),
        ({"kl_estimator": "k1", "beta": 0.0, "has_teacher": True}, "k1.*gradient is zero.*k2"),
        (
            {"policy_weight": 0.0},
            "--grpo.loss.policy-weight 0 leaves nothing to learn from: name a --grpo.teacher",
        ),
        ({"policy_weight": -1.0}, "--grpo.loss.policy-weight -1.0 would punish"),
        ({"policy_weight": math.nan}, "--grpo.loss.policy-weight nan"),
        ({"distill_weight": 0.0}, "--grpo.loss.distill-weight 0.0 must be above 0"),
        ({"distill_weight": math.nan}, "--grpo.loss.distill-weight nan must be above 0"),
        (
            {"objective": "cispo", "dual_clip": 3.0},
            "--grpo.loss.dual-clip with --grpo.loss.objective cispo",
        ),
        ({"objective": "cispo", "level": "sequence"}, "cispo.*use --grpo.loss.level token"),
        (
            {"level": "sequence"},
            "level sequence with --grpo.loss.aggregation token_mean.*aggregation sequence_mean",
        ),
        (
            {"level": "sequence_token"},
            "level sequence_token with --grpo.loss.aggregation token_mean",
        ),
        ({"level": "sequence", "aggregation": "constant"}, "--grpo.loss.aggregation constant"),
        ({"baseline": "leave_one_out"}, "leave_one_out.*--grpo.scale group"),
    ],
)
def test_senseless_combinations_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        warnings_of(change)


@pytest.mark.parametrize(
    "change, warning",
    [
        ({"num_generations": 3}, "--grpo.num-generations 3 with --grpo.scale group"),
        ({"dual_clip": 3.0}, "--grpo.loss.dual-clip with --grpo.num-iterations 1"),
        ({"objective": "cispo"}, "--grpo.loss.objective cispo with --grpo.num-iterations 1"),
    ],
)
def test_unwise_combinations_are_warned_of(change, warning):
    (line,) = warnings_of(change)
    assert line.startswith(warning)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kl_estimator": "k1"}, "k1"),
        ({}, "beta=0.07 needs ref_logps"),
        ({"beta": 0.0}, "tis_cap=1.6 needs sampler_logps"),
    ],
)
def test_the_loss_refuses_what_it_cannot_mean(change, message):
    x_BT = -jnp.ones((1, 2))
    with pytest.raises(UserError, match=message):
        losses.policy_loss(
            x_BT, losses.LossInputs(jnp.ones(1), x_BT, x_BT), LossConfig(**(PLAIN | change))
        )


# Widths


@pytest.mark.parametrize(
    ("settings", "below_and_above"),
    [  # the ratios at which clipping begins
        ({}, (0.8, 1.28)),
        ({"level": "sequence"}, (0.9997, 1.0004)),
        ({"level": "sequence_token"}, (0.9997, 1.0004)),
        ({"objective": "cispo"}, (0.0, 5.0)),
        ({"objective": "cispo", "epsilon_high": 0.28}, (0.0, 1.28)),
        ({"level": "sequence", "epsilon": 0.2}, (0.8, 1.0004)),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, (0.9, 1.3)),
    ],
)
def test_each_objective_has_its_own_widths_and_a_number_replaces_one(settings, below_and_above):
    epsilon, epsilon_high = LossConfig(**settings).widths
    np.testing.assert_allclose((1 - epsilon, 1 + epsilon_high), below_and_above, rtol=1e-12)


@pytest.mark.parametrize(("ratio", "clipped"), [(0.01, 0.0), (4.9, 0.0), (5.1, 1.0)])
def test_cispo_of_its_own_widths_clips_ratios_above_five_alone(ratio, clipped):
    logps_BT, one_BT = jnp.full((1, 1), -1.0), jnp.ones((1, 1))
    inputs = losses.LossInputs(jnp.ones(1), one_BT, one_BT, old_logps=logps_BT - np.log(ratio))
    loss, metrics = losses.policy_loss(logps_BT, inputs, LossConfig(objective="cispo"))
    assert metrics["clipped_tokens"] == clipped
    np.testing.assert_allclose(loss, min(ratio, 5.0), rtol=1e-5)
