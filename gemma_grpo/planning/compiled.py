"""What a compiled program says of itself: memory, collectives, compile time.

Read from XLA's own buffer assignment and optimised HLO, per device.
"""

import re
import time
from collections import Counter
from dataclasses import dataclass

import jax

from gemma_grpo.planning import hlo

_NAME = re.compile(r"[\w.-]+")


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
        hbm_bytes: that one execution moves, counted in the program's text (`hlo.py`).
        collectives, hbm_bytes, loop_bytes, kept_on_chip: None where XLA cannot print the program's
            text; libtpu 0.0.52 fails to for v6e.
        loop_bytes: of HBM that one turn of the heaviest loop moves; 0 without a loop.
        kept_on_chip: that this loop carries from turn to turn without a way through HBM.
        compile_seconds, compile_cpu_seconds: on this host, by the clock and of all its cores.
    """

    arguments: int
    temporaries: int
    peak: int
    collectives: list[Collective] | None
    hbm_bytes: float | None
    loop_bytes: float | None
    kept_on_chip: float | None
    compile_seconds: float
    compile_cpu_seconds: float


def compile_and_read(lowered: jax.stages.Lowered) -> Compiled:
    """Compile a lowered program and read it off. Raises what XLA raises, as where HBM runs out."""
    started, cpu_started = time.monotonic(), time.process_time()
    executable = lowered.compile()
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    memory, module = executable.memory_analysis(), _module(executable)
    assert memory is not None  # XLA tells it on every device that we compile for
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives_in(module) if module else None,
        hbm_bytes=hlo.program(module).bytes if module else None,
        loop_bytes=hlo.loop_body(module).bytes if module else None,
        kept_on_chip=hlo.carried_on_chip(module) if module else None,
        compile_seconds=seconds,
        compile_cpu_seconds=cpu_seconds,
    )


def _module(executable: jax.stages.Compiled) -> hlo.Module | None:
    """The program's text, parsed; None where XLA fails to print it."""
    try:
        return hlo.parse(executable.as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        return None


def collectives_in(module: hlo.Module) -> list[Collective]:
    """The collectives of a program. An asynchronous pair counts once.

    A computation counts as a loop's if a while names it as its body, or one in a loop names it.
    """
    bodies = {name: list(each.instructions.values()) for name, each in module.computations.items()}
    named = {
        name: set(_NAME.findall(" ".join(one.attributes for one in body))) & bodies.keys()
        for name, body in bodies.items()
    }
    in_loop = {
        hlo.called(one, "body") for body in bodies.values() for one in body if one.op == "while"
    }
    todo = list(in_loop)
    while todo:
        new = named[todo.pop()] - in_loop
        in_loop |= new
        todo += new
    found: Counter[tuple[str, bool]] = Counter()
    largest: Counter[tuple[str, bool]] = Counter()
    for name, body in bodies.items():
        for one in body:
            kind = one.op.removesuffix("-start")
            if kind in hlo.COLLECTIVES:
                key = (kind, name in in_loop)
                found[key] += 1
                sizes = [int(size) for size, _ in hlo.arrays(one.shape)]
                largest[key] = max(largest[key], *sizes)
    return [
        Collective(kind, inside, largest[kind, inside], count)
        for (kind, inside), count in sorted(found.items())
    ]
