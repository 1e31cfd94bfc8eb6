"""Matmul FLOPs of a program as JAX traced it, each loop as often as it turns.

XLA's own `cost_analysis` counts a loop's body once, and nothing of a TPU's collective matmuls.
Imports jax alone: Tunix's process, which sees nothing else of ours, counts by this file too.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core


def matmul_flops(
    traced: jax.stages.Traced,
    *,
    turns: int | Sequence[int] = 1,
    platform: str | None = None,
    steps: float | Sequence[float] | None = None,
    branches: Sequence[Sequence[int]] | None = None,
) -> int:
    """Of one device: 2 * (elements of the result) * (elements summed over), for each `dot_general`.

    A Pallas kernel counts as often as its grid has steps, and of a branch the most expensive side.

    Args:
        turns: how often each `while` runs, whose length no trace knows; or, for the outermost ones
            in their order, how often each.
        platform: that the program is for, such as "tpu". Of what is written in several ways its
            own is counted; without one, the most expensive.
        steps: of the side of a Pallas kernel's grid whose length no trace knows; or, with several
            `turns`, those in each of the loops.
        branches: which one of a `switch` each turn takes, for each of those loops; the mean counts.

    Raises:
        ValueError: there is such a side, and no `steps`.
    """
    if isinstance(turns, int):
        return round(_flops(traced.jaxpr.jaxpr, _Unknown(turns, platform, steps)))
    none = [None] * len(turns)
    loops = iter(zip(turns, steps or none, branches or none, strict=True))
    return round(_flops(traced.jaxpr.jaxpr, _Unknown(1, platform, None, None, loops)))


class _Unknown(NamedTuple):
    """What no trace knows."""

    turns: int
    platform: str | None
    steps: float | None
    taken: Sequence[int] | None = None
    loops: Iterator[tuple] | None = None  # of the outermost loops: turns, steps, taken


def _flops(jaxpr: core.Jaxpr, unknown: _Unknown) -> int | float:
    return sum(_of_equation(equation, unknown) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, unknown: _Unknown) -> int | float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        lhs, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(result) * math.prod(lhs[axis] for axis in summed)
    if name == "cond":
        branches = _branches(params, unknown.platform)
        flops = [_flops(branch.jaxpr, unknown) for branch in branches]
        if unknown.taken and not params.get("branches_platforms"):
            return sum(flops[one] for one in unknown.taken) / len(unknown.taken)
        return max(flops)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "while":
        if unknown.loops is not None:
            turns, steps, taken = next(unknown.loops)
            unknown = _Unknown(turns, unknown.platform, steps, taken)
        times = unknown.turns
    elif name == "pallas_call":
        times = math.prod(_steps(side, unknown) for side in params["grid_mapping"].grid)
        unknown = unknown._replace(taken=None)  # `pl.when` is a branch too
    inner = [value for value in params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
    return times * sum(_flops(getattr(one, "jaxpr", one), unknown) for one in inner)


def _branches(params: dict[str, Any], platform: str | None) -> Sequence[core.ClosedJaxpr]:
    """Those that may run: of `jax.lax.platform_dependent` the platform's, or else the default."""
    branches, platforms = params["branches"], params.get("branches_platforms")
    if platform is None or platforms is None:
        return branches
    own = [one for one, names in zip(branches, platforms, strict=True) if platform in (names or ())]
    return own or [one for one, names in zip(branches, platforms, strict=True) if names is None]


def _steps(side: Any, unknown: _Unknown) -> int | float:
    if isinstance(side, int):
        return side
    if unknown.steps is None:
        raise ValueError("a Pallas kernel has a grid of a length that no trace knows: give `steps`")
    return unknown.steps
