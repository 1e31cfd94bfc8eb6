"""Our side: the functions that our own training calls, in a process that answers `turns`.

python -m benchmarks.tunix.ours, started by the benchmarks.
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.tunix import convert
from benchmarks.tunix.theirs import turns
from benchmarks.tunix.trace import PAD
from gemma_grpo import config, model, weights
from gemma_grpo.devices import mesh
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout
from gemma_grpo.generation.sampling import SamplingConfig
from gemma_grpo.objective import advantages
from gemma_grpo.text import padding
from gemma_grpo.training import grpo, grpo_update, packing
from gemma_grpo.training import state as train_state

PACKAGES = ("gemma_grpo", "jax", "flax", "optax", "numpy")


class Side:
    """The calls that the benchmarks make."""

    def load(self, name: str, real: bool, out: str, trained: str = "") -> dict:
        """Make the parameters: real, random, or those that a run's stage has saved in `trained`;
        and write them for Tunix."""
        self.config = model.CONFIGS[name]
        self.graphdef, shapes = model.abstract(self.config)
        if real:
            source = weights.open_source(name)
            self.params = weights.assemble(source, shapes, dtype="float32", sharding=None)
        else:
            make = lambda key: model.split(model.Gemma3(self.config, rngs=nnx.Rngs(params=key)))[1]
            self.params = jax.jit(make)(jax.random.key(0))
        if trained:
            self.params = weights.load(Path(trained), self.params)
        np.savez(out, **convert.to_tunix(self.params))
        return {
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "shape": dataclasses.asdict(self.config),
            "device": jax.devices()[0].device_kind,
        }

    def logits(self, rows: str, out: str) -> dict:
        """Logits of padded rows, to a file."""
        with np.load(rows) as file:
            ids, mask = file["ids"], file["mask"]

        @jax.jit
        def logits(params):
            gemma = nnx.merge(self.graphdef, params)
            return gemma.logits(model.forward(gemma, ids, mask)[0])

        np.save(out, logits(self.params))
        return {}

    def begin(self, run: str, stop_ids: list[int], trained_stop: bool = True) -> dict:
        """The GRPO stage of a run's config.yaml, ready for its first step. Without `trained_stop`
        completions go into the update without the token that ended them, as Tunix's do."""
        self.run, self.stop_ids = config.from_yaml(Path(run)), stop_ids
        self.trained_stop, self.mesh = trained_stop, mesh.data_mesh()
        settings, stage = self.run.model, self.run.grpo
        self.trainer = grpo.make_trainer(
            stage, self.graphdef, self.mesh, dtype=settings.dtype, remat=settings.remat
        )
        rollout = RolloutConfig(
            num_generations=stage.num_generations,
            max_completion_length=settings.max_completion_length,
            stop_ids=tuple(stop_ids),
            pad_id=PAD,
            sampling=SamplingConfig(temperature=stage.temperature),
        )
        self.rollout = make_rollout(self.graphdef, self.mesh, rollout)
        self.state = train_state.init_train_state(self.params, self.trainer.optimizer, self.mesh)
        del self.params
        return {}

    def draw(
        self, prompts: list[list[int]], number: int, instead: list[list[int]] | None = None
    ) -> dict:
        """Step `number`'s rollout, by the key of our own training: completions without their stop
        token, whether each had one, and how many tokens were drawn; `instead` is trained on in
        place of what was drawn."""
        with turns.measured(jax.devices()[0]) as reading:
            self.prompts = padding.pad_left(
                prompts, length=self.run.model.max_prompt_length, pad_id=PAD
            )
            step_key = jax.random.fold_in(jax.random.key(self.run.seed), number)
            params = model.in_dtype(self.state.params, self.run.model.dtype)
            params = jax.device_put(params, mesh.replicated(self.mesh))
            key = jax.random.fold_in(step_key, 0)
            self.drawn = jax.device_get(self.rollout(params, *self.prompts, key))
            kept = without_tokens(self.drawn, self.stop_ids).completion_mask
            rows = zip(self.drawn.completion_ids, kept, strict=True)
            completions = [ids[mask].tolist() for ids, mask in rows]
        answer = {"completions": completions, "stopped": self.drawn.stopped.tolist()}
        answer["drawn"] = int(self.drawn.completion_mask.sum())
        if instead:
            self.drawn = replaced(self.drawn, instead)
        return answer | {"reading": reading}

    def learn(self, rewards: list[float]) -> dict:
        """The same step's update, from rewards to updated weights."""
        with turns.measured(jax.devices()[0]) as reading:
            stage = self.run.grpo
            rewards_PG = jnp.array(rewards, jnp.float32).reshape(-1, stage.num_generations)
            advantages_PG = advantages.sharded_group_advantages(
                rewards_PG, self.mesh, scale=stage.scale, baseline=stage.baseline
            )
            stop_ids = [] if self.trained_stop else self.stop_ids
            batch = grpo_update.make_batch(
                *self.prompts,
                without_tokens(self.drawn, stop_ids),
                np.asarray(advantages_PG).reshape(-1),
                stage.loss,
            )
            lengths = self.prompts[0].shape[1], self.drawn.completion_ids.shape[1]
            packs = packing.pack(batch, grpo.make_packing(stage, lengths, self.mesh.size))
            packs = mesh.place_rows(self.mesh, packs)
            self.state, metrics = self.trainer.update(self.state, {}, packs)
            jax.device_get(metrics)
            jax.block_until_ready(self.state)
        return {"reading": reading}

    def moment(self, out: str) -> dict:
        """Adam's first moment of the final norm, to a file: the gradient the optimizer saw."""
        (found,) = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(self.state.opt_state)
            if ".mu['final_norm']" in jax.tree_util.keystr(path)
        ]
        np.save(out, found)
        return {}

    def save(self, out: str) -> dict:
        """The weights, to a file."""
        weights.save(Path(out), self.state.params)
        return {}


def without_tokens(drawn: Rollout, ids: Sequence[int]) -> Rollout:
    """The completions with these tokens masked out."""
    is_out_BT = np.isin(drawn.completion_ids, ids)
    return drawn._replace(completion_mask=drawn.completion_mask & ~is_out_BT)


def replaced(drawn: Rollout, completions: Sequence[Sequence[int]]) -> Rollout:
    """These completions in place of those drawn."""
    ids_BT = np.full_like(drawn.completion_ids, PAD)
    for row_T, ids in zip(ids_BT, completions, strict=True):
        row_T[: len(ids)] = ids
    T, lengths_B = ids_BT.shape[1], np.array([len(ids) for ids in completions])
    mask_BT = np.arange(T) < lengths_B[:, None]
    return drawn._replace(completion_ids=ids_BT, completion_mask=mask_BT, stopped=lengths_B < T)


if __name__ == "__main__":
    turns.serve_side(Side())
