"""What a compiled TPU program moves: HBM bytes and collectives, counted in its HLO text.

The compiler's own `cost_analysis` counts a loop's body once and a prefetch several times. Here:

- an array counts where it lies in HBM; one with a memory space in its layout, `S(1)`, is on chip
- a slice, in a fusion too, reads what it yields, and an update in place writes what it is given
- a copy into on-chip memory is one read of HBM; the pair of an asynchronous operation counts once
- a loop counts as often as its condition's constant says, a conditional as its costliest branch
- what a fusion of a collective in flight carries through untouched is no traffic, and the
  collective counts where it starts, not in each fusion that it is in flight in

Bytes are of one device. Traffic over the interconnect counts only as the HBM bytes at its ends.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
_NAME = re.compile(r"%([\w.-]+)")
_SUB_BYTE = {"s4": 0.5, "u4": 0.5, "pred": 1.0}
_SLICES = ("dynamic-slice", "slice", "gather")
MOVES_NOTHING = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id iota "
    "opt-barrier add-dependency".split()
)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO. `shape` and `attributes` are its text; `argument` that in the brackets."""

    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    argument: str
    attributes: str


@dataclass
class Computation:
    """Instructions by name, in order, and the name of the root."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def users(self, name: str) -> list[Instruction]:
        """The instructions that take `name` as an operand."""
        return [other for other in self.instructions.values() if name in other.operands]

    def parameters(self) -> dict[int, str]:
        """Number -> name."""
        return {
            int(one.argument): one.name
            for one in self.instructions.values()
            if one.op == "parameter"
        }


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


@dataclass(frozen=True)
class Moved:
    """HBM bytes of a program or a part of it, and its collectives by kind."""

    bytes: float
    collectives: dict[str, int]


def parse(text: str) -> Module:
    """A module from `compiled.as_text()`. Raises ValueError without an entry."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = Computation(head[2])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3])
            current.instructions[instruction.name] = instruction
            current.root = instruction.name if found[1] else current.root
    if not entry:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    return Module(computations, entry)


def program(module: Module) -> Moved:
    """Everything that one run moves."""
    return Moved(_traffic(module, module.entry), _collectives(module, module.entry))


def loop_body(module: Module) -> Moved:
    """One turn of the loop that moves most in a turn, of those in the entry computation; nothing
    where there is none."""
    heaviest = _heaviest_loop(module)
    if heaviest is None:
        return Moved(0.0, {})
    body = called(heaviest, "body")
    return Moved(_traffic(module, body), _collectives(module, body))


def carried_on_chip(module: Module) -> float:
    """Bytes that this loop keeps on chip from turn to turn: what it need not read again."""
    heaviest = _heaviest_loop(module)
    return _total(heaviest.shape) - _in_hbm(heaviest.shape) if heaviest else 0.0


def _heaviest_loop(module: Module) -> Instruction | None:
    entry = module.computations[module.entry]
    loops = [one for one in entry.instructions.values() if one.op == "while"]
    return max(loops, key=lambda one: _traffic(module, called(one, "body")), default=None)


def _instruction(name: str, rest: str) -> Instruction:
    """From "bf16[8]{0} add(%a, %b), attributes"."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    op = call[: call.index("(")]
    close = _closing(call, len(op))
    argument = call[len(op) + 1 : close]
    return Instruction(name, op, shape, tuple(_NAME.findall(argument)), argument, call[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"unbalanced: {text[:80]}")


def arrays(shape: str) -> list[tuple[float, bool]]:
    """(bytes, in HBM) of each array of an instruction's shape."""
    found = []
    for dtype, sides, layout in _ARRAY.findall(shape):
        width = _SUB_BYTE.get(dtype)
        if width is None:
            bits = re.search(r"\d+", dtype)
            if bits is None:
                continue  # a token, say
            width = int(bits[0]) / 8
        size = width
        for side in filter(None, sides.split(",")):
            size *= int(side)
        found.append((size, not _ON_CHIP.search(layout)))
    return found


def _in_hbm(shape: str) -> float:
    return sum((size for size, hbm in arrays(shape) if hbm), 0.0)


def _total(shape: str) -> float:
    return sum((size for size, _ in arrays(shape)), 0.0)


def called(instruction: Instruction, attribute: str) -> str:
    """The computation that an attribute such as "body" names."""
    found = re.search(rf"\b{attribute}=%?([\w.-]+)", instruction.attributes)
    assert found is not None, (instruction, attribute)
    return found[1]


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return _NAME.findall(listed[1])
    return re.findall(r"(?:true|false)_computation=%([\w.-]+)", instruction.attributes)


def trips(module: Module, loop: Instruction) -> int:
    """How often a loop runs: what the compiler states, or the largest constant that its condition
    compares with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    most, todo = 1, [called(loop, "condition")]
    while todo:
        for one in module.computations[todo.pop()].instructions.values():
            if one.op == "constant" and one.shape.startswith("s32[]"):
                most = max(most, int(one.argument))
            elif one.op == "fusion":
                todo.append(called(one, "calls"))
    return most


def _collectives(module: Module, name: str) -> dict[str, int]:
    """By kind, over loops and branches; an asynchronous pair counts once."""
    found: Counter[str] = Counter()
    for one in module.computations[name].instructions.values():
        kind = one.op.removesuffix("-start")
        if kind in COLLECTIVES:
            found[kind] += 1
        elif one.op == "while":
            inner = _collectives(module, called(one, "body"))
            found.update({kind: trips(module, one) * n for kind, n in inner.items()})
        elif one.op == "conditional":
            options = [_collectives(module, branch) for branch in _branches(one)]
            found.update(max(options, key=lambda option: sum(option.values()), default={}))
        elif one.op == "call":
            found.update(_collectives(module, called(one, "to_apply")))
        elif one.op == "async-start":
            found.update(_collectives(module, called(one, "calls")))
    return dict(found)


def _traffic(module: Module, name: str) -> float:
    """HBM bytes of a computation's run."""
    computation = module.computations[name]
    each = (moved(module, computation, one) for one in computation.instructions.values())
    return sum(each, 0.0)


def moved(module: Module, computation: Computation, one: Instruction) -> float:
    """HBM bytes of one instruction."""
    op = one.op
    if op in MOVES_NOTHING or op.endswith("-done"):
        return 0.0
    if op == "while":
        return trips(module, one) * _traffic(module, called(one, "body"))
    if op == "conditional":
        return max((_traffic(module, branch) for branch in _branches(one)), default=0.0)
    if op == "call":
        return _traffic(module, called(one, "to_apply"))
    if op == "fusion":
        return _fusion(module, computation, one)
    sources = [computation.instructions[name] for name in one.operands]
    if op in ("copy-start", "slice-start"):
        # The result is (destination, source, context) of a copy, (source, destination, ..) of a
        # slice.
        size, written = arrays(one.shape)[0 if op == "copy-start" else 1]
        return size * ((_in_hbm(sources[0].shape) > 0) + written)
    if op in _SLICES:
        return _total(one.shape) * (_in_hbm(sources[0].shape) > 0) + _in_hbm(one.shape)
    if op == "dynamic-update-slice":
        update = sources[1].shape
        return _in_hbm(update) + _total(update) * (_in_hbm(one.shape) > 0)
    if op.endswith("-start"):
        return _in_hbm(one.shape)
    return sum(_in_hbm(source.shape) for source in sources) + _in_hbm(one.shape)


def _fusion(module: Module, computation: Computation, one: Instruction) -> float:
    """What a fusion reads of its operands and writes of its results."""
    inner = module.computations[called(one, "calls")]
    outputs = arrays(one.shape)
    carried_in, carried_out = set(), set()
    if "async_collective_fusion" in inner.name:
        aliased = re.search(r"output_to_operand_aliasing=\{(.*?)\}, calls", one.attributes)
        for out, place in re.findall(r"\{(\d+)\}: \((\d+),", aliased[1] if aliased else ""):
            carried_out.add(int(out))
            carried_in.add(int(place))
    parameters, read = inner.parameters(), 0.0
    for place, name in enumerate(one.operands):
        size = _in_hbm(computation.instructions[name].shape)
        if size and place not in carried_in:
            part = _part_read(module, inner, parameters[place])
            read += size if part is None else min(size, part)
    root = inner.instructions[inner.root]
    results = root.operands if root.op == "tuple" else (inner.root,)
    written = 0.0
    for place, (size, hbm) in enumerate(outputs):
        if hbm and place not in carried_out:
            part = _part_written(module, inner, results[place]) if place < len(results) else None
            written += size if part is None else min(size, part)
    return read + written


def _part_read(module: Module, inner: Computation, name: str) -> float | None:
    """Bytes read of a parameter that is only sliced or updated in place; None is all of it."""
    users, total = inner.users(name), 0.0
    if not users or name == inner.root:
        return None  # handed on as it is
    for user in users:
        if user.op in _SLICES and user.operands[0] == name:
            total += _total(user.shape)
            continue
        if user.op == "dynamic-update-slice" and user.operands[0] == name:
            continue
        if user.op == "bitcast":
            part = _part_read(module, inner, user.name)
        elif user.op == "fusion":
            nested = module.computations[called(user, "calls")]
            places = [place for place, one in enumerate(user.operands) if one == name]
            parts = [_part_read(module, nested, nested.parameters()[place]) for place in places]
            known = [part for part in parts if part is not None]
            part = sum(known, 0.0) if len(known) == len(parts) else None
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _part_written(module: Module, inner: Computation, name: str) -> float | None:
    """Bytes written by a result that is an update in place; None is all of it."""
    one = inner.instructions[name]
    if one.op == "dynamic-update-slice":
        return _total(inner.instructions[one.operands[1]].shape)
    if one.op == "bitcast":
        return _part_written(module, inner, one.operands[0])
    if one.op == "fusion":
        nested = module.computations[called(one, "calls")]
        return _part_written(module, nested, nested.root)
    return None
