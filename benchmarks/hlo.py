"""What a compiled TPU program executes, from its optimised HLO. Knows no chip, kernel or schedule.

HBM traffic is counted from the layouts: an array without a memory space `S(n)` lies in HBM, and an
instruction reads its operands and writes its results once. Of what is sliced, or updated in place,
the piece counts. A Pallas call is opaque to XLA: its own `cost_estimate` stands for it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([\w.-]+)")
_SLICES = {"slice", "dynamic-slice", "gather"}
_PRODUCTS = {"convolution", "dot"}
_FREE = set(
    "parameter constant tuple get-tuple-element bitcast iota after-all copy-done slice-done".split()
)
_PALLAS = 'custom_call_target="tpu_custom_call"'


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type."""

    elements: int
    bytes: float
    in_hbm: bool


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    results: list[Array]
    operands: list[str]  # names; of a parameter its number
    rest: str  # attributes

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.results)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return list(self.instructions.values())[-1]

    def parameter(self, number: int) -> Instruction:
        return next(
            i
            for i in self.instructions.values()
            if i.opcode == "parameter" and i.operands == [str(number)]
        )

    def users(self, name: str) -> list[Instruction]:
        return [i for i in self.instructions.values() if name in i.operands]


@dataclass(frozen=True)
class Op:
    """An instruction of the program and how often it runs.

    Attributes:
        name: as in the dumps of its schedule.
        times: one, or the trips of the loops around it.
        hbm_bytes: between HBM and the core, each time.
        macs: multiply-adds of its matrix products, each time.
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
    computations, entry = _parse(text)
    return list(_walk(computations, entry, 1))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head.group(2)] = Computation()
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            is_root, name, type_text, opcode, operands, rest = found.groups()
            names = re.findall(r"%([\w.-]+)", operands) or [operands]
            current.instructions.pop(name, None)
            current.instructions[name] = Instruction(name, opcode, _arrays(type_text), names, rest)
            if is_root:
                current = None
    return computations, entry


def _arrays(type_text: str) -> list[Array]:
    arrays = []
    for dtype, bits, sides, layout in _ARRAY.findall(type_text):
        elements = math.prod(int(side) for side in sides.split(",") if side)
        size = elements * (1 if dtype == "pred" else int(bits) / 8)
        arrays.append(Array(elements, size, not re.search(r"S\([1-9]\d*\)", layout)))
    return arrays


def _walk(computations: dict[str, Computation], name: str, times: int) -> Iterator[Op]:
    computation = computations[name]
    for i in computation.instructions.values():
        if i.opcode in _FREE or (i.opcode == "custom-call" and _PALLAS not in i.rest):
            continue
        if i.opcode == "while":
            condition, body = (
                re.search(rf"\b{role}=%([\w.-]+)", i.rest).group(1)
                for role in ("condition", "body")
            )
            yield from _walk(computations, body, times * _trips(computations[condition]))
        elif i.opcode == "call":
            yield from _walk(computations, _CALLED.search(i.rest).group(1), times)
        elif i.opcode == "conditional":
            raise ValueError(f"{i.name}: which branch runs is not in the text")
        else:
            yield _op(computations, computation, i, times)


def _trips(condition: Computation) -> int:
    """Of a loop that counts from 0 up to a constant."""
    root = condition.root
    limits = [condition.instructions[name] for name in root.operands]
    counts = [i for i in limits if i.opcode == "constant"]
    if root.opcode != "compare" or "direction=LT" not in root.rest or len(counts) != 1:
        raise ValueError(f"{root.name}: the loop's trips are no constant")
    return int(counts[0].operands[0])


def _op(
    computations: dict[str, Computation], computation: Computation, i: Instruction, times: int
) -> Op:
    estimate = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
    is_pallas = i.opcode == "custom-call"
    is_transfer = i.opcode in ("copy-start", "slice-start")
    if is_pallas:
        hbm_bytes, flops = (
            int(re.search(rf'"{what}":"(\d+)"', i.rest).group(1))
            for what in ("bytes_accessed", "flops")
        )
        macs = flops / 2
    else:
        hbm_bytes = (
            _transfer(computation, i) if is_transfer else _traffic(computations, computation, i)
        )
        macs = _macs(computations, computation, i)
    cycles = int(estimate.group(1)) if estimate else None
    return Op(i.name, times, hbm_bytes, macs, cycles, is_pallas, is_transfer)


def _traffic(
    computations: dict[str, Computation], computation: Computation, i: Instruction
) -> float:
    read = sum(
        min(source.bytes, _read(computations, computation, name, i))
        for name in dict.fromkeys(i.operands)
        if (source := computation.instructions.get(name)) and all(a.in_hbm for a in source.results)
    )
    written = _written(computations, computation, i)
    return read + sum(b for b, array in zip(written, i.results, strict=True) if array.in_hbm)


def _transfer(computation: Computation, i: Instruction) -> float:
    """Of an asynchronous copy: its type is (to, from, ...) or, of a slice, ((from), to, ...)."""
    pair = i.results[:2]
    return min(array.bytes for array in pair) * sum(array.in_hbm for array in pair)


def _read(
    computations: dict[str, Computation], computation: Computation, name: str, user: Instruction
) -> float:
    """Bytes of the array `name` that one user of it reads."""
    if user.opcode in _SLICES and name == user.operands[0]:
        return user.bytes
    if user.opcode == "dynamic-update-slice" and name == user.operands[0]:
        return 0
    if user.opcode == "bitcast" and user is not computation.root:
        return sum(
            _read(computations, computation, user.name, other)
            for other in computation.users(user.name)
        )
    if user.opcode == "fusion":
        inner = computations[_CALLED.search(user.rest).group(1)]
        total = 0
        for number, operand in enumerate(user.operands):
            if operand == name:
                parameter = inner.parameter(number).name
                total += sum(
                    _read(computations, inner, parameter, u) for u in inner.users(parameter)
                )
        return total
    return computation.instructions[name].bytes


def _written(
    computations: dict[str, Computation], computation: Computation, i: Instruction
) -> list[float]:
    """Bytes of each result that are written."""
    if i.opcode == "dynamic-update-slice":
        return [computation.instructions[i.operands[1]].bytes]
    if i.opcode == "bitcast":
        return _written(computations, computation, computation.instructions[i.operands[0]])
    if i.opcode == "tuple":
        parts = [computation.instructions[name] for name in i.operands]
        return [b for part in parts for b in _written(computations, computation, part)]
    if i.opcode == "fusion":
        inner = computations[_CALLED.search(i.rest).group(1)]
        return _written(computations, inner, inner.root)
    return [array.bytes for array in i.results]


def _macs(computations: dict[str, Computation], computation: Computation, i: Instruction) -> float:
    """Of a product [M, K] [K, N] -> [M, N]: M K N is the root of the three sizes' product."""
    if i.opcode in _PRODUCTS:
        sides = [computation.instructions[name].results[0].elements for name in i.operands]
        return math.sqrt(math.prod(sides) * i.results[0].elements)
    if i.opcode != "fusion":
        return 0
    inner = computations[_CALLED.search(i.rest).group(1)]
    return sum(_macs(computations, inner, each) for each in inner.instructions.values())
