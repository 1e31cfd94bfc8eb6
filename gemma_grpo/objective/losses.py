"""Per-token policy losses that compose: log-probs and advantages in, a scalar out.

Everything here is *minimised*: a loss is minus the paper's objective. Names: `logps` carries the
gradient, `old_logps` is the policy that sampled the rollout, as the trainer computes it;
`sampler_logps` is the same policy as the sampler computed it, `ref_logps` the frozen reference,
`teacher_logps` the teacher that is distilled.
Log-probs are natural logs, float32, of the token that was sampled. `mask_BT` is 1 on completion
tokens that count, the stop token included, and 0 elsewhere; values where it is 0 may be NaN.

Before each e^x of a difference of log-probs, x is clamped to at most `MAX_LOG_RATIO`, without
gradient beyond (`_clamped`): float32 overflows at 88. Below there is no bound, as e^x goes to 0.

How a loss is composed (`policy_loss`), each step a function below:

    ratio_BT     importance_ratio            token, GSPO or GSPO-token
    policy_BT    clipped_surrogate | cispo   clip, clip-higher, dual clip | CISPO
    x weight     truncated_importance_weights  sampler against trainer, detached
    + beta * kl  kl                          k2, k3, k3 with k2's gradient, unbiased k3
    + distill_weight * teacher_kl            on-policy distillation, the same estimators
    sum          token_weights               GRPO, DAPO or Dr.GRPO

Averaging is a matrix of weights, computed once from the mask of the *whole* batch, over all
micro-batches and devices. Accumulation is then a plain sum of losses and gradients, and does not
depend on how the batch was split.
"""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gemma_grpo.errors import UserError
from gemma_grpo.objective import checks as loss_checks
from gemma_grpo.objective.config import (
    Aggregation,
    KlEstimator,
    Level,
    LossConfig,
    Objective,
    TisLevel,
)

MAX_LOG_SEQUENCE_RATIO = 10.0  # as verl does: a geometric mean ratio of e^10 is a broken policy
MAX_LOG_RATIO = 20.0  # as verl does: a token this unlikely when sampled is one in 5e8


def token_weights(
    mask_BT: Float[Array, "B T"], *, aggregation: Aggregation, max_completion_length: int
) -> Float[Array, "B T"]:
    """The weight w of each token in loss = sum(w * token_loss), float32; 0 where the mask is 0.

    With L_i tokens counted in row i and R rows that count at all (L_i > 0):

        token_mean      1 / sum_i L_i    DAPO, 2503.14476: long completions weigh more
        sequence_mean   1 / (R * L_i)    GRPO, 2402.03300: each completion weighs the same
        constant        1 / (B * max_completion_length)    Dr.GRPO, 2503.20783

    Rows that are fully masked (truncated completions, say) do not count in the first two averages.
    They do count in B: Dr.GRPO's normaliser is a constant of the run, so that a token's gradient
    never depends on what else was sampled. `max_completion_length` is the budget in tokens, not the
    longest row nor the padded width T.
    """
    keep_BT = (mask_BT > 0).astype(jnp.float32)
    lengths_B1 = keep_BT.sum(axis=1, keepdims=True)
    if aggregation == "token_mean":
        return keep_BT / jnp.maximum(lengths_B1.sum(), 1)
    if aggregation == "sequence_mean":
        num_rows = jnp.maximum((lengths_B1 > 0).sum(), 1)
        return keep_BT / (num_rows * jnp.maximum(lengths_B1, 1))
    if aggregation == "constant":
        return keep_BT / (mask_BT.shape[0] * max_completion_length)
    raise _unknown("aggregation", aggregation, Aggregation)


def importance_ratio(
    logps_BT: Float[Array, "B T"],
    old_logps_BT: Float[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    *,
    level: Level,
) -> Float[Array, "B T"]:
    """pi / pi_old for each token, with its gradient; exactly 1, without gradient, in padding.

        token            r_it = exp(logps - old_logps)                    PPO, 1707.06347
        sequence         s_i  = exp(mean_t (logps - old_logps))           GSPO, 2507.18071
        sequence_token   s_it = sg[s_i] * pi_it / sg[pi_it]               GSPO-token, same paper

    s_i is repeated at each token of its row. s_it has the value of s_i, but the gradient of token t
    alone: d s_it = s_i * d logps_it, whereas d s_i gives each token s_i/L_i * d logps_it.

    log s is clamped to at most 10, without gradient there, and the token's log ratio to 20.
    """
    log_ratio_BT = _zero_padding(logps_BT, mask_BT) - _zero_padding(old_logps_BT, mask_BT)
    if level == "token":
        return jnp.exp(_clamped(log_ratio_BT))
    lengths_B1 = (mask_BT > 0).sum(axis=1, keepdims=True)
    log_s_B1 = log_ratio_BT.sum(axis=1, keepdims=True) / jnp.maximum(lengths_B1, 1)
    if level == "sequence":
        log_s_BT = jnp.broadcast_to(log_s_B1, logps_BT.shape)
    elif level == "sequence_token":
        token_BT = _zero_padding(logps_BT, mask_BT)  # x - sg(x) is 0, with the gradient of x
        log_s_BT = token_BT - jax.lax.stop_gradient(token_BT) + jax.lax.stop_gradient(log_s_B1)
    else:
        raise _unknown("level", level, Level)
    return jnp.exp(_zero_padding(jnp.minimum(log_s_BT, MAX_LOG_SEQUENCE_RATIO), mask_BT))


def clipped_surrogate(
    ratio_BT: Float[Array, "B T"],
    advantages_B: Float[Array, "B"],
    *,
    epsilon: float,
    epsilon_high: float,
    dual_clip: float | None,
) -> Float[Array, "B T"]:
    """PPO's pessimistic loss per token (1707.06347), with two widths and a floor.

        J = min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
        J = max(J, c A)   where A < 0, if dual_clip = c is given

    The min removes the gradient of tokens that have already moved far enough in the direction of A,
    and never of tokens that have moved against it. The gradient is

                  r < 1 - epsilon     inside     r > 1 + epsilon_high      r > c
        A > 0     A dr                A dr       0                         0
        A < 0     0                   A dr       A dr                      0 with dual clip

    epsilon_high > epsilon is DAPO's clip-higher (2503.14476). Dual clip is 1912.09729: without it
    the loss of a token with A < 0 that became likely grows with the ratio, which ends at e^20.
    """
    advantages_B1 = advantages_B[:, None]
    clipped_BT = jnp.clip(ratio_BT, 1 - epsilon, 1 + epsilon_high)
    surrogate_BT = jnp.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    if dual_clip is not None:
        floored_BT = jnp.maximum(surrogate_BT, dual_clip * advantages_B1)
        surrogate_BT = jnp.where(advantages_B1 < 0, floored_BT, surrogate_BT)
    return -surrogate_BT


def cispo(
    logps_BT: Float[Array, "B T"],
    ratio_BT: Float[Array, "B T"],
    advantages_B: Float[Array, "B"],
    *,
    epsilon: float,
    epsilon_high: float,
) -> Float[Array, "B T"]:
    """CISPO's loss per token (MiniMax-M1, 2506.13585): clips the weight, keeps the gradient.

        J = sg[clip(r, 1 - epsilon, 1 + epsilon_high)] * A * logps

    REINFORCE with a bounded importance weight: no token is ever dropped. epsilon=1 gives the
    paper's form without a lower bound. Both epsilons are distances from 1; TRL's `epsilon_high` is
    the cap itself.
    """
    weight_BT = jax.lax.stop_gradient(jnp.clip(ratio_BT, 1 - epsilon, 1 + epsilon_high))
    return -weight_BT * advantages_B[:, None] * logps_BT


def kl(
    logps_BT: Float[Array, "B T"],
    ref_logps_BT: Float[Array, "B T"],
    ratio_BT: Float[Array, "B T"] | None = None,
    *,
    estimator: KlEstimator,
) -> Float[Array, "B T"]:
    """An estimate of KL(pi || ref) from each sampled token, in nats; zero where the two agree.

    With x = ref_logps - logps (Schulman, "Approximating KL divergence", 2020), and the gradient
    that each has *as a loss*, in expectation over tokens sampled from pi:

        k1            -x                      0: only noise. A metric only
        k2            x^2 / 2                 grad KL(pi || ref); its value is biased
        k3            e^x - x - 1             grad KL(ref || pi), the reverse. GRPO's own
        k3_k2grad     k3, straight through    grad KL(pi || ref), and an unbiased value
        k3_unbiased   r * k3                  grad KL(pi || ref), even if tokens come from pi_old

    `ratio_BT` is the unclipped token ratio pi / pi_old with its gradient; only k3_unbiased needs it
    (DeepSeek-V3.2, 2512.02556, eq. 7). k1 and k3 are unbiased in value. In k3, x is at most 20.

    In on-policy distillation (Agarwal et al., 2306.13649; Gu et al., 2306.08543) ref is the
    teacher. On-policy, the gradient of all but k1 and k3 is that of a per-token advantage x, as in
    Lu et al. ("On-Policy Distillation", Thinking Machines 2025).
    """
    x_BT = ref_logps_BT - logps_BT
    k2_BT = jnp.square(x_BT) / 2
    clamped_BT = _clamped(x_BT)
    # expm1: near the reference e^x - 1 cancels to nothing in float32.
    k3_BT = jnp.expm1(clamped_BT) - clamped_BT
    if estimator == "k1":
        return -x_BT
    if estimator == "k2":
        return k2_BT
    if estimator == "k3":
        return k3_BT
    if estimator == "k3_k2grad":
        return k2_BT + jax.lax.stop_gradient(k3_BT - k2_BT)
    if estimator == "k3_unbiased":
        assert ratio_BT is not None
        return ratio_BT * k3_BT
    raise _unknown("kl_estimator", estimator, KlEstimator)


def truncated_importance_weights(
    trainer_logps_BT: Float[Array, "B T"],
    sampler_logps_BT: Float[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    *,
    cap: float,
    level: TisLevel,
) -> Float[Array, "B T"]:
    """min(rho, cap), where rho = pi_old of the trainer / pi_old of the sampler; no gradient.

    Corrects for two programs that disagree about one policy (Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"). At level "sequence" every token of a row
    has the product over the row. Padding has weight 1. log rho is clamped to at most 20.
    """
    gap_BT = _zero_padding(trainer_logps_BT, mask_BT) - _zero_padding(sampler_logps_BT, mask_BT)
    if level == "sequence":
        row_gap_B1 = gap_BT.sum(axis=1, keepdims=True)
        gap_BT = _zero_padding(jnp.broadcast_to(row_gap_B1, gap_BT.shape), mask_BT)
    elif level != "token":
        raise _unknown("tis_level", level, TisLevel)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(_clamped(gap_BT)), cap))


class LossInputs(NamedTuple):
    """What the loss of a micro-batch takes besides the log-probs that are trained.

    Attributes:
        advantages: one per row.
        mask: 1 on completion tokens that count, else 0.
        weights: this micro-batch's rows of the whole batch's `token_weights`.
        old_logps: None on the first update of a rollout, where pi is still pi_old: the ratio is
            then 1, and has a gradient.
        ref_logps: needed when beta > 0; at beta = 0 the KL is only measured.
        sampler_logps: needed when `tis_cap` is not None.
        teacher_logps: None where there is no teacher.
    """

    advantages: Float[Array, " B"]
    mask: Float[Array, "B T"]
    weights: Float[Array, "B T"]
    old_logps: Float[Array, "B T"] | None = None
    ref_logps: Float[Array, "B T"] | None = None
    sampler_logps: Float[Array, "B T"] | None = None
    teacher_logps: Float[Array, "B T"] | None = None


def policy_loss(
    logps_BT: Float[Array, "B T"], inputs: LossInputs, config: LossConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss and metrics of one micro-batch: sums, to be added over micro-batches and devices.

        loss = sum_BT weights * (policy_weight * min(rho, tis_cap) * policy + beta * kl
                                 + distill_weight * teacher_kl)

    The KLs use the token ratio at every level. `config` is static under jit.

    Metrics: `policy_loss`, `kl_loss` and `teacher_kl_loss`, with the token weights but without the
    factors policy_weight, beta and distill_weight; `tokens`, the number that count;
    `clipped_tokens`, `kl_sum` and `teacher_kl_sum` (k3, whatever the estimator), `tis_weight_sum`
    and `tis_capped_tokens`, sums over these tokens. `metric_means` divides. A metric that was not
    measured is absent.

    Raises UserError for k1 as a loss, and for missing log-probs.
    """
    loss_checks.refuse_kl_loss(config, has_teacher=inputs.teacher_logps is not None)
    beta, tis_cap, mask_BT = config.beta, config.tis_cap, inputs.mask
    if beta > 0 and inputs.ref_logps is None:
        raise UserError(f"beta={beta} needs ref_logps: score the batch with the reference first")
    logps_BT, old_logps_BT = _zero_padding(logps_BT, mask_BT), inputs.old_logps
    if old_logps_BT is None:
        old_logps_BT = jax.lax.stop_gradient(logps_BT)
    ratio_BT = importance_ratio(logps_BT, old_logps_BT, mask_BT, level=config.level)
    policy_BT, clipped_BT = _policy_term(logps_BT, ratio_BT, inputs.advantages, config)
    metrics = {"tokens": _count(True, mask_BT), "clipped_tokens": _count(clipped_BT, mask_BT)}
    if tis_cap is not None:
        if inputs.sampler_logps is None:
            raise UserError(f"tis_cap={tis_cap} needs sampler_logps: keep them from the rollout")
        rho_BT = truncated_importance_weights(
            old_logps_BT, inputs.sampler_logps, mask_BT, cap=tis_cap, level=config.tis_level
        )
        policy_BT = rho_BT * policy_BT
        metrics["tis_weight_sum"] = _zero_padding(rho_BT, mask_BT).sum()
        metrics["tis_capped_tokens"] = _count(rho_BT >= tis_cap, mask_BT)
    metrics["policy_loss"] = (inputs.weights * policy_BT).sum()
    loss = config.policy_weight * metrics["policy_loss"]
    token_ratio_BT = importance_ratio(logps_BT, old_logps_BT, mask_BT, level="token")
    for name, target_logps_BT, weight in (
        ("kl", inputs.ref_logps, beta),
        ("teacher_kl", inputs.teacher_logps, config.distill_weight),
    ):
        if target_logps_BT is not None:
            target_logps_BT = _zero_padding(target_logps_BT, mask_BT)
            kl_BT = kl(logps_BT, target_logps_BT, token_ratio_BT, estimator=config.kl_estimator)
            metrics[f"{name}_loss"] = (inputs.weights * kl_BT).sum()
            metrics[f"{name}_sum"] = kl(logps_BT, target_logps_BT, estimator="k3").sum()
            loss = loss + weight * metrics[f"{name}_loss"]
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def metric_means(sums: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """The metrics of a whole update, from those of `policy_loss` summed over micro-batches.

    `policy_loss`, `kl_loss` and `teacher_kl_loss` are returned as they are. Means over the tokens
    that count: `clip_fraction`; `kl` and `teacher_kl`, in nats per token; `tis_weight`;
    `tis_capped_fraction`.
    """
    tokens = jnp.maximum(sums["tokens"], 1)
    losses = ("policy_loss", "kl_loss", "teacher_kl_loss")
    means = {name: sums[name] for name in losses if name in sums}
    sum_of_mean = {
        "clip_fraction": "clipped_tokens",
        "kl": "kl_sum",
        "teacher_kl": "teacher_kl_sum",
        "tis_weight": "tis_weight_sum",
        "tis_capped_fraction": "tis_capped_tokens",
    }
    return means | {name: sums[key] / tokens for name, key in sum_of_mean.items() if key in sums}


def _policy_term(
    logps_BT: Float[Array, "B T"],
    ratio_BT: Float[Array, "B T"],
    advantages_B: Float[Array, "B"],
    config: LossConfig,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """The policy loss of each token, and whether it is clipped."""
    epsilon, epsilon_high = config.widths
    widths = dict(epsilon=epsilon, epsilon_high=epsilon_high)
    too_low_BT, too_high_BT = ratio_BT < 1 - epsilon, ratio_BT > 1 + epsilon_high
    if config.objective == "clip":
        policy_BT = clipped_surrogate(ratio_BT, advantages_B, **widths, dual_clip=config.dual_clip)
        # Where the min of `clipped_surrogate` takes its constant branch.
        advantages_B1 = advantages_B[:, None]
        clipped_BT = ((advantages_B1 > 0) & too_high_BT) | ((advantages_B1 < 0) & too_low_BT)
        return policy_BT, clipped_BT
    if config.objective == "cispo":
        return cispo(logps_BT, ratio_BT, advantages_B, **widths), too_low_BT | too_high_BT
    raise _unknown("objective", config.objective, Objective)


def _clamped(log_ratio_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The log ratio, at most `MAX_LOG_RATIO`, without gradient beyond; NaN stays NaN."""
    return jnp.minimum(log_ratio_BT, MAX_LOG_RATIO)


def _zero_padding(
    values_BT: Float[Array, "B T"], mask_BT: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """The values where the mask is 1, else 0, in value and gradient, even for NaN."""
    # Not values * mask: 0 * NaN is NaN.
    return jnp.where(mask_BT > 0, values_BT, 0)


def _count(true_BT: Bool[Array, "B T"] | bool, mask_BT: Float[Array, "B T"]) -> Float[Array, ""]:
    """How many unmasked tokens are true, as float32 like the other metrics; exact to 2^24."""
    return (true_BT & (mask_BT > 0)).sum(dtype=jnp.float32)


def _unknown(name: str, value: object, names: object) -> UserError:
    """The error for a value outside the Literal `names`, for callers without a type checker."""
    return UserError(f"{name}={value!r} is unknown: use one of {get_args(names)}")
