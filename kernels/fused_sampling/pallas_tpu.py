"""Head and draw in one pass over the embedding, as a TPU kernel.

Tokens run down the sublanes and rows along the lanes: the embedding streams through the matrix unit
against hidden states that stay there, and every reduction over a block's tokens is elementwise
except for its last three steps. VMEM holds one tile of the embedding at a time; of earlier tiles it
keeps a few numbers per row and the logits of the best block so far.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_grpo.kernels import block_draw
from gemma_grpo.kernels.block_draw import BLOCK, LOWEST
from gemma_grpo.kernels.matmul import precision_of

VMEM_LIMIT = 16 * 2**20  # bytes: a kernel's default on v5e
TILE_BYTES = 5 * 2**20  # of the embedding: 2048 tokens of Gemma 3 1B in bfloat16
MAX_TILE_BLOCKS = 8  # the kernel's loop over them is unrolled
LANES = 128


def tile_blocks(vocab_size: int, embed_dim: int, dtype: jnp.dtype) -> int:
    """Blocks of tokens in a tile."""
    block_bytes = BLOCK * embed_dim * jnp.dtype(dtype).itemsize
    return max(
        1, min(TILE_BYTES // block_bytes, MAX_TILE_BLOCKS, block_draw.num_blocks(vocab_size))
    )


def vmem_bytes(rows: int, vocab_size: int, embed_dim: int, dtype: jnp.dtype) -> int:
    """Bytes that the kernel holds in VMEM. Inputs and outputs are double-buffered."""
    itemsize = jnp.dtype(dtype).itemsize
    lanes = -(-rows // LANES) * LANES
    blocks = -(-block_draw.num_blocks(vocab_size) // 8) * 8
    return (
        2 * tile_blocks(vocab_size, embed_dim, dtype) * BLOCK * embed_dim * itemsize  # embedding
        + 2 * embed_dim * lanes * itemsize  # hidden states
        + 2 * blocks * lanes * 4  # block noise
        + 2 * BLOCK * lanes * 4  # output: the best block's logits
        + 2 * 3 * 8 * lanes * 4  # outputs: score, block, logsumexp
        + 2 * 8 * lanes * 4  # scratch: largest logit, sum of exponentials
        + 2 * BLOCK * lanes * 4  # values: a block's logits and their exponentials
    )


def pick(
    hidden_BD: Float[Array, "B D"],
    embedding_VD: Float[Array, "V D"],
    noise: block_draw.Noise,
    *,
    temperature: float,
    interpret: bool = False,
) -> block_draw.Pick:
    """As `xla.pick`. The kernel finds each row's block; the token is drawn from its logits."""
    (B, D), V = hidden_BD.shape, len(embedding_VD)
    blocks_in_tile = tile_blocks(V, D, embedding_VD.dtype)
    num_tiles = pl.cdiv(V, blocks_in_tile * BLOCK)
    missing = num_tiles * blocks_in_tile - noise.gumbel.shape[1]
    gumbel_NB = jnp.pad(noise.gumbel, ((0, 0), (0, missing))).T
    itemsize = embedding_VD.dtype.itemsize
    full = lambda *shape: pl.BlockSpec(shape, lambda tile: (0,) * len(shape))
    number = jax.ShapeDtypeStruct((1, B), jnp.float32)
    score, block, logsumexp, best_logits = pl.pallas_call(
        partial(_kernel, vocab_size=V, temperature=temperature),
        grid=(num_tiles,),
        in_specs=[
            full(D, B),
            pl.BlockSpec((blocks_in_tile * BLOCK, D), lambda tile: (tile, 0)),
            full(*gumbel_NB.shape),
        ],
        out_specs=[full(1, B), full(1, B), full(1, B), full(BLOCK, B)],
        out_shape=[
            number,
            jax.ShapeDtypeStruct((1, B), jnp.int32),
            number,
            jax.ShapeDtypeStruct((BLOCK, B), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((1, B), jnp.float32), pltpu.VMEM((1, B), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=2 * B * V * D,
            bytes_accessed=(V + B) * D * itemsize + (gumbel_NB.size + BLOCK * B) * 4,
            transcendentals=B * V,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="fused_sampling",
    )(hidden_BD.T, embedding_VD, gumbel_NB)
    if temperature:
        token_B, logits_B, _ = block_draw.pick_token(best_logits, noise.uniform)
    else:
        token_B, logits_B = jnp.argmax(best_logits, axis=0).astype(jnp.int32), score[0]
    return block_draw.Pick(score[0], block[0] * BLOCK + token_B, logits_B, logsumexp[0])


def _kernel(
    hidden_DB,
    embedding,  # the tile's tokens
    gumbel_NB,
    best_score,
    best_block,
    logsumexp,
    best_logits,
    top,  # the largest logit so far
    total,  # the sum of exp(logit - top) so far
    *,
    vocab_size: int,
    temperature: float,
):
    tile = pl.program_id(0)
    blocks_in_tile = len(embedding) // BLOCK

    @pl.when(tile == 0)
    def _():
        best_score[...] = jnp.full_like(best_score, -jnp.inf)
        best_block[...] = jnp.zeros_like(best_block)
        best_logits[...] = jnp.full_like(best_logits, -jnp.inf)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)

    for index in range(blocks_in_tile):
        block = tile * blocks_in_tile + index
        logits = jnp.dot(
            embedding[index * BLOCK : (index + 1) * BLOCK],
            hidden_DB[...],
            precision=precision_of(embedding.dtype, hidden_DB.dtype),
            preferred_element_type=jnp.float32,
        )
        if temperature:
            logits = logits * (1 / temperature)
        if vocab_size % (blocks_in_tile * BLOCK):  # past the vocabulary the tile is undefined
            token = block * BLOCK + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            logits = jnp.where(token < vocab_size, logits, -jnp.inf)
        block_top = jnp.maximum(logits.max(axis=0, keepdims=True), LOWEST)
        mass = jnp.exp(logits - block_top).sum(axis=0, keepdims=True)
        score = block_top
        if temperature:
            score = block_top + jnp.log(mass) + gumbel_NB[pl.ds(block, 1)]
        better = score > best_score[...]
        best_score[...] = jnp.where(better, score, best_score[...])
        best_block[...] = jnp.where(better, block, best_block[...])
        best_logits[...] = jnp.where(better, logits, best_logits[...])
        new_top = jnp.maximum(top[...], block_top)
        kept = total[...] * jnp.exp(top[...] - new_top)
        total[...] = kept + mass * jnp.exp(block_top - new_top)
        top[...] = new_top

    @pl.when(tile == pl.num_programs(0) - 1)
    def _():
        logsumexp[...] = top[...] + jnp.log(total[...])
