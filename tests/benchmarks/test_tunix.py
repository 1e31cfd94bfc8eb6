"""The benchmarks against Tunix: the counter of HBM bytes, the trace, the conversion."""

import ast
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import lengths
from benchmarks.tunix import cpu, flops, sides, table, v5e
from gemma_grpo import model
from gemma_grpo.planning import hlo

LOOP = """HloModule step

%body (arg: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %arg = (s32[], bf16[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %cache = bf16[64,64]{1,0} get-tuple-element(%arg), index=1
  %row = bf16[1,64]{1,0:S(1)} custom-call(), custom_call_target="rows"
  %zero = s32[] constant(0)
  %new = bf16[64,64]{1,0} dynamic-update-slice(%cache, %row, %i, %zero)
  %all = bf16[64,64]{1,0} all-reduce-start(%new), to_apply=%add
  %sum = bf16[64,64]{1,0} all-reduce-done(%all)
  %one = s32[] constant(1)
  %next = s32[]{:S(1)} add(%i, %one)
  ROOT %out = (s32[], bf16[64,64]{1,0}) tuple(%next, %sum)
}

%condition (arg: (s32[], bf16[64,64])) -> pred[] {
  %arg = (s32[], bf16[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[]{:S(1)} compare(%i, %limit), direction=LT
}

ENTRY %main (start: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %start = (s32[], bf16[64,64]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[64,64]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def module_of(body: str, fused: str = "") -> hlo.Module:
    """A module whose entry is `body`, and a fused computation before it."""
    return hlo.parse(f"HloModule one\n\n{fused}\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


def moved(body: str, fused: str = "") -> float:
    return hlo.program(module_of(body, fused)).bytes


PARAMETER = "  %x = f32[1024,8]{1,0} parameter(0)\n"


def test_an_operation_reads_its_operands_and_writes_its_result():
    assert moved(PARAMETER + "  ROOT %y = f32[1024,8]{1,0} negate(%x)") == 2 * 1024 * 8 * 4


def test_what_is_on_chip_is_no_traffic():
    assert moved(PARAMETER + "  ROOT %y = f32[1024,8]{1,0:T(8,128)S(1)} negate(%x)") == 32768


def test_a_prefetch_counts_once():
    pair = (
        "  %s = (f32[1024,8]{1,0:S(1)}, f32[1024,8]{1,0}, u32[]) copy-start(%x)\n"
        "  ROOT %y = f32[1024,8]{1,0:S(1)} copy-done(%s)"
    )
    assert moved(PARAMETER + pair) == 32768


def test_a_slice_reads_what_it_yields():
    assert moved(PARAMETER + "  ROOT %y = f32[2,8]{1,0} slice(%x), slice={[0:2], [0:8]}") == 128


FUSED_SLICE = """%fused (p: f32[1024,8]) -> f32[1,8] {
  %p = f32[1024,8]{1,0} parameter(0)
  %b = f32[1024,8]{1,0} bitcast(%p)
  %s = f32[1,8]{1,0} slice(%b), slice={[0:1], [0:8]}
  ROOT %n = f32[1,8]{1,0} negate(%s)
}"""

FUSED_UPDATE = """%fused (p: f32[1024,8], u: f32[1,8]) -> f32[1024,8] {
  %p = f32[1024,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1024,8]{1,0} dynamic-update-slice(%p, %u, %z, %z)
}"""


def test_a_slice_within_a_fusion_reads_what_it_yields():
    call = "  ROOT %y = f32[1,8]{1,0} fusion(%x), kind=kLoop, calls=%fused"
    assert moved(PARAMETER + call, FUSED_SLICE) == 32 + 32


FUSED_HANDED_ON = """%inner (q: f32[1024,8]) -> f32[8192] {
  %q = f32[1024,8]{1,0} parameter(0)
  ROOT %b = f32[8192]{0} bitcast(%q)
}

%fused (p: f32[1024,8]) -> f32[] {
  %p = f32[1024,8]{1,0} parameter(0)
  %f = f32[8192]{0} fusion(%p), kind=kLoop, calls=%inner
  ROOT %s = f32[]{:S(1)} reduce(%f), to_apply=%add
}"""


def test_what_a_fusion_within_a_fusion_hands_on_is_read_whole():
    call = "  ROOT %y = f32[]{:S(1)} fusion(%x), kind=kLoop, calls=%fused"
    assert moved(PARAMETER + call, FUSED_HANDED_ON) == 32768


def test_a_fused_update_in_place_moves_the_update_alone():
    body = (
        PARAMETER
        + "  %u = f32[1,8]{1,0} parameter(1)\n"
        + "  ROOT %y = f32[1024,8]{1,0} fusion(%x, %u), kind=kLoop, calls=%fused"
    )
    assert moved(body, FUSED_UPDATE) == 32 + 32


def test_a_loop_counts_as_often_as_its_condition_says():
    # One turn: 128 bytes of cache written, 8192 of the collective's result, 8 to count on.
    assert hlo.loop_body(hlo.parse(LOOP)).bytes == 128 + 8192 + 8
    assert hlo.program(hlo.parse(LOOP)).bytes == 10 * (128 + 8192 + 8)


def test_an_asynchronous_collective_counts_once():
    assert hlo.loop_body(hlo.parse(LOOP)).collectives == {"all-reduce": 1}
    assert hlo.program(hlo.parse(LOOP)).collectives == {"all-reduce": 10}


FUSED_FLIGHT = """%async_collective_fusion (p: f32[1024,8], q: f32[8]) -> (f32[1024,8], f32[8]) {
  %p = f32[1024,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %a = f32[1024,8]{1,0} all-gather(%p), dimensions={0}
  %n = f32[8]{0} negate(%q)
  ROOT %out = (f32[1024,8]{1,0}, f32[8]{0}) tuple(%a, %n)
}"""


def test_a_collective_in_flight_in_a_fusion_is_neither_its_traffic_nor_counted_again():
    body = (
        PARAMETER
        + "  %q = f32[8]{0} parameter(1)\n"
        + "  ROOT %y = (f32[1024,8]{1,0}, f32[8]{0}) fusion(%x, %q), kind=kCustom, "
        + "output_to_operand_aliasing={{0}: (0, {})}, calls=%async_collective_fusion"
    )
    assert hlo.program(module_of(body, FUSED_FLIGHT)) == hlo.Moved(64.0, {})


def test_what_a_loop_keeps_on_chip_is_told():
    kept = LOOP.replace("bf16[64,64]{1,0}) while", "bf16[64,64]{1,0:S(1)}) while")
    assert hlo.carried_on_chip(hlo.parse(LOOP)) == 0
    assert hlo.carried_on_chip(hlo.parse(kept)) == 8192


def test_a_program_without_a_loop_has_no_body():
    module = module_of(PARAMETER + "  ROOT %y = f32[1024,8]{1,0} negate(%x)")
    assert hlo.loop_body(module) == hlo.Moved(0.0, {})


def test_a_compiled_loop_moves_its_matrices_once_a_turn(v5e):
    """Against arithmetic: a bf16 matrix too large for on-chip memory is read once a turn."""
    size, turns = 16384, 8
    place = jax.sharding.SingleDeviceSharding(v5e[0])
    matrix = jax.ShapeDtypeStruct((size, size), "bfloat16", sharding=place)
    vector = jax.ShapeDtypeStruct((8, size), "bfloat16", sharding=place)

    def loop(weights, x):
        return jax.lax.fori_loop(0, turns, lambda _, x: jnp.tanh(x @ weights), x)

    compiled = jax.jit(loop).lower(matrix, vector).compile()
    module = hlo.parse(compiled.as_text())
    assert 1.0 <= hlo.loop_body(module).bytes / (2 * size**2) < 1.02
    assert 1.0 <= hlo.program(module).bytes / (2 * size**2 * turns) < 1.02


def test_completions_have_the_traces_lengths_and_one_of_sixteen_takes_the_budget():
    batch = cpu.frozen_batch(cpu.run_of(cpu.Options(rows=16, prompt_length=16, budget=64)))
    of_budget = [round(length * 64 / 800) for length in lengths.LENGTHS[:16]]
    assert [len(ids) for ids in batch["completions"]] == of_budget and max(of_budget) == 64
    assert [len(ids) for ids in batch["prompts"]] == [16, 16] and len(batch["rewards"]) == 16


def test_a_row_that_tunix_wins_stays_in_the_table(tmp_path, capsys):
    common = {
        "benchmark": "tunix/cpu",
        "model": "gemma3-nano",
        "dtype": "float32",
        "prompts": 4,
        "generations": 8,
        "prompt_length": 128,
        "budget": 128,
        "part": "step",
    }
    rows = [
        common | {"side": "ours", "wall": 2.0, "cpu": 4.0, "first_cpu": 9.0},
        common | {"side": "tunix", "wall": 1.0, "cpu": 8.0, "first_cpu": 9.0},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    table.main((path,), chart=tmp_path / "chart.png")
    printed = capsys.readouterr().out
    assert "| step, wall | 2 s | 1 s | 0.50 |" in printed
    assert "| step, CPU time | 4 s | 8 s | 2.00 |" in printed
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_every_row_of_the_picture_is_in_the_results_and_the_page_has_the_whole_table(capsys):
    root = Path(table.__file__).parents[2]
    results, page = root / "benchmarks/results/tunix.jsonl", root / "docs/tunix.md"
    table.main((results,))
    printed = capsys.readouterr().out.strip()
    start, end = table.MARKERS
    assert page.read_text().split(start)[1].split(end)[0].strip() == printed
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {f"{line.group.split(',')[0]}, {line.what}" for line in table.lines_of(rows)}
    assert len(table.PICTURED) == 10 and set(table.PICTURED) <= found


def test_our_decoding_stands_against_tunix_prefill_and_decoding_and_by_its_settings_alone():
    common = {"benchmark": "tunix/v5e", "model": "gemma3-1b", "sequences": 64, "fits": True}
    own = {"side": "ours", "program": "decode", "layout": "data", "pack_tokens": 0, "remat": "none"}
    other = {"side": "tunix", "fsdp": 2, "tp": 4, "replicated": False, "remat": "NONE", "peak": 3e9}
    rows = [
        common | own | {"peak": 1.5e9, "step_bytes": 1e9, "step_collectives": 0},
        common | other | {"program": "prefill"},
        common | other | {"program": "decode", "step_bytes": 4e9, "step_collectives": 7},
        common | other | {"program": "decode", "sequences": 32},
        common | other | {"program": "update"},
    ]
    lines = [(line.what, line.ours, line.tunix, line.ratio) for line in table.lines_of(rows)]
    named = "(ours data, Tunix fsdp 2 x tp 4)"
    assert lines == [
        (f"decode {named}: HBM of a step", "1 GB", "4 GB", 4.0),
        (f"decode {named}: collectives of a step", "0", "7", float("inf")),
        (f"decode {named}: peak", "1.5 GB", "3 GB", 2.0),
        (f"prefill {named}: peak", "1.5 GB", "3 GB", 2.0),
    ]


def test_the_largest_batch_that_fits_is_found_by_whole_steps():
    for limit in (64, 95, 96, 160, 383, 384, 1000):
        for step in (32, 64):
            found = v5e.largest(lambda n, limit=limit: n <= limit, known=64, step=step)
            assert found <= limit < found + step and (found - 64) % step == 0


def test_the_largest_batch_is_looked_for_with_the_cases_other_settings(monkeypatch, capsys):
    tried = []

    class Compiler:
        def compiled(self, case):
            tried.append(case)
            return {"fits": case.sequences <= 200, "peak": 10 * case.sequences}

    monkeypatch.setattr(v5e, "Compiler", Compiler)
    v5e.print_largest(("tunix-update-best",))
    row = json.loads(capsys.readouterr().out)
    assert (row["sequences"], row["refused"], row["peaks"]["128"]) == (192, 224, 1280)
    own = v5e.CASES["tunix-update-best"]
    assert {dataclasses.replace(case, sequences=64) for case in tried} == {own}


def test_the_larger_batch_is_the_better_one(tmp_path, capsys):
    common = {"benchmark": "tunix/largest", "model": "gemma3-1b", "remat": "BLOCK"}
    rows = [
        common | {"side": "ours", "sequences": 384},
        common | {"side": "tunix", "sequences": 96, "remat": "DECODER"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    table.main((path,))
    assert "| 384 | 96 | 4.00 |" in capsys.readouterr().out


LONGEST = [498, 800, 429, 531, 497, 632, 504, 800]  # of each of the trace's groups, by hand


def test_a_loop_turns_until_its_own_longest_row_has_ended():
    assert flops.longest(flops.Step(), 8) == LONGEST
    assert flops.longest(flops.Step(), 4) == [800, 531, 632, 800]
    assert flops.longest(flops.Step(), 1) == flops.longest(flops.Step(full=True), 1) == [800]


def test_tunix_turns_are_counted_loop_by_loop_and_a_loops_first_token_is_drawn_before_it():
    """With programs of one operation a row: rows of at most 498 tokens need 497 turns more; at the
    budget Tunix makes one too many."""
    one_each = lambda program: program.sequences
    by_group = flops.count_theirs(flops.Step(tunix_prompts=1), one_each)
    turns = sum(tokens - 1 for tokens in LONGEST if tokens < 800) + 2 * 800
    assert by_group["rollout"] == 8 * (8 + turns)
    assert flops.count_theirs(flops.Step(), one_each)["rollout"] == 64 * (1 + 800)


def test_chips_with_loops_of_their_own_do_no_more_than_one_loop_for_all():
    """Ours, of one nano layer: at full lengths the same on one chip and on eight, in either layout;
    on the trace less where a chip's loop is its own, and less in a packed update."""
    nano = model.CONFIGS["gemma3-nano"]
    config = dataclasses.replace(nano, vocab_size=4096, num_layers=1, scan_unroll=1)
    count = lambda **step: flops.count_ours(flops.Step(**step), config, jax.devices())
    one = count(full=True, chips=1)
    assert count(full=True) == one
    assert count(full=True, layout="tensor_parallel") == one
    trace, tensor_parallel = count(), count(layout="tensor_parallel")
    assert trace["rollout"] < tensor_parallel["rollout"] == one["rollout"]
    assert trace["update"] == tensor_parallel["update"] < one["update"]
    assert count(short_prompts=True)["update"] < trace["update"]


def test_our_cases_are_the_preset_with_their_own_settings():
    """As training runs it, in packs; `ours-update` alone takes all rows in one pass, as Tunix."""
    for name, case in v5e.CASES.items():
        if case.side == "ours":
            run = v5e.run_of(case)
            expected = 0 if name == "ours-update" else v5e.RUN.grpo.pack_tokens
            assert run.grpo.pack_tokens == expected
            assert run.grpo.prompts_per_step * run.grpo.num_generations == case.sequences == 64
            assert (run.model.remat, run.model.rollout_layout) == (case.remat, case.layout)
            assert (run.grpo.loss.beta > 0) == (case.program == "logps")
    assert v5e.run_of(v5e.CASES["ours-update-packed"]).model.remat == v5e.RUN.model.remat


def test_tunix_is_told_the_settings_of_a_case_and_our_sizes():
    told = v5e.settings(v5e.CASES["tunix-decode-default"])
    assert (told["fsdp"], told["tp"], told["replicated"], told["remat"]) == (2, 4, False, "NONE")
    assert (told["prompt_length"], told["budget"], told["sequences"]) == (512, 800, 64)
    assert told["shape"]["num_layers"] == 26 and told["topology"] == "v5e:2x4"


STUB = """import os, sys
sys.path.insert(0, {folder!r})
import numpy as np
import turns

class Stub:
    def grow(self, megabytes):
        read = turns.start()
        bytearray(b"x" * (megabytes << 20))
        print("a library talks")
        return read()

    def double(self, array):
        return {{"doubled": 2 * array}}

    def train(self):
        asked = server.serve("draw", {{"ready": True}})
        while True:
            asked = server.serve("draw", {{"drawn": asked["number"]}})

    def die(self):
        os._exit(3)

server = turns.Server(Stub())
server.serve()
"""


@pytest.fixture
def side(tmp_path):
    folder = Path(sides.__file__).parent / "theirs"
    script = tmp_path / "stub.py"
    script.write_text(STUB.format(folder=str(folder)))
    command = [sys.executable, str(script)]
    process = sides.SideProcess("stub", command, folder=tmp_path, cwd=tmp_path)
    yield process
    process.close()


def test_a_peak_is_of_its_own_part_and_outlives_what_was_freed(side):
    large = side.call("grow", megabytes=200)["peak"]
    small = side.call("grow", megabytes=1)["peak"]
    assert 200 << 20 < large < 600 << 20
    assert small < large - (150 << 20)


def test_what_a_side_says_of_its_failure_ends_the_benchmark(side):
    with pytest.raises(SystemExit, match=r"stub has ended at 'grow'(.|\n)*TypeError: "):
        side.call("grow", megabytes="many")


def test_a_side_that_ends_ends_the_benchmark(side):
    with pytest.raises(SystemExit, match="stub has ended at 'die'"):
        side.call("die")
    with pytest.raises(SystemExit, match="stub has ended at 'double'"):
        side.call("double", array=np.ones(1))


def test_arrays_go_to_a_side_and_back(side):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    doubled = side.call("double", array=array)["doubled"]
    assert doubled.dtype == np.float32 and (doubled == 2 * array).all()


def test_a_side_in_its_own_loop_answers_what_it_waits_for_and_all_else(side):
    """As Tunix's does, whose training never returns."""
    assert side.call("train") == {"ready": True}
    assert side.call("draw", number=1) == {"drawn": 1}
    assert side.call("double", array=np.ones(1))["doubled"] == 2
    assert side.call("draw", number=2) == {"drawn": 2}
    with pytest.raises(SystemExit, match=r"stub has ended at 'grow'(.|\n)*TypeError: "):
        side.call("grow", megabytes="many")


def opened(ours, theirs):
    opener = object.__new__(sides.Opener)
    opener.run = cpu.run_of(cpu.Options())
    opener.rows = sides.padded_rows(512, length=6)
    opener.opened = {"ours": {"logits": ours}, "tunix": {"logits": theirs}}
    return opener


def test_sides_are_apart_by_shares_and_padding_does_not_count():
    theirs = np.zeros((2, 6, 4))
    theirs[..., 0] = 1.0  # of a quarter of the entries: their spread is sqrt(3) / 4
    ours = theirs.copy()
    ours[0, 0, 0] += 1e-4
    ours[1, 0, 0] = 9.0  # padding
    far = opened(ours, theirs).apart()
    entries = (6 + 4) * 4  # of which one is off
    assert far == {"logits_apart": pytest.approx(1e-4 / entries**0.5 / (3**0.5 / 4))}
    moments = {"ours": np.array([2.0, -4.0]), "tunix": np.array([2.0, -4.0 + 4e-4])}
    far = opened(ours, theirs).apart(moments)
    assert far["gradient_apart"] == pytest.approx(1e-4, rel=1e-3)
    with pytest.raises(SystemExit, match="not the same model or update"):
        opened(1.1 * theirs, theirs).apart()


def test_a_step_sums_its_parts_and_medians_leave_out_the_first():
    reading = lambda wall: {"wall": wall, "cpu": 2 * wall, "peak": 100 - wall}
    taken = [{"update": reading(wall)} for wall in (50.0, 1.0, 4.0, 2.0)]
    row = cpu.summary(taken, "update")
    assert (row["wall"], row["cpu"], row["first_wall"], row["first_cpu"]) == (2, 4, 50, 100)
    assert row["wall_all"] == [1, 4, 2] and row["peak"] == 99


def test_tunix_sees_of_this_repository_its_own_folder_alone():
    """Else it would find `kernels/`, or ours in the place of its own packages."""
    theirs = Path(sides.__file__).parent / "theirs"
    counter = theirs.parents[2] / "gemma_grpo" / "planning" / "traced.py"  # run as a lone file
    for path in (*theirs.glob("*.py"), counter):
        tree = ast.parse(path.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {"gemma_grpo", "benchmarks", "kernels"}
