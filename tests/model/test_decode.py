"""How gemma_grpo.model runs: groups and `decode` are `forward`, and padding is nothing.

The weights are the oracle's recipe's, for a model whose window is shorter than both the prompts and
the completions: layers local, global, local.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from small_models import build, make_config, make_params
from tolerances import BF16_LOGITS, HIDDEN_F32, HIDDEN_GRAD_F32

from gemma_grpo import model as gemma3

SETTINGS = {
    "seed": 21,
    "vocab_size": 41,
    "num_layers": 3,
    "pattern": 2,
    "embed_dim": 18,
    "hidden_dim": 26,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "sliding_window": 4,
    "query_pre_attn_scalar": 5.0,
}
CONFIG, PARAMS = make_config(SETTINGS), make_params(SETTINGS)
P, G, S, T = 3, 2, 7, 9  # B = 6 rows; the window of 4 ends inside prompt and completion alike
PROMPT_LENGTHS = np.array([7, 1, 4])
COMPLETION_LENGTHS = np.array([9, 3, 6, 1, 8, 9])


def draw_batch(seed: int = 5) -> tuple[jax.Array, ...]:
    """Left-padded prompts and right-padded completions with their masks; ids everywhere."""
    generator = np.random.default_rng(seed)
    prompt_ids_PS = generator.integers(0, SETTINGS["vocab_size"], (P, S))
    prompt_mask_PS = np.arange(S)[None] >= S - PROMPT_LENGTHS[:, None]
    completion_ids_BT = generator.integers(0, SETTINGS["vocab_size"], (P * G, T))
    completion_mask_BT = np.arange(T)[None] < COMPLETION_LENGTHS[:, None]
    batch = prompt_ids_PS, prompt_mask_PS, completion_ids_BT, completion_mask_BT
    return tuple(map(jnp.asarray, batch))


def whole(prompt_PS: jax.Array, completion_BT: jax.Array) -> jax.Array:
    """Each row's prompt and completion in one sequence."""
    return jnp.concatenate([jnp.repeat(prompt_PS, G, axis=0), completion_BT], axis=1)


@functools.partial(jax.jit, static_argnames=("config",))
def run_forward(params, ids_BL, mask_BL, *, config=CONFIG):
    """Hidden states of whole sequences."""
    return gemma3.forward(build(config, params), ids_BL, mask_BL)[0]


@functools.partial(jax.jit, static_argnames=("remat",))
def run_groups(params, prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT, *, remat="none"):
    """Hidden states of completions, the prompt run once for its group."""
    batch = prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT
    rows = gemma3.Rows(prompt_ids_PS.shape, ids_BT.shape)
    hidden = gemma3.forward_groups(build(CONFIG, params), batch, rows, remat=remat)
    return rows.unpack(hidden)[1]


@jax.jit
def run_decode(params, prompt_ids_PS, prompt_mask_PS, ids_BT):
    """Hidden states of completions, token after token, in a cache that starts full of poison."""
    model = build(CONFIG, params)
    _, prompt_kv = gemma3.forward(model, prompt_ids_PS, prompt_mask_PS)
    blocks = gemma3.unstack_layers(model)
    B, num_slots = ids_BT.shape[0], ids_BT.shape[1] + 1  # one slot that is never reached
    cache = gemma3.empty_cache(CONFIG, num_rows=B, num_slots=num_slots, dtype=jnp.dtype("float32"))
    poisoned = jax.tree.map(lambda leaf: leaf + 100.0, cache)

    def step(cache, slot_and_ids):
        slot, ids_B = slot_and_ids
        hidden_BD, cache = gemma3.decode(
            model, blocks, ids_B, slot, cache, prompt_kv, prompt_mask_PS
        )
        return cache, hidden_BD

    slots_T = jnp.arange(ids_BT.shape[1])
    _, hidden_TBD = jax.lax.scan(step, poisoned, (slots_T, ids_BT.T))
    return hidden_TBD.swapaxes(0, 1)


def value_and_gradient(run, mask: jax.Array) -> tuple[jax.Array, gemma3.Params]:
    """The hidden states on tokens, and the gradient by the parameters of a random mix of them."""
    weights_BTD = np.random.default_rng(9).normal(0, 1, (*mask.shape, SETTINGS["embed_dim"]))
    weights_BTD = jnp.asarray(weights_BTD, jnp.float32) * mask[..., None]

    def mix(params):
        hidden_BTD = run(params)
        return jnp.sum(weights_BTD * hidden_BTD), hidden_BTD

    grads, hidden_BTD = jax.jit(jax.grad(mix, has_aux=True))(PARAMS)
    return hidden_BTD[mask], grads


def assert_same(ours: tuple, theirs: tuple) -> None:
    """Values, and gradients leaf by leaf relative to the leaf's largest entry, which is not 0."""
    assert np.abs(ours[0] - theirs[0]).max() <= HIDDEN_F32
    leaves = jax.tree.leaves_with_path(ours[1])
    for (path, a), b in zip(leaves, jax.tree.leaves(theirs[1]), strict=True):
        largest = np.abs(b).max()
        assert largest > 0, path
        assert np.abs(a - b).max() <= HIDDEN_GRAD_F32 * largest, path


# --- forward_groups and decode are forward ---


def test_running_groups_equals_the_whole_sequences_in_value_and_gradient_and_so_does_remat():
    prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT = batch = draw_batch()
    ids_BL, mask_BL = whole(prompt_ids_PS, ids_BT), whole(prompt_mask_PS, mask_BT)
    of_whole = value_and_gradient(lambda p: run_forward(p, ids_BL, mask_BL)[:, S:], mask_BT)
    grouped = value_and_gradient(lambda p: run_groups(p, *batch), mask_BT)
    assert_same(grouped, of_whole)
    for remat in ("dots", "full"):
        again = value_and_gradient(
            lambda p, remat=remat: run_groups(p, *batch, remat=remat), mask_BT
        )
        assert_same(again, grouped)


def test_remat_keeps_of_each_layer_its_input_or_that_and_the_matmuls_with_its_weights():
    N = P * S + P * G * T  # tokens, padding too
    D, F, NH, KH = 18, 26, 4 * 6, 2 * 6

    def widths(remat):
        """Of all that the backward pass is left for each token of each layer."""
        run = lambda params: run_groups.__wrapped__(params, *draw_batch(), remat=remat)
        kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(run, params)[1], PARAMS))
        of_tokens = [leaf for leaf in kept if leaf.shape[:1] == (3,) and N in leaf.shape]
        return sorted(leaf.size // (3 * N) for leaf in of_tokens)

    assert widths("full") == [D]
    assert widths("dots") == sorted([D, NH, KH, KH, D, F, F, D])
    assert sum(widths("none")) > 2 * sum(widths("dots"))


def test_decoding_equals_running_the_whole_sequence_at_every_slot_beyond_the_window_too():
    prompt_ids_PS, prompt_mask_PS, ids_BT, _ = draw_batch()
    every_BT = jnp.ones_like(ids_BT, bool)  # rows go on past their end: it must not matter
    expected = run_forward(PARAMS, whole(prompt_ids_PS, ids_BT), whole(prompt_mask_PS, every_BT))
    hidden_BTD = run_decode(PARAMS, prompt_ids_PS, prompt_mask_PS, ids_BT)
    assert np.abs(hidden_BTD - expected[:, S:]).max() <= HIDDEN_F32


# --- padding and neighbours ---


def test_hidden_states_do_not_depend_on_the_ids_in_the_padding():
    prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT = batch = draw_batch()
    other_ids_PS, _, other_ids_BT, _ = draw_batch(seed=6)
    poisoned_PS = jnp.where(prompt_mask_PS, prompt_ids_PS, other_ids_PS)
    poisoned_BT = jnp.where(mask_BT, ids_BT, other_ids_BT)
    assert (poisoned_PS != prompt_ids_PS).any() and (poisoned_BT != ids_BT).any()
    clean = run_groups(PARAMS, *batch)
    poisoned = run_groups(PARAMS, poisoned_PS, prompt_mask_PS, poisoned_BT, mask_BT)
    np.testing.assert_array_equal(clean[mask_BT], poisoned[mask_BT])
    clean = run_decode(PARAMS, prompt_ids_PS, prompt_mask_PS, ids_BT)
    poisoned = run_decode(PARAMS, poisoned_PS, prompt_mask_PS, poisoned_BT)
    np.testing.assert_array_equal(clean[mask_BT], poisoned[mask_BT])


def test_hidden_states_do_not_depend_on_how_much_padding_stands_left_or_right():
    prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT = draw_batch()
    ids_BL, mask_BL = whole(prompt_ids_PS, ids_BT), whole(prompt_mask_PS, mask_BT)
    wider = ((0, 0), (5, 2))
    wide_ids, wide_mask = jnp.pad(ids_BL, wider, constant_values=3), jnp.pad(mask_BL, wider)
    narrow = run_forward(PARAMS, ids_BL, mask_BL)
    wide = run_forward(PARAMS, wide_ids, wide_mask)[:, 5:-2]
    assert np.abs(wide - narrow)[mask_BL].max() <= HIDDEN_F32


def test_a_row_does_not_depend_on_the_rows_beside_it():
    prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT = draw_batch()
    ids_BL, mask_BL = whole(prompt_ids_PS, ids_BT), whole(prompt_mask_PS, mask_BT)
    together = run_forward(PARAMS, ids_BL, mask_BL)
    for row in (0, 3):
        alone = run_forward(PARAMS, ids_BL[row : row + 1], mask_BL[row : row + 1])[0]
        assert np.abs(alone - together[row])[mask_BL[row]].max() <= HIDDEN_F32
    swapped = run_forward(PARAMS, ids_BL[::-1], mask_BL[::-1])[::-1]
    assert np.abs(swapped - together)[mask_BL].max() <= HIDDEN_F32


def test_a_later_token_changes_nothing_before_it():
    prompt_ids_PS, prompt_mask_PS, ids_BT, _ = draw_batch()
    ids_BL = whole(prompt_ids_PS, ids_BT)
    mask_BL = whole(prompt_mask_PS, jnp.ones_like(ids_BT, bool))
    changed_BL = ids_BL.at[:, S + 5].set((ids_BL[:, S + 5] + 1) % SETTINGS["vocab_size"])
    before, after = (run_forward(PARAMS, ids, mask_BL) for ids in (ids_BL, changed_BL))
    same_BL = mask_BL.at[:, S + 5 :].set(False)
    np.testing.assert_array_equal(before[same_BL], after[same_BL])
    assert (np.abs(before - after)[:, S + 5 :].max(axis=-1) > HIDDEN_F32).all()


def test_a_local_layer_sees_its_window_and_no_token_before_it():
    one_layer = dataclasses.replace(CONFIG, num_layers=1)
    params = PARAMS | {"layers": jax.tree.map(lambda leaf: leaf[:1], PARAMS["layers"])}
    ids_BL, mask_BL = jnp.arange(8)[None], jnp.ones((1, 8), bool)
    changed_BL = ids_BL.at[0, 2].set(40)
    before, after = (
        run_forward(params, ids, mask_BL, config=one_layer) for ids in (ids_BL, changed_BL)
    )
    differs_L = (np.asarray(before) != np.asarray(after)).any(axis=-1)[0]
    assert differs_L.tolist() == [False] * 2 + [True] * 4 + [False] * 2  # slots 2, 3, 4, 5


# --- how it is compiled, and in what ---


def test_unrolling_the_scan_over_layers_changes_no_value():
    prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT = draw_batch()
    ids_BL, mask_BL = whole(prompt_ids_PS, ids_BT), whole(prompt_mask_PS, mask_BT)
    by_twos = dataclasses.replace(CONFIG, scan_unroll=2)  # of three layers: one is left over
    unrolled = run_forward(PARAMS, ids_BL, mask_BL, config=by_twos)
    assert np.abs(unrolled - run_forward(PARAMS, ids_BL, mask_BL))[mask_BL].max() <= HIDDEN_F32


def test_bfloat16_weights_give_bfloat16_hidden_states_and_float32_logits_near_the_exact_ones():
    prompt_ids_PS, prompt_mask_PS, ids_BT, mask_BT = draw_batch()
    ids_BL, mask_BL = whole(prompt_ids_PS, ids_BT), whole(prompt_mask_PS, mask_BT)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    hidden_BLD = run_forward(low, ids_BL, mask_BL)
    assert hidden_BLD.dtype == jnp.bfloat16
    low_logits = build(CONFIG, low).logits(hidden_BLD)
    logits = build(CONFIG, PARAMS).logits(run_forward(PARAMS, ids_BL, mask_BL))
    assert low_logits.dtype == logits.dtype == jnp.float32
    assert np.abs(low_logits - logits)[mask_BL].mean() <= BF16_LOGITS
