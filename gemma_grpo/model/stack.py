"""The stack of blocks, run layer by layer: the scan, remat, RoPE tables, dropout keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_grpo.model.config import Gemma3Config
from gemma_grpo.model.layers import rope_table
from gemma_grpo.model.settings import Remat
from gemma_grpo.model.transformer import Block, Gemma3

Gather = Callable[[nnx.State], nnx.State]  # one layer's parameters, sharded -> whole
_KEPT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def score_scale(config: Gemma3Config) -> float:
    return config.query_pre_attn_scalar**-0.5


def rope_tables(config: Gemma3Config, positions_BL: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """RoPE tables of the local (0) and the global (1) layers."""
    kinds = ((config.rope_base_local, 1.0), (config.rope_base_global, config.rope_scale_global))
    return [
        rope_table(positions_BL, head_dim=config.head_dim, base=base, scale=scale)
        for base, scale in kinds
    ]


def select_rope(ropes: list, is_global: jax.Array) -> tuple[jax.Array, jax.Array]:
    (near_sin, near_cos), (far_sin, far_cos) = ropes
    return jnp.where(is_global, far_sin, near_sin), jnp.where(is_global, far_cos, near_cos)


def layer_block(
    model: Gemma3, scanned: tuple, keys_BL: jax.Array | None
) -> tuple[Block, jax.Array, jax.Array | None]:
    """One layer's module, its kind, and its dropout keys."""
    state, index, is_global = scanned
    if keys_BL is not None:
        keys_BL = _fold_in(keys_BL, index)
    return nnx.merge(nnx.graphdef(model.layers), state), is_global, keys_BL


def token_keys(
    keys_B: jax.Array | None, row_BL: jax.Array, positions_BL: jax.Array
) -> jax.Array | None:
    """Each token's dropout key, of its row's key and its position: in any layout the same."""
    return None if keys_B is None else _fold_in(keys_B[row_BL], positions_BL)


def _fold_in(keys_BL: jax.Array, data: jax.Array) -> jax.Array:
    data_BL = jnp.broadcast_to(data, keys_BL.shape)
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys_BL, data_BL)


def scan_layers(
    model: Gemma3,
    layer: Callable,
    x: jax.Array,
    *,
    remat: Remat,
    gather: Gather | None,
    unroll: int,
) -> tuple:
    """Carry `x` through the stacked blocks, collecting what each returns; `unroll` of them are
    compiled together."""
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
    return jax.lax.scan(body, x, scanned, unroll=unroll)
