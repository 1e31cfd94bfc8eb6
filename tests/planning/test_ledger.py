"""A run's ledger: what is added up, by hand."""

import math
from dataclasses import replace

import pytest

from benchmarks import lengths
from gemma_grpo import presets
from gemma_grpo.config import DataConfig
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS
from gemma_grpo.planning import batches, compiled, fit, ledger, programs
from gemma_grpo.planning.chips import CHIPS

ONE_B = CONFIGS["gemma3-1b"]
PARAMETERS = 999_885_952  # 262144 x 1152, 26 layers of 26 836 992 with norms and gains, 1152

# Seconds of a call at full lengths; half of it at likely ones.
CALLS = {
    "state": 0.5,
    "reshard": 0.25,
    "greedy": 2.0,
    "sampled": 4.0,
    "sft update": 3.0,
    "rollout": 5.0,
    "advantages": 0.25,
    "update": 1.5,
}


def rows(calls=CALLS):
    read = compiled.Compiled(1, 2, 3, [], 4.0, 5.0, 0.0, 10.0, 20.0)
    return [fit.Row(name, read, 0, 1, 1, 1, "", s, "memory", s / 2) for name, s in calls.items()]


def account(run, calls=CALLS):
    return ledger.of_run(run, ONE_B, rows(calls), 8)


def by_name(lines):
    return {line.name: line for line in lines}


def test_likely_completions_are_the_trace_that_benchmarks_share():
    assert tuple(batches.completion_lengths(64, 800)) == lengths.LENGTHS


def test_a_planned_step_computes_all_tokens_of_its_lengths_and_no_others():
    run = presets.preset("gemma3-1b")
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    (P, G), tokens = batches.size(run, "grpo"), {}
    for lengths_of in ("full", "likely"):
        step = batches.batch(run, "grpo", lengths_of)
        prompts, completions = step["prompt_mask"], step["completion_mask"]
        tokens[lengths_of] = prompts.sum(axis=1).tolist(), completions.sum(axis=1).tolist()
        assert prompts[:, -1].all() and completions[:, 0].all()  # padded on the left, on the right
    assert tokens["full"] == ([S] * P, [T] * P * G)
    likely = batches.prompt_lengths(P, S), batches.completion_lengths(P * G, T)
    assert tokens["likely"] == tuple(each.tolist() for each in likely)
    assert tokens["likely"][0][0] == 40 and tokens["likely"][0][-1] == 120


def test_the_seconds_of_a_run_are_added_by_hand():
    """SFT 200 steps and GRPO 500, saved every 50 but for the last; 1319 problems are 21 batches of
    64 greedy and 83 of 16 sampled ones; the disk takes 100 MB a second, the host 1 GB."""
    run = presets.preset("gemma3-1b")
    seconds = by_name(account(run).seconds)
    full = {name: line.most for name, line in seconds.items()}
    assert full["loading"] == 2 * PARAMETERS / 1e8
    assert full["compilation"] == 10 * len(CALLS)
    evaluation = 21 * 2.0 + 83 * 4.0
    assert {full[f"{name} evaluation"] for name in ("base", "SFT", "GRPO")} == {evaluation}
    assert full["SFT steps"] == 200 * 3.0 and seconds["SFT steps"].likely == 300
    assert full["GRPO steps"] == 500 * (0.25 + 5.0 + 0.25 + 1.5)
    assert full["SFT checkpoints"] == 0.05 * 600 < 3 * 12 * PARAMETERS / 1e9  # more than 5 %
    assert full["GRPO checkpoints"] == pytest.approx(9 * 12 * PARAMETERS / 1e9, rel=1e-3)
    assert full["GRPO weights"] == pytest.approx(8 * PARAMETERS / 1e8, rel=1e-3)
    assert full["export"] == pytest.approx(6 * PARAMETERS / 1e8)
    assert account(run).hours()[1] == pytest.approx(sum(full.values()) / 3600)
    bases = {name: line.basis for name, line in seconds.items()}
    assert bases.pop("compilation") == "measured" and set(bases.values()) == {"modelled"}


def test_own_demonstrations_are_the_batches_of_their_problems():
    """7473 problems of GSM8K without the four that are shown, 16 at a time; or the first 100."""
    run = presets.preset("gemma3-1b").replace({"sft.demonstrations": "own"})
    line = by_name(account(run, CALLS | {"own": 6.0}).seconds)["own demonstrations"]
    assert (line.likely, line.most) == (467 * 3.0, 467 * 6.0)
    assert line.note == "7469 problems x 4, 467 batches"
    few = run.replace({"sft.own.num_problems": 100})
    assert by_name(account(few, CALLS | {"own": 6.0}).seconds)["own demonstrations"].most == 7 * 6.0
    assert "own demonstrations" not in by_name(account(presets.preset("gemma3-1b")).seconds)


def test_steps_in_some_hours_are_what_all_else_leaves():
    run = presets.preset("gemma3-1b")
    made = account(run)
    rest = sum(
        line.most for line in made.seconds if line.name not in ("GRPO steps", "GRPO checkpoints")
    )
    each = 7.0 + made.disk.checkpoint / 1e9 * 9 / 500  # nine checkpoints in 500 steps
    assert made.steps_in(9)[1] == math.floor((9 * 3600 - rest) / each)
    assert made.steps_in(9)[0] > made.steps_in(9)[1] > made.steps_in(3)[1] > 0
    assert made.steps_in(0.1) == (0, 0)


def test_what_a_step_repeats_counts_as_often():
    run = presets.preset("gemma3-1b")
    run = replace(run, grpo=replace(run.grpo, num_iterations=2, resample_rounds=3))
    calls = CALLS | {"reference": 1.0, "old": 1.0}
    step = account(run, calls).step
    save = 12 * PARAMETERS / 1e9 * 9 / 500
    most = 0.25 + 4 * 5.0 + 0.25 + 1.0 + 1.0 + 2 * 1.5 + save
    assert step.most == pytest.approx(most, rel=1e-3)
    likely = (0.25 + 5.0 + 0.25 + 1.0 + 1.0 + 2 * 1.5) / 2
    assert likely < step.likely < 1.0501 * likely  # the share that saving may take


def test_a_teacher_is_read_from_disk_with_the_model_and_asked_once_a_step():
    """A 4B: 262208 x 2560, 34 layers of 94 382 592 with norms and gains, 2560."""
    run = presets.preset("gemma3-1b")
    grpo = replace(run.grpo, teacher="gemma3-4b", num_iterations=2)
    calls = CALLS | {"teacher": 7.0, "old": 1.0}
    seconds = by_name(account(replace(run, grpo=grpo), calls).seconds)
    assert seconds["loading"].most == 2 * (PARAMETERS + 3_880_263_168) / 1e8
    assert seconds["GRPO steps"].most == 500 * (0.25 + 5.0 + 0.25 + 7.0 + 1.0 + 2 * 1.5)
    host = by_name(ledger.of_run(replace(run, grpo=grpo), ONE_B, rows(calls), 8).host)
    assert host["loading"].most == 2 * 262_208 * 2560  # more than 4 * 262144 * 1152


def test_adapters_are_all_that_is_saved_of_them():
    run = presets.preset("gemma3-1b-lora")
    trained, everything = ledger.parameters(run, ONE_B)
    # A and B of rank 16 for q, k, v, o, and the MLP's three: 16 x (in + out), in 26 layers.
    sides = (1152 + 1024) * 2 + (1152 + 256) * 2 + (1152 + 6912) * 3
    assert (trained, everything) == (26 * 16 * sides, PARAMETERS)
    host = by_name(account(run).host)
    assert host["a checkpoint"].most == pytest.approx(12 * trained, rel=0.01)
    assert host["loading"].most == 2 * 262_144 * 1152
    assert by_name(account(presets.preset("gemma3-1b")).host)["loading"].most == 4 * 262_144 * 1152


def test_a_stage_that_is_left_out_costs_nothing():
    sft = account(replace(presets.preset("gemma3-1b"), stages="sft"))
    assert not any("GRPO" in line.name for line in [*sft.seconds, *sft.bus])
    assert sft.step.most == 0 and math.isnan(sft.steps_in(9)[0])


def test_the_bytes_of_a_grpo_step_are_counted_by_hand():
    """8 prompts of 512 slots and 64 completions of 800. Packs of 3072 tokens: 3 a device, each of
    4 prompts (8 * 3072 tokens make groups of 512 + 6400 slots) and 32 completions; packs of 768: 3
    a device, each of one prompt and 8 completions."""
    run = presets.preset("gemma3-1b")
    lines = by_name(ledger.bus_lines(run, 8))

    def pack(tokens, prompts):
        prompt, completion = 512 * (4 + 1), 800 * (4 + 1 + 1 + 4 + 4) + 4 + 4
        return prompts * prompt + 8 * prompts * completion + 4 * tokens

    packs = 8 * (3 * pack(3072, 4) + 4 + 3 * pack(768, 1) + 4)
    up = 8 * 512 * (4 + 1) + 64 * 4
    down = 64 * (800 * (4 + 1 + 4) + 1) + 64 * 4 + 64 * 800 * 4
    assert lines["a GRPO step, to the devices"].most == up + packs
    assert lines["a GRPO step, from them"].most == down
    assert all(line.basis == "counted" for line in lines.values())


def test_a_batch_of_evaluation_is_no_larger_than_all_problems_need():
    run = presets.preset("gemma3-1b")
    assert batches.evaluation_prompts(run, 8) == {"greedy": 64, "sampled": 16}
    few = replace(run, data=DataConfig("gsm8k", num_test=20))
    assert batches.evaluation_prompts(few, 8) == {"greedy": 24, "sampled": 16}


def test_hours_that_are_none_are_refused():
    for hours in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="give the session's hours"):
            ledger.check_hours(hours)


def test_plan_says_what_it_compiles(monkeypatch, capsys):
    run, (row, *_) = presets.preset("gemma3-1b"), rows()
    program = programs.Program("rollout", lambda: None, (), 0, "rollout")
    monkeypatch.setattr(programs, "of_run", lambda *_: [program, program])
    monkeypatch.setattr(fit, "_row", lambda *_: row)
    assert len(fit.plan(run, ONE_B, mesh.data_mesh(), CHIPS["v5e"])) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"compiling rollout ({number} of 2)" for number in (1, 2)]


def test_snapshots_are_greedy_batches_and_grow_with_the_steps():
    run = presets.preset("gemma3-1b")
    run = replace(run, evaluation=replace(run.evaluation, every=150, snapshot_problems=100))
    line = by_name(account(run).seconds)["GRPO snapshots"]
    assert line.most == 3 * 2 * 2.0 and line.likely == line.most / 2  # after 150, 300 and 450
    assert account(run).step.most - account(presets.preset("gemma3-1b")).step.most == (
        pytest.approx(line.most / 500)
    )
    few = replace(run, data=DataConfig(source="gsm8k", num_test=5))  # one batch holds them all
    assert by_name(account(few).seconds)["GRPO snapshots"].most == 3 * 1 * 2.0
    sft = replace(run, stages="sft")
    assert "GRPO snapshots" not in by_name(account(sft).seconds)
