"""Gemma 3 as a Flax NNX module: the block, and the stack of blocks between embedding and head.

The blocks' parameters are stacked along a leading layer axis, so that compile time does not grow
with depth. Architecture: Gemma 3 technical report, arXiv 2503.19786, section 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemma_grpo.kernels import head
from gemma_grpo.model import attention
from gemma_grpo.model.config import Gemma3Config
from gemma_grpo.model.layers import GatedMLP, RMSNorm
from gemma_grpo.model.layout import REPLICATED, Layout
from gemma_grpo.model.params import partition, random_key
from gemma_grpo.model.settings import NO_LORA, LoRAConfig

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) -> mixed heads


class Block(nnx.Module):
    """x + post_norm(attention(pre_norm(x))), then the same with the MLP."""

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
        """The block's output, and its keys and values."""
        q_BLNH, k_BLKH, v_BLKH = self.attention.qkv(self.pre_attention_norm(x_BLD), *rope, keys_BL)
        mixed_BLD = self.attention.output(attend(q_BLNH, k_BLKH, v_BLKH), keys_BL)
        x_BLD = x_BLD + self.post_attention_norm(mixed_BLD)
        x_RLD = layout.gather(self.pre_mlp_norm(x_BLD))
        out_BLD = layout.scatter(self.mlp(x_RLD, keys_BL, layout.partial_dtype))
        x_BLD = x_BLD + self.post_mlp_norm(out_BLD).astype(x_BLD.dtype)
        return x_BLD, (k_BLKH, v_BLKH)


class Gemma3(nnx.Module):
    """One Gemma 3 text model, with float32 parameters.

    Projections start LeCun-normal; the embedding starts as N(0, 1/D), so that the scaled input has
    unit variance and the tied head gives logits of order one. Adapters start with zero output.
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
    """Fresh adapters, float32. Base weights are not computed: XLA drops them as unused."""

    @jax.jit
    def make(key: jax.Array) -> Params:
        _, params = split(Gemma3(config, rngs=nnx.Rngs(params=key), lora_config=lora_config))
        return partition(params)[0]

    return make(random_key(seed))
