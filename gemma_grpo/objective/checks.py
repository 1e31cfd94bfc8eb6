"""Which settings of loss and advantages go together: refusals and warnings, by flag."""

from typing import get_args

from gemma_grpo.errors import UserError
from gemma_grpo.objective.config import Baseline, LossConfig, Scale


def check_combination(
    loss: LossConfig,
    *,
    num_generations: int,
    scale: Scale,
    baseline: Baseline,
    num_iterations: int,
    has_teacher: bool = False,
) -> list[str]:
    """A warning for each setting that works but surprises. `num_iterations` is mu.

    Raises:
        UserError: settings that make no sense, alone or together; names the flags and the fix.
    """
    if num_iterations < 1:
        raise UserError(
            f"--grpo.num-iterations {num_iterations}: a rollout is trained on at least once"
        )
    _refuse_numbers(loss)
    check_advantages(num_generations=num_generations, scale=scale, baseline=baseline)
    _refuse_combinations(loss)
    refuse_kl_loss(loss, has_teacher=has_teacher)
    if loss.policy_weight == 0 and not has_teacher:
        raise UserError(
            "--grpo.loss.policy-weight 0 leaves nothing to learn from: name a --grpo.teacher, or "
            "use 1 for GRPO"
        )
    return _warnings(loss, num_generations, scale, num_iterations)


def check_advantages(*, num_generations: int, scale: str, baseline: str) -> None:
    """Raises UserError for an unknown name, G = 1, or leave_one_out with scale group or mean."""
    if scale not in get_args(Scale):
        raise UserError(f"--grpo.scale {scale} is unknown: use one of {get_args(Scale)}")
    if baseline not in get_args(Baseline):
        raise UserError(f"--grpo.baseline {baseline} is unknown: use one of {get_args(Baseline)}")
    if num_generations < 2:
        raise UserError(
            f"--grpo.num-generations {num_generations} leaves nothing to compare a completion "
            "with: use at least 2, better 8"
        )
    if baseline == "leave_one_out" and scale == "group":
        raise UserError(
            "--grpo.baseline leave_one_out with --grpo.scale group: the group's std contains the "
            "reward that leave-one-out leaves out; use --grpo.scale batch or none"
        )
    if baseline == "leave_one_out" and scale == "mean":
        raise UserError(
            "--grpo.baseline leave_one_out with --grpo.scale mean: the group's mean contains the "
            "reward that leave-one-out leaves out; use --grpo.baseline mean"
        )


def refuse_kl_loss(loss: LossConfig, *, has_teacher: bool) -> None:
    """Raises UserError for k1 as a loss; with beta=0 and no teacher it is not part of the loss."""
    if (loss.beta > 0 or has_teacher) and loss.kl_estimator == "k1":
        raise UserError(
            "--grpo.loss.kl-estimator k1 as a loss: its expected gradient is zero, so it adds "
            "noise and holds nothing; use k2, k3_k2grad or k3_unbiased"
        )


def _refuse_numbers(loss: LossConfig) -> None:
    """Raises UserError for a number out of range. `not (x > low)` refuses NaN too."""
    for name, width in zip(("epsilon", "epsilon-high"), loss.widths, strict=True):
        if not width > 0:
            raise UserError(
                f"--grpo.loss.{name} {width} must be above 0: the first update has ratio 1, which "
                "would be on the clip's edge; None is the objective's own width"
            )
    if not loss.beta >= 0:
        raise UserError(
            f"--grpo.loss.beta {loss.beta} would reward distance from the reference: use 0 or more"
        )
    if not loss.distill_weight > 0:
        raise UserError(
            f"--grpo.loss.distill-weight {loss.distill_weight} must be above 0: 1 is usual"
        )
    if not loss.policy_weight >= 0:
        raise UserError(
            f"--grpo.loss.policy-weight {loss.policy_weight} would punish what is rewarded: use "
            "0 or more"
        )
    if loss.dual_clip is not None and not loss.dual_clip > 1:
        raise UserError(
            f"--grpo.loss.dual-clip {loss.dual_clip} must be above 1, or it stops every completion "
            "that did worse than its group; 3 is usual"
        )
    if loss.tis_cap is not None and not loss.tis_cap >= 1:
        raise UserError(
            f"--grpo.loss.tis-cap {loss.tis_cap} must be at least 1, or it scales down tokens on "
            "which sampler and trainer agree; 2 is usual"
        )


def _refuse_combinations(loss: LossConfig) -> None:
    if loss.level != "token" and loss.objective == "cispo":
        raise UserError(
            f"--grpo.loss.objective cispo with --grpo.loss.level {loss.level}: CISPO weighs each "
            "token's own log-prob by that token's ratio; use --grpo.loss.level token"
        )
    if loss.level != "token" and loss.aggregation != "sequence_mean":
        raise UserError(
            f"--grpo.loss.level {loss.level} with --grpo.loss.aggregation {loss.aggregation}: a "
            "sequence's ratio would count once for each of its tokens; GSPO needs "
            "--grpo.loss.aggregation sequence_mean"
        )
    if loss.dual_clip is not None and loss.objective == "cispo":
        raise UserError(
            "--grpo.loss.dual-clip with --grpo.loss.objective cispo: CISPO's weights are bounded "
            "already; use --grpo.loss.dual-clip None"
        )


def _warnings(
    loss: LossConfig, num_generations: int, scale: Scale, num_iterations: int
) -> list[str]:
    """One line for each choice that works but surprises."""
    warnings = []
    if num_generations < 4 and scale == "group":
        warnings.append(
            f"--grpo.num-generations {num_generations} with --grpo.scale group: a std of this few "
            "rewards hides how large they are (with 2, an advantage is always 0 or 0.71 in size); "
            "use 4 or more, or --grpo.scale none"
        )
    if num_iterations == 1 and loss.dual_clip is not None:
        warnings.append(
            "--grpo.loss.dual-clip with --grpo.num-iterations 1: on the first update of a rollout "
            "every ratio is 1, so it has no effect"
        )
    if num_iterations == 1 and loss.objective == "cispo":
        warnings.append(
            "--grpo.loss.objective cispo with --grpo.num-iterations 1: on the first update of a "
            "rollout every ratio is 1, so this is plain REINFORCE"
        )
    return warnings
