"""Tunix's side: its model, sampler and learner, as its users call them. Run by its own Python.

Imports nothing of gemma_grpo. A step is two requests: Tunix's data set waits for `draw`, its reward
function hands the completions out and waits for `learn`. Besides plain use of Tunix's API there
is only this: completions that `draw` is given are trained on in place of those that were drawn.
"""

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import turns
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.generate import utils as generate_utils
from tunix.models.gemma3 import model as gemma3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

PAD, NO_ID = 0, -1
PACKAGES = ("google-tunix", "jax", "flax", "optax", "numpy")
NEVER = 1_000_000  # steps
# Of a model's shape, what both sides call alike.
SAME = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")


class Numbers:
    """A tokenizer whose text is the ids: "17 4 256". Nothing is put before them, and the rollout is
    told apart what ends one."""

    encode = staticmethod(lambda text: [int(token) for token in text.split()])
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))
    bos_id = staticmethod(lambda: 0)  # none
    eos_id = staticmethod(lambda: NO_ID)
    pad_id = staticmethod(lambda: PAD)


def abstract(make: Callable[[], object], mesh: Mesh, *, replicated: bool = False) -> tuple:
    """Graph and state of what `make` makes: shapes, with the places on the mesh that Tunix's own
    annotations give them."""

    def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec | None) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if replicated or spec is None else spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, jax.tree.map(place, state, nnx.get_partition_spec(state))


def model_of(shape: dict, *, remat: str, dtype: str) -> gemma3.Gemma3:
    """Tunix's Gemma 3, fresh, of a shape in our names."""
    config = gemma3.ModelConfig(
        **{name: shape[name] for name in SAME},
        num_embed=shape["vocab_size"],
        sliding_window_size=shape["sliding_window"],
        local_base_frequency=int(shape["rope_base_local"]),
        global_base_frequency=int(shape["rope_base_global"]),
        remat_config=gemma3.RematConfig[remat],
        param_dtype=np.dtype(dtype),
    )
    return gemma3.Gemma3(config, rngs=nnx.Rngs(0))


def load_model(graphdef: nnx.GraphDef, state: nnx.State, weights: str) -> nnx.Module:
    """The model with the weights of an .npz file, which must be exactly its own."""
    flat = {"/".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    loaded = []
    with np.load(weights) as file:
        if flat.keys() ^ set(file.files):
            raise ValueError(f"weights do not match: {sorted(flat.keys() ^ set(file.files))[:6]}")
        for name, (path, leaf) in flat.items():
            array, wanted = file[name], leaf.get_value()
            if array.shape != wanted.shape:
                raise ValueError(f"{name}: {array.shape}, Tunix has {wanted.shape}")
            array = jax.device_put(array.astype(wanted.dtype), wanted.sharding)
            loaded.append((path, leaf.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def logits(model: nnx.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of padded rows, in float32."""
    run = nnx.jit(lambda model, *given: model(*given)[0])
    positions = generate_utils.build_positions_from_mask(mask)
    attention = generate_utils.make_causal_attn_mask(mask, mask.shape[1])
    return np.asarray(run(model, ids, positions, None, attention), np.float32)


class Side:
    """The calls that the benchmarks make."""

    def __init__(self):
        self.server = turns.Server(self)

    def open(self, weights: str, rows: dict[str, np.ndarray], settings: dict) -> None:
        """Build the model and train it by the settings of `sides.Opener`; what is asked from then
        on is answered within. The answer to this call, when Tunix asks for its first batch, has the
        logits of padded rows."""
        given = self.settings = SimpleNamespace(**settings)
        mesh = Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
        make = lambda: model_of(given.shape, remat="NONE", dtype=given.dtype)
        model = load_model(*abstract(make, mesh), weights)
        self.rollout_config = base_rollout.RolloutConfig(
            max_tokens_to_generate=given.budget,
            temperature=1.0,
            top_p=1.0,
            max_prompt_length=given.prompt_length,
            kv_cache_size=given.prompt_length + given.budget,
            seed=0,
            eos_tokens=given.stop_ids or None,
        )
        self.cluster = rl_cluster.RLCluster(
            actor=model,
            tokenizer=Numbers(),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh={rl_cluster.Role.ACTOR: mesh, rl_cluster.Role.ROLLOUT: mesh},
                training_config=training_config(given),
                rollout_config=self.rollout_config,
            ),
        )
        generate = self.cluster.generate
        self.cluster.generate = lambda *args, **kwargs: self._drawn(generate(*args, **kwargs))
        config = grpo_learner.GRPOConfig(
            num_generations=given.generations, num_iterations=1, beta=0.0, epsilon=0.2
        )
        learner = grpo_learner.GRPOLearner(
            rl_cluster=self.cluster, algo_config=config, reward_fns=self._reward
        )
        opened = {"versions": turns.versions(*PACKAGES), "device": jax.devices()[0].device_kind}
        learner.train(self._batches(opened | {"logits": logits(model, **rows)}))

    def save(self, out: str) -> dict:
        """The weights, to a file."""
        state = nnx.to_flat_state(nnx.state(self.cluster.actor_trainer.model, nnx.Param))
        np.savez(out, **{"/".join(map(str, path)): leaf.get_value() for path, leaf in state})
        return {}

    def _batches(self, answer: dict) -> Iterator[dict]:
        """Tunix's data set. It is asked for a batch when the step before has ended."""
        while True:
            asked = self.server.exchange(answer, until="draw")
            self.instead = asked.get("instead")
            self.rollout_config.seed = self.settings.first_seed + asked["number"]
            self.read = turns.start()
            yield {"prompts": np.array([Numbers.decode(ids) for ids in asked["prompts"]])}
            jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
            reading = self.read()
            optimizer = nnx.to_pure_dict(nnx.state(self.cluster.actor_trainer.optimizer))
            answer = {"reading": reading, "moment": turns.first_moment(optimizer)}

    def _reward(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        ids = [Numbers.encode(text) for text in completions]
        # Cut before the token that ended it, a completion is shorter than the budget.
        stopped = [len(each) < self.settings.budget for each in ids]
        answer = {"completions": ids, "stopped": stopped, "drawn": self.drawn}
        asked = self.server.exchange(answer | {"reading": self.read()}, until="learn")
        self.read = turns.start()
        return asked["rewards"]

    def _drawn(self, output: base_rollout.RolloutOutput) -> base_rollout.RolloutOutput:
        """What Tunix's rollout has drawn is counted; what is given instead takes its place."""
        self.drawn = sum(len(row) for row in output.tokens)
        if self.instead is None:
            return output
        texts = [Numbers.decode(ids) for ids in self.instead]
        tokens = [np.array(ids, np.int32) for ids in self.instead]
        return dataclasses.replace(output, tokens=tokens, text=texts)


def training_config(given: SimpleNamespace) -> rl_cluster.RLTrainingConfig:
    """One update a batch, by the optimizer of ours and the learning rate given for each step."""
    rates = jnp.array(given.learning_rates)
    return rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(lambda count: rates[count], b1=0.9, b2=0.95, weight_decay=0.0),
        ),
        eval_every_n_steps=NEVER,
        max_steps=NEVER,
        mini_batch_size=given.num_prompts,
        train_micro_batch_size=given.micro_batch if given.micro_batch < given.num_prompts else None,
        rollout_micro_batch_size=given.num_prompts,
    )


if __name__ == "__main__":
    Side().server.serve()
