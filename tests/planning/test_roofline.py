"""Counting: what a step must compute and move by formula, and what its programs compute."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from gemma_grpo import presets
from gemma_grpo.devices import mesh
from gemma_grpo.model import CONFIGS
from gemma_grpo.planning import chips, fit, programs, roofline, traced

V5E = chips.CHIPS["v5e"]
ONE_B = CONFIGS["gemma3-1b"]


def test_parameters_are_counted_by_hand():
    """A layer: q and o 1152 x 4 x 256 each, k and v 1152 x 256 each, three of 1152 x 6912."""
    layer = 2 * 1152 * 1024 + 2 * 1152 * 256 + 3 * 1152 * 6912
    assert roofline.block_parameters(ONE_B) == 26 * layer == 697_761_792


def test_a_decode_step_reads_the_weights_the_caches_and_each_prompt_once():
    """1 KiB a token and layer: keys and values of one head of 256 in bfloat16. Of 800 slots, 22
    local layers of the 26 keep the last 512."""
    step = roofline.decode_step(ONE_B, num_rows=8, num_prompts=1, prompt_length=512, num_slots=800)
    weights = 697_761_792 + 301_989_888
    assert step.bytes == 2 * weights + 1024 * (8 * (22 * 512 + 4 * 800) + 26 * 512)
    assert step.flops == 2 * weights * 8
    assert step.bound(V5E) == "memory" and step.seconds(V5E) == step.bytes / 819e9


def test_tensor_parallel_a_chip_reads_its_share_of_mlps_and_embedding_and_waits_for_collectives():
    """Attention's 76 677 120 weights replicated, 1/8 of 621 084 672 and of the embedding; a
    collective is assumed to take 8 us: two a layer, and one each for embedding, head and draw."""
    shapes = dict(num_prompts=1, prompt_length=512, shards=8)
    alone = roofline.decode_step(ONE_B, num_rows=8, num_prompts=1, prompt_length=512, num_slots=800)
    step = roofline.decode_step(ONE_B, num_rows=8, num_slots=800, **shapes)
    read = 76_677_120 + (621_084_672 + 301_989_888) / 8
    assert step.bytes == 2 * read + 1024 * (8 * (22 * 512 + 4 * 800) + 26 * 512)
    assert step.flops == alone.flops
    assert step.seconds(V5E) == pytest.approx(step.bytes / 819e9 + 55 * 8e-6)
    first = roofline.prefill(ONE_B, **shapes)
    assert first.bytes == 2 * (76_677_120 + 621_084_672 / 8) and first.collectives == 53


def test_the_plan_of_a_rollout_in_slices_counts_them_in_every_step():
    sharded = presets.preset("gemma3-1b")
    run = replace(sharded, model=replace(sharded.model, rollout_layout="data"))
    works = []
    for each in (run, sharded):
        rollout = programs.of_step(each, ONE_B, mesh.data_mesh())[0]
        works.append(fit.work_of(rollout, each, ONE_B, 8))
    (_, replicated), (_, decode) = works
    assert replicated.collectives == 0 and decode.collectives == 800 * 55
    assert decode.bytes == pytest.approx(800 * 0.516e9, rel=1e-3)
    assert decode.seconds(V5E) < 0.45 * replicated.seconds(V5E)


def test_the_limit_that_takes_longest_is_the_bound():
    chip = chips.Chip(memory=1.0, flops=1.0, bandwidth=1.0, latency=1.0)
    works = [roofline.Work(3, 2, 1), roofline.Work(2, 3, 1), roofline.Work(1, 2, 3)]
    assert [work.bound(chip) for work in works] == ["compute", "memory", "latency"]
    assert [work.seconds(chip) for work in works] == [4, 4, 5]


def test_an_update_counts_forward_backward_and_what_is_run_again():
    """Of attention: 26 layers of 4 heads of 256, a score and a value for each pair."""
    N, E, A = roofline.block_parameters(ONE_B), 262_144 * 1152, 26 * 4 * 256 * 4
    sizes = {"block_tokens": 100, "head_tokens": 10, "attended": 5}
    work = lambda **how: roofline.update(ONE_B, **sizes, **how).flops
    assert work(remat="none") == 100 * 6 * N + 10 * 6 * E + 5 * 3 * A
    assert work(remat="full") == 100 * 8 * N + 10 * 8 * E + 5 * 4 * A
    assert work(remat="dots") == 100 * 6 * N + 10 * 8 * E + 5 * 4 * A
    frozen = work(remat="none", adapter_parameters=7)
    assert frozen == 100 * (4 * N + 6 * 7) + 10 * 4 * E + 5 * 3 * A
    scored = roofline.log_probs(ONE_B, **sizes, adapter_parameters=7).flops
    assert scored == 100 * 2 * (N + 7) + 10 * 2 * E + 5 * A


def test_pairs_seen_are_counted_by_hand():
    """Two tokens behind three: 4 and 5 keys in a global layer, two each through a window of 2; one
    layer of three is global."""
    config = replace(ONE_B, num_layers=3, pattern=3, sliding_window=2)
    assert roofline.seen_pairs(config, before=3, tokens=2) == (2 * (2 + 2) + (4 + 5)) / 3


@pytest.mark.parametrize(
    "preset, remat", [("gemma3-1b", "full"), ("gemma3-1b", "none"), ("gemma3-1b-lora", "full")]
)
def test_an_unpacked_update_does_no_more_than_the_formulas_say(preset, remat):
    """Of matmuls, as traced: nothing is computed twice but what remat and the head's chunks are.
    XLA's attention computes the hidden pairs too."""
    run = presets.preset(preset)
    loss = replace(run.grpo.loss, beta=0.1)
    run = replace(run, grpo=replace(run.grpo, loss=loss, pack_tokens=0))
    run = replace(run, model=replace(run.model, remat=remat))
    devices = mesh.data_mesh()
    hidden = 512 * 512 - roofline.seen_pairs(ONE_B, before=0, tokens=512)
    hidden += 8 * (800 * 1312 - roofline.seen_pairs(ONE_B, before=512, tokens=800))
    for program in programs.of_step(run, ONE_B, devices)[1:]:
        (floor,) = fit.work_of(program, run, ONE_B, devices.size)
        times = (3 if remat == "none" else 4) if program.name == "update" else 1
        counted = traced.matmul_flops(program.trace(), platform="cpu")
        expected = floor.flops + times * roofline.attention(ONE_B, hidden)
        assert counted == pytest.approx(expected, rel=1e-3), program.name


def test_a_packed_update_does_that_work_for_every_place_and_pair_of_blocks():
    """Three packs of 3072 places a device at full lengths: of all 24, 16 hold a prompt and three
    completions of 800, which the head takes as 2496 rows, 8 two, as 2112. A TPU's kernel computes
    full blocks of pairs, and makes the scores once more in its backward pass: five matmuls for
    four."""
    run, devices = presets.preset("gemma3-1b"), mesh.data_mesh()
    update = programs.of_step(run, ONE_B, devices)[-1]
    loops = fit.packs_of(update, run, ONE_B, devices.size)
    assert loops["turns"] == [3, 0]
    trace = update.trace()
    counted = traced.matmul_flops(trace, platform="tpu", **loops)
    places = roofline.update(
        ONE_B,
        block_tokens=3 * 3072,
        head_tokens=(16 * 2496 + 8 * 2112) / 8,
        attended=0,
        adapter_parameters=0,
        remat="full",
    )
    kernel = 4.5 * roofline.attention(ONE_B, 3 * 256 * 256 * loops["steps"][0])
    assert counted == pytest.approx(places.flops + kernel, rel=2e-3)


def test_matmuls_are_counted_through_loops_branches_and_gradients():
    """A matmul of 2x3 and 3x5 is 60 FLOPs."""
    x, w = jnp.zeros((2, 3)), jnp.zeros((3, 5))
    square = jnp.zeros((3, 3))

    def of(function, *arrays, **how):
        return traced.matmul_flops(jax.jit(function).trace(*arrays), **how)

    assert of(lambda x, w: x @ w, x, w) == 60
    assert of(lambda x, w: jax.lax.scan(lambda c, _: (c, c @ w), x, length=7), x, w) == 7 * 60
    assert (
        of(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w.T @ w, lambda: x @ w), x, w)
        == 180
    )
    loop = lambda x, s: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ s, x)
    assert of(loop, x, square, turns=4) == 4 * 36
    grad = jax.grad(lambda x, w: jax.checkpoint(lambda x: jnp.sin(x @ w))(x).sum(), argnums=(0, 1))
    assert of(grad, x, w) == 60 + 60 + 2 * 60  # forward, again, and for either argument


def test_of_a_switch_in_a_loop_the_branches_that_turns_take_are_counted():
    """Three turns of one loop take 36, 36 and 72 FLOPs; two of another 72 each."""
    square = jnp.eye(3)
    once, twice = (lambda c: c @ square), (lambda c: c @ square @ square)

    def loops(x, n):
        turn = lambda i, c: jax.lax.switch(i % 2, [once, twice], c)
        return jax.lax.fori_loop(0, n, turn, jax.lax.fori_loop(0, n, turn, x))

    trace = jax.jit(loops).trace(jnp.zeros((2, 3)), 5)
    taken = [[0, 0, 1], [1, 1]]
    assert traced.matmul_flops(trace, turns=[3, 2], branches=taken) == 36 + 36 + 72 + 2 * 72
    assert traced.matmul_flops(trace, turns=[3, 2]) == 5 * 72


def test_a_branch_in_a_kernel_is_none_of_a_switch_in_the_loop_around_it():
    """The kernel's matmul of 8x8 and 8x8, 1024 FLOPs, is behind a condition of its own."""

    def kernel(x_ref, out_ref):
        @pl.when(pl.program_id(0) == 0)
        def _():
            out_ref[...] = x_ref[...] @ x_ref[...]

    def turn(i, x):
        x = pl.pallas_call(kernel, grid=(1,), out_shape=jax.ShapeDtypeStruct((8, 8), x.dtype))(x)
        return jax.lax.switch(i, [lambda x: x, lambda x: x, lambda x: x @ x], x)

    trace = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, turn, x)).trace(jnp.zeros((8, 8)), 3)
    assert traced.matmul_flops(trace, turns=[3], branches=[[0, 0, 2]]) == 3 * 1024 + 1024


def test_matmuls_of_a_kernel_are_counted_at_every_step_of_its_grid():
    """Four matmuls of 8x16 and 16x32, each 8192 FLOPs."""

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def matmul(x, w):
        block = lambda shape, place: pl.BlockSpec(shape, place)
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[block((8, 16), lambda i: (0, 0)), block((16, 32), lambda i: (0, i))],
            out_specs=block((8, 32), lambda i: (0, i)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        )(x, w)

    trace = jax.jit(matmul).trace(jnp.zeros((8, 16)), jnp.zeros((16, 128)))
    assert traced.matmul_flops(trace) == 4 * 8192 == 2 * 8 * 16 * 128


def test_a_grid_of_unknown_length_counts_as_told_and_is_refused_untold():
    def matmul(x, steps):
        return pl.pallas_call(
            lambda x_ref, out_ref: out_ref.__setitem__(..., x_ref[...] @ x_ref[...]),
            grid=(2, steps),
            out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32),
        )(x)

    trace = jax.jit(matmul).trace(jnp.zeros((8, 8)), 3)
    assert traced.matmul_flops(trace, steps=2.5) == 2 * 2.5 * 1024
    with pytest.raises(ValueError, match="steps"):
        traced.matmul_flops(trace)


def test_of_forms_by_platform_the_one_asked_for_is_counted():
    x = jnp.zeros((2, 2))  # a matmul is 16 FLOPs
    forms = {"tpu": lambda x: x @ x, "default": lambda x: x @ x @ x}
    trace = jax.jit(lambda x: jax.lax.platform_dependent(x, **forms)).trace(x)
    counted = [traced.matmul_flops(trace, platform=name) for name in ("tpu", "cpu", None)]
    assert counted == [16, 32, 32]
