"""Truncated sampling as one TPU kernel: the embedding read once, logits never outside VMEM.

Tiles of the embedding stream through the matrix unit into logits that stay in VMEM, 64 MiB for 64
rows of Gemma's vocabulary: a v5e has 128 MiB. After the last tile there are only passes over the
logits, of 9 to 24 us each, where a sort takes 10 ms. Few are needed: while the embedding streams,
which takes most of the time, the kernel keeps the `LAYERS` largest logits at each place in a block.
These 4096 candidates contain the few hundred largest logits, except for a contrived order of the
vocabulary. Not for a sharded vocabulary: a kernel cannot sum over devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gemma_grpo.kernels import block_draw, dispatch
from gemma_grpo.kernels.matmul import precision_of
from gemma_grpo.kernels.truncated_sampling.search import Passes, Truncation, Vocabulary, threshold

TILE = 1024  # tokens per step
LAYERS = 8
LANES = 128
SLACK_BYTES = 4 * 2**20  # values within a pass that do not fit in registers


def vmem_limit() -> int:
    """Bytes that the kernel may take: 120 of a v5e's 128 MiB; the rest is for the compiler."""
    return dispatch.vmem_bytes() * 120 // 128


def vmem_bytes(rows: int, vocab_size: int, embed_dim: int, dtype: jnp.dtype) -> int:
    """Bytes that the kernel holds in VMEM. Inputs and outputs are double-buffered."""
    rows, itemsize = -(-rows // 16) * 16, jnp.dtype(dtype).itemsize
    tiles = -(-vocab_size // TILE)
    return (
        tiles * TILE * rows * 4  # logits
        + 2 * TILE * embed_dim * itemsize  # embedding
        + 2 * rows * embed_dim * itemsize  # hidden states
        + 2 * rows * _noise_columns(vocab_size) * 4  # block noise
        + rows * _noise_columns(vocab_size) * 4  # block masses
        + LAYERS * rows * block_draw.BLOCK * 4  # candidates
        + 2 * rows * block_draw.BLOCK * 4  # output: the drawn block's logits
        + 2 * 4 * rows * LANES * 4  # outputs of one column, padded to 128
        + SLACK_BYTES
    )


def draw_truncated(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    noise: block_draw.Noise,
    truncation: Truncation,
    *,
    temperature: float,
    interpret: bool = False,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """As `xla.draw_truncated`, with the head. `vmem_bytes` must be within `vmem_limit`.

    The kernel finds each row's block; the token is drawn from the block's logits.
    """
    B, D = hidden_BD.shape
    V = embedding_VD.shape[0]
    columns = _noise_columns(V)
    missing = columns - noise.gumbel.shape[1]
    gumbel = jnp.pad(noise.gumbel, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    full = lambda *shape: pl.BlockSpec(shape, lambda tile: (0, 0))
    column = lambda dtype: jax.ShapeDtypeStruct((B, 1), dtype)
    tiles = pl.cdiv(V, TILE)
    block, top, kept_mass, full_mass, kept_logits = pl.pallas_call(
        partial(_kernel, vocab_size=V, truncation=truncation, temperature=temperature),
        grid=(tiles,),
        in_specs=[
            full(B, D),
            pl.BlockSpec((TILE, D), lambda tile: (tile, 0)),
            full(B, columns),
        ],
        out_specs=[*[full(B, 1)] * 4, full(B, block_draw.BLOCK)],
        out_shape=[
            column(jnp.int32),
            *[column(jnp.float32)] * 3,
            jax.ShapeDtypeStruct((B, block_draw.BLOCK), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((tiles, B, TILE), jnp.float32),
            pltpu.VMEM((LAYERS, B, block_draw.BLOCK), jnp.float32),
            pltpu.VMEM((B, columns), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * V * D,
            bytes_accessed=(V + B) * D * embedding_VD.dtype.itemsize
            + (gumbel.size + B * block_draw.BLOCK) * 4,
            transcendentals=3 * B * V,  # the masses: of all tokens, of top-k's, of those kept
        ),
        interpret=interpret,
        name="truncated_sampling",
    )(hidden_BD, embedding_VD, gumbel)
    token_B, logits_B, _ = block_draw.pick_token(kept_logits.T, noise.uniform)
    ids_B = block[:, 0] * block_draw.BLOCK + token_B
    logsumexps = [(top + jnp.log(mass))[:, 0] for mass in (kept_mass, full_mass)]
    return ids_B, logits_B, *logsumexps


def _kernel(
    hidden_ref,  # [B, D]
    embedding_ref,  # [TILE, D]
    gumbel_ref,  # [B, blocks], padded with -inf
    block_out,  # [B, 1], like the next three
    top_out,
    kept_mass_out,
    full_mass_out,
    kept_logits_out,  # [B, BLOCK]: the drawn block's logits, -inf where they are not kept
    logits_ref,  # [tiles, B, TILE]
    candidates_ref,  # [LAYERS, B, BLOCK]: the largest of each place in a block, descending
    mass_ref,  # [B, blocks]
    *,
    vocab_size: int,
    truncation: Truncation,
    temperature: float,
):
    tile, last = pl.program_id(0), pl.num_programs(0) - 1
    logits = jax.lax.dot_general(
        hidden_ref[...],
        embedding_ref[...],
        (((1,), (1,)), ((), ())),
        precision=precision_of(hidden_ref.dtype, embedding_ref.dtype),
        preferred_element_type=jnp.float32,
    )
    logits = logits * (1 / temperature)
    if vocab_size % TILE:
        # The last tile reaches past the end of the embedding, where memory is undefined.
        token = tile * TILE + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where(token < vocab_size, logits, -jnp.inf)
    logits_ref[tile] = logits

    @pl.when(tile == 0)
    def _():
        candidates_ref[...] = jnp.full_like(candidates_ref, -jnp.inf)

    for lane in range(0, block_draw.BLOCK, LANES):
        entering = [block[:, lane : lane + LANES] for block in _blocks(logits)]
        for layer in range(LAYERS):
            held = candidates_ref[layer, :, lane : lane + LANES]
            for index, values in enumerate(entering):
                held, entering[index] = jnp.maximum(held, values), jnp.minimum(held, values)
            candidates_ref[layer, :, lane : lane + LANES] = held

    @pl.when(tile == last)
    def _():
        draw = _draw(logits_ref, candidates_ref, mass_ref, gumbel_ref, vocab_size, truncation)
        (
            block_out[...],
            top_out[...],
            kept_mass_out[...],
            full_mass_out[...],
            kept_logits_out[...],
        ) = draw


def _draw(logits_ref, candidates_ref, mass_ref, gumbel_ref, vocab_size, truncation):
    """The kernel's outputs."""
    tiles, B, _ = logits_ref.shape
    top = candidates_ref[0].max(axis=-1, keepdims=True)
    everything = _passes(logits_ref, top)
    candidates = _passes(candidates_ref, top)
    incomplete = candidates_ref[LAYERS - 1].max(axis=-1, keepdims=True)
    _, full_mass = everything.count_and_mass(jnp.full_like(top, -jnp.inf))
    vocabulary = Vocabulary(everything, candidates, incomplete, top, full_mass, vocab_size)
    least = threshold(vocabulary, truncation)

    mass_ref[...] = jnp.zeros_like(mass_ref)
    lane = jax.lax.broadcasted_iota(jnp.int32, (B, LANES), 1)

    def weigh_tile(tile, _):
        for place, logits in enumerate(_blocks(logits_ref[tile])):
            weights = jnp.where(logits >= least, jnp.exp(logits - top), 0.0)
            mass = weights.sum(axis=-1, keepdims=True)
            block = tile * (TILE // block_draw.BLOCK) + place
            columns = pl.ds(pl.multiple_of(block & -LANES, LANES), LANES)
            mass_ref[:, columns] = jnp.where(
                lane == (block & (LANES - 1)), mass, mass_ref[:, columns]
            )

    jax.lax.fori_loop(0, tiles, weigh_tile, None)
    mass = mass_ref[...]
    scores = jnp.log(mass) + gumbel_ref[...]
    best = scores.max(axis=-1, keepdims=True)
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    block = jnp.where(scores == best, column, block_draw.num_blocks(vocab_size) - 1)
    block = block.min(axis=-1, keepdims=True)

    def take_tile(tile, taken):
        for place, logits in enumerate(_blocks(logits_ref[tile])):
            here = block == tile * (TILE // block_draw.BLOCK) + place
            taken = jnp.where(here, logits, taken)
        return taken

    nothing = jnp.full((B, block_draw.BLOCK), -jnp.inf, jnp.float32)
    taken = jax.lax.fori_loop(0, tiles, take_tile, nothing)
    kept_logits = jnp.where(taken >= least, taken, -jnp.inf)
    return block, top, mass.sum(axis=-1, keepdims=True), full_mass, kept_logits


def _passes(logits_ref, top: jax.Array) -> Passes:
    """Passes over logits [tiles, B, tokens of a tile]."""
    tiles, B, size = logits_ref.shape

    def over_logits(add, start):
        def add_tile(tile, sums):
            for lane in range(0, size, LANES):
                sums = add(logits_ref[tile, :, lane : lane + LANES], sums)
            return sums

        sums = jax.lax.fori_loop(0, tiles, add_tile, start)
        return jax.tree.map(lambda lanes: lanes.sum(axis=-1, keepdims=True), sums)

    zeros = jnp.zeros((B, LANES), jnp.float32)

    def count(least):
        add = lambda logits, sums: sums + jnp.where(logits >= least, 1.0, 0.0)
        return over_logits(add, zeros)

    def count_and_mass(least):
        def add(logits, sums):
            reaches = logits >= least
            mass = jnp.where(reaches, jnp.exp(logits - top), 0.0)
            return sums[0] + jnp.where(reaches, 1.0, 0.0), sums[1] + mass

        return over_logits(add, (zeros, zeros))

    return Passes(count, count_and_mass)


def _blocks(logits: jax.Array) -> list[jax.Array]:
    return [logits[:, at : at + block_draw.BLOCK] for at in range(0, TILE, block_draw.BLOCK)]


def _noise_columns(vocab_size: int) -> int:
    """Blocks of all tiles, rounded up to a multiple of `LANES`."""
    return pl.cdiv(pl.cdiv(vocab_size, TILE) * TILE // block_draw.BLOCK, LANES) * LANES
