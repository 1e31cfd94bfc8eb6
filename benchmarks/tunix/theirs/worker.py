"""Tunix's side: its model, its sampler, its learner, as its users call them. Run by its own Python.

Imports nothing of gemma_grpo. What stands here beside plain use of Tunix's API: clocks around
`RLCluster.generate` and `update_actor`, and the exchange of what was drawn for the trace's
completions, so that both sides train on the same rows.
"""

import dataclasses
import importlib.metadata
import queue
import threading

import jax
import numpy as np
import optax
import turns
from flax import nnx
from jax.sharding import Mesh
from tunix.generate import utils as generate_utils
from tunix.models.gemma3 import model as gemma3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

PAD, BOS = 0, 2
ACTOR, ROLLOUT = rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT
PACKAGES = ("google-tunix", "jax", "flax", "optax", "numpy")


class Numbers:
    """A tokenizer whose text is the ids: "17 4 256"."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return -1  # no token: rollouts run to the budget

    def pad_id(self) -> int:
        return PAD


def model_config(shape: dict, *, remat: str, dtype: str) -> gemma3.ModelConfig:
    """Tunix's configuration of a Gemma 3 with our names for its sizes."""
    return gemma3.ModelConfig(
        num_layers=shape["num_layers"],
        num_embed=shape["vocab_size"],
        embed_dim=shape["embed_dim"],
        hidden_dim=shape["hidden_dim"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_kv_heads"],
        sliding_window_size=shape["sliding_window"],
        local_base_frequency=int(shape["rope_base_local"]),
        global_base_frequency=int(shape["rope_base_global"]),
        remat_config=gemma3.RematConfig[remat],
        param_dtype=np.dtype(dtype),
    )


def load_model(config: gemma3.ModelConfig, weights: str, mesh: Mesh) -> nnx.Module:
    """Tunix's model with the weights of an .npz file, every one of them used."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0))))
    shapes = nnx.to_flat_state(state)
    specs = dict(nnx.to_flat_state(nnx.get_partition_spec(state)))
    with np.load(weights) as file:
        names = {"/".join(map(str, path)) for path, _ in shapes}
        if names != set(file.files):
            raise ValueError(f"weights do not match: {sorted(names ^ set(file.files))[:6]}")
        loaded = []
        for path, variable in shapes:
            array = file["/".join(map(str, path))]
            if array.shape != variable.shape:
                raise ValueError(f"{path}: {array.shape}, Tunix has {variable.shape}")
            place = jax.sharding.NamedSharding(mesh, specs[path].get_value())
            array = jax.device_put(array.astype(variable.dtype), place)
            loaded.append((path, variable.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


class Side:
    """The calls that the benchmark makes."""

    def load(self, shape: dict, weights: str, remat: str, dtype: str) -> dict:
        """Build the model."""
        self.mesh = Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
        config = model_config(shape, remat=remat, dtype=dtype)
        self.model = load_model(config, weights, self.mesh)
        return {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}

    def logits(self, rows: str, out: str) -> dict:
        """Logits of padded rows, to a file."""
        with np.load(rows) as file:
            ids, mask = file["ids"], file["mask"]
        logits, _ = nnx.jit(lambda model, *given: model(*given))(
            self.model,
            ids,
            generate_utils.build_positions_from_mask(mask),
            None,
            generate_utils.make_causal_attn_mask(mask, mask.shape[1]),
        )
        np.save(out, np.asarray(logits, np.float32))
        return {}

    def prepare(self, trace: str, generations: int, micro_batch: int, learning_rate: float) -> dict:
        """The learner, ready for `step`."""
        with np.load(trace) as file:
            self.prompts, self.completions = file["prompt_ids"], file["completion_ids"]
            self.lengths, self.rewards = file["lengths"], file["rewards"]
        self._open(
            num_prompts=len(self.prompts),
            generations=generations,
            prompt_length=self.prompts.shape[1],
            budget=self.completions.shape[1],
            micro_batch=micro_batch,
            learning_rate=learning_rate,
            eos_tokens=None,
        )
        return {}

    def step(self, number: int) -> dict:
        """One whole GRPO step: `learner.train` between two batches."""
        self.rollout_config.seed = number
        self.reading = {"rollout": None, "updates": []}
        with turns.measured() as whole:
            prompts = [" ".join(map(str, row)) for row in self.prompts]
            self.requests.put({"prompts": np.array(prompts)})
            self._outcome()
        updates = self.reading["updates"]
        return {
            "rollout": self.reading["rollout"],
            "update": {
                "wall": sum(part["wall"] for part in updates),
                "cpu": sum(part["cpu"] for part in updates),
                "peak": max(part["peak"] for part in updates),
                "device_peak": max(part.get("device_peak", 0) for part in updates),
            },
            "step": {"wall": whole["wall"], "cpu": whole["cpu"]},
            "resident": turns.resident(),
        }

    def moment(self, out: str) -> dict:
        """Adam's first moment of the final norm, to a file: the gradient, as the optimizer saw
        it."""
        state = nnx.to_pure_dict(nnx.state(self.cluster.actor_trainer.optimizer))
        (found,) = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(state)
            if "mu" in (keys := [str(getattr(key, "key", key)) for key in path])
            and "final_norm" in keys
        ]
        np.save(out, np.asarray(found, np.float32))
        return {}

    def _open(
        self,
        *,
        num_prompts: int,
        generations: int,
        prompt_length: int,
        budget: int,
        micro_batch: int,
        learning_rate: float | optax.Schedule,
        eos_tokens: list[int] | None,
    ) -> None:
        """Tunix's cluster and its learner, which waits in a thread for its first batch."""
        self.rollout_config = base_rollout.RolloutConfig(
            max_tokens_to_generate=budget,
            temperature=1.0,
            top_p=1.0,
            max_prompt_length=prompt_length,
            kv_cache_size=prompt_length + budget,
            seed=0,
            eos_tokens=eos_tokens,
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.0),
        )
        self.cluster = rl_cluster.RLCluster(
            actor=self.model,
            tokenizer=Numbers(),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh={ACTOR: self.mesh, ROLLOUT: self.mesh},
                training_config=rl_cluster.RLTrainingConfig(
                    actor_optimizer=optimizer,
                    eval_every_n_steps=1_000_000,
                    max_steps=1_000_000,
                    mini_batch_size=num_prompts,
                    train_micro_batch_size=micro_batch if micro_batch < num_prompts else None,
                    rollout_micro_batch_size=num_prompts,
                ),
                rollout_config=self.rollout_config,
            ),
        )
        self.cluster.generate = self._generate(self.cluster.generate)
        self.cluster.update_actor = self._update(self.cluster.update_actor)
        learner = grpo_learner.GRPOLearner(
            rl_cluster=self.cluster,
            algo_config=grpo_learner.GRPOConfig(
                num_generations=generations, num_iterations=1, beta=0.0, epsilon=0.2
            ),
            reward_fns=self._reward,
        )
        self.requests, self.ended = queue.Queue(), queue.Queue()
        threading.Thread(target=self._train, args=(learner,), daemon=True).start()
        self._outcome()

    def _outcome(self) -> object:
        """What the thread says next; raises the error that ended it."""
        outcome = self.ended.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _reward(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        """Tunix's reward function: the trace's rewards."""
        return self.rewards.tolist()

    def _train(self, learner: grpo_learner.GRPOLearner) -> None:
        try:
            learner.train(self._batches())
        except Exception as error:
            self.ended.put(error)

    def _batches(self):
        """Tunix's data set. It is asked for a batch when the step before has ended."""
        while True:
            self.ended.put(None)
            yield self.requests.get()

    def _generate(self, generate):
        """Tunix's rollout under the clock; then the trace's completions instead of its own."""

        def run(*args, **kwargs):
            with turns.measured(jax.devices()[0]) as self.reading["rollout"]:
                output = generate(*args, **kwargs)
            drawn = sum(len(row) for row in output.tokens)
            if drawn != self.completions.size:
                raise ValueError(f"drew {drawn} tokens of {self.completions.size}")
            rows = zip(self.completions, self.lengths, strict=True)
            return dataclasses.replace(output, tokens=[row[:length] for row, length in rows])

        return run

    def _update(self, update):
        """Tunix's update of one micro-batch under the clock; it waits for the device itself."""

        def run(*args, **kwargs):
            with turns.measured(jax.devices()[0]) as reading:
                update(*args, **kwargs)
                jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
            self.reading["updates"].append(reading)

        return run


if __name__ == "__main__":
    side = Side()
    turns.serve(
        {name: getattr(side, name) for name in ("load", "logits", "prepare", "step", "moment")}
    )
