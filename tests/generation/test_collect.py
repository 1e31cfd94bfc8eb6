"""From problems to scored groups: whose completion each row is, and what it is given."""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_grpo import rewards
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import mesh
from gemma_grpo.generation import collect
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assets

TOKENIZER = Tokenizer(assets.NANO_TOKENIZER)
PROBLEMS = [Problem("What is 1?", "1"), Problem("What is 2?", "2")]
S, G, T = 24, 3, 40


def drawn(answers):
    """A rollout of a completion for each answer, right-padded."""
    rows = [
        TOKENIZER.encode_completion(f"<reasoning>\n</reasoning>\n<answer>\n{answer}\n</answer>")
        for answer in answers
    ]
    mask_BT = np.arange(T) < np.array([len(row) for row in rows])[:, None]
    ids_BT = np.full((len(rows), T), TOKENIZER.pad_id, np.int32)
    ids_BT[mask_BT] = np.concatenate(rows)
    logps_BT = jnp.where(mask_BT, -0.5, 0.0)
    return Rollout(jnp.asarray(ids_BT), jnp.asarray(mask_BT), logps_BT, jnp.ones(len(rows), bool))


def test_a_row_is_scored_against_the_problem_of_its_group():
    asked = []

    def rollout(params, prompt_ids_PS, prompt_mask_PS, key):
        asked.extend(np.asarray(prompt_ids_PS)[p, np.asarray(prompt_mask_PS)[p]] for p in range(2))
        return drawn("121212")

    one = mesh.data_mesh(jax.devices()[:1])
    sampler = collect.Sampler(rollout, one, TOKENIZER, "", S, G)
    groups = sampler.collect({}, PROBLEMS, jax.random.key(0), rewards.END_WEIGHTS, [])
    assert [row.tolist() for row in asked] == [
        TOKENIZER.encode_prompt(problem.prompt) for problem in PROBLEMS
    ]
    assert groups.problems == PROBLEMS
    assert [each.prompt for each in groups.samples] == ["What is 1?"] * G + ["What is 2?"] * G
    assert [each.answer for each in groups.samples] == ["1"] * G + ["2"] * G
    assert groups.scores.components["correctness"] == [1, 0, 1, 1, 0, 1]
