"""A run's peak on disk: by hand arithmetic, and one line where there is no room for it."""

import shutil
from dataclasses import replace

import jax
import pytest

from gemma_grpo import model, presets
from gemma_grpo.errors import UserError
from gemma_grpo.planning import disk
from gemma_grpo.training.config import GuardConfig

PARAMETERS = 999_885_952  # of Gemma 3 1B
ARCHITECTURE = model.CONFIGS["gemma3-1b"]
FULL = presets.preset("gemma3-1b")
KAGGLE = presets.preset("gemma3-1b-kaggle")


def about(expected):
    """Indices, names and headers are a thousandth."""
    return pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_holds_weights_and_two_moments_in_float32():
    of = disk.of_run(FULL, ARCHITECTURE)
    assert of.weights == about(4 * PARAMETERS)
    assert of.checkpoint == about(12 * PARAMETERS)


def test_the_peak_is_the_kept_checkpoints_one_being_written_and_two_stages_weights():
    of = disk.of_run(FULL, ARCHITECTURE)
    assert of.run_folder - of.records == about((3 * 12 + 2 * 4) * PARAMETERS)
    assert of.checkpoint_folder == 0
    kept = disk.of_run(replace(FULL, keep_checkpoints=True), ARCHITECTURE)
    assert kept.run_folder - kept.records == about((5 * 12 + 2 * 4) * PARAMETERS)
    alone = disk.of_run(replace(FULL, stages="grpo"), ARCHITECTURE)
    assert alone.run_folder - alone.records == about((3 * 12 + 4) * PARAMETERS)


@pytest.mark.parametrize("action, checkpoints", [("none", 3), ("stop", 4), ("rollback", 4)])
def test_a_guard_keeps_one_more_checkpoint_to_go_back_to(action, checkpoints):
    guarded = replace(FULL, grpo=replace(FULL.grpo, guard=GuardConfig(action=action)))
    of = disk.of_run(guarded, ARCHITECTURE)
    assert of.run_folder - of.records == about((checkpoints * 12 + 2 * 4) * PARAMETERS)
    of = disk.of_run(replace(guarded, stages="sft"), ARCHITECTURE)
    assert of.run_folder - of.records == about((3 * 12 + 4) * PARAMETERS)


def test_all_weights_of_the_1b_live_within_kaggles_20_gb_with_the_preset_for_it():
    of = disk.of_run(KAGGLE, ARCHITECTURE)
    programs = disk.PROGRAMS * disk.PROGRAM_BYTES
    assert of.run_folder - of.records == about((12 + 2 * 2) * PARAMETERS)
    assert of.run_folder + programs <= 20e9
    assert of.checkpoint_folder == about(2 * 12 * PARAMETERS)
    wide = disk.of_run(replace(KAGGLE, weights_dtype="float32"), ARCHITECTURE)
    assert wide.run_folder + programs > 20e9  # why the weights are stored in bfloat16


def test_adapters_alone_are_kept_of_a_lora_run():
    run = presets.preset("gemma3-1b-lora")
    adapters, _ = model.partition(model.abstract(ARCHITECTURE, run.model.lora)[1])
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    of = disk.of_run(run, ARCHITECTURE)
    assert 4 * trained <= of.weights < 4.1 * trained
    assert 12 * trained <= of.checkpoint < 12.5 * trained


def test_own_demonstrations_are_counted_as_many_as_may_be_kept():
    run = FULL.replace({"sft.demonstrations": "own", "data.num_train": 104})
    more = run.replace({"sft.own.max_per_problem": 3})
    rows = lambda run: disk.of_run(run, ARCHITECTURE).records
    a_row = (rows(more) - rows(run)) / 100  # the four that are shown are not asked
    tokens = FULL.model.max_prompt_length + FULL.model.max_completion_length
    assert a_row >= 4 * tokens
    assert rows(run) - rows(FULL) == pytest.approx(2 * 100 * a_row)
    never = run.replace({"sft.own.max_per_problem": 9})  # of four samples four are kept at most
    assert rows(never) - rows(FULL) == pytest.approx(4 * 100 * a_row)


def test_snapshots_are_counted_as_often_as_they_are_taken_with_the_few_problems_of_each():
    run = FULL.replace({"grpo.num_steps": 100, "evaluation.num_samples": 0, "data.num_test": 50})
    rows = lambda **data: (
        disk.of_run(
            run.replace({f"evaluation.{name}": value for name, value in data.items()}), ARCHITECTURE
        ).records
    )
    more_problems = run.replace({"data.num_test": 51})
    # The base, two stages, and what a deadline left of one.
    a_row = (disk.of_run(more_problems, ARCHITECTURE).records - rows()) / 4
    assert rows(every=30, snapshot_problems=8) - rows() == 3 * 8 * a_row
    assert rows(every=30, snapshot_problems=64) - rows() == 3 * 50 * a_row


def test_records_grow_with_the_completions():
    more = replace(FULL, grpo=replace(FULL.grpo, num_steps=2 * FULL.grpo.num_steps))
    rows = FULL.grpo.num_steps * FULL.grpo.prompts_per_step * FULL.grpo.num_generations
    one, two = (disk.of_run(run, ARCHITECTURE).records for run in (FULL, more))
    tokens = FULL.model.max_prompt_length + FULL.model.max_completion_length
    # Text of four bytes a token; a completion's token ids and log-probs beside it.
    assert two - one >= rows * (4 * tokens + 6 * FULL.model.max_completion_length)


@pytest.fixture
def free(monkeypatch):
    """Bytes free on every disk, as the test sets them."""
    num_bytes = [0]
    usage = lambda _: shutil._ntuple_diskusage(10**14, 0, num_bytes[0])
    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    return num_bytes


def refusal(run, run_dir, **how):
    how = {"cache": False, "fixed": False} | how
    with pytest.raises(UserError) as caught:
        disk.require_room(run, ARCHITECTURE, run_dir, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_that_fits_to_the_byte_starts_and_with_a_byte_less_does_not(tmp_path, free):
    free[0] = disk.of_run(FULL, ARCHITECTURE).run_folder
    disk.require_room(FULL, ARCHITECTURE, tmp_path / "run", cache=False, fixed=False)
    free[0] -= 1
    refusal(FULL, tmp_path / "run")


@pytest.mark.parametrize(
    "gigabytes, missing, fix",
    [
        (40, "4.7 GB", "; --checkpoint.keep 1 fits,"),
        (30, "14.7 GB", "; --checkpoint.keep 1 --weights-dtype bfloat16 fits,"),
        (22, "22.7 GB", "; --checkpoint.keep 1 --checkpoint.folder PATH fits, with a PATH on"),
        (20, "24.7 GB", "; --weights-dtype bfloat16 --checkpoint.keep 1 --checkpoint.folder PATH"),
        (10, "34.7 GB", "; free some space,"),
    ],
)
def test_too_small_a_disk_is_told_by_how_much_and_with_a_setting_that_fits(
    tmp_path, free, gigabytes, missing, fix
):
    free[0] = gigabytes * 10**9
    said = refusal(FULL, tmp_path / "run")
    assert f"too small for the run, by {missing}" in said and fix in said
    assert str(tmp_path / "run") in said and said.endswith("or insist with --ignore-plan")


def test_two_folders_on_one_disk_share_what_is_free(tmp_path, free):
    run = replace(KAGGLE, checkpoint=replace(KAGGLE.checkpoint, folder=str(tmp_path / "ck")))
    of = disk.of_run(run, ARCHITECTURE)
    free[0] = of.run_folder + of.checkpoint_folder - 1
    assert f"{tmp_path}/run and {tmp_path}/ck" in refusal(run, tmp_path / "run")
    free[0] += 1
    disk.require_room(run, ARCHITECTURE, tmp_path / "run", cache=False, fixed=False)
    refusal(run, tmp_path / "run", cache=True)


def test_what_a_resumed_run_holds_already_needs_no_room_and_its_settings_stay(tmp_path, free):
    run = presets.preset("gemma3-nano")
    nano = model.CONFIGS["gemma3-nano"]
    needed = disk.of_run(run, nano).run_folder
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "sft.safetensors").write_bytes(bytes(10**6))
    free[0] = needed - 10**6
    disk.require_room(run, nano, tmp_path, cache=False, fixed=True)
    free[0] -= 1
    with pytest.raises(UserError, match="; free some space, or insist with --ignore-plan"):
        disk.require_room(run, nano, tmp_path, cache=False, fixed=True)


def test_the_lines_name_both_folders():
    first, second = disk.lines(KAGGLE, disk.of_run(KAGGLE, ARCHITECTURE))
    assert "16.7 GB at most in the run's folder" in first
    assert second.split() == ["24.0", "GB", "at", "most", "in", "/tmp/checkpoints"]
