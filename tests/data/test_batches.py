"""Which problems a step takes: epochs, phases, and that seed and step alone decide."""

import collections

import numpy as np
import pytest

from gemma_grpo.data import batches
from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.errors import UserError

MANY = batches.by_difficulty(
    [Problem(f"{name} {row}", "1", difficulty=name) for name in DIFFICULTIES for row in range(50)]
)


def phase_batch(step, *, problems=MANY, num_steps=300, batch_size=8, seed=5, **options):
    return batches.phase_batch(
        problems, step=step, num_steps=num_steps, batch_size=batch_size, seed=seed, **options
    )


def shares(steps, **options) -> dict[str, float]:
    counts = collections.Counter(
        problem.difficulty for step in steps for problem in phase_batch(step, **options)
    )
    return {name: counts[name] / counts.total() for name in DIFFICULTIES}


def test_an_epoch_is_a_permutation_of_its_own():
    first, second = batches.epoch_order(40, 7, 0), batches.epoch_order(40, 7, 1)
    assert sorted(first) == sorted(second) == list(range(40))
    assert list(first) != list(second)
    assert list(first) != list(batches.epoch_order(40, 8, 0))
    assert list(batches.epoch_order(40, 0, 1)) != list(batches.epoch_order(40, 1, 0))
    assert list(first) == list(batches.epoch_order(40, 7, 0))


@pytest.mark.parametrize(
    ("num_problems", "batch_size"), [(10, 4), (10, 10), (3, 8), (7, 1), (1, 3)]
)
def test_batches_are_the_epochs_laid_end_to_end(num_problems, batch_size):
    endless = np.concatenate([batches.epoch_order(num_problems, 7, e) for e in range(30)])
    for step in range(6):
        expected = endless[step * batch_size : (step + 1) * batch_size]
        found = batches.batch_indices(step, batch_size, num_problems, 7)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int64


def test_a_far_step_is_found_without_walking_there():
    # Step 10**9 of batches of 4 begins at position 4 * 10**9: epoch 4 * 10**8, place 0, of 10.
    found = batches.batch_indices(10**9, 4, 10, 3)
    np.testing.assert_array_equal(found, batches.epoch_order(10, 3, 4 * 10**8)[:4])


@pytest.mark.parametrize(
    ("progress", "phase"),
    [
        (0.0, "easy"),
        (0.33, "easy"),
        (1 / 3, "medium"),
        (0.66, "medium"),
        (2 / 3, "hard"),
        (1.0, "hard"),
    ],
)
def test_a_boundary_belongs_to_the_phase_it_begins(progress, phase):
    assert batches.curriculum_phase(progress) == phase


def test_a_third_of_the_steps_each_is_easy_medium_and_hard():
    phases = [batches.curriculum_phase(step / 9) for step in range(9)]
    assert phases == ["easy"] * 3 + ["medium"] * 3 + ["hard"] * 3


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_an_error(progress):
    with pytest.raises(ValueError, match="progress"):
        batches.curriculum_phase(progress)


def test_by_difficulty_parts_the_problems_and_names_the_absent():
    problems = [Problem("a", "1", difficulty="hard"), Problem("b", "1", difficulty="easy")]
    assert batches.by_difficulty(problems) == {
        "easy": [problems[1]],
        "medium": [],
        "hard": [problems[0]],
    }


@pytest.mark.parametrize(
    ("phase", "present", "weights"),
    [
        ("medium", ("easy", "medium", "hard"), {"easy": 0.3, "medium": 0.7, "hard": 0.0}),
        ("hard", ("easy", "hard"), {"easy": 2 / 7, "hard": 5 / 7}),  # 0.2 and 0.5 of 0.7
        ("hard", ("easy", "medium"), {"easy": 0.4, "medium": 0.6}),
        ("medium", ("easy", "hard"), {"easy": 1.0, "hard": 0.0}),
        ("easy", ("medium", "hard"), {"medium": 1.0, "hard": 0.0}),
        ("medium", ("hard",), {"hard": 1.0}),
    ],
)
def test_weights_are_rescaled_to_the_difficulties_present(phase, present, weights):
    assert batches.phase_weights(phase, present) == pytest.approx(weights)


def test_each_phase_draws_its_mix():
    # 800 draws a phase: the largest standard deviation is sqrt(0.25 / 800) = 0.018.
    assert shares(range(0, 100)) == {"easy": 1.0, "medium": 0.0, "hard": 0.0}
    assert shares(range(100, 200)) == pytest.approx(
        {"easy": 0.3, "medium": 0.7, "hard": 0.0}, abs=0.07
    )
    assert shares(range(200, 300)) == pytest.approx(
        {"easy": 0.2, "medium": 0.3, "hard": 0.5}, abs=0.07
    )


def test_batches_of_one_still_get_every_share():
    assert shares(range(200, 300), batch_size=1)["easy"] > 0


def test_a_phase_batch_follows_from_seed_and_step_alone():
    batch = phase_batch(250)
    assert len(batch) == 8
    phase_batch(3)
    assert phase_batch(250) == batch
    assert phase_batch(251) != batch
    assert phase_batch(250, seed=6) != batch


def test_a_batch_repeats_a_problem_only_when_it_must():
    for step in range(30):  # the easy phase: 8 of 50
        assert len(set(phase_batch(step))) == 8
    few = batches.by_difficulty([Problem(f"{row}", "1", difficulty="hard") for row in range(3)])
    counts = collections.Counter(phase_batch(0, problems=few))
    assert sorted(counts.values()) == [2, 3, 3]


def test_every_problem_of_a_phase_comes_up():
    # 100 batches of 8 from 50: a given one is missed with probability 0.84**100, below 1e-7.
    assert {problem.prompt for step in range(100) for problem in phase_batch(step)} == {
        problem.prompt for problem in MANY["easy"]
    }


def test_a_batch_mixes_its_difficulties_along_its_rows():
    first_rows = [phase_batch(step)[0].difficulty for step in range(200, 300)]
    assert 0.3 < first_rows.count("hard") / 100 < 0.7  # its weight is 0.5


def test_no_problems_and_negative_seeds_are_refused():
    with pytest.raises(UserError, match="no problems"):
        batches.batch_indices(0, 4, 0, 7)
    with pytest.raises(UserError, match="no problems"):
        phase_batch(0, problems=batches.by_difficulty([]))
    with pytest.raises(UserError, match="seed -1 is negative"):
        batches.epoch_order(4, -1, 0)
    with pytest.raises(UserError, match="seed -1 is negative"):
        phase_batch(0, seed=-1)


def test_epochs_and_phases_do_not_share_their_randomness():
    # With one stream, the first draw of step 0 would be the first of epoch 0.
    one_each = batches.by_difficulty([Problem(f"{row}", "1") for row in range(1000)])
    drawn = {int(problem.prompt) for problem in phase_batch(0, problems=one_each, batch_size=100)}
    assert drawn != set(batches.epoch_order(1000, 5, 0)[:100].tolist())
