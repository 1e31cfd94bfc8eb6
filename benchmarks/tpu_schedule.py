"""What the TPU's compiler says of a program: HBM traffic, memory, and its own schedule in ms.

Nothing runs on a TPU. Each op of the optimised HLO takes the longest of: its HBM bytes at the
chip's bandwidth; its matmuls at the chip's peak; its schedule at 1.5 GHz. The schedule is

- for a matmul that the matrix unit bounds, XLA's `estimated_cycles` (97 % of the peak for a plain
  matmul of 4096 cubed). Its bundles leave out waits for that unit and count an epilogue at every
  step: they put the matmuls of `lm_head_logps` and of its plain form at 31 to 117 % of the peak;
- else the VLIW bundles times trips. XLA's estimate is up to 30 times as long for elementwise work,
  and there is none for Pallas kernels and sorts.

Ops follow one another without a gap, transfers run beside them, and the whole takes no less than
its bytes. So a time is the compiler's, and a bound from below for the chip's.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import bundles
from benchmarks.executed_ops import Op, executed
from gemma_grpo.planning.chips import Chip

CLOCK = 1.5e9  # Hz of a v5e: four matrix units of 128 x 128 multiply-adds make its 197 TFLOPs


class Schedule(NamedTuple):
    """Of one program on one chip; bytes, and seconds.

    Attributes:
        hbm_by_layout: traffic of XLA's ops, read off the layouts.
        hbm_by_cost_estimate: traffic of Pallas kernels as they state it, or as it was restated.
        temporaries: alive at the peak that are no arguments and no results.
        peak: the most alive at a time.
        seconds: of the schedule.
        products: share of the matrix unit's peak that the program's matmuls would have.
        ops: (name, seconds) of those that take 1 % or more, the longest first.
    """

    hbm_by_layout: float
    hbm_by_cost_estimate: float
    temporaries: int
    peak: int
    seconds: float
    products: float
    ops: list[tuple[str, float]]


def schedule(
    lower: Callable[..., jax.stages.Lowered],
    arguments: Sequence[Any],
    chip: Chip,
    *,
    trips: Sequence[int] = (),
    restated: Callable[[Op], Op] = lambda op: op,
) -> Schedule | None:
    """Compiles `lower(*arguments)` in a process of its own, and reads it; None where the compiler
    brings that process down, as its dumps can.

    Args:
        lower: of a module's top level, with plain arguments: the process imports it.
        trips: of the data-dependent loops of each of the program's Pallas kernels.
        restated: a Pallas kernel whose `cost_estimate` was made without knowing the data, with what
            it does.
    """
    with tempfile.TemporaryDirectory() as folder:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with pool:
            try:
                text, memory = pool.submit(_compile, folder, lower, *arguments).result()
            except BrokenProcessPool:
                return None
        kernels = bundles.dumped(Path(folder))
    ops = [restated(op) if op.is_pallas else op for op in executed(text)]
    times = {op.name: op.times * _seconds(op, kernels.get(op.name), chip, trips) for op in ops}
    hbm = {kind: _bytes(ops, is_pallas=kind) for kind in (False, True)}
    seconds = max(sum(times.values()), sum(hbm.values()) / chip.bandwidth)
    arguments_bytes, results_bytes, peak = memory
    longest = sorted(times.items(), key=lambda item: -item[1])
    return Schedule(
        hbm_by_layout=hbm[False],
        hbm_by_cost_estimate=hbm[True],
        temporaries=peak - arguments_bytes - results_bytes,
        peak=peak,
        seconds=seconds,
        products=2 * sum(op.macs * op.times for op in ops) / chip.flops / seconds,
        ops=[(name, took) for name, took in longest if took >= seconds / 100],
    )


def _compile(
    folder: str, lower: Callable[..., jax.stages.Lowered], *arguments: Any
) -> tuple[str, tuple[int, int, int]]:
    """Optimised HLO, and bytes of arguments, results and peak; dumps the kernels to the folder."""
    os.environ["LIBTPU_INIT_ARGS"] = bundles.dump_flags(Path(folder))
    compiled = lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return compiled.as_text(), (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.peak_memory_in_bytes,
    )


def _bytes(ops: Sequence[Op], *, is_pallas: bool) -> float:
    return sum(op.hbm_bytes * op.times for op in ops if op.is_pallas == is_pallas)


def _seconds(op: Op, kernel: str | None, chip: Chip, trips: Sequence[int]) -> float:
    """Of one execution. An op without a schedule has an equal one with it, and takes the floor."""
    if op.is_transfer:
        return 0.0
    by_product, by_memory = 2 * op.macs / chip.flops, op.hbm_bytes / chip.bandwidth
    floor = max(by_product, by_memory)
    if by_product > by_memory and op.estimated_cycles is not None:
        return max(floor, op.estimated_cycles / CLOCK)
    if kernel is None:
        return floor
    streamed, once = bundles.cycles(kernel, trips if op.is_pallas else None)
    return max(floor, streamed / CLOCK) + once / CLOCK
