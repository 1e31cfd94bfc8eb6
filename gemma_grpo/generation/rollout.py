"""Sampling completions: prefill, the decode loop, and what comes out. Knows no text or reward.

    make_rollout  prefill and the whole loop in one program: training, evaluation, batches
    make_stream   the same two parts as two programs, the loop run a few tokens at a time

In a rollout every device prefills its own prompts, once per prompt, and decodes their groups;
nothing goes to the host before the end. How the weights lie is a choice (`LAYOUTS`):

    data             replicated: each device has a loop of its own that ends when its own rows
                     have, and no collective
    tensor_parallel  MLPs and embedding sharded (`model/layout.py`): two collectives a layer, and
                     1/n of the bytes of these weights. Every device draws all rows, each from its
                     shard of the vocabulary, so all know when all have ended: one loop, and no
                     collective to end it
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from gemma_grpo import model as gemma3
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation import sampling


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
    min_p: float = 0.0,
    layout: gemma3.Layout = gemma3.REPLICATED,
) -> Callable[..., Rollout]:
    """The jitted function (params, prompt_ids_PS, prompt_mask_PS, key) -> Rollout.

    P must split evenly over the mesh. The draw of row b at slot t depends on (key, b, t) alone, so
    the same rows come out whatever the layout and the number of devices.

    Args:
        graphdef: of the model whose parameters will be given.
        mesh: with a data axis.
        num_generations: G, completions of each prompt.
        max_completion_length: T, tokens, the stop token included.
        stop_ids: a row ends after any of these.
        pad_id: fills the slots after the end.
        temperature, top_k, top_p, min_p: see `sampling.sample`.
        layout: that the parameters are used in, of `LAYOUTS`; those given otherwise are moved.
    """
    prefill = partial(
        _prefill, graphdef, layout, G=num_generations, T=max_completion_length, pad_id=pad_id
    )
    decode = _decoder(
        graphdef,
        layout,
        stop_ids=stop_ids,
        pad_id=pad_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )

    def on_device(params, prompt_ids_PS, prompt_mask_PS, key):
        """One device's share: its prompts in, their completions out."""
        B = prompt_ids_PS.shape[0] * num_generations
        first_row = jax.lax.axis_index(meshes.DATA) * B
        given, state = prefill(params, prompt_ids_PS, prompt_mask_PS, key, first_row)
        drawn = decode(params, given, state, max_completion_length).drawn
        return jax.tree.map(layout.own, drawn)

    rows, whole = PartitionSpec(meshes.DATA), PartitionSpec()

    def rollout(params, prompt_ids_PS, prompt_mask_PS, key):
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(layout.specs(params), rows, rows, whole),
            out_specs=rows,
            check_vma=False,  # the loop's first state is made of constants, alike on all devices
        )(params, prompt_ids_PS, prompt_mask_PS, key)

    return jax.jit(rollout)


def make_stream(
    graphdef: nnx.GraphDef,
    *,
    num_generations: int,
    max_completion_length: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Callable[..., Iterator[Rollout]]:
    """The function (params, prompt_ids_PS, prompt_mask_PS, key, chunk) -> Rollouts that grow.

    Each is on the host and holds all that was drawn so far, up to `chunk` tokens a row more than
    the one before; the last has the tokens that `make_rollout` draws. Runs on one device, where
    its parameters are. Compiled once, whatever the chunks.

    Args:
        as of `make_rollout`.
    """
    T = max_completion_length
    prefill = jax.jit(
        partial(_prefill, graphdef, gemma3.REPLICATED, G=num_generations, T=T, pad_id=pad_id)
    )
    decode = jax.jit(
        _decoder(
            graphdef,
            gemma3.REPLICATED,
            stop_ids=stop_ids,
            pad_id=pad_id,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        ),
        donate_argnames="state",
    )

    def stream(params, prompt_ids_PS, prompt_mask_PS, key, chunk):
        given, state = prefill(params, prompt_ids_PS, prompt_mask_PS, key, 0)
        for end in range(chunk, T + chunk, chunk):
            state = decode(params, given, state, min(end, T))
            drawn = jax.device_get(state.drawn)
            yield drawn
            if drawn.stopped.all():
                return

    return stream


# B rows are this device's own, R all that it draws a token for: those of all devices where the
# layout is in slices.


class _Given(NamedTuple):
    """What decoding reads and leaves alone: the weights layer by layer, the prompts, the keys."""

    blocks: list
    prompt_kv: gemma3.KV
    prompt_mask: Bool[Array, "P S"]
    row_keys: Key[Array, " R"]


class _State(NamedTuple):
    """What the loop carries: `slot` is the next to be filled, from `hidden`. `drawn` has R rows."""

    slot: Int[Array, ""]
    hidden: Float[Array, "B D"]
    cache: list
    drawn: Rollout


def _prefill(
    graphdef, layout, params, prompt_ids_PS, prompt_mask_PS, key, first_row, *, G, T, pad_id
) -> tuple[_Given, _State]:
    """Runs the prompts; the own rows that follow are numbered from `first_row`, for their keys."""
    model = nnx.merge(graphdef, params)
    B = prompt_ids_PS.shape[0] * G
    hidden_PSD, prompt_kv = gemma3.forward(
        model, layout.gather(prompt_ids_PS), prompt_mask_PS, layout=layout
    )
    rows_R = layout.gather(first_row + jnp.arange(B))
    row_keys_R = jax.vmap(partial(jax.random.fold_in, key))(rows_R)
    given = _Given(gemma3.unstack_layers(model), prompt_kv, prompt_mask_PS, row_keys_R)
    R = len(rows_R)
    nothing = Rollout(
        completion_ids=jnp.full((R, T), pad_id, jnp.int32),
        completion_mask=jnp.zeros((R, T), bool),
        sampler_logps=jnp.zeros((R, T), jnp.float32),
        stopped=jnp.zeros(R, bool),
    )
    state = _State(
        slot=jnp.zeros((), jnp.int32),
        # Left-padded: the last slot is the last token.
        hidden=jnp.repeat(hidden_PSD[:, -1], G, axis=0),
        cache=gemma3.empty_cache(model.config, num_rows=B, num_slots=T, dtype=hidden_PSD.dtype),
        drawn=nothing,
    )
    return given, state


def _decoder(
    graphdef, layout, *, stop_ids, pad_id, temperature, top_k, top_p, min_p
) -> Callable[..., _State]:
    """(params, given, state, end) -> state: the loop, until slot `end` or all have stopped."""
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    sampling.check_sampling(**settings)
    draw = partial(sampling.sample, **settings, axis_name=layout.axis_name)

    def decode(params, given, state, end):
        model = nnx.merge(graphdef, params)
        stops = jnp.asarray(stop_ids)

        def unfinished(state):
            return (state.slot < end) & ~state.drawn.stopped.all()

        def step(state):
            t, done_R = state.slot, state.drawn.stopped
            keys_R = jax.vmap(lambda row_key: jax.random.fold_in(row_key, t))(given.row_keys)
            ids_R, logps_R = draw(layout.gather(state.hidden), model.embedding[...], keys_R)
            ids_R = jnp.where(done_R, pad_id, ids_R).astype(jnp.int32)
            drawn = Rollout(
                completion_ids=state.drawn.completion_ids.at[:, t].set(ids_R),
                completion_mask=state.drawn.completion_mask.at[:, t].set(~done_R),
                sampler_logps=state.drawn.sampler_logps.at[:, t].set(
                    jnp.where(done_R, 0.0, logps_R)
                ),
                stopped=done_R | (ids_R[:, None] == stops[None]).any(axis=1),
            )
            hidden_BD, cache = gemma3.decode(
                model,
                given.blocks,
                ids_R,
                t,
                state.cache,
                given.prompt_kv,
                given.prompt_mask,
                layout,
            )
            return _State(t + 1, hidden_BD, cache, drawn)

        return jax.lax.while_loop(unfinished, step, state)

    return decode
