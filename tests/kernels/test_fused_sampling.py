"""Fused sampling: head, draw and log-prob in one op. Expected values by NumPy, float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_grpo.errors import UserError
from gemma_grpo.kernels import block_draw, head
from gemma_grpo.kernels.block_draw import BLOCK
from gemma_grpo.kernels.fused_sampling import cases, fused_sampling, pallas_tpu, reference, xla

jitted = partial(jax.jit, static_argnames="temperature")
IMPLEMENTATIONS = {
    "xla": jitted(xla.pick),
    "pallas": jitted(partial(pallas_tpu.pick, interpret=True)),
}
sample = jitted(fused_sampling)
noise_of = jax.jit(block_draw.noise, static_argnums=1)
REPLICATED = PartitionSpec()


def some_inputs(B, V, D, dtype=jnp.float32):
    """Drawn by NumPy: nothing is compiled for each shape."""
    rng = np.random.default_rng(V + B)
    hidden_BD, embedding_VD = rng.normal(size=(B, D)), 0.5 * rng.normal(size=(V, D))
    keys_B = jax.random.wrap_key_data(rng.integers(0, 2**32, (B, 2), np.uint32))
    return jnp.asarray(hidden_BD, dtype), jnp.asarray(embedding_VD, dtype), keys_B


def numpy_pick(hidden_BD, embedding_VD, noise, temperature):
    """Score, id, logit and logsumexp of each row, in float64, by the draw's documented rule."""
    logits_BV = np.asarray(hidden_BD, np.float64) @ np.asarray(embedding_VD, np.float64).T
    logits_BV /= temperature or 1
    exponentials = np.exp(logits_BV)
    logsumexp_B = np.log(exponentials.sum(-1))
    rows = np.arange(len(logits_BV))
    if temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return logits_BV.max(-1), ids_B, logits_BV[rows, ids_B], logsumexp_B
    gumbel, uniform = (np.asarray(x, np.float64) for x in noise)
    starts = np.arange(0, logits_BV.shape[1], BLOCK)
    scores = np.log(np.add.reduceat(exponentials, starts, axis=1)) + gumbel
    ids_B = []
    for row, block in enumerate(scores.argmax(-1)):
        # A group is drawn by mass and then a token of it: the two-level form of one inverse.
        masses = exponentials[row, block * BLOCK : (block + 1) * BLOCK]
        groups = np.add.reduceat(masses, np.arange(0, len(masses), block_draw.GROUP))
        group = np.argmax(groups.cumsum() > uniform[row, 0] * groups.sum())
        inside = masses[group * block_draw.GROUP : (group + 1) * block_draw.GROUP]
        token = np.argmax(inside.cumsum() > uniform[row, 1] * inside.sum())
        ids_B.append(block * BLOCK + group * block_draw.GROUP + token)
    return scores.max(-1), np.array(ids_B), logits_BV[rows, ids_B], logsumexp_B


@pytest.fixture
def tiles_of_two_blocks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "MAX_TILE_BLOCKS", 2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "B, V, dtype",
    [
        (1, 300, jnp.float32),  # less than a block
        (8, 512, jnp.bfloat16),
        (3, 1536, jnp.bfloat16),  # the second tile short of a block
        (5, 1537, jnp.float32),  # and with a block of one token
        (9, 2048, jnp.float32),
        (9, 2048, jnp.bfloat16),
    ],
)
def test_every_implementation_is_the_law(tiles_of_two_blocks, name, temperature, B, V, dtype):
    hidden_BD, embedding_VD, keys_B = some_inputs(B, V, 32, dtype)
    noise = noise_of(keys_B, V)
    picked = IMPLEMENTATIONS[name](hidden_BD, embedding_VD, noise, temperature=temperature)
    expected = numpy_pick(hidden_BD, embedding_VD, noise, temperature)
    np.testing.assert_array_equal(picked.ids, expected[1])
    for value, exact in zip(picked, expected, strict=True):
        chex.assert_trees_all_close(
            np.asarray(value, np.float64),
            exact.astype(np.float64),
            atol=tolerances.SAMPLED_LOGP,
            rtol=tolerances.SAMPLED_LOGP,
        )


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_reference_and_the_api_agree_with_the_law(temperature):
    operands = some_inputs(6, 1200, 32)
    _, ids, logits, logsumexps = numpy_pick(*operands[:2], noise_of(operands[2], 1200), temperature)
    drawn = sample(*operands, temperature=temperature)
    chex.assert_type(list(drawn), [jnp.int32, jnp.float32])
    for found_ids, found_logps in (
        drawn,
        jitted(reference.fused_sampling)(*operands, temperature=temperature),
    ):
        np.testing.assert_array_equal(found_ids, ids)
        chex.assert_trees_all_close(
            np.asarray(found_logps, np.float64), logits - logsumexps, atol=tolerances.SAMPLED_LOGP
        )


def test_bfloat16_weights_lose_no_more_than_twice_what_the_plain_head_loses():
    """Against float64 on the same weights: products are exact, sums are in float32."""
    hidden_BD, embedding_VD, keys_B = some_inputs(16, 1200, 64, jnp.bfloat16)
    noise = noise_of(keys_B, 1200)
    plain_BV = jnp.einsum("bd,vd->bv", hidden_BD, embedding_VD, preferred_element_type=jnp.float32)
    exact = numpy_pick(hidden_BD, embedding_VD, noise, 1.0)
    plain_error = np.abs(jax.nn.logsumexp(plain_BV, axis=-1) - exact[3]).max()
    for pick in IMPLEMENTATIONS.values():
        picked = pick(hidden_BD, embedding_VD, noise, temperature=1.0)
        assert np.abs(picked.logsumexps - exact[3]).max() <= 2 * plain_error + tolerances.F32


def test_ties_at_temperature_zero_go_to_the_first_token():
    hidden_BD, _, keys_B = some_inputs(2, 1, 16)
    embedding_VD = jnp.ones((3 * BLOCK, 16))
    for pick in IMPLEMENTATIONS.values():
        noise = noise_of(keys_B, 3 * BLOCK)
        picked = pick(hidden_BD, embedding_VD, noise, temperature=0.0)
        np.testing.assert_array_equal(picked.ids, [0, 0])


def test_a_temperature_towards_zero_is_greedy_and_sure_of_it():
    operands = some_inputs(8, 1200, 32)
    greedy = sample(*operands, temperature=0.0)
    nearly = sample(*operands, temperature=1e-5)
    np.testing.assert_array_equal(nearly.ids, greedy.ids)
    np.testing.assert_array_equal(nearly.logps, 0.0)


def test_a_row_is_drawn_alike_in_any_batch():
    hidden_BD, embedding_VD, keys_B = some_inputs(8, 1200, 32)
    together = sample(hidden_BD, embedding_VD, keys_B, temperature=1.0)
    order = np.array([5, 0, 3])
    apart = sample(hidden_BD[order], embedding_VD, keys_B[order], temperature=1.0)
    np.testing.assert_array_equal(apart.ids, together.ids[order])
    chex.assert_trees_all_close(apart.logps, together.logps[order], atol=tolerances.SAMPLED_LOGP)


@pytest.mark.parametrize("pick", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("V", [300, 1200])
def test_nan_gives_nan_and_a_token_of_the_vocabulary(pick, V):
    hidden_BD, embedding_VD, keys_B = some_inputs(2, V, 16)
    noise = noise_of(keys_B, V)
    picked = pick(hidden_BD.at[1].set(jnp.nan), embedding_VD, noise, temperature=1.0)
    assert ((0 <= picked.ids) & (picked.ids < V)).all()
    np.testing.assert_array_equal(np.isnan(picked.logits - picked.logsumexps), [False, True])


def sharded(mesh, temperature):
    """`fused_sampling` over raw keys, the vocabulary sharded over all of the mesh's devices."""

    def of_device(hidden_BD, embedding_VD, raw_keys_B):
        keys_B = jax.random.wrap_key_data(raw_keys_B)
        return fused_sampling(
            hidden_BD, embedding_VD, keys_B, temperature=temperature, axis_name="vocab"
        )

    return jax.jit(
        jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(REPLICATED, PartitionSpec("vocab"), REPLICATED),
            out_specs=REPLICATED,
            check_vma=False,
        )
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("blocks_per_device", [1, 2])
def test_a_vocabulary_sharded_over_eight_devices_gives_the_same_tokens(
    temperature, blocks_per_device
):
    hidden_BD, embedding_VD, keys_B = some_inputs(48, 8 * blocks_per_device * BLOCK, 32)
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AxisType.Auto,))
    found = sharded(mesh, temperature)(hidden_BD, embedding_VD, jax.random.key_data(keys_B))
    expected = sample(hidden_BD, embedding_VD, keys_B, temperature=temperature)
    np.testing.assert_array_equal(found.ids, expected.ids)
    chex.assert_trees_all_close(found.logps, expected.logps, atol=tolerances.SAMPLED_LOGP)
    assert len(set(np.asarray(expected.ids) // (blocks_per_device * BLOCK))) > 4


def test_a_shard_that_cuts_a_block_is_refused():
    hidden_BD, embedding_VD, keys_B = some_inputs(2, 8 * 300, 16)
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AxisType.Auto,))
    with pytest.raises(UserError, match="multiple of 512"):
        sharded(mesh, 1.0)(hidden_BD, embedding_VD, jax.random.key_data(keys_B))


@pytest.mark.parametrize(
    "setting, named",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(temperature=1e-9), "temperature"),
        (dict(temperature=1.0, implementation="pallas"), "implementation.*TPU"),
    ],
)
def test_a_setting_that_cannot_be_met_is_refused_by_name(setting, named):
    with pytest.raises(UserError, match=named):
        fused_sampling(*some_inputs(2, 600, 16), **setting)


def test_the_head_is_the_matmul_with_the_embedding_in_float32():
    hidden_BD, embedding_VD, _ = some_inputs(6, 40, 32, jnp.bfloat16)
    logits = head.logits(hidden_BD.reshape(2, 3, 32), embedding_VD)
    expected = np.asarray(hidden_BD, np.float64) @ np.asarray(embedding_VD, np.float64).T
    chex.assert_type(logits, jnp.float32)
    chex.assert_trees_all_close(
        np.asarray(logits, np.float64), expected.reshape(2, 3, 40), atol=tolerances.SAMPLED_LOGP
    )


def test_vmem_by_hand_and_within_the_limit():
    """64 rows of Gemma 3 1B: two tiles of 2048 tokens, the hidden states, 512 blocks' noise and the
    best block's logits twice, three rows of results twice, two of state, two blocks of values."""
    bfloat16 = jnp.dtype(jnp.bfloat16)
    by_hand = 2 * 2048 * 1152 * 2 + 2 * 1152 * 128 * 2 + 2 * 512 * 128 * 4 + 2 * 512 * 128 * 4
    by_hand += 2 * 3 * 8 * 128 * 4 + 2 * 8 * 128 * 4 + 2 * 512 * 128 * 4
    assert pallas_tpu.vmem_bytes(64, 262_144, 1152, bfloat16) == by_hand
    for case in (cases.NANO, cases.GEMMA3_270M, cases.GEMMA3_1B, cases.GEMMA3_1B_MULTIMODAL):
        for rows in case.rows:
            size = pallas_tpu.vmem_bytes(rows, case.vocab_size, case.embed_dim, bfloat16)
            assert size <= pallas_tpu.VMEM_LIMIT


BFLOAT16_AND_FLOAT32 = [
    *((rows, devices, jnp.bfloat16) for rows in (8, 64, 96) for devices in (1, 8)),
    (96, 8, jnp.float32),
]


@pytest.mark.parametrize("rows, num_devices, dtype", BFLOAT16_AND_FLOAT32)
def test_it_compiles_for_v5e_as_one_kernel_beside_which_nothing_large_is_kept(
    v5e, num_devices, rows, dtype
):
    mesh = Mesh(np.array(v5e[:num_devices]), ("vocab",))
    V, D = cases.GEMMA3_1B.vocab_size, cases.GEMMA3_1B.embed_dim
    shape = lambda size, dtype, spec=REPLICATED: jax.ShapeDtypeStruct(
        size, dtype, sharding=NamedSharding(mesh, spec)
    )
    compiled = (
        sharded(mesh, 1.0)
        .lower(
            shape((rows, D), dtype),
            shape((V, D), dtype, PartitionSpec("vocab")),
            shape((rows, 2), jnp.uint32),
        )
        .compile()
    )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20  # logits would be 2^18 * rows
    one_read = V * D * jnp.dtype(dtype).itemsize // num_devices
    assert compiled.cost_analysis()["bytes accessed"] < 1.05 * one_read + 2**23
