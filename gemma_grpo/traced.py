"""Matmul FLOPs of a program as JAX traced it, each loop as often as it turns. Knows no model.

XLA's own `cost_analysis` counts a loop's body once, and nothing of a TPU's collective matmuls.
Imports jax alone: Tunix's process, which sees nothing else of ours, counts by this file too.
"""

import math

import jax
from jax.extend import core


def matmul_flops(traced: jax.stages.Traced, *, turns: int = 1) -> int:
    """Of one device: 2 * (elements of the result) * (elements summed over), for each `dot_general`.

    A Pallas kernel counts as often as its grid has steps, and of a branch the dearest side.

    Args:
        turns: how often each `while` runs, whose length no trace knows.
    """
    return _flops(traced.jaxpr.jaxpr, turns)


def _flops(jaxpr: core.Jaxpr, turns: int) -> int:
    return sum(_of_equation(equation, turns) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, turns: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        lhs, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(result) * math.prod(lhs[axis] for axis in summed)
    if name == "cond":
        return max(_flops(branch.jaxpr, turns) for branch in params["branches"])
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "while":
        times = turns
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    inner = [value for value in params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
    return times * sum(_flops(getattr(one, "jaxpr", one), turns) for one in inner)
