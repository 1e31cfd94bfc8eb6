"""Laws of the rollout: what was drawn, from which distribution, and that nothing else matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx
from stubs import PAD, TINY, host, tiny_model, tiny_prompts

from gemma_grpo import logps, mesh, model, rollout

G, T = 3, 9
STOPS = (5, 6, 7, 8, 9, 10)  # many, so that random rows end at different slots
GRAPHDEF, PARAMS = tiny_model()


def one_device():
    return mesh.data_mesh(jax.devices()[:1])


def roll(num_prompts=4, *, on=None, key=0, stop_ids=STOPS, prompts=None, **sampling):
    prompt_ids, prompt_mask = tiny_prompts(num_prompts) if prompts is None else prompts
    program = rollout.make_rollout(
        GRAPHDEF,
        on or one_device(),
        num_generations=sampling.pop("num_generations", G),
        max_completion_length=T,
        stop_ids=stop_ids,
        pad_id=PAD,
        **{"temperature": 1.0} | sampling,
    )
    return host(program(PARAMS, prompt_ids, prompt_mask, jax.random.key(key)))


def trainer_logps(drawn, num_prompts=4, temperature=1.0, logits_chunk=0):
    prompt_ids, prompt_mask = tiny_prompts(num_prompts)
    values, _ = logps.completion_logps(
        nnx.merge(GRAPHDEF, PARAMS),
        jnp.asarray(prompt_ids),
        jnp.asarray(prompt_mask),
        jnp.asarray(drawn.completion_ids),
        jnp.asarray(drawn.completion_mask),
        temperature=temperature,
        logits_chunk=logits_chunk,
    )
    return np.asarray(values)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_and_the_trainer_agree_on_the_log_probs(temperature):
    drawn = roll(temperature=temperature)
    gap = np.abs(trainer_logps(drawn, temperature=temperature) - drawn.sampler_logps)
    assert drawn.completion_mask.sum() > 20
    assert gap[drawn.completion_mask].max() < tolerances.LOGP_GAP


def test_log_probs_taken_in_chunks_are_those_taken_at_once():
    drawn = roll()
    whole, chunked = trainer_logps(drawn), trainer_logps(drawn, logits_chunk=10)
    np.testing.assert_allclose(chunked, whole, atol=tolerances.LOGP_GAP)


def test_eight_devices_draw_the_rows_that_one_draws():
    eight, one = roll(8, on=mesh.data_mesh()), roll(8)
    np.testing.assert_array_equal(eight.completion_ids, one.completion_ids)
    np.testing.assert_array_equal(eight.completion_mask, one.completion_mask)
    np.testing.assert_allclose(eight.sampler_logps, one.sampler_logps, atol=tolerances.LOGP_GAP)


def test_a_row_does_not_depend_on_how_many_follow_it():
    few, many = roll(2, prompts=first_prompts(2)), roll(4, prompts=first_prompts(4))
    np.testing.assert_array_equal(few.completion_ids, many.completion_ids[: 2 * G])


def first_prompts(num):
    ids, mask = tiny_prompts(4)
    return ids[:num], mask[:num]


def test_a_row_does_not_depend_on_how_much_padding_it_carries():
    ids, mask = tiny_prompts(4)
    wider = np.pad(ids, ((0, 0), (5, 0))), np.pad(mask, ((0, 0), (5, 0)))
    np.testing.assert_array_equal(roll(prompts=wider).completion_ids, roll().completion_ids)


def test_completions_of_one_prompt_differ_and_another_key_gives_others():
    drawn = roll(stop_ids=())
    assert (drawn.completion_ids[0] != drawn.completion_ids[1]).any()
    assert (drawn.completion_ids != roll(stop_ids=(), key=1).completion_ids).any()


def test_greedy_is_the_chain_of_argmaxes_of_full_forwards():
    drawn = roll(2, prompts=first_prompts(2), stop_ids=(), temperature=0.0, num_generations=1)
    gemma = nnx.merge(GRAPHDEF, PARAMS)
    for row, (ids, mask) in enumerate(zip(*first_prompts(2), strict=True)):
        sequence = ids[mask].tolist()
        for expected in drawn.completion_ids[row]:
            hidden, _ = model.forward(
                gemma, jnp.asarray([sequence]), jnp.ones((1, len(sequence)), bool)
            )
            assert int(gemma.logits(hidden[0, -1]).argmax()) == expected
            sequence.append(int(expected))


def test_a_completion_ends_with_its_first_stop_token_and_padding_follows():
    drawn = roll()
    ends = []
    for row in range(4 * G):
        stops = np.flatnonzero(np.isin(drawn.completion_ids[row], STOPS))
        length = stops[0] + 1 if len(stops) else T
        assert drawn.stopped[row] == (len(stops) > 0)
        np.testing.assert_array_equal(drawn.completion_mask[row], np.arange(T) < length)
        assert (drawn.completion_ids[row, length:] == PAD).all()
        assert (drawn.sampler_logps[row, length:] == 0).all()
        ends.append(int(length))
    assert len(set(ends)) > 3


def test_a_stop_token_in_the_first_slot_ends_the_completion():
    drawn = roll(stop_ids=tuple(range(TINY.vocab_size)))
    np.testing.assert_array_equal(drawn.completion_mask.sum(axis=1), 1)
    assert drawn.stopped.all()


def test_a_row_cut_off_by_the_budget_has_not_stopped():
    drawn = roll(stop_ids=())
    assert drawn.completion_mask.all() and not drawn.stopped.any()
