"""Tunix's own programs as shapes, traced for a v5e without a weight. Run by its own Python.

Imports nothing of gemma_grpo. The programs are `_train_step` of its trainer with its GRPO loss,
`compute_per_token_logps`, `_prefill_fn` and `_decode_fn` of its sampler; nothing of them is copied.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import turns
from flax import nnx
from jax.experimental import topologies
from jax.interpreters import pxla
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.generate import sampler, tokenizer_adapter
from tunix.rl import algo_core, common, trainer
from tunix.rl.grpo import grpo_learner
from tunix.utils import sharding_utils
from worker import PACKAGES, PAD, Numbers, abstract, model_of

EOS = (1, 106)
# Our own counter, of a file that imports jax alone; our package stays off its path.
TRACED = Path(__file__).parents[3] / "gemma_grpo" / "planning" / "traced.py"
matmul_flops = runpy.run_path(str(TRACED))["matmul_flops"]
# What is jitted, its arguments, and which of them Tunix donates.
Program = tuple[Callable, tuple, tuple[int, ...]]


class Side:
    """The calls that the benchmarks make, with the settings that `v5e.settings` gives."""

    def compile(self, hlo: str, settings: dict) -> dict:
        """The program's figures; its HLO goes to a file."""
        programs = Programs(**settings)
        with programs.mesh:
            return turns.compiled(programs.trace(), hlo) | {"versions": turns.versions(*PACKAGES)}

    def flops(self, settings: dict) -> dict:
        """Matmul FLOPs of one run, the decode loop for one turn."""
        programs = Programs(**settings)
        with programs.mesh:
            return {"flops": matmul_flops(programs.trace())}


class Programs:
    """What Tunix runs on a topology's devices; a program is a method."""

    def __init__(self, *, topology: str, fsdp: int, tp: int, replicated: bool, **settings: object):
        # The environment that the benchmark's process hands down lets libtpu do without a TPU.
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=(2, 4, 1)
        ).devices
        self.mesh = Mesh(np.array(devices).reshape(fsdp, tp), ("fsdp", "tp"))
        self.given, self.replicated = SimpleNamespace(**settings), replicated
        self.make = lambda: model_of(
            self.given.shape, remat=self.given.remat, dtype=self.given.dtype
        )
        sharding_utils.shard = self.shard
        self.graphdef, self.state = abstract(self.make, self.mesh, replicated=replicated)

    def trace(self) -> jax.stages.Traced:
        """The program that is asked for; the mesh must be entered."""
        function, arguments, donated = getattr(self, self.given.program)()
        return jax.jit(function, donate_argnums=donated).trace(*arguments)

    def shard(self, x: jax.Array, axes: tuple, eager: bool = False) -> jax.Array:
        """In the place of Tunix's `shard`, which places nothing while this process has only a CPU.
        Where weights are replicated, activations are sharded by rows alone."""
        spec = PartitionSpec("fsdp") if self.replicated else PartitionSpec(*axes)
        mesh = pxla.thread_resources.env.physical_mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def rows(self, *shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        """An array sharded by its first axis."""
        place = NamedSharding(self.mesh, PartitionSpec("fsdp"))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    def update(self) -> Program:
        """Its train step, jitted as `PeftTrainer.jit_train_and_eval_step` does."""
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b1=0.9, b2=0.95))
        make = lambda: nnx.Optimizer(self.make(), adam, wrt=nnx.Param)
        optimizer, optimizer_state = abstract(make, self.mesh, replicated=self.replicated)
        config = grpo_learner.GRPOConfig(num_generations=8, num_iterations=1, beta=0.0)
        config.temperature = 1.0
        its = object.__new__(trainer.Trainer)
        its._lora_enabled, its._has_aux = False, True
        its.gen_model_input_fn = lambda example: {"train_example": example, "algo_config": config}
        its.loss_fn = lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
            model, train_example, algo_config=algo_config, pad_id=PAD, eos_id=EOS[0]
        )
        B, S, T = self.given.sequences, self.given.prompt_length, self.given.budget
        example = common.TrainExample(
            prompt_ids=self.rows(B, S),
            prompt_mask=self.rows(B, S, dtype="bool"),
            completion_ids=self.rows(B, T),
            completion_mask=self.rows(B, T, dtype="bool"),
            advantages=self.rows(B, dtype="float32"),
            ref_per_token_logps=None,
            old_per_token_logps=None,
        )

        def step(state, optimizer_state, example):
            model = nnx.merge(self.graphdef, state)
            adam = nnx.merge(optimizer, optimizer_state)
            out = its._train_step(model, adam, example)
            return out, nnx.state(model), nnx.state(adam)

        return step, (self.state, optimizer_state, example), (1,)

    def logps(self) -> Program:
        """Its log-probs without gradient: the reference's, and the old ones."""
        B, S, T = self.given.sequences, self.given.prompt_length, self.given.budget
        function = lambda *arguments: common.compute_per_token_logps(
            self.graphdef, *arguments, pad_id=PAD, eos_id=EOS[0]
        )
        return function, (self.state, self.rows(B, S), self.rows(B, T)), ()

    def decode(self) -> Program:
        """Its decode loop."""
        its, arguments = self.sampler()
        return its._decode_fn, arguments, (1,)

    def prefill(self) -> Program:
        """Its prefill, and the first token."""
        its, arguments = self.sampler()
        return lambda *arguments: its._prefill_fn(*arguments, None, echo=False), arguments, (1,)

    def sampler(self) -> tuple[sampler.Sampler, tuple]:
        """Its sampler; the weights as it holds them, and its state. The cache's place is the
        compiler's choice, as it is for Tunix."""
        leaves = jax.tree.leaves(self.state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        B, L = self.given.sequences, self.given.prompt_length + self.given.budget
        sizes = [self.given.shape[name] for name in ("num_layers", "num_kv_heads", "head_dim")]
        its = object.__new__(sampler.Sampler)
        its._transformer_graphdef, its._flattened_transformer_state = self.graphdef, leaves
        its._supports_decode_only_last_token = False
        its.tokenizer = tokenizer_adapter.TokenizerAdapter(Numbers())
        its.cache_config = sampler.CacheConfig(L, *sizes)
        its.eos_ids = np.array(EOS)
        num_layers, *of_heads = sizes
        cache = lambda: sampler._init_cache(num_layers, L, B, *of_heads, self.given.dtype)
        of_rows = {
            "token_buffer": jax.ShapeDtypeStruct((B, L), jnp.int32),
            "positions": jax.ShapeDtypeStruct((B, L), jnp.int32),
            "cache": jax.eval_shape(cache),
            "done": jax.ShapeDtypeStruct((B,), jnp.bool_),
        }
        if self.replicated:
            of_rows = jax.tree.map(lambda leaf: self.rows(*leaf.shape, dtype=leaf.dtype), of_rows)
        sampling = sampler._SamplingState(
            **of_rows,
            decoding_step=jax.ShapeDtypeStruct((), jnp.int32),
            total_sampling_steps=jax.ShapeDtypeStruct((), jnp.int32),
            logits_buffer=None,
            logprobs_buffer=None,
            forbidden_token_ids=None,
            seed=jax.eval_shape(lambda: jax.random.PRNGKey(0)),
            sampling_mode="top_p",
            num_input_tokens=self.given.prompt_length,
            temperature=1.0,
            sampling_parameters={"top_p": 1.0, "top_k": None},
        )
        return its, (leaves, sampling)


if __name__ == "__main__":
    turns.Server(Side()).serve()
