"""Planning: what is read off a compiled program, and what was compiled for the v5e-8."""

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from gemma_grpo import cli, config, pipeline, plan, presets, train
from gemma_grpo import model as gemma3
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.generation.rollout import RolloutConfig, make_rollout
from gemma_grpo.generation.sampling import SamplingConfig
from gemma_grpo.kernels.lm_head_logps import xla as lm_head
from gemma_grpo.model import CONFIGS
from gemma_grpo.planning import chips, compiled, fit, hlo, ledger, programs, topology
from gemma_grpo.records import files

V5E = chips.CHIPS["v5e"]
ONE_B = CONFIGS["gemma3-1b"]
TWO_LAYERS = replace(ONE_B, num_layers=2)
# What its programs gather and keep shows in a narrower one too, of which the same matrices are
# sharded, and in short packs of both sizes: these compile sooner.
NARROW = replace(ONE_B, num_layers=1, vocab_size=8192, embed_dim=512, hidden_dim=1024)
NARROW_FSDP_FROM = mesh.FSDP_FROM // 4
SHORT = {"max_prompt_length": 128, "max_completion_length": 128}
SHORT_PACK = 1280

HLO = """\
HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: bf16[8,4]) -> bf16[8,32] {
  ROOT %g = bf16[8,32]{1,0} all-gather(%p), dimensions={1}
}

%other (p: f32[4]) -> f32[4] {
  ROOT %e = f32[4] collective-permute(%p), source_target_pairs={{0,1}}
}

%body (p: (bf16[8,4])) -> (bf16[8,4]) {
  %x = bf16[8,32]{1,0} fusion(%p), kind=kLoop, calls=%inner
  %r = (f32[16], f32[16]) all-reduce-start(%y), to_apply=%add
  %d = f32[16] all-reduce-done(%r)
  %n = f32[4] conditional(%i, %a, %b), branch_computations={%one, %other}
}

ENTRY %main (p: bf16[8,4]) -> f32[2] {
  %w = (bf16[8,4]) while(%t), condition=%c, body=%body
  ROOT %q = f32[2]{0} reduce-scatter(%z), to_apply=%add
}
"""


def test_collectives_are_counted_by_kind_and_by_whether_they_stand_in_a_loop():
    assert compiled.collectives_in(hlo.parse(HLO)) == [
        compiled.Collective("all-gather", True, 8 * 32 * 2, 1),
        compiled.Collective("all-reduce", True, 16 * 4, 1),  # a pair counts once
        compiled.Collective("collective-permute", True, 4 * 4, 1),  # in a branch
        compiled.Collective("reduce-scatter", False, 2 * 4, 1),
    ]


def test_a_program_is_read_as_a_device_sees_it():
    devices = mesh.data_mesh()
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=mesh.batch_sharding(devices))
    read = compiled.compile_and_read(jax.jit(lambda x: x.sum()).lower(x))
    assert read.arguments == 1024 * 4
    assert [found.kind for found in read.collectives] == ["all-reduce"]


def test_what_stays_in_memory_beside_a_program_is_counted():
    """Master weights and two moments of float32, sharded over 8, and twice what was begun with; a
    bfloat16 reference likewise. Log-probs under the master weights have these for an argument."""
    run = presets.preset("gemma3-1b")
    run = replace(
        run, grpo=replace(run.grpo, loss=replace(run.grpo.loss, beta=0.1), num_iterations=2)
    )
    by_name = {each.name: each for each in programs.of_step(run, ONE_B, mesh.data_mesh())}
    of = lambda bytes_a_weight: pytest.approx(bytes_a_weight * 999_751_680 / 8, rel=2e-3)
    resident = {name: program.resident for name, program in by_name.items()}
    assert list(resident) == ["rollout", "reference", "old", "update"]
    assert resident["rollout"] == of(2 * 4 + 3 * 4 + 2)
    assert resident["reference"] == of(2 * 4 + 3 * 4)
    assert resident["old"] == of(2 * 4 + 2 * 4 + 2)
    assert resident["update"] == of(2 * 4 + 2)


def test_a_teacher_stays_in_memory_beside_every_program_but_its_own():
    """3,880,263,168 weights of a 4B in bfloat16, sharded over 8; it has no adapters to be run with,
    and its scores join the update's packs."""
    run = presets.preset("gemma3-1b-lora")
    plain = programs.of_run(run, ONE_B, mesh.data_mesh())
    run = replace(run, grpo=replace(run.grpo, teacher="gemma3-4b"))
    with_teacher = programs.of_run(run, ONE_B, mesh.data_mesh())
    resident = {program.name: program.resident for program in plain}
    names = [program.name for program in with_teacher]
    assert names[names.index("advantages") :] == ["advantages", "teacher", "update"]
    teacher = with_teacher[names.index("teacher")]
    params, frozen, _ = teacher.arguments
    assert not frozen and sum(leaf.size for leaf in jax.tree.leaves(params)) == 3_880_263_168
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for program in with_teacher:
        if program.name not in ("teacher", "advantages"):
            more = program.resident - resident[program.name]
            assert more == pytest.approx(2 * 3_880_263_168 / 8, rel=2e-3), program.name
    packs = with_teacher[-1].arguments[-1]
    assert all("teacher_logps" in of_shape for of_shape in packs)
    assert not any("teacher_logps" in of_shape for of_shape in teacher.arguments[-1])


def read(name, preset, config, devices, monkeypatch, *, beta=0.0):
    run = presets.preset(preset)
    run = replace(run, grpo=replace(run.grpo, loss=replace(run.grpo.loss, beta=beta)))
    run = replace(run, model=replace(run.model, rollout_layout="data"))
    if config is NARROW:
        run = replace(run, model=replace(run.model, **SHORT))
        run = replace(run, grpo=replace(run.grpo, pack_tokens=SHORT_PACK))
        monkeypatch.setattr(mesh, "FSDP_FROM", NARROW_FSDP_FROM)
        monkeypatch.setattr(lm_head, "SHARES", (13 / 16, 1))  # two sizes show what four do
    program = {each.name: each for each in programs.of_step(run, config, mesh.data_mesh(devices))}[
        name
    ]
    return compiled.compile_and_read(program.trace().lower()), program.resident


@pytest.mark.parametrize(
    "config", [TWO_LAYERS, pytest.param(ONE_B, marks=pytest.mark.slow)], ids=["2 layers", "1B"]
)
def test_on_v5e_the_rollout_has_no_collective_and_fits(v5e, config, monkeypatch):
    rollout, resident = read("rollout", "gemma3-1b", config, v5e, monkeypatch)
    assert rollout.collectives == []
    assert rollout.peak + resident < 12e9  # of 16


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, num_chips", [("gemma3-1b", 8), ("gemma3-1b-lora-v5e-1", 1)], ids=["8 rows", "64 rows"]
)
def test_on_v5e_a_decode_step_moves_within_a_tenth_of_what_it_must(v5e, preset, num_chips):
    """Caches written back in full would make it a third more at 64 rows."""
    run = presets.preset(preset)
    run = replace(run, model=replace(run.model, rollout_layout="data"))
    devices = mesh.data_mesh(v5e[:num_chips])
    rollout = programs.of_step(run, ONE_B, devices)[0]
    read = compiled.compile_and_read(rollout.trace().lower())
    floor = fit.work_of(rollout, run, ONE_B, num_chips)[-1].bytes / 800
    assert floor <= read.loop_bytes <= 1.1 * floor


def test_on_v5e_a_truncated_rollout_draws_by_its_kernel_and_keeps_logits_in_vmem(v5e):
    """Eight rows a chip, the full vocabulary; in HBM their logits would take 8 MB in float32."""
    devices = mesh.data_mesh(v5e)
    graphdef, shapes = gemma3.abstract(TWO_LAYERS, gemma3.NO_LORA)
    rollout = make_rollout(
        graphdef,
        devices,
        RolloutConfig(
            num_generations=8,
            max_completion_length=32,
            stop_ids=programs.GEMMA_IDS.stop_ids,
            pad_id=programs.GEMMA_IDS.pad_id,
            sampling=SamplingConfig(top_k=50, top_p=0.95),
        ),
    )
    replicated, rows = mesh.replicated(devices), mesh.batch_sharding(devices)
    place = lambda shape, dtype, where: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    lowered = rollout.lower(
        jax.tree.map(lambda leaf: place(leaf.shape, jnp.bfloat16, replicated), shapes),
        place((8, 64), jnp.int32, rows),
        place((8, 64), jnp.bool_, rows),
        mesh.with_shardings(jax.eval_shape(lambda: jax.random.key(0)), replicated),
    )
    text = lowered.compile().as_text()
    (kernel,) = re.findall(r"%(\S+) = .*custom_call_target=\"tpu_custom_call\"", text)
    assert kernel.startswith("truncated_sampling")
    assert compiled.collectives_in(hlo.parse(text)) == []
    assert not re.search(r"f32\[(8,262144|262144,8)\]", text)


@pytest.mark.parametrize(
    "config",
    [
        NARROW,
        pytest.param(TWO_LAYERS, marks=pytest.mark.slow),
        pytest.param(ONE_B, marks=pytest.mark.slow),
    ],
    ids=["narrow", "2 layers", "1B"],
)
def test_on_v5e_scoring_gathers_weights_and_never_logits_and_fits(v5e, config, monkeypatch):
    scoring, resident = read("reference", "gemma3-1b", config, v5e, monkeypatch, beta=0.1)
    assert scoring.peak + resident < 12e9  # of 16
    assert {found.kind for found in scoring.collectives} == {"all-gather"}
    assert all(is_of_weights(found, config) for found in scoring.collectives)


@pytest.mark.slow
def test_on_v5e_a_4b_teacher_scores_beside_a_1b_of_which_all_weights_are_trained(v5e):
    run = presets.preset("gemma3-1b")
    run = replace(run, grpo=replace(run.grpo, teacher="gemma3-4b"))
    found = {program.name: program for program in programs.of_step(run, ONE_B, mesh.data_mesh(v5e))}
    teacher = found["teacher"]
    scoring = compiled.compile_and_read(teacher.trace().lower())
    assert scoring.peak + teacher.resident < 12e9  # of 16
    assert {found.kind for found in scoring.collectives} == {"all-gather"}
    assert all(is_of_weights(found, CONFIGS["gemma3-4b"]) for found in scoring.collectives)


def is_of_weights(found, config):
    """A layer's matrix, or the embedding once a pack: bytes in bfloat16."""
    matrix, embedding = (config.embed_dim * n * 2 for n in (config.hidden_dim, config.vocab_size))
    return found.largest <= 1.05 * matrix or found.largest == embedding


@pytest.mark.parametrize(
    "preset, config",
    [
        ("gemma3-1b-lora", NARROW),
        ("gemma3-1b", NARROW),
        pytest.param("gemma3-1b-lora", TWO_LAYERS, marks=pytest.mark.slow),
        pytest.param("gemma3-1b", TWO_LAYERS, marks=pytest.mark.slow),
        pytest.param("gemma3-1b-lora", ONE_B, marks=pytest.mark.slow),
        pytest.param("gemma3-1b", ONE_B, marks=pytest.mark.slow),
    ],
)
def test_on_v5e_the_update_gathers_weights_and_never_logits_and_fits(
    v5e, preset, config, monkeypatch
):
    update, resident = read("update", preset, config, v5e, monkeypatch)
    assert update.peak + resident < 12e9  # of 16
    if config is ONE_B and preset == "gemma3-1b":
        # 1.50 of the state, 0.50 of gradients, 1.21 of the embedding and its gradient, 0.17 of the
        # layers and 0.18 of their inputs in bfloat16; 0.08 more where the embedding's shard is kept
        assert update.peak < 3.6e9
    pack = SHORT_PACK if config is NARROW else presets.preset(preset).grpo.pack_tokens
    embedding, logits = config.vocab_size * config.embed_dim * 2, config.vocab_size * pack * 2
    assert embedding < logits  # in bfloat16; in float32 they are twice as large
    for found in update.collectives:
        assert found.largest <= embedding, found
        assert found.kind != "all-gather" or is_of_weights(found, config), found
    if preset == "gemma3-1b-lora":
        others = [found for found in update.collectives if found.kind != "all-reduce"]
        if config is ONE_B:  # so deep a stack of adapters is sharded: a layer's is gathered
            layer = presets.preset(preset).model.lora.rank * config.hidden_dim * 2
            assert {(found.kind, found.largest) for found in others} == {("all-gather", layer)}
        else:
            assert others == []


@pytest.mark.slow
def test_on_v5e_an_updates_memory_does_not_depend_on_the_batch(v5e):
    """Four times the prompts are more packs of the same shape, and some more integers."""
    run = presets.preset("gemma3-1b")
    peaks = []
    for prompts in (8, 32):
        grpo = replace(run.grpo, prompts_per_step=prompts)
        update = programs.of_step(replace(run, grpo=grpo), TWO_LAYERS, mesh.data_mesh(v5e))[-1]
        peaks.append(compiled.compile_and_read(update.trace().lower()).peak)
    assert peaks[1] - peaks[0] < 20e6 < 0.05 * peaks[0]


def row(name, peak, *, resident=0, seconds=1.0):
    read = compiled.Compiled(1, 2, peak, [], 7e9, 0.0, 0.0, 5.0, 9.0)
    return fit.Row(
        name, read, resident, 4 * 10**12, 3.3e9, 3e9, "HBM bytes", seconds, "memory", seconds / 2
    )


def rows_of_a_run(peak=1_000_000_000, **others):
    names = "greedy", "sampled", "sft update", "rollout", "update"
    return [row(name, peak, **others) for name in names]


@pytest.mark.parametrize("peak, status", [(1_000_000_000, 0), (17_000_000_000, 1)])
def test_the_command_prints_json_and_its_status_says_whether_it_fits(
    capsys, monkeypatch, v5e, peak, status
):
    monkeypatch.setattr(fit, "plan", lambda *_: rows_of_a_run(peak))
    monkeypatch.setattr(ledger, "bus_lines", lambda *_: [])  # deals out 32,768 completions
    assert plan.main(["--json", "--search", "--grpo.prompts-per-step", "4096"]) == status
    result = json.loads(capsys.readouterr().out)
    assert result["chips"] == 8 and result["fits"] == (status == 0)
    assert result["largest_prompts_per_step"] == (4096 if status == 0 else 0)


def test_the_command_refuses_a_batch_that_does_not_split(capsys, v5e):
    assert plan.main(["--grpo.prompts-per-step", "9"]) == 2
    assert "use a multiple of 8" in capsys.readouterr().err


def test_the_largest_batch_is_searched_by_doubling_prompts(monkeypatch):
    seen = []

    def takes_200_mb_a_prompt(program, run, *_):
        seen.append(run.grpo.prompts_per_step)
        return row("update", 200_000_000 * run.grpo.prompts_per_step)

    monkeypatch.setattr(programs, "of_step", lambda *_: ["update"])
    monkeypatch.setattr(fit, "_row", takes_200_mb_a_prompt)
    run = presets.preset("gemma3-1b")
    assert fit.largest(run, ONE_B, mesh.data_mesh(), V5E) == 64
    assert seen == [16, 32, 64, 128]


def test_a_summary_adds_up():
    run = presets.preset("gemma3-1b")
    rows = rows_of_a_run(15_000_000_000, resident=500_000_000)
    account = ledger.of_run(run, ONE_B, rows, 8)
    where = topology.Target("v5e:2x4", mesh.data_mesh(), V5E)
    result = plan.summary(run, rows, account, V5E, 8, 9.0)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["fits"] and result["programs"][0]["headroom"] == 500_000_000
    assert result["compile_seconds"] == 25 and result["compile_cpu_seconds"] == 45
    assert "in 9 hours, beside all else:" in plan.table(run, rows, account, result, where)
    rows.append(row("update", 15_000_000_000, resident=1_500_000_000))
    over = plan.summary(run, rows, account, V5E, 8, 9.0)
    text = plan.table(run, rows, account, over, where)
    assert not over["fits"] and "DOES NOT FIT, by 0.50 GB" in text
    line = "4e+12 matmul FLOPs and 7e+09 HBM bytes a chip; 3.3e+09 HBM bytes, 1.100 x the floor"
    assert line in text
    assert max(len(each) for each in text.split("\n")) <= 130


def test_times_of_a_chip_of_unknown_speed_are_unknown_and_null():
    run = presets.preset("gemma3-1b")
    unknown = chips.Chip(64e9, math.nan, math.nan, math.nan)
    rows = rows_of_a_run(seconds=math.nan)
    account = ledger.of_run(run, ONE_B, rows, 8)
    where = topology.Target("8 chips of this host", mesh.data_mesh(), unknown)
    result = plan.summary(run, rows, account, unknown, 8, 9.0)
    assert json.loads(json.dumps(result, allow_nan=False))["steps_in_hours"]["likely"] is None
    text = plan.table(run, rows, account, result, where)
    assert result["fits"] and "unknown number of GRPO steps" in text and "nan" not in text


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--hours", "0"], "--hours 0.0: give the session's hours, a number above 0"),
        (["--hours", "nan"], "--hours nan: give the session's hours"),
        (["--topology", "v5e-8"], "topology 'v5e-8': write it like v5e:2x4"),
        (["--evaluation.batch-size", "20"], "evaluation.batch_size / num_samples=5 does not split"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_the_fix(capsys, v5e, flags, line):
    assert plan.main(flags) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_a_runs_own_config_is_planned_and_a_preset_beside_it_refused(tmp_path, capsys):
    run = presets.preset("gemma3-1b-lora").replace({"grpo.num_steps": 7})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(run))
    assert cli.default_run(["--config", str(path)], "gemma3-1b") == run
    assert plan.main(["--config", str(path), "--preset", "gemma3-1b"]) == 2
    assert "--config and --preset: each chooses" in capsys.readouterr().err


UPDATE = programs.Program("update", jax.jit(jnp.sin), (jnp.ones(2),), 0, "copy")


def test_a_run_that_will_not_fit_is_refused_with_what_to_change(monkeypatch):
    run = presets.preset("gemma3-1b")
    monkeypatch.setattr(programs, "of_run", lambda *_: [UPDATE])
    over = row("update", 15_000_000_000, resident=2_250_000_000)
    monkeypatch.setattr(fit, "_row", lambda *_: over)
    with pytest.raises(UserError, match="update does not fit, by 1.25 GB a chip; set --grpo.pack"):
        fit.require_room(run, mesh.data_mesh(), V5E, ["grpo"])
    monkeypatch.setattr(fit, "_row", lambda *_: row("update", 15_000_000_000))
    fit.require_room(run, mesh.data_mesh(), V5E, ["grpo"])


def test_fixes_are_named_in_the_order_of_what_they_cost():
    run = presets.preset("gemma3-1b")
    without_remat = replace(run, model=replace(run.model, remat="none"))
    smallest = replace(run, grpo=replace(run.grpo, pack_tokens=1312))
    some_remat = replace(run, model=replace(run.model, remat="dots"))
    adapters = smallest.replace({"model.lora.rank": 4})
    for settings, program, num_devices, advice in (
        (without_remat, "update", 8, "remat dots"),
        (some_remat, "sft update", 8, "remat full"),
        (run, "update", 8, "--grpo.pack-tokens 1536"),
        (without_remat, "reference", 8, "--grpo.pack-tokens 1536"),
        (run, "sft update", 8, "--sft.pack-tokens"),
        (smallest, "update", 8, "lora.rank"),
        (adapters, "update", 8, "more chips"),
        (run, "greedy", 8, "--evaluation.batch-size"),
        (run, "greedy", 128, "--evaluation.num-samples"),
        (without_remat, "state", 8, "lora.rank"),
        (adapters, "state", 8, "more chips"),
        (run, "rollout", 8, "--grpo.num-generations"),
        (without_remat, "rollout", 1, "--grpo.prompts-per-step"),
        (run, "own", 8, "--sft.own.batch-size"),
    ):
        assert advice in fit.fix(settings, program, num_devices)


def test_on_a_tpu_training_starts_only_if_the_plan_fits(monkeypatch, capsys, tmp_path):
    """The chips are this machine's CPU; what the plan says of them is made up."""
    seen = []

    def no_room(run, mesh, chip, stages):
        seen.append((run.model.weights, *stages))
        raise UserError("update does not fit")

    monkeypatch.setattr(cli, "split_cpu", lambda *_: None)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda _: None)
    monkeypatch.setattr(chips, "chip_here", lambda _: V5E)
    monkeypatch.setattr(fit, "require_room", no_room)
    ended = {"trained": True, "unfinished": None}
    monkeypatch.setattr(pipeline, "execute", lambda *_, **__: ended)
    where = lambda name: ["--json", "--run-dir", str(tmp_path / name)]
    assert train.main(where("a")) == 0 and not seen  # no TPU
    monkeypatch.setattr(topology, "is_here", lambda: True)
    assert train.main(where("b")) == 2 and seen == [("gemma3-nano", "sft", "grpo")]
    assert "update does not fit" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert train.main([*where("b"), "--ignore-plan"]) == 0 and len(seen) == 1
    for resume in (
        ["--run-dir", str(tmp_path / "b"), "--resume"],
        [*where("c"), "--resume-from", str(tmp_path / "b")],
    ):
        files.write_text(tmp_path / "b" / "weights" / "sft.safetensors", "")
        assert train.main(resume) == 2 and seen.pop() == ("gemma3-nano", "grpo")


@pytest.mark.parametrize(
    "stages, update",
    [
        (None, {"sft update", "rollout", "advantages", "update", "state"}),
        (["grpo"], {"rollout", "advantages", "update", "state"}),
        ([], set()),
    ],
)
def test_only_the_programs_of_what_is_left_of_a_run_are_looked_at(stages, update):
    run, config = presets.preset("gemma3-nano"), CONFIGS["gemma3-nano"]
    found = lambda *stages: {
        program.name: program.resident
        for program in programs.of_run(
            run, config, mesh.data_mesh(jax.devices()[:4]), programs.GEMMA_IDS, *stages
        )
    }
    left = found(stages)
    assert left.keys() == update | {"greedy", "sampled"}
    assert left.items() <= found().items()


RUN = {"gemma3-nano", "gemma3-270m"}  # the presets whose results README.md has
FILES = {"gemma3-1b-kaggle": "gemma3-1b"}  # differ from these in nothing but their files
CHIPS = {  # what the others are compiled for
    "gemma3-1b": "v5e:2x4",
    "gemma3-1b-lora": "v5e:2x4",
    "gemma3-1b-it-lora": "v5e:2x4",
    "gemma3-1b-lora-v5e-1": "v5e:1x1",
    "gemma3-1b-v5e-16": "v5e:4x4",
    "gemma3-1b-v5e-256": "v5e:16x16",
}


def test_every_preset_was_run_or_is_compiled_for_its_chips():
    assert set(presets.PRESETS) == RUN | CHIPS.keys() | FILES.keys() and RUN.isdisjoint(CHIPS)
    for name, other in FILES.items():
        one, other = presets.preset(name), presets.preset(other)
        assert one != other
        files = {"checkpoint": other.checkpoint, "weights_dtype": other.weights_dtype}
        assert replace(one, **files) == other


@pytest.mark.slow
@pytest.mark.parametrize("preset", CHIPS)
def test_a_preset_compiles_for_its_chips_and_fits(v5e, preset):
    """Two layers of the 1B, at its widths."""
    devices = mesh.data_mesh(topology.devices(CHIPS[preset]))
    rows = fit.plan(presets.preset(preset), TWO_LAYERS, devices, V5E)
    names = [
        "state",
        "reshard",
        "greedy",
        "sampled",
        "sft update",
        "rollout",
        "advantages",
        "update",
    ]
    if preset == "gemma3-1b-it-lora":  # GRPO alone, held to a reference
        names = ["state", "reshard", "greedy", "rollout", "advantages", "reference", "update"]
    assert [row.name for row in rows] == names
    assert not any(fit.excess(row, V5E) for row in rows)


@pytest.mark.parametrize("number", [16, 256])
def test_presets_for_more_chips_have_a_prompt_a_chip(number):
    run = presets.preset(f"gemma3-1b-v5e-{number}")
    assert run.grpo.prompts_per_step == number and run.sft.batch_size % number == 0
    assert run.evaluation.batch_size // run.evaluation.num_samples % number == 0
    few = presets.preset("gemma3-1b")
    for stage, times in (("sft", run.sft.batch_size / 64), ("grpo", number / 8)):
        rate, of_few = (getattr(each, stage).optimizer.learning_rate for each in (run, few))
        assert rate == pytest.approx(of_few * times**0.5, rel=0.01)
