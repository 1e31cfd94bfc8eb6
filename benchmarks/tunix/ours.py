"""Our side: the functions that our own training calls, in a process that answers `sides`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.tunix.theirs import turns
from gemma_grpo import model, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout
from gemma_grpo.generation.sampling import SamplingConfig
from gemma_grpo.text import padding
from gemma_grpo.training import grpo, grpo_update, packing, state

PAD = 0  # Gemma's


class Side:
    """The calls that the benchmarks make."""

    def open(
        self, run: RunConfig, trained_stop: bool, folder: str, rows: dict, stop_ids: list[int], **_
    ) -> dict:
        """The GRPO stage of `run` on the weights of a folder, ready for its first step. Without
        `trained_stop` completions go into the update without the token that ended them, as Tunix's
        do. The answer has the logits of padded rows. `_` is what Tunix is told of the run."""
        self.run, self.stop_ids, self.mesh = run, stop_ids, meshes.data_mesh()
        self.untrained = [] if trained_stop else stop_ids
        how = {"dtype": run.model.dtype, "remat": run.model.remat}
        self.lengths = run.model.max_prompt_length, run.model.max_completion_length
        graphdef, like = model.abstract(model.CONFIGS[run.model.weights])
        source, places = weights.open_source(folder), meshes.fsdp_shardings(self.mesh, like)
        params = weights.assemble(source, like, dtype="float32", sharding=places)
        self.trainer = grpo.make_trainer(run.grpo, graphdef, self.mesh, **how)
        self.packing = grpo.make_packing(run.grpo, self.lengths, self.mesh.size)
        drawn = run.grpo.num_generations, self.lengths[1], tuple(stop_ids), PAD
        rollout = RolloutConfig(*drawn, SamplingConfig(temperature=run.grpo.temperature))
        self.rollout = make_rollout(graphdef, self.mesh, rollout)

        @jax.jit
        def logits(params):
            gemma = nnx.merge(graphdef, model.in_dtype(params, run.model.dtype))
            return gemma.logits(model.forward(gemma, rows["ids"], rows["mask"])[0])

        answer = {
            "versions": turns.versions("gemma_grpo", "jax", "flax", "optax", "numpy"),
            "device": jax.devices()[0].device_kind,
            "logits": np.asarray(logits(params)),
        }
        self.state = state.init_train_state(params, self.trainer.optimizer, self.mesh)
        return answer

    def draw(
        self, prompts: list[list[int]], number: int, instead: list[list[int]] | None = None
    ) -> dict:
        """Step `number`'s rollout, by the key of our own training: completions without their stop
        token, whether each had one, and how many tokens were drawn; `instead` is trained on in
        place of what was drawn."""
        read, params, (S, T) = turns.start(), self.state.params, self.lengths
        layout = meshes.named_shardings(self.mesh, model.REPLICATED.specs(params))
        params = meshes.reshard(params, layout, self.run.model.dtype)
        self.prompts = padding.pad_left(prompts, length=S, pad_id=PAD)
        placed = meshes.place_rows(self.mesh, self.prompts)
        step_key = jax.random.fold_in(model.random_key(self.run.seed), number)
        drawn = jax.device_get(self.rollout(params, *placed, jax.random.fold_in(step_key, 0)))
        self.drawn = drawn
        if instead:
            ids_BT, mask_BT = padding.pad_right(instead, length=T, pad_id=PAD)
            self.drawn = Rollout(ids_BT, mask_BT, drawn.sampler_logps, ~mask_BT.all(axis=1))
        kept = without_tokens(drawn, self.stop_ids).completion_mask
        rows = zip(drawn.completion_ids, kept, strict=True)
        return {
            "completions": [ids[mask].tolist() for ids, mask in rows],
            "stopped": drawn.stopped.tolist(),
            "drawn": int(drawn.completion_mask.sum()),
            "reading": read(),
        }

    def learn(self, rewards: list[float]) -> dict:
        """The same step's update, from rewards to updated weights."""
        read, stage = turns.start(), self.run.grpo
        rewards_PG = np.array(rewards, np.float32).reshape(-1, stage.num_generations)
        rewards_PG = meshes.place_rows(self.mesh, rewards_PG)
        how = {"scale": stage.scale, "baseline": stage.baseline}
        advantages_PG = meshes.to_host(self.trainer.advantages(rewards_PG, self.mesh, **how))
        drawn = without_tokens(self.drawn, self.untrained)
        batch = grpo_update.make_batch(*self.prompts, drawn, advantages_PG.reshape(-1), stage.loss)
        packs = meshes.place_rows(self.mesh, packing.pack(batch, self.packing))
        self.state, metrics = self.trainer.update(self.state, {}, packs)
        jax.device_get(metrics)
        jax.block_until_ready(self.state)
        reading = read()
        return {"reading": reading, "moment": turns.first_moment(self.state.opt_state)}

    def save(self, out: str) -> dict:
        """The weights, to a file."""
        weights.save(Path(out), self.state.params)
        return {}


def without_tokens(drawn: Rollout, ids: Sequence[int]) -> Rollout:
    """The completions with these tokens masked out."""
    is_out_BT = np.isin(drawn.completion_ids, ids)
    return drawn._replace(completion_mask=drawn.completion_mask & ~is_out_BT)


if __name__ == "__main__":
    turns.Server(Side()).serve()
