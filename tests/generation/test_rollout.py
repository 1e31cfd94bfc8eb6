"""The rollout: what is drawn, from which distribution, and that nothing else affects it."""

import functools
import re

import jax
import numpy as np
import pytest
import tolerances
from flax import nnx
from stubs import PAD, TINY, host, tiny_model, tiny_prompts

from gemma_grpo import model
from gemma_grpo.devices import mesh
from gemma_grpo.generation import rollout
from gemma_grpo.generation.sampling import SamplingConfig
from gemma_grpo.training import logps

G, T = 3, 9
STOPS = (5, 6, 7, 8, 9, 10)  # many, so that random rows end at different slots
GRAPHDEF, PARAMS = tiny_model(scale=1.5)


@functools.cache
def program(num_devices=1, *, num_generations=G, stop_ids=STOPS, temperature=1.0):
    return rollout.make_rollout(
        GRAPHDEF,
        mesh.data_mesh(jax.devices()[:num_devices]),
        rollout.RolloutConfig(num_generations, T, stop_ids, PAD, SamplingConfig(temperature)),
    )


def roll(num_prompts=4, num_devices=1, *, key=0, prompts=None, **settings):
    """A rollout on the host; programs of the same settings are compiled once."""
    prompts = tiny_prompts(num_prompts) if prompts is None else prompts
    return host(program(num_devices, **settings)(PARAMS, *prompts, jax.random.key(key)))


@functools.cache
def scoring_program(temperature):
    def score(params, batch):
        return logps.batch_logps(nnx.merge(GRAPHDEF, params), batch, temperature=temperature)[0]

    return jax.jit(score)


def trainer_logps(drawn, temperature=1.0):
    """The log-probs that training would compute for a rollout of `tiny_prompts(4)`."""
    prompt_ids, prompt_mask = tiny_prompts(4)
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": drawn.completion_ids,
        "completion_mask": drawn.completion_mask,
    }
    return host(scoring_program(temperature)(PARAMS, batch))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_and_the_trainer_agree_on_the_log_probs(temperature):
    drawn = roll(temperature=temperature)
    gap = np.abs(trainer_logps(drawn, temperature=temperature) - drawn.sampler_logps)
    assert drawn.completion_mask.sum() > 20
    assert gap[drawn.completion_mask].max() < tolerances.LOGP_GAP


def test_eight_devices_draw_the_rows_that_one_draws():
    eight, one = roll(8, 8), roll(8)
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
    assert len({tuple(row) for row in drawn.completion_ids[:G].tolist()}) == G
    assert (drawn.completion_ids != roll(stop_ids=(), key=1).completion_ids).any()


def test_greedy_takes_the_argmax_of_the_full_forward_at_every_slot():
    drawn = roll(4, stop_ids=(), temperature=0.0, num_generations=1)
    prompt_ids, prompt_mask = tiny_prompts(4)
    ids = np.concatenate([prompt_ids, drawn.completion_ids], axis=1)
    mask = np.concatenate([prompt_mask, drawn.completion_mask], axis=1)
    gemma = nnx.merge(GRAPHDEF, PARAMS)
    hidden, _ = jax.jit(lambda ids, mask: model.forward(gemma, ids, mask))(ids, mask)
    likeliest = host(gemma.logits(hidden).argmax(axis=-1))
    S = prompt_ids.shape[1]
    np.testing.assert_array_equal(drawn.completion_ids, likeliest[:, S - 1 : -1])


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


@functools.cache
def streaming_program(temperature):
    return rollout.make_stream(
        GRAPHDEF, rollout.RolloutConfig(G, T, STOPS, PAD, SamplingConfig(temperature))
    )


def stream(chunk, temperature=1.0, key=0, num_prompts=4):
    """The rollouts so far, on the prompts and key of `roll`."""
    stream = streaming_program(temperature)
    return list(stream(PARAMS, *tiny_prompts(num_prompts), jax.random.key(key), chunk))


def test_a_stream_runs_on_one_device_whatever_its_parameters_lie_on(monkeypatch):
    """A TPU's kernels are refused in a program of several devices that is no shard_map."""
    places, device_get = [], jax.device_get
    seen = lambda drawn: places.extend(leaf.devices() for leaf in jax.tree.leaves(drawn))
    monkeypatch.setattr(rollout.jax, "device_get", lambda x: (seen(x), device_get(x))[1])
    two = mesh.replicated(mesh.data_mesh(jax.devices()[:2]))
    params = jax.device_put(PARAMS, two)
    list(streaming_program(1.0)(params, *tiny_prompts(1), jax.random.key(0), 8))
    assert places and all(each == {jax.devices()[0]} for each in places)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [1, 2, 4, T, T + 5])
def test_a_stream_ends_in_the_rollout_bit_for_bit_whatever_its_chunks(temperature, chunk):
    whole = roll(temperature=temperature)
    last = stream(chunk, temperature)[-1]
    for streamed, drawn in zip(last, whole, strict=True):
        np.testing.assert_array_equal(streamed, drawn)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_stream_grows_by_a_chunk_at_a_time_and_takes_nothing_back(chunk):
    whole, steps = roll(), stream(chunk)
    for number, so_far in enumerate(steps, start=1):
        shown = np.arange(T) < number * chunk
        np.testing.assert_array_equal(so_far.completion_mask, whole.completion_mask & shown)
        np.testing.assert_array_equal(
            so_far.completion_ids, np.where(shown, whole.completion_ids, PAD)
        )
        np.testing.assert_array_equal(
            so_far.stopped, whole.stopped & (whole.completion_mask.sum(axis=1) <= number * chunk)
        )


def test_a_stream_ends_when_every_row_has():
    draws = ((key, roll(num_prompts=1, key=key)) for key in range(999))
    key, drawn = next(
        (key, drawn)
        for key, drawn in draws
        if drawn.completion_mask[:, 1].any() and not drawn.completion_mask[:, -1].any()
    )
    longest = int(drawn.completion_mask.sum(axis=1).max())
    steps = stream(1, key=key, num_prompts=1)
    assert len(steps) == longest < T
    assert steps[-1].stopped.all() and not steps[-2].stopped.all()


def test_a_stream_is_compiled_once_for_all_its_chunks(caplog):
    stream(1)
    with jax.log_compiles():
        stream(2), stream(T)
    assert not [record for record in caplog.records if "ompil" in record.getMessage()]


def test_a_rollout_never_asks_the_host_and_its_loop_has_no_collective():
    lowered = program(8).lower(PARAMS, *tiny_prompts(8), jax.random.key(0))
    compiled = lowered.compile().as_text()
    asks_host = ("callback", "infeed", "outfeed", "send(", "recv(")
    collectives = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    assert "while" in compiled
    assert not any(word in compiled for word in asks_host + collectives)


def test_a_decode_step_on_a_cpu_copies_no_cache():
    """A whole cache copied in each step would cost more than what the step reads of it."""
    lowered = program().lower(PARAMS, *tiny_prompts(4), jax.random.key(0))
    text = lowered.compile().as_text()
    loops = re.findall(r" while\(.*?body=%?([\w.\-]+)", text)
    bodies = [re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S)[0] for name in loops]
    window, *heads = TINY.sliding_window, TINY.num_kv_heads, TINY.head_dim
    caches = ["f32[{},{},{},{}]".format(4 * G, slots, *heads) for slots in (window, T)]
    (decoding,) = (body for body in bodies if all(shape in body for shape in caches))
    assert not re.findall(rf"({'|'.join(map(re.escape, caches))})\S* copy\(", decoding)
