"""What GRPO draws: by phases, epochs or pass rates, and the same from memory as from the record."""

import json
import shutil
from dataclasses import replace

import pytest

from gemma_grpo.data import batches
from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.training import draw
from gemma_grpo.training.config import GRPOConfig
from gemma_grpo.training.draw import Draws, History

PROBLEMS = [
    Problem(f"{name} {n}", "1", None, name, f"domain {n % 2}")
    for name in DIFFICULTIES
    for n in range(12)
]
POOLS = batches.by_difficulty(PROBLEMS)
CONFIG = GRPOConfig(num_steps=30, prompts_per_step=4, num_generations=4)
BY_RATE = replace(CONFIG, curriculum="pass_rate", skip_uniform=0.7)


def draws_of(config, folder, seed=3):
    return Draws(config, POOLS, seed, History(folder))


def correctness_of(problems_P):
    """Easy problems are always right, hard ones never, medium ones half."""
    share = {"easy": [1.0, 1.0, 1.0, 1.0], "medium": [1.0, 0.0, 1.0, 0.0], "hard": [0.0] * 4}
    return sum((share[p.difficulty] for p in problems_P), [])


def record(folder, step, problems_P):
    """As a run writes it: step counts from 1."""
    (folder / "rollouts").mkdir(exist_ok=True)
    rows = [
        {
            "group": row // 4,
            "prompt": problems_P[row // 4].prompt,
            "difficulty": problems_P[row // 4].difficulty,
            "domain": problems_P[row // 4].domain,
            "correctness": correctness,
        }
        for row, correctness in enumerate(correctness_of(problems_P))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rollouts" / f"grpo-{step + 1:06d}.jsonl").write_text(text)


def run(draws, folder, steps):
    """The problems of each step, all of which go on record."""
    taken = []
    for step in steps:
        problems_P = draws.batch(step)
        draws.history.add(problems_P, correctness_of(problems_P))
        record(folder, step, problems_P)
        taken.append([p.prompt for p in problems_P])
    return taken


def test_phases_and_epochs_are_drawn_as_data_batches_has_them(tmp_path):
    wanted = batches.phase_batch(POOLS, step=7, num_steps=30, batch_size=4, seed=3)
    assert draws_of(CONFIG, tmp_path).batch(7) == wanted
    rows = batches.batch_indices(7, 4, 36, 3)
    epochs = draws_of(replace(CONFIG, curriculum="none"), tmp_path)
    assert epochs.batch(7) == [PROBLEMS[row] for row in rows]
    assert epochs.batch(7, 1) == [PROBLEMS[row] for row in batches.batch_indices(7, 4, 36, 1000006)]


def test_by_pass_rate_what_is_undecided_is_drawn_most(tmp_path):
    taken = run(draws_of(replace(BY_RATE, skip_uniform=0.0), tmp_path), tmp_path, range(60))
    late = [prompt.split()[0] for batch in taken[20:] for prompt in batch]
    # p (1 - p) is 0.25 for medium ones, and at most 0.09 for the others after 8 completions.
    assert late.count("medium") > 2 * (len(late) - late.count("medium"))


@pytest.mark.parametrize("curriculum", ["phases", "pass_rate", "none"])
def test_a_resumed_run_draws_from_the_record_what_it_would_have_drawn_from_memory(
    tmp_path, curriculum
):
    config = replace(BY_RATE, curriculum=curriculum)
    whole = run(draws_of(config, tmp_path), tmp_path, range(30))
    for begin in (1, 12, 29):
        assert run(draws_of(config, tmp_path), tmp_path, range(begin, 30)) == whole[begin:]


def test_history_changes_what_is_drawn_only_where_the_settings_ask_for_it(tmp_path):
    run(draws_of(BY_RATE, tmp_path), tmp_path, range(8))
    num_skipped = 0
    for curriculum in ("phases", "none"):
        for seed in range(5):
            plain = replace(CONFIG, curriculum=curriculum)
            draws = draws_of(plain, tmp_path, seed)
            assert draws.batch(8) == draws_of(plain, tmp_path / "absent", seed).batch(8)
            assert draws.num_skipped(8) == 0
            skipping = draws_of(replace(plain, skip_uniform=0.999), tmp_path, seed)
            pairs = zip(skipping.batch(8), draws.batch(8), strict=True)
            assert skipping.num_skipped(8) == sum(a is not b for a, b in pairs)
            num_skipped += skipping.num_skipped(8)
    assert num_skipped > 0


def test_rounds_of_one_step_draw_other_problems_from_the_same_history(tmp_path):
    draws = draws_of(BY_RATE, tmp_path)
    run(draws, tmp_path, range(5))
    first, second = draws.batch(5), draws.batch(5, 1)
    assert first != second and draws.batch(5) == first


def test_a_record_with_a_missing_step_is_read_with_a_warning(tmp_path, capsys):
    run(draws_of(BY_RATE, tmp_path), tmp_path, range(10))
    (tmp_path / "rollouts" / "grpo-000004.jsonl").unlink()
    assert len(draws_of(BY_RATE, tmp_path).batch(10)) == 4
    assert "rollouts lacks 1 of 10 steps" in capsys.readouterr().err


def test_history_reads_the_record_only_for_steps_that_it_did_not_see(tmp_path, capsys):
    draws = draws_of(BY_RATE, tmp_path)
    taken = run(draws, tmp_path, range(10))
    assert [p.prompt for p in draws.batch(4)] == taken[4]  # an earlier step: from the record
    assert [p.prompt for p in draws.batch(9)] == taken[9]
    draws.history.add(draws.batch(9), correctness_of(draws.batch(9)))
    shutil.rmtree(tmp_path / "rollouts")
    assert draws.batch(10) and capsys.readouterr().err == ""


def test_skipping_that_can_do_little_is_said():
    assert draw.warning(BY_RATE, PROBLEMS) is None  # 120 draws of 36 problems
    assert draw.warning(CONFIG, PROBLEMS * 4) is None
    assert "30 steps draw 120 of 144 problems" in draw.warning(BY_RATE, PROBLEMS * 4)
