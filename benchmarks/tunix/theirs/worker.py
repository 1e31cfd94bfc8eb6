"""Tunix's side: its model, sampler and learner, as its users call them. Run by its own Python.

Imports nothing of gemma_grpo. Tunix's reward function hands the completions out and waits for their
rewards, so that a step is two requests, `draw` and `learn`. Besides plain use of Tunix's API there
is only this: completions that `draw` is given are trained on in place of those that were drawn.
"""

import dataclasses
import importlib.metadata
import queue
import threading

import jax
import jax.numpy as jnp
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
NEVER = 1_000_000  # steps


class Numbers:
    """A tokenizer whose text is the ids: "17 4 256"."""

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return -1  # no token: `eos_tokens` says what stops a completion

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
    """Tunix's model with the weights of an .npz file, which must be exactly its own."""
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a GRPO run: sizes, a learning rate for each step, the tokens that end a completion (none:
    all run to the budget), and the seed of step 0."""

    num_prompts: int
    generations: int
    prompt_length: int
    budget: int
    micro_batch: int
    learning_rates: list[float]
    stop_ids: list[int]
    first_seed: int


class Side:
    """The calls that the benchmarks make."""

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

    def begin(self, **settings: object) -> dict:
        """The learner, in a thread that waits for its first batch."""
        self.settings = Settings(**settings)
        self.rollout_config = base_rollout.RolloutConfig(
            max_tokens_to_generate=self.settings.budget,
            temperature=1.0,
            top_p=1.0,
            max_prompt_length=self.settings.prompt_length,
            kv_cache_size=self.settings.prompt_length + self.settings.budget,
            seed=0,
            eos_tokens=self.settings.stop_ids or None,
        )
        self.cluster = self._cluster()
        self.cluster.generate = self._generate(self.cluster.generate)
        learner = grpo_learner.GRPOLearner(
            rl_cluster=self.cluster,
            algo_config=grpo_learner.GRPOConfig(
                num_generations=self.settings.generations, num_iterations=1, beta=0.0, epsilon=0.2
            ),
            reward_fns=self._reward,
        )
        self.requests, self.ended, self.paid = queue.Queue(), queue.Queue(), queue.Queue()
        threading.Thread(target=self._train, args=(learner,), daemon=True).start()
        self._outcome()
        return {}

    def draw(
        self, prompts: list[list[int]], number: int, instead: list[list[int]] | None = None
    ) -> dict:
        """Step `number`'s rollout: completions without their stop token, whether each had one, and
        how many tokens were drawn; `instead` is trained on in place of what was drawn."""
        self.instead = instead
        self.rollout_config.seed = self.settings.first_seed + number
        with turns.measured(jax.devices()[0]) as reading:
            texts = [" ".join(map(str, ids)) for ids in prompts]
            self.requests.put({"prompts": np.array(texts)})
            completions = [[int(token) for token in text.split()] for text in self._outcome()]
        # Cut before the token that ended it, a completion is shorter than the budget.
        stopped = [len(ids) < self.settings.budget for ids in completions]
        answer = {"completions": completions, "stopped": stopped}
        return answer | {"drawn": self.num_drawn, "reading": reading}

    def learn(self, rewards: list[float]) -> dict:
        """The same step's update."""
        with turns.measured(jax.devices()[0]) as reading:
            self.paid.put(rewards)
            self._outcome()
            jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
        return {"reading": reading}

    def moment(self, out: str) -> dict:
        """Adam's first moment of the final norm, to a file: the gradient the optimizer saw."""
        state = nnx.to_pure_dict(nnx.state(self.cluster.actor_trainer.optimizer))
        (found,) = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(state)
            if "mu" in (keys := [str(getattr(key, "key", key)) for key in path])
            and "final_norm" in keys
        ]
        np.save(out, np.asarray(found, np.float32))
        return {}

    def save(self, out: str) -> dict:
        """The weights, to a file."""
        state = nnx.to_flat_state(nnx.state(self.cluster.actor_trainer.model, nnx.Param))
        np.savez(out, **{"/".join(map(str, path)): leaf.get_value() for path, leaf in state})
        return {}

    def _cluster(self) -> rl_cluster.RLCluster:
        num_prompts, rates = self.settings.num_prompts, jnp.array(self.settings.learning_rates)
        micro_batch = self.settings.micro_batch
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(lambda count: rates[count], b1=0.9, b2=0.95, weight_decay=0.0),
        )
        training = rl_cluster.RLTrainingConfig(
            actor_optimizer=optimizer,
            eval_every_n_steps=NEVER,
            max_steps=NEVER,
            mini_batch_size=num_prompts,
            train_micro_batch_size=micro_batch if micro_batch < num_prompts else None,
            rollout_micro_batch_size=num_prompts,
        )
        return rl_cluster.RLCluster(
            actor=self.model,
            tokenizer=Numbers(),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh={ACTOR: self.mesh, ROLLOUT: self.mesh},
                training_config=training,
                rollout_config=self.rollout_config,
            ),
        )

    def _outcome(self) -> object:
        """What the thread says next; raises the error that ended it."""
        outcome = self.ended.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

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

    def _reward(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        self.ended.put(completions)
        return self.paid.get()

    def _generate(self, generate):
        def run(*args, **kwargs):
            output = generate(*args, **kwargs)
            self.num_drawn = sum(len(row) for row in output.tokens)
            if self.instead is None:
                return output
            texts = [" ".join(map(str, ids)) for ids in self.instead]
            tokens = [np.array(ids, np.int32) for ids in self.instead]
            return dataclasses.replace(output, tokens=tokens, text=texts)

        return run


if __name__ == "__main__":
    turns.serve_side(Side())
