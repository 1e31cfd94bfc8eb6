"""Laws of packing: a packed batch is worth what the padded one is, in every value and gradient."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx
from stubs import PAD, TINY, tiny_model, tiny_prompts

from gemma_grpo import grpo_update, logps, losses, mesh, model, packing, sft, train_state
from gemma_grpo.model import LoRAConfig, Packed
from gemma_grpo.rollout import Rollout
import optax

pytestmark = pytest.mark.usefixtures("compile_quickly")

P, G, T = 8, 2, 6
GRAPHDEF, PARAMS = tiny_model(scale=1.5)
SGD = optax.sgd(1.0)
RNG = np.random.default_rng(5)
LENGTHS = {
    "of all lengths": RNG.integers(1, T + 1, P * G),
    "all of one token": np.ones(P * G, int),
    "all but one at the cap": np.where(np.arange(P * G) == 3, 1, T),
    "one at the cap": np.where(np.arange(P * G) == 3, T, 1),
}


def padded(lengths, *, mask_truncated=False, seed=3):
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < lengths[:, None]
    ids = np.where(mask, rng.integers(8, TINY.vocab_size, mask.shape), PAD).astype(np.int32)
    logps_BT = np.where(mask, rng.normal(-3, 0.5, mask.shape), 0).astype(np.float32)
    batch = grpo_update.make_batch(
        *tiny_prompts(P),
        Rollout(ids, mask, logps_BT, lengths < T),
        rng.normal(size=P * G).astype(np.float32),
        aggregation="token_mean",
        mask_truncated=mask_truncated,
        length_bucket=T,
    )
    off = lambda: (logps_BT + rng.normal(0, 0.3, mask.shape)).astype(np.float32)
    return batch | {"old_logps": off(), "ref_logps": off()}


def packed(batch, *, num_devices=1, passes=1, sizes=P * G * T):
    out = packing.pack(batch, num_devices=num_devices, passes=passes, sizes=sizes)
    assert "slots" in out
    return out


LOSS = grpo_update.LossConfig(beta=0.1, tis_cap=2.0, dual_clip=3.0, mask_truncated=True)


@functools.cache
def update_program(num_devices, passes, loss):
    return grpo_update.make_update(
        GRAPHDEF, mesh.data_mesh(jax.devices()[:num_devices]), SGD, loss,
        temperature=0.8, accumulation_steps=passes, dtype="float32", remat=True,
    )  # fmt: skip


def updated(batch, *, num_devices=1, passes=1, loss=LOSS):
    """The gradient (SGD at rate 1 moves the weights by it) and the metrics."""
    devices = mesh.data_mesh(jax.devices()[:num_devices])
    state = train_state.init_train_state(PARAMS, SGD, devices)
    moved, metrics = update_program(num_devices, passes, loss)(
        state, {}, mesh.place_rows(devices, batch)
    )
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, moved.params)
    return grads, jax.device_get(metrics)


def assert_alike(actual, expected):
    for one, other in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerances.MODEL_GRAD, rtol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(
            actual[1][name], value, rtol=1e-4, atol=tolerances.MODEL_GRAD, err_msg=name
        )


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_packed_update_has_the_gradient_and_the_metrics_of_the_padded_one(lengths):
    batch = padded(LENGTHS[lengths])
    assert_alike(updated(packed(batch)), updated(batch))


@pytest.mark.parametrize("num_devices, passes", [(8, 1), (2, 2), (1, 4)])
def test_it_has_them_on_any_number_of_devices_and_in_any_number_of_passes(num_devices, passes):
    batch = padded(LENGTHS["of all lengths"])
    where = dict(num_devices=num_devices, passes=passes)
    assert_alike(updated(packed(batch, **where), **where), updated(batch))
