"""Which loss settings go together: refusals and warnings, by field name. Computes nothing."""

from gemma_grpo.errors import UserError


def check_combination(
    *,
    num_generations: int,
    scale: str,
    baseline: str,
    objective: str,
    level: str,
    aggregation: str,
    epsilon: float,
    epsilon_high: float,
    dual_clip: float | None,
    beta: float,
    kl_estimator: str,
    tis_cap: float | None,
    num_iterations: int,
) -> list[str]:
    """Refuse settings that make no sense together; return a line for each that is only unwise.

    Names are those of the config's fields. Raises UserError, naming the fields and the mend.
    """
    _refuse_numbers(
        num_generations=num_generations,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        dual_clip=dual_clip,
        beta=beta,
        tis_cap=tis_cap,
        num_iterations=num_iterations,
    )
    if baseline == "leave_one_out" and scale == "group":
        raise UserError(
            "baseline='leave_one_out' with scale='group': the group's std contains the very reward "
            "that leave-one-out takes care to leave out; use scale='batch' or 'none'"
        )
    if level != "token" and objective == "cispo":
        raise UserError(
            f"objective='cispo' with level={level!r}: CISPO weighs each token's own log-prob by "
            "that token's ratio; use level='token'"
        )
    if level != "token" and aggregation != "sequence_mean":
        raise UserError(
            f"level={level!r} with aggregation={aggregation!r}: a sequence's ratio would count "
            "once for each of its tokens; GSPO needs aggregation='sequence_mean'"
        )
    if dual_clip is not None and objective == "cispo":
        raise UserError(
            "dual_clip with objective='cispo': CISPO's weights are bounded already; "
            "set dual_clip to none"
        )
    refuse_kl_loss(beta=beta, kl_estimator=kl_estimator)
    return _warnings(num_generations, scale, objective, dual_clip, num_iterations)


def refuse_kl_loss(*, beta: float, kl_estimator: str) -> None:
    """Raise UserError for k1 as a loss; it is fine where beta=0 only measures."""
    if beta > 0 and kl_estimator == "k1":
        raise UserError(
            "kl_estimator='k1' as a loss: its expected gradient is zero, so it adds noise and "
            "holds nothing; use 'k2', 'k3_k2grad' or 'k3_unbiased'"
        )


def _refuse_numbers(
    *,
    num_generations: int,
    epsilon: float,
    epsilon_high: float,
    dual_clip: float | None,
    beta: float,
    tis_cap: float | None,
    num_iterations: int,
) -> None:
    """Raise UserError for a number out of range. Written as `not (x > low)`, so NaN is refused."""
    if num_generations < 2:
        raise UserError(
            f"num_generations={num_generations} leaves nothing to compare a completion with: "
            "use at least 2, better 8"
        )
    if num_iterations < 1:
        raise UserError(f"num_iterations={num_iterations}: a rollout is trained on at least once")
    for name, width in (("epsilon", epsilon), ("epsilon_high", epsilon_high)):
        if not width > 0:
            raise UserError(
                f"{name}={width} must be above 0: the first update stands at ratio 1, which "
                "would be on the clip's edge; 0.2 is usual"
            )
    if not beta >= 0:
        raise UserError(f"beta={beta} would reward distance from the reference: use 0 or more")
    if dual_clip is not None and not dual_clip > 1:
        raise UserError(
            f"dual_clip={dual_clip} must be above 1, or it stops every completion that did "
            "worse than its group; 3 is usual"
        )
    if tis_cap is not None and not tis_cap >= 1:
        raise UserError(
            f"tis_cap={tis_cap} must be at least 1, or it scales down tokens on which sampler "
            "and trainer agree; 2 is usual"
        )


def _warnings(
    num_generations: int, scale: str, objective: str, dual_clip: float | None, num_iterations: int
) -> list[str]:
    """One line for each choice that works but surprises."""
    warnings = []
    if num_generations < 4 and scale == "group":
        warnings.append(
            f"num_generations={num_generations} with scale='group': a std from so few rewards "
            "hides how large they are (with 2, an advantage is always 0 or 0.71 in size); "
            "use 4 or more, or scale='none'"
        )
    if num_iterations == 1 and dual_clip is not None:
        warnings.append(
            "dual_clip with num_iterations=1: on the first update of a rollout every ratio is 1, "
            "so it never acts unless a rollout is cut into several updates"
        )
    if num_iterations == 1 and objective == "cispo":
        warnings.append(
            "objective='cispo' with num_iterations=1: on the first update of a rollout every ratio "
            "is 1, so this is plain REINFORCE unless a rollout is cut into several updates"
        )
    return warnings
