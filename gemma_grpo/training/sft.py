"""Stage one, supervised fine-tuning: imitate worked solutions."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from gemma_grpo.data import batches
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.model import Params
from gemma_grpo.objective import losses
from gemma_grpo.runtime import Runtime
from gemma_grpo.text import padding
from gemma_grpo.training import packing, update
from gemma_grpo.training.config import SFTConfig
from gemma_grpo.training.logps import batch_logps
from gemma_grpo.training.loop import RunFiles, StepResult, run_steps
from gemma_grpo.training.state import (
    TrainState,
    init_train_state,
    learning_rates,
    make_optimizer,
)
from gemma_grpo.training.update import UpdateConfig

Update = Callable[[TrainState, Params, update.Packs], tuple[TrainState, dict[str, jax.Array]]]


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    max_prompt_length: int,
    max_completion_length: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """The arrays of one update, padded to the budgets.

    Every completion token has the same weight, the stop token included; prompt tokens have none.
    """
    S, T = max_prompt_length, max_completion_length
    prompt_ids_PS, prompt_mask_PS = padding.pad_left(prompts, length=S, pad_id=pad_id)
    ids_BT, mask_BT = padding.pad_right(completions, length=T, pad_id=pad_id)
    weights_BT = losses.token_weights(
        jnp.asarray(mask_BT, jnp.float32), aggregation="token_mean", max_completion_length=T
    )
    return {
        "prompt_ids": prompt_ids_PS,
        "prompt_mask": prompt_mask_PS,
        "completion_ids": ids_BT,
        "completion_mask": mask_BT,
        "weights": np.asarray(weights_BT),
    }


def make_packing(config: SFTConfig, lengths: tuple[int, int], devices: int) -> packing.Packing:
    """How the stage's batches are cut; see `packing.make_packing`."""
    return packing.make_packing(config.batch_size, 1, config.pack_tokens, lengths, devices)


def make_update(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    config: UpdateConfig,
) -> Update:
    """The jitted (state, frozen, packs) -> (state, metrics): cross-entropy on completion tokens.

    `frozen` are the parameters that are not trained, in the compute dtype. Metrics: `loss`,
    nats per completion token; `grad_norm`, before clipping.
    """

    def loss_fn(gathered: update.GatheredParams, batch: dict) -> tuple[jax.Array, dict]:
        model = nnx.merge(graphdef, gathered.params)
        logps_BT, _ = batch_logps(model, batch, remat=config.remat, gather=gathered.gather)
        loss = -jnp.sum(jnp.where(batch["completion_mask"], logps_BT, 0.0) * batch["weights"])
        return loss, {"loss": loss}

    return update.make_update(loss_fn, dict, mesh, optimizer, config)


@functools.lru_cache(maxsize=8)  # as `make_rollout`
def make_trainer(
    config: SFTConfig, graphdef: nnx.GraphDef, mesh: Mesh, update_config: UpdateConfig
) -> tuple[optax.GradientTransformation, Update]:
    """The stage's optimizer and its update, jitted and not yet compiled: for training and for
    planning."""
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    return optimizer, make_update(graphdef, mesh, optimizer, update_config)


@dataclass(frozen=True)
class Stage:
    """What the steps of the stage share.

    Attributes:
        prompts, completions: token ids of each problem.
        packing: how the batches are cut into packs.
        learning_rates: one per step.
        update: see `make_update`.
    """

    config: SFTConfig
    runtime: Runtime
    prompts: list[list[int]]
    completions: list[list[int]]
    packing: packing.Packing
    learning_rates: Float[np.ndarray, " U"]
    update: Update

    def step(self, state: TrainState, step: int) -> tuple[TrainState, StepResult]:
        """One step: batch, update, metrics. A function of its arguments alone."""
        started = time.monotonic()
        batch = self._batch(step)
        packs = meshes.place_rows(self.runtime.mesh, packing.pack(batch, self.packing))
        state, metrics = self.update(state, self.runtime.frozen, packs)
        metrics = jax.device_get(metrics)
        seconds = time.monotonic() - started
        tokens = float(batch["completion_mask"].sum())
        metrics |= {"learning_rate": float(self.learning_rates[step])}
        times = {"time/step_s": seconds, "tokens_per_s": tokens / seconds}
        return state, StepResult(metrics | times)

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of the step's demonstrations."""
        config, runtime = self.config, self.runtime
        chosen = batches.batch_indices(step, config.batch_size, len(self.prompts), runtime.seed)
        batch = make_batch(
            [self.prompts[i] for i in chosen],
            [self.completions[i] for i in chosen],
            max_prompt_length=runtime.max_prompt_length,
            max_completion_length=runtime.max_completion_length,
            pad_id=runtime.tokenizer.pad_id,
        )
        return batch | runtime.dropout_keys(step, config.batch_size, 1)


def train(
    config: SFTConfig,
    runtime: Runtime,
    problems: Sequence[Problem],
    params: Params,
    files: RunFiles,
) -> Params:
    """Run the stage from `params`, or from its last checkpoint, and return its weights.

    Raises:
        UserError: a problem without a completion, or one over the budget.
        InterruptedRunError: a signal came; everything is saved.
    """
    prompts = runtime.encode_prompts(problems)
    completions = runtime.encode_completions(problems)
    optimizer, update_state = make_trainer(
        config, runtime.graphdef, runtime.mesh, UpdateConfig(runtime.dtype, runtime.remat)
    )
    packs = make_packing(config, runtime.lengths, runtime.mesh.size)
    rates = learning_rates(config.optimizer, config.num_steps)
    stage = Stage(config, runtime, prompts, completions, packs, rates, update_state)
    state = run_steps(
        "sft",
        stage.step,
        init_train_state(params, optimizer, runtime.mesh),
        files,
        num_steps=config.num_steps,
        checkpoint_every=config.checkpoint_every,
    )
    return state.params
