"""The programs of one GRPO step as shapes: what training jits, lowered before any weight is there.

Knows no weights, problem or text, and compiles nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_grpo import grpo_update, padding, train_state
from gemma_grpo import mesh as meshes
from gemma_grpo import model as gemma3
from gemma_grpo.config import RunConfig
from gemma_grpo.model import Gemma3Config
from gemma_grpo.rollout import make_rollout

STOP_IDS, PAD_ID = (1, 106), 0  # Gemma's <eos> and <end_of_turn>, and its padding


@dataclass(frozen=True)
class Program:
    """A jitted function and the arguments of a step, each with its place on the mesh.

    Attributes:
        resident: bytes on each device that are no arguments of it and yet alive while it runs.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resident: int

    def lower(self) -> jax.stages.Lowered:
        """Traced for the mesh's devices; `.compile()` is the next step."""
        return self.function.lower(*self.arguments)


def of_step(run: RunConfig, config: Gemma3Config, mesh: Mesh) -> list[Program]:
    """What one GRPO step of `run` executes on the devices, in order, at its full budgets:
    `rollout`; `score` if the step needs reference or old log-probs; `update`."""
    settings, grpo = run.model, run.grpo
    graphdef, shapes = gemma3.abstract(config, settings.lora)
    adapter, base = gemma3.partition(shapes)
    trained, frozen = (adapter, base) if settings.lora.rank else (shapes, {})
    whole, rows = meshes.whole(mesh), meshes.rows(mesh)
    placed = lambda tree, place: meshes.described(tree, jax.tree.map(lambda _: place, tree))
    frozen = placed(_cast(frozen, settings.dtype), whole)
    computing = gemma3.join(placed(_cast(trained, settings.dtype), whole), frozen)

    optimizer = train_state.make_optimizer(grpo.optimizer, grpo.num_steps * grpo.num_iterations)
    state = jax.eval_shape(
        lambda params: train_state.fresh_state(params, optimizer), _cast(trained, "float32")
    )
    state = meshes.described(state, meshes.spread(mesh, state))
    batch = _batch(run, rows)
    reference = _cast(trained, settings.dtype if grpo.loss.beta > 0 else "float32")
    reference = meshes.described(reference, meshes.spread(mesh, reference))

    rollout = make_rollout(
        graphdef,
        mesh,
        num_generations=grpo.num_generations,
        max_completion_length=settings.max_completion_length,
        stop_ids=STOP_IDS,
        pad_id=PAD_ID,
        temperature=grpo.temperature,
    )
    score = grpo_update.make_score(
        graphdef,
        mesh,
        temperature=grpo.temperature,
        dtype=settings.dtype,
    )
    update = grpo_update.make_update(
        graphdef,
        mesh,
        optimizer,
        grpo.loss,
        temperature=grpo.temperature,
        accumulation_steps=grpo.accumulation_steps,
        dtype=settings.dtype,
        remat=settings.remat,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    prompts = (batch["prompt_ids"], batch["prompt_mask"])
    kept, of_reference = _bytes_on_each(state), 0
    if grpo.loss.beta > 0:
        of_reference = _bytes_on_each(reference)
    programs = [Program("rollout", rollout, (computing, *prompts, key), kept + of_reference)]
    later = {}
    if grpo.loss.beta > 0:
        later["ref_logps"] = batch["sampler_logps"]
    if grpo.num_iterations > 1:
        later["old_logps"] = batch["sampler_logps"]
    if later:
        programs.append(Program("score", score, (reference, frozen, batch), kept))
    programs.append(Program("update", update, (state, frozen, batch | later), of_reference))
    return programs


def _bytes_on_each(tree: Any) -> int:
    """Bytes of one device's pieces."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _cast(shapes: gemma3.Params, dtype: str) -> gemma3.Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def _batch(run: RunConfig, rows: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """`grpo_update.make_batch`'s arrays at the longest completions."""
    P, B = run.grpo.prompts_per_step, run.grpo.prompts_per_step * run.grpo.num_generations
    S, budget = run.model.max_prompt_length, run.model.max_completion_length
    T = padding.bucket(budget, multiple=run.grpo.length_bucket, maximum=budget)
    shapes = {
        "prompt_ids": ((P, S), jnp.int32),
        "prompt_mask": ((P, S), jnp.bool_),
        "completion_ids": ((B, T), jnp.int32),
        "completion_mask": ((B, T), jnp.bool_),
        "loss_mask": ((B, T), jnp.bool_),
        "weights": ((B, T), jnp.float32),
        "sampler_logps": ((B, T), jnp.float32),
        "advantages": ((B,), jnp.float32),
    }
    if run.model.lora.rank and run.model.lora.dropout:
        shapes["dropout_keys"] = ((P, 2), jnp.uint32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }
