"""One word a row from softmax(logits) by few random numbers. Knows no head, kernel, truncation.

Gumbel-max (Gumbel 1954; Maddison et al., arXiv 1411.0030) twice: words stand in blocks of `BLOCK`
neighbours, a block is drawn by its mass, then a word within it by its own:

    block = argmax_b( logsumexp(logits of b) + block_noise[b] )
    word  = argmax_w( logits[block, w]       + word_noise[w]  )

The word noise is the same for all blocks, which is exact: only the drawn block's word is used, and
the block's draw does not look at it. V / BLOCK + BLOCK random numbers a row do where V are usual
(1024 for 262 144), so that noise costs nothing beside the head on any device. One pass over the
blocks in any order draws, and pieces of the vocabulary merge by their maximum: a draw depends on
its row's key alone, not on tile, batch, shard or backend.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

BLOCK = 512  # words; fixed, since a draw depends on it


def num_blocks(num_words: int) -> int:
    """Blocks of a vocabulary of `num_words`; the last may be short."""
    return -(-num_words // BLOCK)


def noise(
    keys_B: Key[Array, " B"], num_words: int
) -> tuple[Float[Array, "B blocks"], Float[Array, "B block"]]:
    """Block noise and word noise of each row, standard Gumbel, float32.

    `num_words` is of the whole vocabulary. A device with a slice of it takes its columns of the
    block noise.
    """

    def of_row(key):
        block_key, word_key = jax.random.split(key)
        gumbel = lambda key, size: jax.random.gumbel(key, (size,), jnp.float32, mode="high")
        return gumbel(block_key, num_blocks(num_words)), gumbel(word_key, BLOCK)

    return jax.vmap(of_row)(keys_B)


def draw(
    logits_BV: Float[Array, "B V"],
    block_noise: Float[Array, "B blocks"],
    word_noise: Float[Array, "B block"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Words drawn from softmax(logits), and each row's logsumexp. -inf is never drawn.

    Every row needs one finite logit.
    """
    B, V = logits_BV.shape
    padding = num_blocks(V) * BLOCK - V
    blocked = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    blocked = blocked.reshape(B, -1, BLOCK)
    top_B1 = blocked.max(axis=(1, 2))[:, None]
    mass = jnp.exp(blocked - top_B1[:, :, None]).sum(axis=-1)
    block_B = jnp.argmax(jnp.log(mass) + block_noise, axis=-1)
    chosen = jnp.take_along_axis(blocked, block_B[:, None, None], axis=1)[:, 0]
    word_B = jnp.argmax(chosen + word_noise, axis=-1)
    return block_B * BLOCK + word_B, top_B1[:, 0] + jnp.log(mass.sum(axis=-1))
