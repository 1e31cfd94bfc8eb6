"""The programs of one GRPO step as shapes: what training jits, lowered without any weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_grpo import model as gemma3
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation.rollout import RolloutConfig, make_rollout
from gemma_grpo.generation.sampling import SamplingConfig
from gemma_grpo.model import Gemma3Config
from gemma_grpo.runtime import LAYOUTS
from gemma_grpo.training import grpo, packing
from gemma_grpo.training import state as train_state

STOP_IDS, PAD_ID = (1, 106), 0  # Gemma's <eos> and <end_of_turn>, and its padding


@dataclass(frozen=True)
class Program:
    """A jitted function and the arguments of a step, each with its sharding.

    Attributes:
        resident: bytes on each device that are alive while it runs, beside its arguments.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resident: int

    def trace(self) -> jax.stages.Traced:
        """Traced for the mesh's devices; `.lower()` and `.compile()` are the next steps."""
        return self.function.trace(*self.arguments)


def of_step(run: RunConfig, config: Gemma3Config, mesh: Mesh) -> list[Program]:
    """What one GRPO step of `run` executes on the devices, in order, at its full budgets:
    `rollout`; `reference` and `old`, if the step needs those log-probs; `update`."""
    settings, grpo_config = run.model, run.grpo
    layout = LAYOUTS[settings.rollout_layout]
    graphdef, shapes = gemma3.abstract(config, settings.lora)
    adapter, base = gemma3.partition(shapes)
    trained, frozen = (adapter, base) if settings.lora.rank else (shapes, {})
    trainer = grpo.make_trainer(
        grpo_config, graphdef, mesh, dtype=settings.dtype, remat=settings.remat
    )
    rollout_config = RolloutConfig(
        num_generations=grpo_config.num_generations,
        max_completion_length=settings.max_completion_length,
        stop_ids=STOP_IDS,
        pad_id=PAD_ID,
        sampling=SamplingConfig(temperature=grpo_config.temperature),
    )
    rollout = make_rollout(graphdef, mesh, rollout_config, layout=layout)

    frozen = _replicated(mesh, _cast(frozen, settings.dtype))
    sampling = _cast(trained, settings.dtype)
    sampling = meshes.with_shardings(sampling, meshes.named_shardings(mesh, layout.specs(sampling)))
    master = _cast(trained, "float32")
    fresh = partial(train_state.fresh_state, optimizer=trainer.optimizer)
    state = _fsdp(mesh, jax.eval_shape(fresh, master))
    reference = _fsdp(mesh, _cast(trained, settings.dtype) if grpo_config.loss.beta > 0 else {})
    prompts = (run.grpo.prompts_per_step, settings.max_prompt_length)
    rows = meshes.batch_sharding(mesh)
    prompt_ids, prompt_mask = (
        jax.ShapeDtypeStruct(prompts, dtype, sharding=rows) for dtype in (jnp.int32, jnp.bool_)
    )
    packs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), full_packs(run, mesh.size)
    )
    key = _replicated(mesh, jax.eval_shape(lambda: jax.random.key(0)))

    # The pipeline holds what the run and what the stage began with, in float32.
    held = 2 * _bytes_on_each(_fsdp(mesh, master))
    of_state, of_reference = _bytes_on_each(state), _bytes_on_each(reference)
    arguments = (gemma3.join(sampling, frozen), prompt_ids, prompt_mask, key)
    programs = [Program("rollout", rollout, arguments, held + of_state + of_reference)]
    if grpo_config.loss.beta > 0:
        arguments = (reference, frozen, packs)
        programs.append(Program("reference", trainer.score, arguments, held + of_state))
        packs = _with_logps(packs, "ref_logps")
    if grpo_config.num_iterations > 1:
        arguments = (state.params, frozen, packs)
        moments = of_state - _bytes_on_each(state.params)
        programs.append(Program("old", trainer.score, arguments, held + moments + of_reference))
        packs = _with_logps(packs, "old_logps")
    arguments = (state, frozen, packs)
    programs.append(Program("update", trainer.update, arguments, held + of_reference))
    return programs


def _replicated(mesh: Mesh, tree: Any) -> Any:
    return meshes.with_shardings(tree, jax.tree.map(lambda _: meshes.replicated(mesh), tree))


def _fsdp(mesh: Mesh, tree: Any) -> Any:
    return meshes.with_shardings(tree, meshes.fsdp_shardings(mesh, tree))


def _bytes_on_each(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _cast(shapes: gemma3.Params, dtype: str) -> gemma3.Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def full_packs(run: RunConfig, num_devices: int) -> tuple[dict[str, np.ndarray], ...]:
    """The packs of a GRPO update where every row takes its full budget. Their shapes are those of
    every step."""
    lengths = run.model.max_prompt_length, run.model.max_completion_length
    return packing.pack(full_batch(run), grpo.make_packing(run.grpo, lengths, num_devices))


def full_batch(run: RunConfig) -> dict[str, np.ndarray]:
    """`grpo_update.make_batch`'s arrays, of zeros, where every row takes its full budget."""
    P, S = run.grpo.prompts_per_step, run.model.max_prompt_length
    B, T = P * run.grpo.num_generations, run.model.max_completion_length
    batch = {
        "prompt_ids": np.zeros((P, S), np.int32),
        "prompt_mask": np.ones((P, S), bool),
        "completion_ids": np.zeros((B, T), np.int32),
        "completion_mask": np.ones((B, T), bool),
        "loss_mask": np.ones((B, T), bool),
        "weights": np.zeros((B, T), np.float32),
        "sampler_logps": np.zeros((B, T), np.float32),
        "advantages": np.zeros(B, np.float32),
        "rows": np.zeros(B, np.int32),
    }
    if run.model.lora.rank and run.model.lora.dropout:
        batch["dropout_keys"] = np.zeros((P, 2), np.uint32)
        batch["completion_dropout_keys"] = np.zeros((B, 2), np.uint32)
    return batch


def _with_logps(packs: tuple[dict, ...], name: str) -> tuple[dict, ...]:
    return tuple(of_shape | {name: of_shape["sampler_logps"]} for of_shape in packs)
