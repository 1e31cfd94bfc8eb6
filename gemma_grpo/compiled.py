"""What a compiled program says of itself: memory, collectives, compile time. Knows no model or run.

Read from XLA's own buffer assignment and optimised HLO, per device.
"""

import re
import time
from collections import Counter
from dataclasses import dataclass

import jax

from gemma_grpo import hlo

_COLLECTIVES = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
_CALL = re.compile(rf" = (.+?) ({_COLLECTIVES})(-start)?\(")
_NAME = re.compile(r"[\w.-]+")
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+))\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One kind of collective as it stands in the program; in a loop it runs many times.

    Attributes:
        kind: as HLO calls it, such as "all-gather".
        in_loop: it stands in the body of a while loop.
        largest: bytes of the largest result.
        count: how many there are.
    """

    kind: str
    in_loop: bool
    largest: int
    count: int


@dataclass(frozen=True)
class Compiled:
    """Per device, in bytes. The peak is what must fit: arguments are in it, buffers that are never
    alive together are not added up.

    Attributes:
        arguments: of the program's inputs, donated ones included.
        temporaries: of XLA's scratch space, as it would be without sharing.
        peak: the most alive at a time.
        collectives: by kind and place.
        loop_bytes: of HBM that one turn of the heaviest loop moves; 0 without a loop.
        compile_seconds: wall-clock, on this host.
    """

    arguments: int
    temporaries: int
    peak: int
    collectives: list[Collective]
    loop_bytes: float
    compile_seconds: float


def compile_and_read(lowered: jax.stages.Lowered) -> Compiled:
    """Compile a lowered program and read it off. Raises what XLA raises, as where HBM runs out."""
    started = time.monotonic()
    executable = lowered.compile()
    seconds = time.monotonic() - started
    memory, text = executable.memory_analysis(), executable.as_text()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives_in(text),
        loop_bytes=hlo.loop_body(hlo.parse(text)).bytes,
        compile_seconds=seconds,
    )


def collectives_in(hlo: str) -> list[Collective]:
    """The collectives of an HLO module's text. An asynchronous pair counts once.

    A computation counts as a loop's if a while names it as its body, or one in a loop names it.
    """
    bodies = _computations(hlo)
    in_loop = set(re.findall(r"\bbody=%?([\w.-]+)", hlo))
    todo = list(in_loop)
    while todo:
        named = set(_NAME.findall(bodies[todo.pop()])) & bodies.keys() - in_loop
        in_loop |= named
        todo += named
    found, largest = Counter(), Counter()
    for name, body in bodies.items():
        for result, kind, _ in _CALL.findall(body):
            key = (kind, name in in_loop)
            found[key] += 1
            largest[key] = max(largest[key], max(map(_bytes, _SHAPE.findall(result)), default=0))
    return [Collective(*key, largest[key], count) for key, count in sorted(found.items())]


def _computations(hlo: str) -> dict[str, str]:
    """Name -> text of each computation."""
    heads = list(re.finditer(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", hlo, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(hlo)]
    return {h.group(1): hlo[h.end() : end] for h, end in zip(heads, ends, strict=True)}


def _bytes(shape: tuple[str, str, str]) -> int:
    """Of one array, from its ("bf16", "16", "8,128")."""
    _, bits, sides = shape
    size = 1
    for side in filter(None, sides.split(",")):
        size *= int(side)
    return size * max(int(bits or 8) // 8, 1)
