"""Our side: the functions that our own training calls, on the trace's rows. Serves `turns`.

python -m benchmarks.tunix.ours, started by the benchmark.
"""

import dataclasses
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.tunix import convert
from benchmarks.tunix.theirs import turns
from benchmarks.tunix.trace import PAD
from gemma_grpo import model, weights
from gemma_grpo.devices import mesh
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout
from gemma_grpo.generation.sampling import SamplingConfig
from gemma_grpo.objective import advantages
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.training import grpo, grpo_update, packing
from gemma_grpo.training import state as train_state
from gemma_grpo.training.state import OptimizerConfig

PACKAGES = ("gemma_grpo", "jax", "flax", "optax", "numpy")


class Side:
    """The calls that the benchmark makes."""

    def load(self, name: str, real: bool, out: str, trained: str = "") -> dict:
        """Make the parameters, real or random, or read what a run's stage has left of them, and
        write them for Tunix."""
        if real:
            source = weights.open_source(name)
            self.config = source.config
            self.graphdef, shapes = model.abstract(self.config)
            self.params = weights.assemble(source, shapes, dtype="float32", sharding=None)
        else:
            self.config = model.CONFIGS[name]
            self.graphdef, _ = model.abstract(self.config)
            self.params = _random(self.config)
        if trained:
            self.params = weights.load(Path(trained), self.params)
        np.savez(out, **convert.to_tunix(self.params))
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return {
            "versions": versions,
            "shape": dataclasses.asdict(self.config),
            "device": jax.devices()[0].device_kind,
        }

    def logits(self, rows: str, out: str) -> dict:
        """Logits of padded rows, to a file."""
        with np.load(rows) as file:
            ids, mask = file["ids"], file["mask"]

        @jax.jit
        def logits(params):
            whole = nnx.merge(self.graphdef, params)
            return whole.logits(model.forward(whole, ids, mask)[0])

        np.save(out, logits(self.params))
        return {}

    def prepare(
        self,
        trace: str,
        generations: int,
        pack_tokens: int,
        learning_rate: float,
        dtype: str,
        remat: model.Remat,
    ) -> dict:
        """The stage's programs and its state, ready for `step`."""
        with np.load(trace) as file:
            self.prompts, self.completions = file["prompt_ids"], file["completion_ids"]
            self.lengths, self.rewards = file["lengths"], file["rewards"]
        stage = grpo.GRPOConfig(
            prompts_per_step=len(self.prompts),
            num_generations=generations,
            pack_tokens=pack_tokens,
            scale="group",
            loss=LossConfig(aggregation="sequence_mean", epsilon_high=0.2),
            optimizer=OptimizerConfig(learning_rate=learning_rate, warmup=0.0, decay="constant"),
            curriculum=False,
        )
        budget = self.completions.shape[1]
        self._open(stage, budget=budget, stop_ids=(), dtype=dtype, remat=remat)
        return {}

    def step(self, number: int) -> dict:
        """One whole GRPO step, as `grpo.train` takes it."""
        mask_PS = np.ones_like(self.prompts, bool)
        with turns.measured(jax.devices()[0]) as rollout:
            drawn = self._draw(self.prompts, mask_PS, jax.random.key(number))
            _ = [" ".join(map(str, row)) for row in drawn.completion_ids.tolist()]
        with turns.measured(jax.devices()[0]) as update:
            self._update(self.prompts, mask_PS, self._traced(drawn), self.rewards)
        return {
            "rollout": rollout,
            "update": update,
            "step": {key: rollout[key] + update[key] for key in ("wall", "cpu")},
            "resident": turns.resident(),
        }

    def moment(self, out: str) -> dict:
        """Adam's first moment of the final norm, to a file: the gradient, as the optimizer saw
        it."""
        (found,) = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(self.state.opt_state)
            if ".mu['final_norm']" in jax.tree_util.keystr(path)
        ]
        np.save(out, found)
        return {}

    def _open(
        self,
        stage: grpo.GRPOConfig,
        *,
        budget: int,
        stop_ids: tuple[int, ...],
        dtype: str,
        remat: model.Remat,
    ) -> None:
        """The programs of a stage, and the state that it begins with; takes the parameters."""
        self.stage, self.mesh, self.dtype = stage, mesh.data_mesh(), dtype
        self.trainer = grpo.make_trainer(stage, self.graphdef, self.mesh, dtype=dtype, remat=remat)
        config = RolloutConfig(
            num_generations=stage.num_generations,
            max_completion_length=budget,
            stop_ids=stop_ids,
            pad_id=PAD,
            sampling=SamplingConfig(temperature=stage.temperature),
        )
        self.rollout = make_rollout(self.graphdef, self.mesh, config)
        self.state = train_state.init_train_state(self.params, self.trainer.optimizer, self.mesh)
        del self.params

    def _draw(self, prompt_ids_PS: np.ndarray, prompt_mask_PS: np.ndarray, key) -> Rollout:
        """A rollout of the weights as they are, on the host."""
        params = model.in_dtype(self.state.params, self.dtype)
        params = jax.device_put(params, mesh.replicated(self.mesh))
        return jax.device_get(self.rollout(params, prompt_ids_PS, prompt_mask_PS, key))

    def _update(
        self,
        prompt_ids_PS: np.ndarray,
        prompt_mask_PS: np.ndarray,
        drawn: Rollout,
        rewards_B: np.ndarray,
    ) -> None:
        """From rewards to moved weights."""
        rewards_PG = rewards_B.reshape(len(prompt_ids_PS), -1).astype(np.float32)
        advantages_PG = advantages.sharded_group_advantages(
            jnp.asarray(rewards_PG), self.mesh, scale=self.stage.scale, baseline="mean"
        )
        batch = grpo_update.make_batch(
            prompt_ids_PS,
            prompt_mask_PS,
            drawn,
            np.asarray(advantages_PG).reshape(-1),
            self.stage.loss,
        )
        lengths = prompt_ids_PS.shape[1], drawn.completion_ids.shape[1]
        packs = packing.pack(batch, grpo.make_packing(self.stage, lengths, self.mesh.size))
        packs = mesh.place_rows(self.mesh, packs)
        self.state, metrics = self.trainer.update(self.state, {}, packs)
        jax.device_get(metrics)
        jax.block_until_ready(self.state)

    def _traced(self, drawn: Rollout) -> Rollout:
        """The trace's completions in the place of those drawn."""
        slots = np.arange(self.completions.shape[1])
        mask_BT = slots < self.lengths[:, None]
        return drawn._replace(
            completion_ids=self.completions,
            completion_mask=mask_BT,
            stopped=self.lengths < len(slots),
        )


def _random(config: model.Gemma3Config) -> model.Params:
    """The architecture's initial weights."""
    make = lambda key: model.split(model.Gemma3(config, rngs=nnx.Rngs(params=key)))[1]
    return jax.jit(make)(jax.random.key(0))


if __name__ == "__main__":
    side = Side()
    turns.serve(
        {name: getattr(side, name) for name in ("load", "logits", "prepare", "step", "moment")}
    )
