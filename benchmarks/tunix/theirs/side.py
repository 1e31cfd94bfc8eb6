"""Tunix's side, run by its own Python: a GRPO step, and its programs compiled for a v5e.

Imports nothing of gemma_grpo. A step is two requests: Tunix's data set waits for `draw`, its reward
function hands the completions out and waits for `learn`. Besides plain use of Tunix's API there
is only this: completions that `draw` is given are trained on in place of those that were drawn.

Compiled are `_train_step` of its trainer with its GRPO loss, `compute_per_token_logps`, and
`_prefill_fn` and `_decode_fn` of its sampler, traced without a weight; nothing of them is copied.
"""

import dataclasses
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import turns
from flax import nnx
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.generate import sampler, utils
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3.params_safetensors import create_model_from_safe_tensors
from tunix.rl import algo_core, common, trainer
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout import base_rollout
from tunix.utils import sharding_utils

PAD, EOS, NO_ID = 0, (1, 106), -1
PACKAGES = ("google-tunix", "jax", "flax", "optax", "numpy")
NEVER = 1_000_000  # steps
BY_ROWS = PartitionSpec("fsdp")
# Of a model's shape, what both sides call alike.
SAME = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")
# Our own counter, of a file that imports jax alone; our package stays off its path.
TRACED = Path(__file__).parents[3] / "gemma_grpo" / "planning" / "traced.py"
matmul_flops = runpy.run_path(str(TRACED))["matmul_flops"]


class Numbers:
    """A tokenizer whose text is the ids: "17 4 256". Nothing is put before them, and the rollout is
    told apart what ends one."""

    encode = staticmethod(lambda text: [int(token) for token in text.split()])
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))
    bos_id = staticmethod(lambda: 0)  # none
    eos_id = staticmethod(lambda: NO_ID)
    pad_id = staticmethod(lambda: PAD)


def config_of(shape: dict, *, remat: str, dtype: str) -> gemma3.ModelConfig:
    """Tunix's Gemma 3 of a shape in our names."""
    return gemma3.ModelConfig(
        **{name: shape[name] for name in SAME},
        num_embed=shape["vocab_size"],
        sliding_window_size=shape["sliding_window"],
        local_base_frequency=int(shape["rope_base_local"]),
        global_base_frequency=int(shape["rope_base_global"]),
        remat_config=gemma3.RematConfig[remat],
        param_dtype=jnp.dtype(dtype),
    )


def logits(model: nnx.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of padded rows, in float32."""
    run = nnx.jit(lambda model, *given: model(*given)[0])
    positions = utils.build_positions_from_mask(mask)
    attention = utils.make_causal_attn_mask(mask, mask.shape[1])
    return np.asarray(run(model, ids, positions, None, attention), np.float32)


class Side:
    """The calls that the benchmarks make."""

    def __init__(self):
        self.server = turns.Server(self)

    def compile(self, settings: dict) -> dict:
        """The figures of a program, by `v5e.settings`, and its HLO."""
        read = turns.compiled(Programs(**settings).trace())
        return read | {"versions": turns.versions(*PACKAGES)}

    def flops(self, settings: dict) -> dict:
        """Matmul FLOPs of one run of a program, the decode loop for one turn."""
        return {"flops": matmul_flops(Programs(**settings).trace())}

    def open(self, folder: str, rows: dict, **settings: object) -> None:
        """Train the model of a Hugging Face folder by the settings of `sides.Opener`, one update a
        batch by our optimizer; what is asked from then on is answered within. The answer to this
        call, when Tunix asks for its first batch, has the logits of padded rows."""
        given = self.given = SimpleNamespace(**settings)
        mesh = Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
        config = config_of(given.shape, remat="NONE", dtype=given.dtype)
        model = create_model_from_safe_tensors(folder, config, mesh, config.param_dtype)
        self.rollout = base_rollout.RolloutConfig(
            max_tokens_to_generate=given.budget,
            temperature=1.0,
            top_p=1.0,
            max_prompt_length=given.prompt_length,
            kv_cache_size=given.prompt_length + given.budget,
            eos_tokens=given.stop_ids or None,
        )
        rates = jnp.array(given.learning_rates)
        adam = optax.adamw(lambda count: rates[count], b1=0.9, b2=0.95, weight_decay=0.0)
        training = RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), adam),
            eval_every_n_steps=NEVER,
            max_steps=NEVER,
            mini_batch_size=given.prompts,
            train_micro_batch_size=given.micro_batch if given.micro_batch < given.prompts else None,
            rollout_micro_batch_size=given.prompts,
        )
        cluster = ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
            training_config=training,
            rollout_config=self.rollout,
        )
        self.cluster = RLCluster(actor=model, tokenizer=Numbers(), cluster_config=cluster)
        generate = self.cluster.generate
        self.cluster.generate = lambda *args, **kwargs: self._drawn(generate(*args, **kwargs))
        how = {"num_iterations": 1, "beta": 0.0, "epsilon": 0.2}
        config = GRPOConfig(num_generations=given.generations, **how)
        learner = GRPOLearner(self.cluster, config, self._reward)
        opened = {"versions": turns.versions(*PACKAGES), "logits": logits(model, **rows)}
        learner.train(self._batches(opened))

    def save(self, out: str) -> dict:
        """The weights, to a file as ours are."""
        state = nnx.to_flat_state(nnx.state(self.cluster.actor_trainer.model, nnx.Param))
        theirs = {"/".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in state}
        safetensors.numpy.save_file(turns.to_ours(theirs), out)
        return {}

    def _batches(self, answer: dict) -> Iterator[dict]:
        """Tunix's data set. It is asked for a batch when the step before has ended."""
        first_seed = self.given.seed * len(self.given.learning_rates)  # of as many steps
        while True:
            asked = self.server.serve("draw", answer)
            self.instead = asked.get("instead")
            self.rollout.seed = first_seed + asked["number"]
            self.read = turns.start()
            yield {"prompts": np.array([Numbers.decode(ids) for ids in asked["prompts"]])}
            jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
            reading = self.read()
            optimizer = nnx.to_pure_dict(nnx.state(self.cluster.actor_trainer.optimizer))
            answer = {"reading": reading, "moment": turns.first_moment(optimizer)}

    def _reward(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        ids = [Numbers.encode(text) for text in completions]
        # Cut before the token that ended it, a completion is shorter than the budget.
        stopped = [len(each) < self.given.budget for each in ids]
        answer = {"completions": ids, "stopped": stopped, "drawn": self.drawn}
        asked = self.server.serve("learn", answer | {"reading": self.read()})
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


class Programs:
    """What Tunix runs on a topology's devices, by `v5e.settings`: a method is a function and its
    arguments, shapes with their places on the mesh."""

    def __init__(self, *, topology: str, fsdp: int, tp: int, **settings: object):
        # The environment that the benchmark's process hands down lets libtpu do without a TPU.
        tpu = get_topology_desc(topology, "tpu", chips_per_host_bounds=(2, 4, 1))
        self.mesh = Mesh(np.array(tpu.devices).reshape(fsdp, tp), ("fsdp", "tp"))
        given = self.given = SimpleNamespace(**settings)
        config = config_of(given.shape, remat=given.remat, dtype=given.dtype)
        self.make = lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0))
        sharding_utils.shard = self.shard
        self.graphdef, self.state = self.abstract(self.make)
        self.prompts = self.array((given.sequences, given.prompt_length))
        self.completions = self.array((given.sequences, given.budget))

    def trace(self) -> jax.stages.Traced:
        """The program that is asked for, donated as Tunix donates."""
        with self.mesh:
            function, arguments = getattr(self, self.given.program)()
            donated = () if self.given.program == "logps" else (1,)
            return jax.jit(function, donate_argnums=donated).trace(*arguments)

    def array(self, shape: tuple, dtype: str = "int32", spec=BY_ROWS) -> jax.ShapeDtypeStruct:
        """A shape with its place on the mesh."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def abstract(self, make: Callable[[], object]) -> tuple[nnx.GraphDef, nnx.State]:
        """Graph and state of what `make` makes, at the places of Tunix's own annotations, or on all
        devices."""
        graphdef, state = nnx.split(nnx.eval_shape(make))
        spec_of = lambda spec: PartitionSpec() if self.given.replicated or spec is None else spec
        place = lambda leaf, spec: self.array(leaf.shape, leaf.dtype, spec_of(spec))
        return graphdef, jax.tree.map(place, state, nnx.get_partition_spec(state))

    def shard(self, x: jax.Array, axes: tuple, eager: bool = False) -> jax.Array:
        """In the place of Tunix's `shard`, which places nothing while this process has only a CPU.
        Where weights are replicated, activations are sharded by rows alone."""
        spec = BY_ROWS if self.given.replicated else PartitionSpec(*axes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def update(self) -> tuple[Callable, tuple]:
        """Its train step, jitted as `PeftTrainer.jit_train_and_eval_step` does."""
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b1=0.9, b2=0.95))
        make = lambda: nnx.Optimizer(self.make(), adam, wrt=nnx.Param)
        optimizer, optimizer_state = self.abstract(make)
        config = GRPOConfig(num_generations=8, num_iterations=1, beta=0.0)
        config.temperature = 1.0
        its = object.__new__(trainer.Trainer)
        its._lora_enabled, its._has_aux = False, True
        its.gen_model_input_fn = lambda example: {"train_example": example, "algo_config": config}
        its.loss_fn = lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
            model, train_example, algo_config=algo_config, pad_id=PAD, eos_id=EOS[0]
        )
        example = common.TrainExample(
            prompt_ids=self.prompts,
            prompt_mask=self.array(self.prompts.shape, "bool"),
            completion_ids=self.completions,
            completion_mask=self.array(self.completions.shape, "bool"),
            advantages=self.array((self.given.sequences,), "float32"),
            ref_per_token_logps=None,
            old_per_token_logps=None,
        )

        def step(state, optimizer_state, example):
            model = nnx.merge(self.graphdef, state)
            adam = nnx.merge(optimizer, optimizer_state)
            out = its._train_step(model, adam, example)
            return out, nnx.state(model), nnx.state(adam)

        return step, (self.state, optimizer_state, example)

    def logps(self) -> tuple[Callable, tuple]:
        """Its log-probs without gradient: the reference's, and the old ones."""
        function = lambda *arguments: common.compute_per_token_logps(
            self.graphdef, *arguments, pad_id=PAD, eos_id=EOS[0]
        )
        return function, (self.state, self.prompts, self.completions)

    def sampler(self) -> tuple[Callable, tuple]:
        """Its decode loop, or its prefill with the first token. The cache's place is the compiler's
        choice, as it is for Tunix."""
        (B, S), L = self.prompts.shape, self.given.prompt_length + self.given.budget
        sizes = [self.given.shape[name] for name in ("num_layers", "num_kv_heads", "head_dim")]
        model = nnx.merge(self.graphdef, self.state)
        its = sampler.Sampler(model, Numbers(), sampler.CacheConfig(L, *sizes))
        its.eos_ids = np.array(EOS)
        how = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "beam_size": None}
        how |= {"include_logits": False, "forbidden_token_ids": None}
        begin = lambda ids: its.init_sample_state(ids, L, seed=jax.random.PRNGKey(0), **how)
        state = jax.eval_shape(begin, jax.ShapeDtypeStruct((B, S), "int32"))
        state = state.replace(num_input_tokens=S)  # a number, not an array of this trace
        if self.given.replicated:
            of_rows = lambda leaf: leaf.shape[:1] == (B,)
            place = lambda leaf: self.array(leaf.shape, leaf.dtype) if of_rows(leaf) else leaf
            state = jax.tree.map(place, state)
        prefill = lambda *arguments: its._prefill_fn(*arguments, None, echo=False)
        function = its._decode_fn if self.given.program == "decode" else prefill
        return function, (its._flattened_transformer_state, state)

    decode = prefill = sampler


if __name__ == "__main__":
    Side().server.serve()
