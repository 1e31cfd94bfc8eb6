"""Reading the TPU compiler: traffic from HLO, cycles from bundles, and two programs whose
bytes and matmuls are known by hand."""

import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import bundles, kernels, kernels_chart, search_trips, tpu_schedule
from benchmarks.executed_ops import Op, executed
from gemma_grpo.kernels.truncated_sampling.search import Truncation
from gemma_grpo.planning import chips, topology

V5E = chips.CHIPS["v5e"]

MODULE = """\
HloModule by_hand

%cut (whole: bf16[64,128], at: s32[]) -> bf16[16,128] {
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %piece = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={16,128}
}

%product (rows: bf16[8,128], words: bf16[64,128], from: s32[]) -> f32[8,16] {
  %rows = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %words = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %from = s32[]{:T(128)S(6)} parameter(2)
  %chunk = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%words, %from), kind=kLoop, calls=%cut
  ROOT %logits = f32[8,16]{1,0:T(8,128)S(1)} convolution(%rows, %chunk), dim_labels=bf_oi->bf
}

%put (kept: f32[32,16], new: f32[8,16], to: s32[]) -> f32[32,16] {
  %kept = f32[32,16]{1,0:T(8,128)} parameter(0)
  %new = f32[8,16]{1,0:T(8,128)S(1)} parameter(1)
  %to = s32[]{:T(128)S(6)} parameter(2)
  %none = s32[] constant(0)
  ROOT %updated = f32[32,16]{1,0:T(8,128)} dynamic-update-slice(%kept, %new, %to, %none)
}

%body (carry: (s32[], f32[32,16], bf16[8,128], bf16[64,128])) -> (s32[], f32[32,16], bf16[8,128], bf16[64,128]) {
  %carry = (s32[]{:T(128)}, f32[32,16]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %step = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  %held = f32[32,16]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %h = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=2
  %e = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=3
  %head = f32[8,16]{1,0:T(8,128)S(1)} fusion(%h, %e, %step), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"1234"}}
  %store = f32[32,16]{1,0:T(8,128)} fusion(%held, %head, %step), kind=kLoop, calls=%put
  ROOT %next = (s32[]{:T(128)}, f32[32,16]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%step, %store, %h, %e)
}

%condition (seen: (s32[], f32[32,16], bf16[8,128], bf16[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %seen = (s32[]{:T(128)}, f32[32,16]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%seen), index=0
  ROOT %goes_on = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

ENTRY %main (h0: bf16[8,128], e0: bf16[64,128], n0: s32[], k0: f32[32,16]) -> f32[32,16] {
  %h0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %e0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %n0 = s32[]{:T(128)} parameter(2)
  %k0 = f32[32,16]{1,0:T(8,128)} parameter(3)
  %fetch = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%h0)
  %fetched = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %first = (s32[]{:T(128)}, f32[32,16]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%n0, %k0, %fetched, %e0)
  %loop = (s32[]{:T(128)}, f32[32,16]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%first), condition=%condition, body=%body
  %scores = f32[32,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %kernel = f32[32,16]{1,0:T(8,128)} custom-call(%scores, %e0), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"600","transcendentals":"0","bytes_accessed":"777"}}}
}
"""  # noqa: E501


def test_traffic_is_of_what_lies_in_hbm_and_of_the_pieces_that_are_touched():
    ops = {op.name: op for op in executed(MODULE)}
    assert ops.keys() == {"fetch", "head", "store", "kernel"}
    assert ops["fetch"].hbm_bytes == 8 * 128 * 2  # read from HBM, written to VMEM
    assert ops["head"].hbm_bytes == 16 * 128 * 2  # rows and logits are in VMEM
    assert ops["store"].hbm_bytes == 8 * 16 * 4  # in place
    assert ops["kernel"].hbm_bytes == 777
    assert [op.is_pallas for op in ops.values()] == [False, False, False, True]
    assert [op.is_transfer for op in ops.values()] == [True, False, False, False]


def test_ops_of_a_loop_run_as_often_as_it_does():
    assert {op.name: op.times for op in executed(MODULE)} == {
        "fetch": 1,
        "head": 4,
        "store": 4,
        "kernel": 1,
    }


def test_matmuls_are_counted_in_multiply_adds_and_estimates_are_read():
    ops = {op.name: op for op in executed(MODULE)}
    assert ops["head"].macs == 8 * 128 * 16
    assert ops["kernel"].macs == 300
    assert ops["store"].macs == 0
    assert (ops["head"].estimated_cycles, ops["store"].estimated_cycles) == (1234, None)


def test_a_loop_without_constant_trips_is_refused():
    with pytest.raises(ValueError, match="trips"):
        executed(MODULE.replace("direction=LT", "direction=NE"))


# An outer loop of 10 steps; in it 3 bundles at each step (one of them empty), an inner loop of 2
# bundles and 5 trips, and a region that runs in its last step: 2 bundles and a loop that ends on
# data, of 3.
BUNDLES = """\
LB: loop body

     0   :  { %1 = vsyncpa [#a] } /* entry bundle: %x = custom-call(%e.0) */
   0x1 LB: > { %s1 = sadd.s32 1, %s0  ;;  %p1_p0 = scmp.ne.s32.totalorder %s1, 9
element_size_in_bytes: 2048 */ }
   0x2   :  {} /* End region 3 */
   0x3 LB: >> { %s2 = sadd.s32 1, %s3  ;;  %p2_p1 = scmp.ge.s32.totalorder %s2, 5 /* loop exit test */ }
   0x4   : >> { %9 = sbr.rel (!%p2_p1) target = $region30 }
   0x5   : > { %10 = sbr.rel (%p1_p0) target = $region7 }
   0x6   : > { %v1 = vadd.f32 %v0, %v0 }
   0x7 LB: >> { %v2 = vadd.f32 %v1, %v1 }
   0x8   : >> { %p3_p2 = scmp.le.s32.totalorder %s9, 0 }
   0x9   : >> { %11 = sbr.rel (!%p3_p2) target = $region31 }
   0xa   : > { %v3 = vadd.f32 %v2, %v2 }
   0xb PF: > { %p4_p3 = scmp.ge.s32.totalorder %s1, 10 /* loop exit test */ } /* Start/End empty region 7 */
   0xc   : > { %12 = sbr.rel (!%p4_p3) target = $region32 }
   0xd   :  { %13 = vsyncpa [#a], 1 }
"""  # noqa: E501


def test_bundles_count_as_often_as_they_run():
    streamed, once = bundles.cycles(BUNDLES, [7])
    assert streamed == 10 * (1 + 1 + 1 + 1 + 1 + 2 * 5)
    assert once == (1 + 7 * 3 + 1) + 2  # the region, and what is outside of the loop


def test_loops_that_end_on_data_and_their_trips_are_matched():
    assert bundles.cycles(BUNDLES).once == (1 + 3 + 1) + 2
    with pytest.raises(ValueError, match="more loops"):
        bundles.cycles(BUNDLES, [])
    with pytest.raises(ValueError, match="no loop"):
        bundles.cycles(BUNDLES, [7, 7])


def test_only_schedules_are_taken_from_the_dumps(tmp_path):
    for name in (
        "17-fusion.3-01-final_bundles.txt",
        "17-fusion.3-00-schedule-analysis_final_bundles.txt",
        "17-TLP-hlo.txt",
    ):
        (tmp_path / name).write_text(name)
    assert bundles.dumped(tmp_path) == {"fusion.3": "17-fusion.3-01-final_bundles.txt"}


def test_the_search_is_counted_by_hand():
    """Two blocks: all tokens are candidates, so that no pass goes over all. The top-1 of 0 and one
    1: the first middle keeps both, and each next halves what is between 0.0 and 1.0 in floats'
    order until the middle is above 0."""
    logits_BV = np.zeros((1, 1024), np.float32)
    logits_BV[0, 700] = 1.0
    low, high, trips = -2139095041, 1065353216, 0  # the places of -inf and 1.0 among the floats
    reach = {True: 1024, False: 0}
    while low < high and reach[True] - reach[False] > 1:
        middle = (low + high + 1) // 2
        count = 1024 if middle <= 0 else 1
        low, high = (middle, high) if count >= 1 else (low, middle - 1)
        reach[count >= 1] = count
        trips += 1
    assert search_trips.search_trips(logits_BV, Truncation(top_k=1)) == [trips, 0]


def test_an_op_takes_the_longest_of_its_limits():
    """A millisecond of HBM is 819 MB, of matmuls 98.5 G multiply-adds, of the clock 1.5 M."""

    def seconds(kernel=None, **op):
        nothing = dict(times=1, hbm_bytes=0, macs=0, estimated_cycles=None, is_transfer=False)
        made = Op(**({"name": "", "is_pallas": True} | nothing | op))
        return tpu_schedule._seconds(made, kernel, V5E, [7])

    assert seconds(hbm_bytes=819e6) == pytest.approx(1e-3)
    assert seconds(macs=98.5e9) == pytest.approx(1e-3)
    assert seconds(macs=98.5e9, estimated_cycles=3_000_000) == pytest.approx(2e-3)
    bound_by_memory = dict(macs=98.5e9, hbm_bytes=2 * 819e6, estimated_cycles=9_000_000)
    assert seconds(**bound_by_memory) == pytest.approx(2e-3)
    assert seconds(BUNDLES) == pytest.approx(sum(bundles.cycles(BUNDLES, [7])) / 1.5e9)
    once = bundles.cycles(BUNDLES, [7]).once / 1.5e9  # nothing streams beside it
    assert seconds(BUNDLES, hbm_bytes=819e6) == pytest.approx(1e-3 + once)
    assert seconds(hbm_bytes=819e6, is_transfer=True) == 0


def dies(_):
    os.abort()


def test_a_compiler_that_its_dumps_bring_down_is_told_and_takes_nobody_with_it():
    assert tpu_schedule.schedule(dies, (0,), V5E) is None


ROWS = [
    dict(op="a", setting="x", rows=8, ratio=4.0, ms={"ours": 0.5, "plain": 2.0}),
    dict(op="b", setting="y", rows=8, ratio=1.5, ms={"ours": 20.0, "plain": 30.0}),
]


def test_the_table_has_ours_before_plain_and_the_traffic_of_all_counts():
    of_hbm = {"ours": {"layouts": 1.0, "cost_estimate": 600.0}, "plain": {"layouts": 700.0}}
    row = ROWS[0] | dict(temporaries_mb={"ours": 0.1, "plain": 67.0}, hbm_mb=of_hbm)
    last = kernels.table([row]).splitlines()[-1]
    assert last == "| a | x | 8 | 0.5 / 2 | 4.0 | 0.1 / 67 | 601 / 700 |  |"


def test_the_chart_is_a_picture_that_grows_with_its_rows(tmp_path):
    sizes = []
    for rows in (ROWS[:1], ROWS):
        kernels_chart.draw(rows, tmp_path / "chart.png", title="by hand")
        picture = (tmp_path / "chart.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        sizes.append(struct.unpack(">II", picture[16:24]))
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]


def square_matmul(side):
    on_chip = NamedSharding(
        Mesh(np.array(topology.devices("v5e:2x4")[:1]), ("x",)), PartitionSpec()
    )
    matrix = jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=on_chip)
    return jax.jit(jnp.dot).lower(matrix, matrix)


def sum_of_three(num):
    on_chip = NamedSharding(
        Mesh(np.array(topology.devices("v5e:2x4")[:1]), ("x",)), PartitionSpec()
    )
    array = jax.ShapeDtypeStruct((num,), jnp.float32, sharding=on_chip)
    return jax.jit(lambda a, b, c: a + b * c).lower(array, array, array)


def test_a_matmul_is_scheduled_above_nine_tenths_of_the_matrix_units_peak(v5e):
    read = tpu_schedule.schedule(square_matmul, (4096,), V5E)
    assert read.hbm_by_layout == 3 * 4096**2 * 2
    assert read.hbm_by_cost_estimate == 0
    assert 0.9 < read.products < 1
    assert 2 * 4096**3 / V5E.flops < read.seconds


def test_a_sum_is_scheduled_at_the_speed_of_its_bytes(v5e):
    read = tpu_schedule.schedule(sum_of_three, (2**26,), V5E)
    assert read.hbm_by_layout == 4 * 2**28
    assert 1 <= read.seconds * V5E.bandwidth / 2**30 < 1.01
    assert read.temporaries < 2**20
