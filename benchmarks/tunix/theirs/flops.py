"""Floating-point operations of a program's matrix products, as executed. Knows no program.

jax alone, for Tunix's process reads this file too. Counted in the jaxpr, before any compiler: loops
by their trips, what is computed again in a backward pass as often as it is computed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def matmul_flops(function: Callable, arguments: tuple, *, while_trips: int) -> int:
    """2 m n k, summed over all products of `function(*arguments)`, on one device.

    Args:
        while_trips: turns of each `while` loop; those of a scan are known.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, while_trips)


def _count(jaxpr: core.Jaxpr, while_trips: int) -> int:
    return sum(_of_equation(equation, while_trips) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, while_trips: int) -> int:
    name, given = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = given["dimension_numbers"]
        left = equation.invars[0].aval.shape
        inner = math.prod(left[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return max(_count(branch.jaxpr, while_trips) for branch in given["branches"])
    trips = {"scan": given.get("length"), "while": while_trips}.get(name, 1)
    return trips * sum(_count(inner, while_trips) for inner in _inner(given))


def _inner(given: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs that an equation runs, whatever it calls them."""
    found = [value for value in given.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
    return [one.jaxpr if isinstance(one, core.ClosedJaxpr) else one for one in found]
