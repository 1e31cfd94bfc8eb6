"""Cycles of a TPU kernel from its schedule as the compiler dumps it.

`--xla_jf_dump_llo_text` writes the VLIW bundles of every kernel, one a cycle, and marks with `>`
how deep in loops each stands. What stalls is not in it: a bundle that waits for memory or for the
matrix unit counts as one cycle.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*\{(\})?")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder [^,]+, (\d+) /\* loop exit test")
_UNEQUAL = re.compile(r"%(p\w+) = scmp\.ne\.s32\.totalorder [^,]+, -?\d+\b")
_SKIP = re.compile(r"sbr\.rel \(%(p\w+)\) target = \$region(\d+)\b")


class Cycles(NamedTuple):
    """Bundles, each as often as it runs.

    Attributes:
        streamed: of the outermost loops, which fetch the next step's operands meanwhile.
        once: of what runs one time: outside of all loops, or in one step of an outermost one.
    """

    streamed: int
    once: int


@dataclass
class _Scope:
    """A loop; or, with a label, a region that is run in one step of the loop around it."""

    depth: int
    label: str | None = None
    trips: int | None = None
    each: int = 0  # bundles of every step
    once: int = 0  # of one step


def dump_flags(folder: Path) -> str:
    """For LIBTPU_INIT_ARGS, before the compiler is loaded."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


def dumped(folder: Path) -> dict[str, str]:
    """The text of each kernel by the name of its HLO instruction. Of equal ones there is one."""
    names = {path: _FILE.fullmatch(path.name) for path in sorted(folder.glob("*final_bundles.txt"))}
    return {
        name.group(1): path.read_text(errors="replace")
        for path, name in names.items()
        if name and "schedule-analysis" not in path.name
    }


def cycles(text: str, trips: Sequence[int] | None = None) -> Cycles:
    """Of one kernel.

    A region behind a branch counts as run at every step, but for one that is run where a number
    equals a constant: that happens in one step.

    Args:
        trips: of the loops that end on data, in the order of the text. None counts them as run
            once: they are then waits for transfers, a few bundles each.

    Raises:
        ValueError: the kernel has another number of such loops.
    """
    whole = _Scope(depth=0)
    scopes, unequal = [whole], set()
    unknown = list(trips or ())

    def close() -> None:
        scope, around = scopes.pop(), scopes[-1]
        if scope.label:
            around.once += scope.each + scope.once
            return
        if scope.trips is None and trips is not None and not unknown:
            raise ValueError(f"more loops end on data than the {len(trips)} whose trips are given")
        steps = scope.trips or (unknown.pop(0) if trips is not None else 1)
        if around is whole:
            whole.each += steps * scope.each
            whole.once += scope.once
        else:
            around.each += steps * scope.each + scope.once

    for line in text.splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        label, depth, is_empty = bundle.group(1), len(bundle.group(2)), bundle.group(3)
        if not is_empty:  # an empty one has lost its marks
            while scopes[-1] is not whole and _ends(scopes[-1], line, label, depth):
                close()
            if label == "LB":
                scopes.append(_Scope(depth))
        if scopes[-1] is whole:
            whole.once += 1
        else:
            scopes[-1].each += 1
        if test := _EXIT.search(line):
            loop = next(s for s in reversed(scopes) if not s.label and s.depth == depth)
            loop.trips = int(test.group(1))
        unequal.update(_UNEQUAL.findall(line))
        if depth and (skip := _SKIP.search(line)) and skip.group(1) in unequal:
            scopes.append(_Scope(depth, label=skip.group(2)))
    while scopes[-1] is not whole:
        close()
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(trips)} trips belong to no loop")
    return Cycles(whole.each, whole.once)


def _ends(scope: _Scope, line: str, label: str | None, depth: int) -> bool:
    """Whether the scope has ended before this bundle."""
    if scope.label:
        return re.search(rf"region {scope.label}\b", line) is not None
    return depth < scope.depth or (label == "LB" and depth == scope.depth)
