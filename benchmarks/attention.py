"""Attention of one packed layer, forward and backward, by the TPU's compiler: the kernel against
the form that unpacks the rows.

python -m benchmarks.attention [--where v5e:2x4]

Gemma 3 1B's heads in bfloat16, the fullest pack of `benchmarks.lengths` as preset gemma3-1b packs
it for eight chips. A row for each kind of layer and pass.
`tpu_schedule.py` says how times are read; they are the compiler's. What begins and ends a block of
queries counts at every pair, which makes the kernels slower than they are. What they move and
multiply is counted by the pairs of blocks that they go through.
"""

from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import packing
from benchmarks.executed_ops import Op
from benchmarks.timing import print_row
from benchmarks.tpu_schedule import Schedule, schedule
from gemma_grpo import presets
from gemma_grpo.kernels import packed_attention
from gemma_grpo.kernels.packed_attention import block_masks, cases, pallas_tpu
from gemma_grpo.model import Packed, attention
from gemma_grpo.planning import chips, topology
from gemma_grpo.training import grpo

CASE = cases.GEMMA3_1B
WINDOWS = {"local": CASE.window, "global": None}
RUN = presets.preset("gemma3-1b")
(PACK, *_) = grpo.make_packing(RUN.grpo, (512, 800), 8).shapes
PROMPTS, COMPLETIONS = (PACK.num_prompts, 512), (PACK.num_prompts * PACK.rows_each, 800)
PROMPT_SLOTS = PROMPTS[0] * PROMPTS[1]
NUM_SLOTS = PROMPT_SLOTS + COMPLETIONS[0] * COMPLETIONS[1]


def main(where: str = "v5e:2x4") -> None:
    """Compile and print.

    Args:
        where: topology, one chip of which is compiled for.
    """
    chip = chips.chip_of(where, topology.devices(where))
    for kind in WINDOWS:
        pairs = int(make_block_mask(kind, jnp.asarray(fullest())).count)
        for both_ways in (False, True):
            read = {
                side: schedule(
                    lowered,
                    (side, kind, both_ways, where),
                    chip,
                    trips=[pairs] if side == "ours" else (),
                    restated=partial(restated, pairs=pairs),
                )
                for side in ("ours", "unpacked")
            }
            each = lambda of, read=read: {side: of(one) for side, one in read.items()}
            print_row(
                benchmark="attention",
                topology=where,
                libtpu=metadata.version("libtpu"),
                layer=kind,
                passes="forward and backward" if both_ways else "forward",
                dtype="bfloat16",
                heads=dict(zip(("query", "kv", "head_dim"), CASE[1:4], strict=True)),
                tokens=int((fullest() < NUM_SLOTS).sum()),
                slots=CASE.num_tokens,
                pairs_of_blocks=pairs,
                blocks=[block_masks.QUERIES, block_masks.KEYS],
                ms=each(lambda one: round(one.seconds * 1e3, 3)),
                ratio=round(read["unpacked"].seconds / read["ours"].seconds, 2),
                matrix_unit_percent=each(lambda one: round(100 * one.products, 1)),
                hbm_mb=each(hbm_mb),
                temporaries_mb=each(lambda one: round(one.temporaries / 1e6, 1)),
                longest_ms=each(lambda one: {n: round(s * 1e3, 3) for n, s in one.ops[:3]}),
            )


def lowered(
    side: Literal["ours", "unpacked"], kind: str, both_ways: bool, where: str
) -> jax.stages.Lowered:
    """A side for one chip of a topology, not compiled yet."""
    on_chip = NamedSharding(Mesh(np.array(topology.devices(where)[:1]), ("chip",)), PartitionSpec())
    described = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        shape, dtype, sharding=on_chip
    )
    N, K, H, X = *CASE[1:4], CASE.num_tokens
    form = {"ours": ours, "unpacked": unpacked}[side]

    def program(operands, cotangent_XNH, slots_X):
        mixed, back = jax.vjp(lambda *a: form(kind, slots_X, *a), *operands)
        return (mixed, back(cotangent_XNH)) if both_ways else mixed

    q, k = described(X, N, H), described(X, K, H)
    return jax.jit(program).lower((q, k, k), q, described(X, dtype=jnp.int32))


def ours(kind, slots_X, *operands):
    """By the kernel."""
    block_mask = make_block_mask(kind, slots_X)
    return pallas_tpu.attend(*operands, block_mask, scale=CASE.head_dim**-0.5)


def unpacked(kind, slots_X, *operands):
    """On the padded arrays."""
    rows, (prompt_mask, completion_mask) = rows_of(slots_X)
    window, scale = WINDOWS[kind], CASE.head_dim**-0.5
    (q_PS, q_BT), (k_PS, k_BT), (v_PS, v_BT) = (rows.unpack(x[None]) for x in operands)
    causal = lambda length, mask: attention.causal_mask(length, window=window) & mask[:, None]
    S, T = PROMPTS[1], COMPLETIONS[1]
    of_prompts = attention.attend(q_PS, k_PS, v_PS, causal(S, prompt_mask), scale=scale)
    seen = attention.prompt_window_mask(S, jnp.arange(T), window=window) & prompt_mask[:, None]
    own = [(k_BT, v_BT, causal(T, completion_mask))]
    of_completions = attention.attend_with_prompt(q_BT, k_PS, v_PS, seen, own, scale=scale)
    return rows.pack(of_prompts, of_completions)[0]


def make_block_mask(kind, slots_X):
    """What a layer sees."""
    rows, masks = rows_of(slots_X)
    return packed_attention.make_block_mask(rows.segments(*masks), window=WINDOWS[kind])


def rows_of(slots_X):
    """The rows of a pack, and which of the padded slots hold a token."""
    rows = Packed.of(slots_X, PROMPTS, COMPLETIONS)
    is_token = rows.place_of < len(slots_X)
    prompts, completions = is_token[:PROMPT_SLOTS], is_token[PROMPT_SLOTS:]
    return rows, (prompts.reshape(PROMPTS), completions.reshape(COMPLETIONS))


def fullest() -> np.ndarray:
    """The slots of the trace's fullest pack on eight chips."""
    slots = packing.packed_trace(RUN, num_devices=8)[0]["slots"]
    return slots[(slots < NUM_SLOTS).sum(axis=1).argmax()]


def restated(op: Op, *, pairs: int) -> Op:
    """A kernel's products and traffic by the pairs it goes through: keys and values are fetched for
    each; queries, results and all gradients go by once."""
    is_backward = "gradient" in op.name
    N, H, itemsize = CASE.num_heads, CASE.head_dim, 2
    keys = CASE.num_tokens
    fetched = pairs * 2 * block_masks.KEYS * H
    once = (3 if is_backward else 2) * CASE.num_tokens * N * H + (2 * keys * H) * is_backward
    return replace(
        op,
        macs=(5 if is_backward else 2) * pairs * block_masks.QUERIES * block_masks.KEYS * N * H,
        hbm_bytes=(fetched + once) * itemsize,
    )


def hbm_mb(read: Schedule) -> float:
    """Of XLA's ops and of the kernels."""
    return round((read.hbm_by_layout + read.hbm_by_cost_estimate) / 1e6, 1)


if __name__ == "__main__":
    tyro.cli(main)
