"""The ops that a compiled TPU program executes, how often, and what each moves and multiplies.

Bytes are counted as in `gemma_grpo/planning/hlo.py`; a Pallas call is opaque to XLA, and its own
`cost_estimate` stands for it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gemma_grpo.planning import hlo
from gemma_grpo.planning.hlo import Computation, Instruction, Module

_MATMULS = {"convolution", "dot"}
_PALLAS = 'custom_call_target="tpu_custom_call"'


@dataclass(frozen=True)
class Op:
    """An instruction of the program and how often it runs.

    Attributes:
        name: as in the dumps of its schedule.
        times: one, or the trips of the loops around it.
        hbm_bytes: between HBM and the core, each time.
        macs: multiply-adds of its matmuls, each time.
        estimated_cycles: XLA's own, each time; None where it makes none.
        is_pallas: bytes and MACs are then the kernel's `cost_estimate`.
        is_transfer: an asynchronous copy, which other ops run beside.
    """

    name: str
    times: int
    hbm_bytes: float
    macs: float
    estimated_cycles: int | None
    is_pallas: bool
    is_transfer: bool


def executed(text: str) -> list[Op]:
    """The ops of an optimised module.

    Raises:
        ValueError: the trips of a loop are no constant, or there is a conditional.
    """
    module = hlo.parse(text)
    return list(_walk(module, module.computations[module.entry], 1))


def _walk(module: Module, computation: Computation, times: int) -> Iterator[Op]:
    for one in computation.instructions.values():
        if one.op in hlo.MOVES_NOTHING or one.op.endswith("-done"):
            continue
        if one.op == "custom-call" and _PALLAS not in one.attributes:
            continue  # a name for some memory
        if one.op == "while":
            body = module.computations[hlo.called(one, "body")]
            yield from _walk(module, body, times * _trips(module, one))
        elif one.op == "call":
            yield from _walk(module, module.computations[hlo.called(one, "to_apply")], times)
        elif one.op == "conditional":
            raise ValueError(f"{one.name}: which branch runs is not in the text")
        else:
            yield _op(module, computation, one, times)


def _trips(module: Module, loop: Instruction) -> int:
    """Of a loop that counts up to a constant."""
    condition = module.computations[hlo.called(loop, "condition")]
    if "direction=LT" not in condition.instructions[condition.root].attributes:
        raise ValueError(f"{loop.name}: its trips are no constant")
    return hlo.trips(module, loop)


def _op(module: Module, computation: Computation, one: Instruction, times: int) -> Op:
    number = lambda name: int(re.search(rf'"{name}":"(\d+)"', one.attributes)[1])
    is_pallas = one.op == "custom-call"
    if is_pallas:
        hbm_bytes, macs = number("bytes_accessed"), number("flops") / 2
    else:
        hbm_bytes, macs = hlo.moved(module, computation, one), _macs(module, computation, one)
    return Op(
        name=one.name,
        times=times,
        hbm_bytes=hbm_bytes,
        macs=macs,
        estimated_cycles=number("estimated_cycles")
        if "estimated_cycles" in one.attributes
        else None,
        is_pallas=is_pallas,
        is_transfer=one.op in ("copy-start", "slice-start"),
    )


def _macs(module: Module, computation: Computation, one: Instruction) -> float:
    """Of a matmul [M, K] [K, N] -> [M, N]: M K N is the root of MK * KN * MN."""
    if one.op in _MATMULS:
        sides = [computation.instructions[name].shape for name in one.operands]
        return math.sqrt(math.prod(map(_elements, [*sides, one.shape])))
    if one.op != "fusion":
        return 0.0
    inner = module.computations[hlo.called(one, "calls")]
    return sum(_macs(module, inner, each) for each in inner.instructions.values())


def _elements(shape: str) -> int:
    return math.prod(int(side) for side in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if side)
