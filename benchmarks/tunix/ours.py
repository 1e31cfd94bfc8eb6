"""Our side: the functions that our own training calls, in a process that answers `sides`.

python -m benchmarks.tunix.ours, started by the benchmarks.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from benchmarks.tunix import convert
from benchmarks.tunix.theirs import turns
from gemma_grpo import model
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation.rollout import Rollout, RolloutConfig, make_rollout
from gemma_grpo.generation.sampling import SamplingConfig
from gemma_grpo.objective import advantages
from gemma_grpo.text import padding
from gemma_grpo.training import grpo, grpo_update, packing
from gemma_grpo.training import state as train_state

PAD = 0  # Gemma's


class Side:
    """The calls that the benchmarks make."""

    def open(
        self,
        weights: str,
        rows: dict[str, np.ndarray],
        run: RunConfig,
        stop_ids: list[int],
        trained_stop: bool,
    ) -> dict:
        """The GRPO stage of `run` on weights of a file, ready for its first step. Without
        `trained_stop` completions go into the update without the token that ended them, as Tunix's
        do. The answer has the logits of padded rows."""
        self.run, self.stop_ids, self.trained_stop = run, stop_ids, trained_stop
        self.mesh = meshes.data_mesh()
        settings, stage = run.model, run.grpo
        graphdef, shapes = model.abstract(model.CONFIGS[settings.weights])
        with np.load(weights) as file:
            params = convert.from_tunix(file)
        params = jax.tree.map(meshes.place, params, meshes.fsdp_shardings(self.mesh, shapes))
        self.trainer = grpo.make_trainer(
            stage, graphdef, self.mesh, dtype=settings.dtype, remat=settings.remat
        )
        rollout = RolloutConfig(
            num_generations=stage.num_generations,
            max_completion_length=settings.max_completion_length,
            stop_ids=tuple(stop_ids),
            pad_id=PAD,
            sampling=SamplingConfig(temperature=stage.temperature),
        )
        self.rollout = make_rollout(graphdef, self.mesh, rollout)
        lengths = settings.max_prompt_length, settings.max_completion_length
        self.packing = grpo.make_packing(stage, lengths, self.mesh.size)

        @jax.jit
        def logits(params):
            gemma = nnx.merge(graphdef, params)
            return gemma.logits(model.forward(gemma, rows["ids"], rows["mask"])[0])

        answer = {
            "versions": turns.versions("gemma_grpo", "jax", "flax", "optax", "numpy"),
            "device": jax.devices()[0].device_kind,
            "logits": np.asarray(logits(params)),
        }
        self.state = train_state.init_train_state(params, self.trainer.optimizer, self.mesh)
        return answer

    def draw(
        self, prompts: list[list[int]], number: int, instead: list[list[int]] | None = None
    ) -> dict:
        """Step `number`'s rollout, by the key of our own training: completions without their stop
        token, whether each had one, and how many tokens were drawn; `instead` is trained on in
        place of what was drawn."""
        read = turns.start()
        settings = self.run.model
        self.prompts = padding.pad_left(prompts, length=settings.max_prompt_length, pad_id=PAD)
        params = self.state.params
        layout = meshes.named_shardings(self.mesh, model.REPLICATED.specs(params))
        params = meshes.reshard(params, layout, settings.dtype)
        step_key = jax.random.fold_in(jax.random.key(self.run.seed), number)
        placed = meshes.place_rows(self.mesh, self.prompts)
        drawn = jax.device_get(self.rollout(params, *placed, jax.random.fold_in(step_key, 0)))
        kept = without_tokens(drawn, self.stop_ids).completion_mask
        rows = zip(drawn.completion_ids, kept, strict=True)
        self.drawn = replaced(drawn, instead) if instead else drawn
        return {
            "completions": [ids[mask].tolist() for ids, mask in rows],
            "stopped": drawn.stopped.tolist(),
            "drawn": int(drawn.completion_mask.sum()),
            "reading": read(),
        }

    def learn(self, rewards: list[float]) -> dict:
        """The same step's update, from rewards to updated weights."""
        read = turns.start()
        stage, stop_ids = self.run.grpo, [] if self.trained_stop else self.stop_ids
        rewards_PG = np.array(rewards, np.float32).reshape(-1, stage.num_generations)
        advantages_PG = advantages.sharded_group_advantages(
            meshes.place_rows(self.mesh, rewards_PG),
            self.mesh,
            scale=stage.scale,
            baseline=stage.baseline,
        )
        drawn, advantages_B = without_tokens(self.drawn, stop_ids), meshes.to_host(advantages_PG)
        batch = grpo_update.make_batch(*self.prompts, drawn, advantages_B.reshape(-1), stage.loss)
        packs = meshes.place_rows(self.mesh, packing.pack(batch, self.packing))
        self.state, metrics = self.trainer.update(self.state, {}, packs)
        jax.device_get(metrics)
        jax.block_until_ready(self.state)
        reading = read()
        return {"reading": reading, "moment": turns.first_moment(self.state.opt_state)}

    def save(self, out: str) -> dict:
        """The weights, to a file."""
        np.savez(out, **convert.to_tunix(self.state.params))
        return {}


def without_tokens(drawn: Rollout, ids: Sequence[int]) -> Rollout:
    """The completions with these tokens masked out."""
    is_out_BT = np.isin(drawn.completion_ids, ids)
    return drawn._replace(completion_mask=drawn.completion_mask & ~is_out_BT)


def replaced(drawn: Rollout, completions: Sequence[Sequence[int]]) -> Rollout:
    """These completions in place of those drawn."""
    length = drawn.completion_ids.shape[1]
    ids_BT, mask_BT = padding.pad_right(completions, length=length, pad_id=PAD)
    return drawn._replace(
        completion_ids=ids_BT, completion_mask=mask_BT, stopped=~mask_BT.all(axis=1)
    )


if __name__ == "__main__":
    turns.Server(Side()).serve()
