"""Sampling completions: prefill, the decode loop, and what comes out. Knows no text or reward.

Every device prefills its own prompts, once per prompt, and decodes their groups in a loop of its
own that ends when its own rows have: no collective, and nothing goes to the host before the end.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gemma_grpo import mesh as meshes
from gemma_grpo import model as gemma3
from gemma_grpo import sampling


class Rollout(NamedTuple):
    """What one sampling pass drew. Rows are group-major, b = p*G + g.

    Attributes:
        completion_ids: right-padded with the pad id, stop token included.
        completion_mask: True on completion tokens, the stop token too.
        sampler_logps: of each token under the distribution it was drawn from; 0 on padding.
        stopped: True where the row ended on a stop token, False where the budget cut it off.
    """

    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    sampler_logps: Float[Array, "B T"]
    stopped: Bool[Array, " B"]


def make_rollout(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    *,
    num_generations: int,
    max_completion_length: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Callable[..., Rollout]:
    """The jitted function (params, prompt_ids_PS, prompt_mask_PS, key) -> Rollout.

    P must split evenly over the mesh. The draw of row b at slot t depends on (key, b, t) alone, so
    the same rows come out whatever the number of devices.

    Args:
        graphdef: of the model whose parameters will be given.
        mesh: with a data axis.
        num_generations: G, completions of each prompt.
        max_completion_length: T, tokens, the stop token included.
        stop_ids: a row ends after any of these.
        pad_id: fills the slots after the end.
        temperature, top_k, top_p: see `sampling.sample`.
    """
    sampling.check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    on_device = partial(
        _rollout,
        graphdef,
        G=num_generations,
        T=max_completion_length,
        stop_ids=stop_ids,
        pad_id=pad_id,
        draw=partial(sampling.sample, temperature=temperature, top_k=top_k, top_p=top_p),
    )
    rows, whole = PartitionSpec(meshes.DATA), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(whole, rows, rows, whole),
            out_specs=rows,
            check_vma=False,  # the loop's first carry is made of constants, alike on all devices
        )
    )


def _rollout(graphdef, params, prompt_ids_PS, prompt_mask_PS, key, *, G, T, stop_ids, pad_id, draw):
    """One device's share: its prompts in, their completions out."""
    model = nnx.merge(graphdef, params)
    P = prompt_ids_PS.shape[0]
    B = P * G
    first_row = jax.lax.axis_index(meshes.DATA) * B
    row_keys_B = jax.vmap(partial(jax.random.fold_in, key))(first_row + jnp.arange(B))
    stops = jnp.asarray(stop_ids)

    hidden_PSD, prompt_kv = gemma3.forward(model, prompt_ids_PS, prompt_mask_PS)
    blocks = gemma3.unstack_layers(model)
    cache = gemma3.empty_cache(model.config, num_rows=B, num_slots=T, dtype=hidden_PSD.dtype)

    def unfinished(carry):
        t, done_B, *_ = carry
        return (t < T) & ~done_B.all()

    def step(carry):
        t, done_B, hidden_BD, cache, ids_BT, mask_BT, logps_BT = carry
        keys_B = jax.vmap(lambda row_key: jax.random.fold_in(row_key, t))(row_keys_B)
        ids_B, logps_B = draw(model.logits(hidden_BD), keys_B)
        ids_B = jnp.where(done_B, pad_id, ids_B).astype(jnp.int32)
        ids_BT = ids_BT.at[:, t].set(ids_B)
        mask_BT = mask_BT.at[:, t].set(~done_B)
        logps_BT = logps_BT.at[:, t].set(jnp.where(done_B, 0.0, logps_B))
        done_B |= (ids_B[:, None] == stops[None]).any(axis=1)
        hidden_BD, cache = gemma3.decode(model, blocks, ids_B, t, cache, prompt_kv, prompt_mask_PS)
        return t + 1, done_B, hidden_BD, cache, ids_BT, mask_BT, logps_BT

    carry = (
        jnp.zeros((), jnp.int32),
        jnp.zeros(B, bool),
        jnp.repeat(hidden_PSD[:, -1], G, axis=0),  # left-padded: the last slot is the last token
        cache,
        jnp.full((B, T), pad_id, jnp.int32),
        jnp.zeros((B, T), bool),
        jnp.zeros((B, T), jnp.float32),
    )
    _, done_B, _, _, ids_BT, mask_BT, logps_BT = jax.lax.while_loop(unfinished, step, carry)
    return Rollout(ids_BT, mask_BT, logps_BT, done_B)
