"""Matmul FLOPs that a program compiled for the CPU executes, from its optimised HLO: each `dot` as
often as the loops around it turn. Knows no model.

XLA's own `cost_analysis` counts the body of a loop once.
"""

import math
import re
from functools import cache

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \((.*)\) -> .*\{$", re.MULTILINE)
_PARAMETER = re.compile(r"([\w.-]+): \w+\[([\d,]*)\]")
_RESULT = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]", re.MULTILINE)
_DOT = re.compile(
    r"= \w+\[([\d,]*)\]\S* dot\((?:\w+\[[^ ]* )?%?([\w.-]+),.*?lhs_contracting_dims=\{([\d,]*)\}"
)
_CALLED = re.compile(r"\b(calls|to_apply|body)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def executed_flops(hlo: str) -> int:
    """Of one device: 2 * (elements of the result) * (elements summed over), for each `dot` run.

    Raises:
        ValueError: a loop whose number of turns the compiler does not know, or a branch.
    """
    heads = list(_HEAD.finditer(hlo))
    ends = [head.start() for head in heads[1:]] + [len(hlo)]
    text = {head[2]: hlo[head.start() : end] for head, end in zip(heads, ends, strict=True)}

    @cache
    def flops(name: str) -> int:
        head, _, body = text[name].partition("\n")
        shapes = dict(_PARAMETER.findall(head)) | dict(_RESULT.findall(body))
        total = 0
        for line in body.splitlines():
            if dot := _DOT.search(line):
                lhs = _sides(shapes[dot[2]])
                summed = math.prod(lhs[axis] for axis in _sides(dot[3]))
                total += 2 * math.prod(_sides(dot[1])) * summed
            for kind, called in _CALLED.findall(line):
                turns = _TRIPS.search(line) if kind == "body" else None
                if kind == "body" and turns is None and flops(called):
                    raise ValueError(f"a loop of unknown length: {line.strip()[:200]}")
                total += flops(called) * (int(turns[1]) if turns else 1)
            if "branch_computations=" in line or "true_computation=" in line:
                raise ValueError(f"a branch: {line.strip()[:200]}")
        return total

    return flops(next(head[2] for head in heads if head[1]))


def _sides(shape: str) -> list[int]:
    return [int(side) for side in filter(None, shape.split(","))]
