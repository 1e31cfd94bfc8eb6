"""Sampling completions: prompt ids in; prefill and the decode loop; completion ids out.

    make_rollout  prefill and the whole loop in one program: training, evaluation, batches
    make_stream   prefill and loop as two programs, the loop run a few tokens at a time

In a rollout every device prefills its own prompts, once per prompt, and decodes their groups;
nothing goes to the host before the end. There are two layouts of the weights (`runtime.LAYOUTS`):

    data             replicated: each device runs its own loop, without collectives, until its own
                     rows have ended
    tensor_parallel  MLPs and embedding sharded (`model/layout.py`): two collectives a layer, and a
                     device reads 1/n of these weights. Together the devices draw every row's token,
                     so each knows when all rows have ended: the loops end at the same step without
                     another collective
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from gemma_grpo import model as gemma3
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation import sampling
from gemma_grpo.generation.config import SamplingConfig


class Rollout(NamedTuple):
    """What one sampling pass drew. Rows are group-major, b = p*G + g.

    Attributes:
        completion_ids: right-padded with the pad id, stop token included.
        completion_mask: True on completion tokens, stop token included.
        sampler_logps: of each token under the distribution it was drawn from; 0 on padding.
        stopped: True where the row ended on a stop token, False where the budget cut it off.
    """

    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    sampler_logps: Float[Array, "B T"]
    stopped: Bool[Array, " B"]


@dataclass(frozen=True)
class RolloutConfig:
    """What a rollout draws.

    Attributes:
        num_generations: G, completions per prompt.
        max_completion_length: T, tokens, stop token included.
        stop_ids: a row ends after any of these.
        pad_id: fills the slots after the end.
        sampling: the distribution that tokens are drawn from.
    """

    num_generations: int
    max_completion_length: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@functools.lru_cache(maxsize=16)  # one function: compiled once in a session, ahead or not
def make_rollout(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    config: RolloutConfig,
    *,
    layout: gemma3.Layout = gemma3.REPLICATED,
) -> Callable[..., Rollout]:
    """The jitted function (params, prompt_ids_PS, prompt_mask_PS, key) -> Rollout.

    P must divide evenly over the mesh. The random numbers of row b at slot t depend on (key, b, t)
    alone, so the layout and the number of devices do not change the draws.

    Args:
        graphdef: the model's.
        mesh: with a data axis.
        config: what to draw.
        layout: of the parameters while sampling; parameters in another layout are moved to it.
    """
    decoder = _Decoder(graphdef, layout, config)

    def on_device(params, prompt_ids_PS, prompt_mask_PS, key):
        """This device's share: its prompts in, their completions out."""
        B = prompt_ids_PS.shape[0] * config.num_generations
        first_row = jax.lax.axis_index(meshes.DATA) * B
        given, state = decoder.prefill(params, prompt_ids_PS, prompt_mask_PS, key, first_row)
        drawn = decoder.decode(params, given, state, config.max_completion_length).drawn
        return jax.tree.map(layout.own, drawn)

    by_rows, replicated = PartitionSpec(meshes.DATA), PartitionSpec()

    def rollout(params, prompt_ids_PS, prompt_mask_PS, key):
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(layout.specs(params), by_rows, by_rows, replicated),
            out_specs=by_rows,
            check_vma=False,  # would refuse the loop's first state: constants, same on all devices
        )(params, prompt_ids_PS, prompt_mask_PS, key)

    return jax.jit(rollout)


def make_stream(graphdef: nnx.GraphDef, config: RolloutConfig) -> Callable[..., Iterator[Rollout]]:
    """The function (params, prompt_ids_PS, prompt_mask_PS, key, chunk) -> Rollouts that grow.

    Each Rollout is on the host and holds all tokens so far, up to `chunk` per row more than the one
    before; the last has the tokens of `make_rollout`. Runs on the first device that `params` are
    replicated over: TPU kernels run on one device or under `shard_map`. Compiled once per shape
    of the prompts, whatever the chunks; the two programs in parallel, since the first token waits
    for both.
    """
    T = config.max_completion_length
    decoder = _Decoder(graphdef, gemma3.REPLICATED, config)
    compiled = {}

    def programs(*arguments) -> list[jax.stages.Compiled]:
        """Prefill and decode, compiled."""
        params, prompt_ids_PS, *_ = arguments
        if prompt_ids_PS.shape not in compiled:
            prefill = jax.jit(decoder.prefill).trace(*arguments)
            decode = jax.jit(decoder.decode, donate_argnames="state")
            lowered = prefill.lower(), decode.lower(params, *prefill.out_info, np.int32(T))
            with ThreadPoolExecutor() as pool:  # compilation runs outside Python's lock
                built = list(pool.map(lambda program: program.compile(), lowered))
            compiled[prompt_ids_PS.shape] = built
        return compiled[prompt_ids_PS.shape]

    def stream(params, prompt_ids_PS, prompt_mask_PS, key, chunk):
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
        arguments = params, prompt_ids_PS, prompt_mask_PS, key, np.int32(0)
        prefill, decode = programs(*arguments)
        given, state = prefill(*arguments)
        for end in range(chunk, T + chunk, chunk):
            state = decode(params, given, state, np.int32(min(end, T)))
            drawn = jax.device_get(state.drawn)
            yield drawn
            if drawn.stopped.all():
                return

    return stream


# B rows are this device's own. R rows are those it draws tokens for: its own or, tensor-parallel,
# those of all devices.


class _Given(NamedTuple):
    """What decoding reads and does not change: weights by layer, prompt cache, random keys."""

    blocks: list
    prompt_kv: gemma3.KV
    prompt_mask: Bool[Array, "P S"]
    row_keys: Key[Array, " R"]


class _State(NamedTuple):
    """The loop's carry: `hidden` predicts the token of `slot`, the next; `drawn` has R rows."""

    slot: Int[Array, ""]
    hidden: Float[Array, "B D"]
    cache: list
    drawn: Rollout


@dataclass(frozen=True, eq=False)  # hashed by identity: jit hashes the object of a bound method
class _Decoder:
    """The two parts of a rollout, to be traced."""

    graphdef: nnx.GraphDef
    layout: gemma3.Layout
    config: RolloutConfig

    def prefill(
        self,
        params: gemma3.Params,
        prompt_ids_PS: Int[Array, "P S"],
        prompt_mask_PS: Bool[Array, "P S"],
        key: Key[Array, ""],
        first_row: Int[Array, ""],
    ) -> tuple[_Given, _State]:
        """Runs the prompts. This device's rows are numbered from `first_row`, for their keys."""
        layout, G, T = self.layout, self.config.num_generations, self.config.max_completion_length
        model = nnx.merge(self.graphdef, params)
        B = prompt_ids_PS.shape[0] * G
        hidden_PSD, prompt_kv = gemma3.forward(
            model, layout.gather(prompt_ids_PS), prompt_mask_PS, layout=layout
        )
        rows_R = layout.gather(first_row + jnp.arange(B))
        row_keys_R = jax.vmap(partial(jax.random.fold_in, key))(rows_R)
        given = _Given(gemma3.unstack_layers(model), prompt_kv, prompt_mask_PS, row_keys_R)
        R = len(rows_R)
        empty = Rollout(
            completion_ids=jnp.full((R, T), self.config.pad_id, jnp.int32),
            completion_mask=jnp.zeros((R, T), bool),
            sampler_logps=jnp.zeros((R, T), jnp.float32),
            stopped=jnp.zeros(R, bool),
        )
        state = _State(
            slot=jnp.zeros((), jnp.int32),
            # Prompts are left-padded: the last slot holds the last token.
            hidden=jnp.repeat(hidden_PSD[:, -1], G, axis=0),
            cache=gemma3.empty_cache(model.config, num_rows=B, num_slots=T, dtype=hidden_PSD.dtype),
            drawn=empty,
        )
        return given, state

    def decode(
        self, params: gemma3.Params, given: _Given, state: _State, end: Int[Array, ""] | int
    ) -> _State:
        """Runs the loop until slot `end`, or until all rows have stopped."""
        model = nnx.merge(self.graphdef, params)

        def unfinished(state):
            return (state.slot < end) & ~state.drawn.stopped.all()

        def step(state):
            drawn, ids_R = self._draw(model, given, state)
            hidden_BD, cache = gemma3.decode(
                model,
                given.blocks,
                ids_R,
                state.slot,
                state.cache,
                given.prompt_kv,
                given.prompt_mask,
                self.layout,
            )
            return _State(state.slot + 1, hidden_BD, cache, drawn)

        return jax.lax.while_loop(unfinished, step, state)

    def _draw(
        self, model: gemma3.Gemma3, given: _Given, state: _State
    ) -> tuple[Rollout, Int[Array, " R"]]:
        """`state.drawn` with slot `state.slot` filled, and the ids drawn for it."""
        t, drawn, done_R = state.slot, state.drawn, state.drawn.stopped
        keys_R = jax.vmap(lambda row_key: jax.random.fold_in(row_key, t))(given.row_keys)
        ids_R, logps_R = sampling.sample(
            self.layout.gather(state.hidden),
            model.embedding[...],
            keys_R,
            self.config.sampling,
            axis_name=self.layout.axis_name,
        )
        ids_R = jnp.where(done_R, self.config.pad_id, ids_R).astype(jnp.int32)
        ends_R = (ids_R[:, None] == jnp.asarray(self.config.stop_ids)[None]).any(axis=1)
        drawn = Rollout(
            completion_ids=drawn.completion_ids.at[:, t].set(ids_R),
            completion_mask=drawn.completion_mask.at[:, t].set(~done_R),
            sampler_logps=drawn.sampler_logps.at[:, t].set(jnp.where(done_R, 0.0, logps_R)),
            stopped=done_R | ends_R,
        )
        return drawn, ids_R
