"""gemma_grpo.model: transformers' logits on odd configs, and each part by hand or by NumPy.

How its ways of running agree with each other is in test_decode.py.
"""

import dataclasses
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.gemma3_recipe import CASES, checksum, draw_weights
from small_models import build, make_config, make_params
from tolerances import F32, TRANSFORMERS_LOGITS

from gemma_grpo import model as gemma3
from gemma_grpo.errors import UserError
from gemma_grpo.model import attention
from gemma_grpo.model.layers import GatedMLP, RMSNorm, rope_table, rotate

ORACLE = Path(__file__).parents[1] / "oracles" / "transformers_logits.npz"


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    settings = CASES[case]
    with np.load(ORACLE) as oracle:
        ids_BL, mask_BL = oracle[f"{case}/ids"], oracle[f"{case}/mask"]
        expected = oracle[f"{case}/logits"]
        drawn_by_oracle = int(oracle[f"{case}/checksum"])
    assert checksum(draw_weights(settings)) == drawn_by_oracle, "the recipe draws other weights"

    @jax.jit
    def run(params, ids_BL, mask_BL):
        model = build(make_config(settings), params)
        return model.logits(gemma3.forward(model, ids_BL, mask_BL)[0])

    ours = np.asarray(run(make_params(settings), ids_BL, mask_BL))[mask_BL]
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= TRANSFORMERS_LOGITS


def test_the_drawn_weights_fill_the_whole_tree():
    settings = next(iter(CASES.values()))
    _, wanted = gemma3.abstract(make_config(settings))
    drawn = make_params(settings)
    assert jax.tree.structure(wanted) == jax.tree.structure(drawn)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, wanted, drawn))


# --- sizes ---


@pytest.mark.parametrize(
    ("name", "embedding", "layers", "per_layer", "final_norm", "total"),
    [
        # 26 layers of width 1152: 4 query heads and 1 kv head of 256, an MLP of 6912
        (
            "gemma3-1b",
            262_144 * 1152,
            26,
            1152 * 256 * (4 + 1 + 1 + 4) + 3 * 1152 * 6912 + 4 * 1152 + 2 * 256,
            1152,
            999_885_952,
        ),
        # 18 layers of width 640: 4 query heads and 1 kv head of 256, an MLP of 2048
        (
            "gemma3-270m",
            262_144 * 640,
            18,
            640 * 256 * (4 + 1 + 1 + 4) + 3 * 640 * 2048 + 4 * 640 + 2 * 256,
            640,
            268_098_176,
        ),
    ],
)
def test_parameters_are_counted_exactly(name, embedding, layers, per_layer, final_norm, total):
    assert embedding + layers * per_layer + final_norm == total
    _, params = gemma3.abstract(gemma3.CONFIGS[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total


def test_nano_is_a_few_hundred_thousand_parameters_with_every_feature():
    config = gemma3.CONFIGS["gemma3-nano"]
    _, params = gemma3.abstract(config)
    per_layer = 64 * 32 * (2 + 1 + 1 + 2) + 3 * 64 * 256 + 4 * 64 + 2 * 32
    total = 512 * 64 + 6 * per_layer + 64
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total == 403_392
    assert config.is_global == (False,) * 5 + (True,)
    assert config.num_heads > config.num_kv_heads


def test_every_pattern_th_layer_is_global():
    config = gemma3.CONFIGS["gemma3-1b"]
    assert [i + 1 for i, far in enumerate(config.is_global) if far] == [6, 12, 18, 24]
    assert len(config.is_global) == 26
    of_2 = dataclasses.replace(config, num_layers=5, pattern=2)
    assert of_2.is_global == (False, True, False, True, False)


def test_heads_that_do_not_divide_are_refused_by_name():
    with pytest.raises(UserError, match="num_heads=4 .* num_kv_heads=3"):
        dataclasses.replace(gemma3.CONFIGS["gemma3-1b"], num_kv_heads=3)


# --- masks ---

CAUSAL_4_WINDOW_2 = """
1 . . .
1 1 . .
. 1 1 .
. . 1 1
"""
PROMPT_3_COMPLETION_2_WINDOW_3 = """
. 1 1
. . 1
"""


def drawn(picture: str) -> np.ndarray:
    return np.array([[mark == "1" for mark in row.split()] for row in picture.split("\n") if row])


def test_a_local_mask_is_as_drawn_and_so_is_its_docstring():
    mask_1LL = attention.causal_mask(4, window=2)
    assert (np.asarray(mask_1LL[0]) == drawn(CAUSAL_4_WINDOW_2)).all()
    indented = CAUSAL_4_WINDOW_2.strip().replace("\n", "\n    ")
    assert indented in inspect.getdoc(attention.causal_mask)


def test_a_global_mask_is_the_lower_triangle():
    assert (np.asarray(attention.causal_mask(5, window=None)[0]) == np.tri(5, dtype=bool)).all()


def test_a_prompt_mask_is_as_drawn_and_so_is_its_docstring():
    mask_1TS = attention.prompt_window_mask(3, jnp.arange(2), window=3)
    assert (np.asarray(mask_1TS[0]) == drawn(PROMPT_3_COMPLETION_2_WINDOW_3)).all()
    indented = PROMPT_3_COMPLETION_2_WINDOW_3.strip().replace("\n", "\n    ")
    assert indented in inspect.getdoc(attention.prompt_window_mask)
    assert attention.prompt_window_mask(3, jnp.arange(2), window=None).all()


@pytest.mark.parametrize("window", [None, 1, 3, 6, 9])
def test_prompt_and_own_masks_side_by_side_are_the_whole_mask(window):
    S, T = 5, 4
    whole_LL = attention.causal_mask(S + T, window=window)[0]
    prompt_TS = attention.prompt_window_mask(S, jnp.arange(T), window=window)[0]
    own_TT = attention.causal_mask(T, window=window)[0]
    assert (jnp.concatenate([prompt_TS, own_TT], axis=1) == whole_LL[S:]).all()


# --- parts ---


def test_rope_turns_the_two_halves_of_a_head_by_hand_computed_angles():
    # H = 4 and base 100: pair 0 turns by position * 100^0, pair 1 by position * 100^(-1/2).
    sin_BLh, cos_BLh = rope_table(jnp.array([[0, 3]]), head_dim=4, base=100.0)
    np.testing.assert_allclose(sin_BLh[0, 1], [0.14112001, 0.29552021], atol=F32)  # sin 3, sin 0.3
    np.testing.assert_allclose(cos_BLh[0, 1], [-0.98999250, 0.95533649], atol=F32)
    np.testing.assert_array_equal(sin_BLh[0, 0], [0.0, 0.0])
    turned = rotate(jnp.array([[[[1.0, 2, 4, 8]], [[1.0, 2, 4, 8]]]]), sin_BLh, cos_BLh)
    np.testing.assert_array_equal(turned[0, 0, 0], [1, 2, 4, 8])
    # (1, 4) by 3 rad: cos - 4 sin, 4 cos + sin; (2, 8) by 0.3 rad: 2 cos - 8 sin, 8 cos + 2 sin
    expected = [-1.55447254, -0.4534887, -3.81884998, 8.23373234]
    np.testing.assert_allclose(turned[0, 1, 0], expected, atol=4 * F32)


def test_local_layers_turn_by_the_small_base_and_global_ones_by_the_large():
    config = gemma3.CONFIGS["gemma3-1b"]
    assert (config.rope_base_local, config.rope_base_global) == (1e4, 1e6)
    assert config.sliding_window == 512 and config.query_pre_attn_scalar == 256


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_rms_norm_is_numpys_with_a_gain_of_one_plus_scale(eps):
    generator = np.random.default_rng(3)
    x, scale = generator.normal(0, 2, (5, 7)), generator.normal(0, 0.5, 7)
    norm = RMSNorm(7, eps=eps)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * (1 + scale)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=4 * F32)


def test_rms_norm_adds_one_to_its_gain_in_float32():
    norm = RMSNorm(4, eps=0.0)
    norm.scale = nnx.Param(jnp.full(4, 2.0**-9, jnp.bfloat16))  # 1 + 2^-9 is no bfloat16
    np.testing.assert_array_equal(norm(jnp.ones(4)), np.full(4, 1 + 2.0**-9, np.float32))


def test_rms_norm_of_tiny_inputs_is_held_back_by_eps():
    # the mean square is 9e-6, so the norm divides by sqrt(9e-6 + 1e-6) = 0.0031623
    out = RMSNorm(4, eps=1e-6)(jnp.array([[0.003, -0.003, 0.003, 0.003]]))
    np.testing.assert_allclose(out, [[0.9486833, -0.9486833, 0.9486833, 0.9486833]], atol=F32)


def test_rms_norm_in_bfloat16_rounds_only_its_result():
    x = jnp.asarray(np.random.default_rng(4).normal(0, 30, (3, 64)), jnp.bfloat16)
    norm = RMSNorm(64, eps=1e-6)
    in_f32 = norm(x.astype(jnp.float32))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), in_f32.astype(jnp.bfloat16))


def test_the_gated_mlp_is_numpys_geglu_with_the_tanh_form():
    settings = CASES["mha_4_all_local_layers_3_of_6"]
    D, F = settings["embed_dim"], settings["hidden_dim"]
    weights = jax.tree.map(lambda leaf: leaf[0], make_params(settings)["layers"]["mlp"])
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: GatedMLP(D, F, rngs=nnx.Rngs(0))))
    mlp = nnx.merge(graphdef, weights)
    x_BLD = np.random.default_rng(5).normal(0, 2, (2, 3, D)).astype(np.float32)
    gate, up = x_BLD @ np.asarray(weights["gate"]), x_BLD @ np.asarray(weights["up"])
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    expected = (gelu * up) @ np.asarray(weights["down"])
    np.testing.assert_allclose(mlp(jnp.asarray(x_BLD)), expected, atol=8 * F32)


def test_the_embedding_is_scaled_by_the_root_of_its_width_rounded_to_the_weights_dtype():
    settings = CASES["gqa_2_window_4_in_19_layers_8_of_6"]  # D = 12; sqrt(12) = 3.4641
    params = make_params(settings)
    ids_BL = jnp.array([[7, 52]])
    embedded = build(make_config(settings), params).embed(ids_BL)
    np.testing.assert_allclose(embedded, params["embedding"][ids_BL] * 12**0.5, rtol=F32)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    embedded = build(make_config(settings), low).embed(ids_BL)
    # bfloat16 has 8 significant bits: near 3.4641 it steps by 2^-6, and 3.46875 = 222 * 2^-6
    expected = low["embedding"][ids_BL] * jnp.asarray(3.46875, jnp.bfloat16)
    np.testing.assert_array_equal(embedded, expected)


def test_in_bfloat16_the_gelu_has_its_own_constants_and_is_rounded_once():
    """Of one hidden unit whose gate and up are its input; expected values by NumPy in float64."""
    mlp = GatedMLP(1, 1, rngs=nnx.Rngs(0))
    for weight in (mlp.gate, mlp.up, mlp.down):
        weight.set_value(jnp.ones((1, 1), jnp.bfloat16))
    x = np.linspace(-3, 3, 2001).astype(jnp.bfloat16)
    exact = x.astype(np.float64)
    gelu = exact / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    expected = gelu.astype(jnp.bfloat16) * x
    got = np.asarray(mlp(jnp.asarray(x)[None, :, None]))[0, :, 0]
    assert got.dtype == jnp.bfloat16 and (got == expected).mean() > 0.995
