"""Gemma 3 as Flax NNX: blocks, the stack, and its three ways of running. Knows no sampling or loss.

    forward         a batch of sequences        -> hidden states, and keys and values for a cache
    forward_groups  prompts, and G completions  -> hidden states of both; a prompt is run once
    decode          one more token for each row -> hidden states, and the cache with it

All return the final norm's output; `logits` is the head, apart, so that log-probs and sampling can
take it in pieces. The blocks' parameters are stacked along a leading layer axis and scanned, so
that compile time does not grow with depth; `decode` wants them unstacked (`unstack_layers`).
Architecture: Gemma 3 technical report, arXiv 2503.19786, section 2.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gemma_grpo.kernels import head, packed_attention
from gemma_grpo.model import attention
from gemma_grpo.model.config import Gemma3Config
from gemma_grpo.model.layers import GatedMLP, RMSNorm, rope_table
from gemma_grpo.model.layout import REPLICATED, Layout
from gemma_grpo.model.lora import NO_LORA, LoRAConfig
from gemma_grpo.model.packed import Rows
from gemma_grpo.model.params import partition

Params = dict[str, Any]
# Keys and values of every layer, [layer, row, slot, K, H] each.
KV = tuple[Float[Array, "layers P S K H"], Float[Array, "layers P S K H"]]
# One (keys, values) pair for each layer, [row, slot, K, H] each, of as many slots as it needs.
Cache = list[tuple[Float[Array, "B _C K H"], Float[Array, "B _C K H"]]]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Gather = Callable[[nnx.State], nnx.State]  # one layer's parameters, as stored -> whole
# none: all is kept. dots: products with weights are, and the rest (norms, attention, the MLP's
# gate) computed again. full: a block's input is, and all of it computed again.
Remat = Literal["none", "dots", "full"]
_KEPT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """x + post(attention(pre(x))), then the same around the MLP: norms on both sides of each."""

    def __init__(self, config: Gemma3Config, lora_config: LoRAConfig, rngs: nnx.Rngs):
        dim, eps = config.embed_dim, config.norm_eps
        self.pre_attention_norm = RMSNorm(dim, eps=eps)
        self.attention = attention.Attention(
            dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=eps,
            lora_config=lora_config,
            rngs=rngs,
        )
        self.post_attention_norm = RMSNorm(dim, eps=eps)
        self.pre_mlp_norm = RMSNorm(dim, eps=eps)
        self.mlp = GatedMLP(dim, config.hidden_dim, lora_config=lora_config, rngs=rngs)
        self.post_mlp_norm = RMSNorm(dim, eps=eps)

    def __call__(
        self,
        x_BLD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        attend: Attend,
        keys_BL: jax.Array | None = None,
        layout: Layout = REPLICATED,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The block's output and this layer's new keys and values."""
        q_BLNH, k_BLKH, v_BLKH = self.attention.qkv(self.pre_attention_norm(x_BLD), *rope, keys_BL)
        mixed_BLD = self.attention.output(attend(q_BLNH, k_BLKH, v_BLKH), keys_BL)
        x_BLD = x_BLD + self.post_attention_norm(mixed_BLD)
        x_RLD = layout.gather(self.pre_mlp_norm(x_BLD))
        x_BLD = x_BLD + self.post_mlp_norm(layout.scatter(self.mlp(x_RLD, keys_BL)))
        return x_BLD, (k_BLKH, v_BLKH)


class Gemma3(nnx.Module):
    """The parameters of one Gemma 3 text model, float32 at birth.

    Weights start as the architecture's own normal; the embedding is N(0, 1/D), so that the scaled
    input has unit variance and the tied head gives logits of order one. Adapters start as nothing.
    """

    def __init__(self, config: Gemma3Config, *, rngs: nnx.Rngs, lora_config: LoRAConfig = NO_LORA):
        self.config = config
        init = nnx.initializers.normal(stddev=config.embed_dim**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.embed_dim)))
        make_block = nnx.vmap(lambda r: Block(config, lora_config, r), in_axes=0, out_axes=0)
        self.layers = make_block(rngs.split(config.num_layers))
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)

    def embed(
        self, ids_RL: Int[Array, "R L"], layout: Layout = REPLICATED
    ) -> Float[Array, "B L D"]:
        """Embedding rows times sqrt(D), the factor rounded to the weights' dtype as Gemma does."""
        embedding_VD = self.embedding[...]
        factor = jnp.asarray(self.config.embed_dim**0.5, embedding_VD.dtype)
        return layout.scatter(layout.lookup(embedding_VD, ids_RL)) * factor

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The tied head, in float32. Gemma 3 has no soft-cap."""
        return head.logits(hidden, self.embedding[...])


def split(model: Gemma3) -> tuple[nnx.GraphDef, Params]:
    """The model as a static graph and a nested dict of arrays; `nnx.merge` undoes it."""
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def abstract(
    config: Gemma3Config, lora_config: LoRAConfig = NO_LORA
) -> tuple[nnx.GraphDef, Params]:
    """`split` without the arrays: the graph and a tree of `jax.ShapeDtypeStruct`."""
    make = lambda: Gemma3(config, rngs=nnx.Rngs(0), lora_config=lora_config)
    return split(nnx.eval_shape(make))


def init_adapter(config: Gemma3Config, lora_config: LoRAConfig, *, seed: int) -> Params:
    """Fresh adapters, float32. No base weight is made: nothing reads it, so XLA leaves it out."""

    @jax.jit
    def make(key: jax.Array) -> Params:
        _, params = split(Gemma3(config, rngs=nnx.Rngs(params=key), lora_config=lora_config))
        return partition(params)[0]

    return make(jax.random.key(seed))


def forward(
    model: Gemma3,
    ids_RL: Int[Array, "R L"],
    mask_BL: Bool[Array, "B L"],
    *,
    layout: Layout = REPLICATED,
) -> tuple[Float[Array, "B L D"], KV]:
    """Run whole sequences. Padding may stand on either side; its hidden states mean nothing.

    Args:
        ids_RL: tokens of all rows (see `Layout`); everything else is of the B own ones.
        mask_BL: True on tokens, False on padding. Tokens of a row stand together.
        layout: how the weights lie.

    Returns:
        Hidden states after the final norm, and every layer's keys and values.
    """
    config = model.config
    positions_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1) - 1, 0)
    masks = [
        attention.causal_mask(mask_BL.shape[1], window=window) & mask_BL[:, None, :]
        for window in (config.sliding_window, None)
    ]

    def layer(x_BLD, scanned):
        block, is_global, _ = _block(model, scanned, None)
        mask_BLL = jnp.where(is_global, masks[1], masks[0])
        attend = lambda q, k, v: attention.attend(q, k, v, mask_BLL, scale=_scale(config))
        return block(x_BLD, _select_rope(ropes, is_global), attend, layout=layout)

    ropes = _ropes(config, positions_BL)
    x_BLD, kv = _scan(model, layer, model.embed(ids_RL, layout), remat="none", gather=None)
    return model.final_norm(x_BLD), kv


def forward_groups(
    model: Gemma3,
    prompt_ids_PS: Int[Array, "P S"],
    prompt_mask_PS: Bool[Array, "P S"],
    completion_ids_BT: Int[Array, "B T"],
    completion_mask_BT: Bool[Array, "B T"],
    *,
    remat: Remat = "none",
    gather: Gather | None = None,
    dropout_keys_P: Key[Array, " P"] | None = None,
    dropout_keys_B: Key[Array, " B"] | None = None,
    rows: Rows,
) -> tuple[Float[Array, "P S D"], Float[Array, "1 X D"]]:
    """Run prompts and G completions of each, every prompt once.

    All tokens go through the layers as one row, prompts before completions, and come apart for
    attention alone: a layer's weights are gathered and read once, and compiled for one shape.

    Args:
        prompt_ids_PS: tokens, left-padded.
        prompt_mask_PS: True on prompt tokens.
        completion_ids_BT: tokens, right-padded, group-major.
        completion_mask_BT: True on tokens.
        remat: what of a block the backward pass computes again rather than have it kept.
        gather: makes a layer's parameters whole as the scan comes to it, and again in the backward
            pass under remat; None where they are whole already.
        dropout_keys_P, dropout_keys_B: a key for each row, for adapters with dropout; None drops
            nothing.
        rows: the completions' slots that the layers run on, all or those that hold tokens; the
            tokens of a completion stand side by side.

    Returns:
        Hidden states after the final norm, equal to those of the whole sequences; the completions'
        as `rows` packs them.
    """
    config = model.config
    P, S = prompt_ids_PS.shape
    B, T = completion_ids_BT.shape

    def together(x_PS, x_BT):
        """As one row [1, Z]; `apart` leaves completions packed."""
        return jnp.concatenate([x_PS.reshape(1, P * S, *x_PS.shape[2:]), rows.pack(x_BT)], axis=1)

    def apart(x_1Z):
        return x_1Z[:, : P * S].reshape(P, S, *x_1Z.shape[2:]), x_1Z[:, P * S :]

    row_PS, _ = jnp.indices((P, S))
    row_BT, slot_BT = jnp.indices((B, T))
    length_P = prompt_mask_PS.sum(axis=1)
    before_PS = jnp.maximum(jnp.cumsum(prompt_mask_PS, axis=1) - 1, 0)
    positions_1Z = together(before_PS, jnp.repeat(length_P, B // P)[:, None] + slot_BT)
    token_keys_1Z = None
    if dropout_keys_P is not None:
        keys = jnp.concatenate([dropout_keys_P, dropout_keys_B])
        token_keys_1Z = _token_keys(keys, together(row_PS, P + row_BT), positions_1Z)
    packed_tokens = [rows.pack(each)[0] for each in (row_BT, slot_BT, completion_mask_BT)]

    def in_sight(window: int | None) -> tuple:
        """Masks of prompts, of completions over prompts and over themselves, and the kernel's."""
        seen_1TS = attention.prompt_window_mask(S, jnp.arange(T), window=window)
        sizes = dict(num_rows=B, num_prompt_slots=S, window=window)
        return (
            attention.causal_mask(S, window=window) & prompt_mask_PS[:, None, :],
            seen_1TS & prompt_mask_PS[:, None, :],
            attention.causal_mask(T, window=window) & completion_mask_BT[:, None, :],
            packed_attention.sight(*packed_tokens, length_P, **sizes),
        )

    near, far = in_sight(config.sliding_window), in_sight(None)

    def layer(x_1ZD, scanned):
        block, is_global, keys_1Z = _block(model, scanned, token_keys_1Z)
        prompt_mask, seen_mask, own_mask, sight = jax.tree.map(
            lambda near, far: jnp.where(is_global, far, near), near, far
        )
        scale = _scale(config)

        def attend(*row):
            (q_PS, q_1X), (k_PS, k_1X), (v_PS, v_1X) = map(apart, row)
            padded = lambda q, k, v: attention.attend_with_prompt(
                q, k_PS, v_PS, seen_mask, [(k, v, own_mask)], scale=scale
            )
            of_prompts = attention.attend(q_PS, k_PS, v_PS, prompt_mask, scale=scale)
            of_completions = packed_attention.packed_attention(
                *(q_1X, k_1X, v_1X, k_PS, v_PS, sight),
                scale=scale,
                elsewhere=rows.between(padded),
            )
            of_prompts = of_prompts.reshape(1, P * S, *of_prompts.shape[2:])
            return jnp.concatenate([of_prompts, of_completions], axis=1)

        x_1ZD, _ = block(x_1ZD, _select_rope(ropes, is_global), attend, keys_1Z)
        return x_1ZD, None

    ropes = _ropes(config, positions_1Z)
    x_1ZD = model.embed(together(prompt_ids_PS, completion_ids_BT))
    x_1ZD, _ = _scan(model, layer, x_1ZD, remat=remat, gather=gather)
    return apart(model.final_norm(x_1ZD))


def unstack_layers(model: Gemma3) -> list[Block]:
    """The blocks one by one, for `decode`. Copies the weights: call it outside the decode loop."""
    graphdef, stacked = nnx.split(model.layers)
    block = lambda i: nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], stacked))
    return [block(i) for i in range(model.config.num_layers)]


def empty_cache(config: Gemma3Config, *, num_rows: int, num_slots: int, dtype: jnp.dtype) -> Cache:
    """Zeroed keys and values for the `num_slots` completion slots of `num_rows` rows.

    C is as many for a global layer. A local one has a ring of no more than its window, in which
    completion slot t stands at t % C: what leaves the window is written over.
    """

    def empty(is_global: bool) -> jax.Array:
        C = num_slots if is_global else min(num_slots, config.sliding_window)
        return jnp.zeros((num_rows, C, config.num_kv_heads, config.head_dim), dtype)

    return [(empty(is_global), empty(is_global)) for is_global in config.is_global]


def decode(
    model: Gemma3,
    blocks: list[Block],
    ids_R: Int[Array, " R"],
    slot: Int[Array, ""],
    cache: Cache,
    prompt_kv: KV,
    prompt_mask_PS: Bool[Array, "P S"],
    layout: Layout = REPLICATED,
) -> tuple[Float[Array, "B D"], Cache]:
    """Run one token of each row, at completion slot `slot`, and write its keys and values there.

    Args:
        model: for the embedding and the final norm.
        blocks: `unstack_layers(model)`.
        ids_R: the token at `slot` in all rows (see `Layout`); everything else is of the B own ones.
            Rows that have ended may hold anything.
        slot: the completion slot, the same for all rows since prompts end at the same slot.
        cache: of `empty_cache`, slots below `slot` written.
        prompt_kv: from `forward` over the left-padded prompts.
        prompt_mask_PS: True on prompt tokens.
        layout: how the weights lie.

    Returns:
        Hidden states after the final norm, and the cache with slot `slot` filled.
    """
    config = model.config
    P, S = prompt_mask_PS.shape
    B = cache[0][0].shape[0]
    positions_B1 = jnp.repeat(prompt_mask_PS.sum(axis=1), B // P)[:, None] + slot
    ropes = _ropes(config, positions_B1)
    itself = jnp.ones((1, 1, 1), bool)
    x_B1D = model.embed(ids_R[:, None], layout)
    tokens = []
    for i, (block, is_global) in enumerate(zip(blocks, config.is_global, strict=True)):
        window = None if is_global else config.sliding_window
        C = cache[i][0].shape[1]
        age_C = (slot - 1 - jnp.arange(C)) % C + 1  # of what stands in each slot; 1 is the newest
        older_11C = ((age_C <= slot) & (age_C < (window or C + 1)))[None, None]
        prompt_mask = attention.prompt_window_mask(S, slot[None], window=window)
        prompt_mask = prompt_mask & prompt_mask_PS[:, None, :]

        def attend(q, k, v, i=i, older=older_11C, prompt=prompt_mask):
            own = [(*cache[i], older), (k, v, itself)]
            prompt_k, prompt_v = prompt_kv[0][i], prompt_kv[1][i]
            return attention.attend_with_prompt(
                q, prompt_k, prompt_v, prompt, own, scale=_scale(config)
            )

        x_B1D, new = block(x_B1D, ropes[is_global], attend, layout=layout)
        tokens.append(new)
    # Written when all were read, which the barrier holds the compiler to: a cache updated before,
    # or while the TPU has it on chip, is written back whole.
    x_B1D, tokens = jax.lax.optimization_barrier((x_B1D, tokens))

    def write(old: jax.Array, token: jax.Array) -> jax.Array:
        at = slot % old.shape[1]
        return jax.lax.dynamic_update_slice_in_dim(old, token.astype(old.dtype), at, axis=1)

    cache = jax.tree.map(write, cache, tokens)
    return model.final_norm(x_B1D)[:, 0], cache


def _scale(config: Gemma3Config) -> float:
    return config.query_pre_attn_scalar**-0.5


def _ropes(config: Gemma3Config, positions_BL: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """RoPE tables of the local (0) and the global (1) layers."""
    kinds = ((config.rope_base_local, 1.0), (config.rope_base_global, config.rope_scale_global))
    return [
        rope_table(positions_BL, head_dim=config.head_dim, base=base, scale=scale)
        for base, scale in kinds
    ]


def _select_rope(ropes: list, is_global: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(
        jnp.where(is_global, far, near) for near, far in zip(ropes[0], ropes[1], strict=True)
    )


def _block(
    model: Gemma3, scanned: tuple, keys_BL: jax.Array | None
) -> tuple[Block, jax.Array, jax.Array | None]:
    """One layer's module, its kind, and its dropout keys."""
    state, index, is_global = scanned
    if keys_BL is not None:
        keys_BL = _fold_in(keys_BL, index)
    return nnx.merge(nnx.graphdef(model.layers), state), is_global, keys_BL


def _token_keys(
    keys_B: jax.Array | None, row_BL: jax.Array, positions_BL: jax.Array
) -> jax.Array | None:
    """Each token's dropout key, of its row's key and its position: in any layout the same."""
    return None if keys_B is None else _fold_in(keys_B[row_BL], positions_BL)


def _fold_in(keys_BL: jax.Array, data: jax.Array) -> jax.Array:
    data_BL = jnp.broadcast_to(data, keys_BL.shape)
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys_BL, data_BL)


def _scan(
    model: Gemma3,
    layer: Callable,
    x: jax.Array,
    *,
    remat: Remat,
    gather: Gather | None,
) -> tuple:
    """Carry `x` through the stacked blocks, collecting what each returns."""
    state = nnx.state(model.layers)

    def whole_layer(x, scanned):
        stored, *others = scanned
        return layer(x, (gather(stored) if gather else stored, *others))

    is_global = jnp.asarray(model.config.is_global)
    index = jnp.arange(model.config.num_layers)
    body = whole_layer
    if remat != "none":
        # In a scan nothing can be merged with the forward pass; guarding against that costs time.
        body = jax.checkpoint(whole_layer, policy=_KEPT[remat], prevent_cse=False)
    scanned = (state, index, is_global)
    return jax.lax.scan(body, x, scanned, unroll=model.config.scan_unroll)
