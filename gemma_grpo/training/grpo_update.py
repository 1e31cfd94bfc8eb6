"""GRPO's update: a scored batch in, updated weights out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.model import Params
from gemma_grpo.objective import losses
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import update
from gemma_grpo.training.logps import batch_logps
from gemma_grpo.training.state import TrainState
from gemma_grpo.training.update import UpdateConfig


def make_batch(
    prompt_ids_PS: np.ndarray,
    prompt_mask_PS: np.ndarray,
    rollout: Rollout,
    advantages_B: Float[np.ndarray, " B"],
    loss: LossConfig,
) -> dict[str, Any]:
    """The arrays of an update.

    `loss_mask` is the completion mask, without truncated completions if these are masked;
    `weights` are `token_weights` of the whole batch; `rows` numbers the completions.
    """
    mask_BT = rollout.completion_mask
    loss_mask_BT = mask_BT & rollout.stopped[:, None] if loss.mask_truncated else mask_BT
    weights_BT = losses.token_weights(
        jnp.asarray(loss_mask_BT, jnp.float32),
        aggregation=loss.aggregation,
        max_completion_length=mask_BT.shape[1],
    )
    return {
        "prompt_ids": prompt_ids_PS,
        "prompt_mask": prompt_mask_PS,
        "completion_ids": rollout.completion_ids,
        "completion_mask": mask_BT,
        "loss_mask": loss_mask_BT,
        "weights": np.asarray(weights_BT),
        "sampler_logps": rollout.sampler_logps,
        "advantages": np.asarray(advantages_B, np.float32),
        "rows": np.arange(len(mask_BT), dtype=np.int32),
    }


def make_score(
    graphdef: nnx.GraphDef, mesh: Mesh, *, temperature: float, dtype: str
) -> Callable[[Params, Params, update.Packs], tuple[jax.Array, ...]]:
    """The jitted (params, frozen, packs) -> log-probs of the completions, one array per pack shape,
    without gradient: for the reference, the teacher and the old policy."""

    def values(gathered: update.GatheredParams, rows: dict) -> jax.Array:
        model = nnx.merge(graphdef, gathered.params)
        return batch_logps(model, rows, temperature=temperature, gather=gathered.gather)[0]

    return update.make_score(values, mesh, dtype=dtype)


def make_update(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    config: UpdateConfig,
    *,
    temperature: float,
) -> Callable[[TrainState, Params, update.Packs], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted (state, frozen, packs) -> (state, metrics): one optimizer update on a rollout.

    `frozen` are the parameters that are not trained, in the compute dtype. The packs may hold
    `old_logps` (without them the update is on-policy) and `teacher_logps`, and must hold
    `ref_logps` if beta > 0.
    Metrics besides those of `losses.metric_means`: `loss`; `entropy`, nats per token;
    `logp_gap/mean` and `logp_gap/rms`, |trainer - sampler| log-prob over completion tokens, which
    is numerical error on the first update of a rollout only; `grad_norm`, before clipping;
    `trainer_logps` [B, T], 0 on padding, if `config.num_rows` is given.

    Args:
        temperature: the sampler's.
    """

    def loss_fn(gathered: update.GatheredParams, batch: dict) -> tuple[jax.Array, dict]:
        model = nnx.merge(graphdef, gathered.params)
        logps_BT, entropy_BT = batch_logps(
            model, batch, temperature=temperature, remat=config.remat, gather=gathered.gather
        )
        inputs = losses.LossInputs(
            advantages=batch["advantages"],
            mask=batch["loss_mask"].astype(jnp.float32),
            weights=batch["weights"],
            old_logps=batch.get("old_logps"),
            ref_logps=batch.get("ref_logps"),
            sampler_logps=batch["sampler_logps"],
            teacher_logps=batch.get("teacher_logps"),
        )
        total, sums = losses.policy_loss(logps_BT, inputs, loss)
        mask_BT = batch["completion_mask"]
        gap_BT = jnp.where(mask_BT, jnp.abs(logps_BT - batch["sampler_logps"]), 0.0)
        sums |= {
            "loss": total,
            "sampled_tokens": mask_BT.sum().astype(jnp.float32),
            "entropy_sum": jnp.where(mask_BT, entropy_BT, 0.0).sum(),
            "gap_sum": gap_BT.sum(),
            "gap_square_sum": jnp.square(gap_BT).sum(),
        }
        if config.num_rows:  # each pack adds its rows
            rows_BT = jnp.zeros((config.num_rows, mask_BT.shape[1]), jnp.float32)
            counted = jnp.where(mask_BT, logps_BT, 0.0)
            sums["trainer_logps"] = rows_BT.at[batch["rows"]].add(counted)
        return total, jax.tree.map(jax.lax.stop_gradient, sums)

    return update.make_update(loss_fn, _means, mesh, optimizer, config)


def _means(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of `make_update`, from sums over the whole batch."""
    kept = {name: sums[name] for name in ("loss", "trainer_logps") if name in sums}
    tokens = sums["sampled_tokens"]
    return (
        losses.metric_means(sums)
        | kept
        | {
            "entropy": sums["entropy_sum"] / tokens,
            "logp_gap/mean": sums["gap_sum"] / tokens,
            "logp_gap/rms": jnp.sqrt(sums["gap_square_sum"] / tokens),
        }
    )
