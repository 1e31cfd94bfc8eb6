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
_POLICIES = {  # what the backward pass finds stored
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def score_scale(config: Gemma3Config) -> float:
    """The factor of attention scores."""
    return config.query_pre_attn_scalar**-0.5


def rope_tables(config: Gemma3Config, positions_BL: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """RoPE tables of the local (0) and the global (1) layers."""
    kinds = ((config.rope_base_local, 1.0), (config.rope_base_global, config.rope_scale_global))

    def tables(positions_BL: jax.Array) -> list:
        return [
            rope_table(positions_BL, head_dim=config.head_dim, base=base, scale=scale)
            for base, scale in kinds
        ]

    def behind_branch(positions_BL: jax.Array) -> list:
        never = positions_BL[0, 0] < 0  # but XLA does not see that
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(tables, positions_BL))
        return jax.lax.cond(never, lambda _: zeros, tables, positions_BL)

    # On CPU XLA would compute sine and cosine again in every rotation, for every head: it fuses
    # them into whatever reads them, but nothing out of a branch.
    return jax.lax.platform_dependent(positions_BL, cpu=behind_branch, default=tables)


def select_rope(ropes: list, is_global: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The table for a layer, of `rope_tables`."""
    (local_sin, local_cos), (global_sin, global_cos) = ropes
    sin = jnp.where(is_global, global_sin, local_sin)
    return sin, jnp.where(is_global, global_cos, local_cos)


def layer_block(
    model: Gemma3, scanned: tuple, keys_BL: jax.Array | None
) -> tuple[Block, jax.Array, jax.Array | None]:
    """One layer's module, whether it is global, and its tokens' dropout keys."""
    state, index, is_global = scanned
    if keys_BL is not None:
        keys_BL = _fold_in(keys_BL, index)
    return nnx.merge(nnx.graphdef(model.layers), state), is_global, keys_BL


def token_keys(
    keys_B: jax.Array | None, row_BL: jax.Array, positions_BL: jax.Array
) -> jax.Array | None:
    """Each token's dropout key, from its row's key and its position: the same in any layout."""
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
) -> tuple:
    """Carry `x` through the stacked blocks, collecting what each returns."""
    state = nnx.state(model.layers)

    def gathered_layer(x, scanned):
        stored, *others = scanned
        return layer(x, (gather(stored) if gather else stored, *others))

    is_global = jnp.asarray(model.config.is_global)
    index = jnp.arange(model.config.num_layers)
    body = gathered_layer
    if remat != "none":
        # Within a scan XLA cannot merge the recomputation with the forward pass (CSE), and
        # preventing that costs time.
        body = jax.checkpoint(gathered_layer, policy=_POLICIES[remat], prevent_cse=False)
    scanned = (state, index, is_global)
    return jax.lax.scan(body, x, scanned, unroll=model.config.scan_unroll)
