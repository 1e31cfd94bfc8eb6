"""Attention of one packed layer, forward and backward, by the TPU's compiler: the kernel against
the form that unpacks the rows.

python -m benchmarks.attention [--topology v5e:2x4]

Gemma 3 1B's heads in bfloat16, one prompt of 512 and the completions of the fullest group of
`benchmarks.lengths`, packed as preset gemma3-1b packs them. A row for each kind of layer and pass.
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

from benchmarks import lengths
from benchmarks.executed_ops import Op
from benchmarks.timing import print_row
from benchmarks.tpu_schedule import Schedule, schedule
from gemma_grpo.kernels import packed_attention
from gemma_grpo.kernels.packed_attention import cases, pallas_tpu, sights
from gemma_grpo.model import Packed, attention
from gemma_grpo.planning import chips, topology

CASE = cases.GEMMA3_1B
WINDOWS = {"local": CASE.window, "global": None}
ROWS = lengths.GENERATIONS, lengths.BUDGET


def main(where: str = "v5e:2x4") -> None:
    """Compile and print.

    Args:
        where: topology, one chip of which is compiled for.
    """
    chip = chips.chip_of(where, topology.devices(where))
    for kind in WINDOWS:
        pairs = int(sight(kind, *who()).count)
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
                tokens=int(lengths_of_fullest().sum()),
                slots=CASE.num_tokens,
                pairs_of_blocks=pairs,
                blocks=[sights.QUERIES, sights.KEYS],
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
    N, K, H, S, X = *CASE[1:4], *CASE[5:]
    form = {"ours": ours, "unpacked": unpacked}[side]

    def program(operands, cotangent_XNH, slots_X):
        mixed, back = jax.vjp(lambda *a: form(kind, slots_X, *a), *operands)
        return (mixed, back(cotangent_XNH)) if both_ways else mixed

    q, k, prompt = described(X, N, H), described(X, K, H), described(1, S, K, H)
    return jax.jit(program).lower((q, k, k, prompt, prompt), q, described(X, dtype=jnp.int32))


def ours(kind, slots_X, *operands):
    """By the kernel."""
    return pallas_tpu.attend(*operands, sight(kind, *places(slots_X)), scale=CASE.head_dim**-0.5)


def unpacked(kind, slots_X, q_XNH, k_XKH, v_XKH, *prompt_kv):
    """As the model does on other devices."""
    rows, (B, T), window = Packed.of(slots_X, ROWS), ROWS, WINDOWS[kind]
    is_token_BT = (rows.places < len(slots_X)).reshape(B, T)
    own_mask = attention.causal_mask(T, window=window) & is_token_BT[:, None]
    prompt_mask = attention.prompt_window_mask(CASE.num_prompt_slots, jnp.arange(T), window=window)
    padded = lambda q, k, v: attention.attend_with_prompt(
        q, *prompt_kv, prompt_mask, [(k, v, own_mask)], scale=CASE.head_dim**-0.5
    )
    return rows.between(padded)(q_XNH[None], k_XKH[None], v_XKH[None])[0]


def sight(kind, *places):
    """What a layer sees."""
    return packed_attention.sight(
        *places,
        jnp.array([CASE.num_prompt_slots]),
        num_rows=ROWS[0],
        num_prompt_slots=CASE.num_prompt_slots,
        window=WINDOWS[kind],
    )


def places(slots_X):
    """Rows, slots, and which are tokens."""
    return slots_X // ROWS[1], slots_X % ROWS[1], slots_X < ROWS[0] * ROWS[1]


def who():
    """`places` of the trace's fullest group."""
    tokens = np.flatnonzero(np.arange(ROWS[1]) < lengths_of_fullest()[:, None])
    empty = np.full(CASE.num_tokens - len(tokens), ROWS[0] * ROWS[1])
    return places(jnp.asarray(np.concatenate([tokens, empty])))


def lengths_of_fullest() -> np.ndarray:
    """Tokens of its completions."""
    groups = np.array(lengths.LENGTHS).reshape(lengths.PROMPTS, -1)
    return groups[groups.sum(axis=1).argmax()]


def restated(op: Op, *, pairs: int) -> Op:
    """A kernel's products and traffic by the pairs it goes through: keys and values are fetched for
    each; queries, results and all gradients go by once."""
    is_backward = "gradient" in op.name
    N, H, itemsize = CASE.num_heads, CASE.head_dim, 2
    keys = CASE.num_prompt_slots + CASE.num_tokens
    fetched = pairs * 2 * sights.KEYS * H
    once = (3 if is_backward else 2) * CASE.num_tokens * N * H + (2 * keys * H) * is_backward
    return replace(
        op,
        macs=(5 if is_backward else 2) * pairs * sights.QUERIES * sights.KEYS * N * H,
        hbm_bytes=(fetched + once) * itemsize,
    )


def hbm_mb(read: Schedule) -> float:
    """Of XLA's ops and of the kernels."""
    return round((read.hbm_by_layout + read.hbm_by_cost_estimate) / 1e6, 1)


if __name__ == "__main__":
    tyro.cli(main)
