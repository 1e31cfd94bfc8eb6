"""Attention masks and grouped-query attention with QK-norm.

Key slots are of two kinds: the prompt's, shared by all completions of a group (P rows), and the
row's own (B rows). A plain sequence has only own slots.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from gemma_grpo.kernels.matmul import einsum
from gemma_grpo.model import lora
from gemma_grpo.model.layers import RMSNorm, adapted, rotate
from gemma_grpo.model.settings import LoRAConfig

# Large, but finite: a query with all slots masked gets a uniform average, which is never read; with
# -inf it would get NaN, also in the gradient.
MASKED = -1e30


def causal_mask(length: int, *, window: int | None) -> Bool[Array, "1 L L"]:
    """Which slots a query slot sees: itself and all before it; in a window w the w - 1 before it.

    For length 4 and window 2 (rows are queries):

        1 . . .
        1 1 . .
        . 1 1 .
        . . 1 1
    """
    distance_LL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    mask_LL = distance_LL >= 0
    if window is not None:
        mask_LL &= distance_LL < window
    return mask_LL[None]


def prompt_window_mask(
    num_prompt_slots: int, completion_slots_T: jax.Array, *, window: int | None
) -> Bool[Array, "1 T S"]:
    """Which prompt slots a completion slot sees. Prompts end at slot S - 1, so the distance from
    completion slot t to prompt slot s is S + t - s in every row, however much padding it carries.

    For S = 3, T = 2 and window 3:

        . 1 1
        . . 1
    """
    distance_T1 = num_prompt_slots + completion_slots_T[:, None]
    distance_TS = distance_T1 - jnp.arange(num_prompt_slots)[None]
    mask_TS = distance_TS > 0
    if window is not None:
        mask_TS &= distance_TS < window
    return mask_TS[None]


def attend(
    q_BLNH: Float[Array, "B L N H"],
    k_BCKH: Float[Array, "B C K H"],
    v_BCKH: Float[Array, "B C K H"],
    mask_BLC: Bool[Array, "#B L C"],
    *,
    scale: float,
) -> Float[Array, "B L N H"]:
    """softmax(scale * q k^T) v over the slots that the mask allows; softmax in float32."""
    B, L, N, H = q_BLNH.shape
    own = _Slots(k_BCKH, v_BCKH, mask_BLC, scale=scale)
    scores = own.scores(_heads_first(q_BLNH, k_BCKH.shape[2]))
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = own.mix(weights) / weights.sum(axis=-1, keepdims=True)
    return _heads_last(mixed, q_BLNH)


def attend_with_prompt(
    q_BLNH: Float[Array, "B L N H"],
    prompt_k_PSKH: Float[Array, "P S K H"],
    prompt_v_PSKH: Float[Array, "P S K H"],
    prompt_mask_PLS: Bool[Array, "P L S"],
    own: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    *,
    scale: float,
) -> Float[Array, "B L N H"]:
    """`attend` over the group's prompt slots and then the row's own, without repeating the prompt.

    The G rows b = p*G + g of a group share one matmul with the prompt's keys (Hydragen, arXiv
    2402.05099, section 3.1); the partial softmaxes share their maximum and their sum.

    Args:
        own: the row's own slots in one or more parts, each (k_BCKH, v_BCKH, mask_BLC) as in
            `attend`: a new token's can be given beside a cache that does not hold it yet.
    """
    B, L, N, H = q_BLNH.shape
    P, _, K, _ = prompt_k_PSKH.shape
    G, R = B // P, N // K
    prompt = _Slots(prompt_k_PSKH, prompt_v_PSKH, prompt_mask_PLS, scale=scale)
    own_slots = [_Slots(*part, scale=scale) for part in own]

    def by_group(x):  # In: [B K R L .]  Out: [P K (G R) L .]
        return jnp.swapaxes(x.reshape(P, G, K, R, L, -1), 1, 2).reshape(P, K, G * R, L, -1)

    def by_row(x):  # In: [P K (G R) L .]  Out: [B K R L .]
        return jnp.swapaxes(x.reshape(P, K, G, R, L, -1), 1, 2).reshape(B, K, R, L, -1)

    q_BKRLH = _heads_first(q_BLNH, K)
    prompt_scores = by_row(prompt.scores(by_group(q_BKRLH)))
    scores = [prompt_scores, *(slots.scores(q_BKRLH) for slots in own_slots)]
    top = reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in scores])
    weights = [jnp.exp(part - jax.lax.stop_gradient(top)) for part in scores]
    total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
    mixed = by_row(prompt.mix(by_group(weights[0])))
    for slots, part in zip(own_slots, weights[1:], strict=True):
        mixed += slots.mix(part)
    return _heads_last(mixed / total, q_BLNH)


class _Slots:
    """Keys, values and their mask, for plain batched matmuls.

    The R query heads of a kv head and the L query slots are the M = R * L rows of one matmul: XLA's
    CPU backend transposes any other arrangement through memory, at several times the cost.
    """

    def __init__(self, k_BCKH: jax.Array, v_BCKH: jax.Array, mask_BLC: jax.Array, *, scale: float):
        self.k_BKCH, self.v_BKCH = jnp.swapaxes(k_BCKH, 1, 2), jnp.swapaxes(v_BCKH, 1, 2)
        self.mask = mask_BLC[:, None, None]
        self.scale = scale

    def scores(self, q_BKRLH: jax.Array) -> jax.Array:
        """[B, K, R, L, C], scaled and masked."""
        B, K, R, L, H = q_BKRLH.shape
        q_BKMH = q_BKRLH.reshape(B, K, R * L, H)
        scores = einsum("bkmh,bkch->bkmc", q_BKMH, self.k_BKCH)
        return jnp.where(self.mask, scores.reshape(B, K, R, L, -1) * self.scale, MASKED)

    def mix(self, weights_BKRLC: jax.Array) -> jax.Array:
        """The weighted sum of the values, [B, K, R, L, H]."""
        B, K, R, L, C = weights_BKRLC.shape
        weights_BKMC = weights_BKRLC.reshape(B, K, R * L, C).astype(self.v_BKCH.dtype)
        mixed = einsum("bkmc,bkch->bkmh", weights_BKMC, self.v_BKCH)
        return mixed.reshape(B, K, R, L, -1)


def _heads_first(q_BLNH: jax.Array, num_kv_heads: int) -> jax.Array:
    B, L, N, H = q_BLNH.shape
    q_BLKRH = q_BLNH.reshape(B, L, num_kv_heads, N // num_kv_heads, H)
    return q_BLKRH.transpose(0, 2, 3, 1, 4)


def _heads_last(mixed_BKRLH: jax.Array, like_BLNH: jax.Array) -> jax.Array:
    mixed_BLKRH = mixed_BKRLH.transpose(0, 3, 1, 2, 4)
    return mixed_BLKRH.reshape(like_BLNH.shape).astype(like_BLNH.dtype)


class Attention(nnx.Module):
    """The projections around `attend`: queries, keys and values in, the mixed heads out.

    `keys_BL` are the tokens' dropout keys, for adapters in training.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        lora_config: LoRAConfig,
        rngs: nnx.Rngs,
    ):
        init_in = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        init_out = nnx.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        self.q_proj = nnx.Param(init_in(rngs.params(), (embed_dim, num_heads, head_dim)))
        self.k_proj = nnx.Param(init_in(rngs.params(), (embed_dim, num_kv_heads, head_dim)))
        self.v_proj = nnx.Param(init_in(rngs.params(), (embed_dim, num_kv_heads, head_dim)))
        self.o_proj = nnx.Param(init_out(rngs.params(), (num_heads, head_dim, embed_dim)))
        self.q_norm = RMSNorm(head_dim, eps=norm_eps)
        self.k_norm = RMSNorm(head_dim, eps=norm_eps)
        q_dim, kv_dim = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj_lora = lora.make(embed_dim, q_dim, "attention.q_proj", lora_config, rngs)
        self.k_proj_lora = lora.make(embed_dim, kv_dim, "attention.k_proj", lora_config, rngs)
        self.v_proj_lora = lora.make(embed_dim, kv_dim, "attention.v_proj", lora_config, rngs)
        self.o_proj_lora = lora.make(q_dim, embed_dim, "attention.o_proj", lora_config, rngs)

    def qkv(
        self,
        x_BLD: Float[Array, "B L D"],
        sin_BLh: Float[Array, "B L h"],
        cos_BLh: Float[Array, "B L h"],
        keys_BL: Key[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L N H"], Float[Array, "B L K H"], Float[Array, "B L K H"]]:
        """Queries, keys and values; the first two normalised, then rotated."""
        q_BLNH = self._heads(x_BLD, self.q_proj[...], self.q_proj_lora, keys_BL)
        k_BLKH = self._heads(x_BLD, self.k_proj[...], self.k_proj_lora, keys_BL)
        v_BLKH = self._heads(x_BLD, self.v_proj[...], self.v_proj_lora, keys_BL)
        q_BLNH = rotate(self.q_norm(q_BLNH), sin_BLh, cos_BLh)
        k_BLKH = rotate(self.k_norm(k_BLKH), sin_BLh, cos_BLh)
        return q_BLNH, k_BLKH, v_BLKH

    def output(
        self, heads_BLNH: Float[Array, "B L N H"], keys_BL: Key[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """The heads projected back to the residual stream."""
        o_proj = self.o_proj[...]
        flat = heads_BLNH.reshape(*heads_BLNH.shape[:2], -1)
        return adapted(flat, o_proj.reshape(-1, o_proj.shape[-1]), self.o_proj_lora, keys_BL)

    @staticmethod
    def _heads(
        x_BLD: jax.Array,
        weight_DNH: jax.Array,
        adapter: lora.LoRA | None,
        keys_BL: jax.Array | None,
    ) -> jax.Array:
        D, N, H = weight_DNH.shape
        flat = adapted(x_BLD, weight_DNH.reshape(D, N * H), adapter, keys_BL)
        return flat.reshape(*x_BLD.shape[:2], N, H)
