"""Tunix's own programs as shapes, traced for a v5e without a weight. Run by its own Python.

Imports nothing of gemma_grpo. The programs are `_train_step` of its trainer with its GRPO loss,
`compute_per_token_logps`, `_prefill_fn` and `_decode_fn` of its sampler; nothing of them is copied.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Settings

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
from worker import PACKAGES, PAD, Numbers, abstract, abstract_model

EOS = (1, 106)
# Our own counter, of a file that imports jax alone: our package is not imported here.
matmul_flops = runpy.run_path(Path(__file__).parents[3] / "gemma_grpo" / "planning" / "traced.py")[
    "matmul_flops"
]
# A program to be jitted, its arguments, and which of them Tunix donates.
Made = tuple[Callable, tuple, tuple[int, ...]]


class Side:
    """The calls that the benchmarks make, with the settings that `v5e.settings` gives."""

    def compile(self, hlo: str, settings: dict) -> dict:
        """The program's figures; its HLO goes to a file."""
        program, mesh = trace(Settings(**settings))
        with mesh:
            return turns.compiled(program, hlo) | {"versions": turns.versions(*PACKAGES)}

    def flops(self, settings: dict) -> dict:
        """Matmul FLOPs of one run, the decode loop for one turn."""
        flops = matmul_flops(trace(Settings(**settings))[0])
        return {"flops": flops, "versions": turns.versions(*PACKAGES)}


def trace(given: Settings) -> tuple[jax.stages.Traced, Mesh]:
    """One of PROGRAMS, for the topology's devices. The benchmark's environment, which this process
    has inherited, lets libtpu make them without a TPU."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=given.topology, chips_per_host_bounds=(2, 4, 1)
    ).devices
    mesh = Mesh(np.array(devices).reshape(given.fsdp, given.tp), ("fsdp", "tp"))
    sharding_utils.shard = place_activation if not given.replicated else place_row
    with mesh:
        function, arguments, donated = PROGRAMS[given.program](given, mesh)
        return jax.jit(function, donate_argnums=donated).trace(*arguments), mesh


def place_activation(x: jax.Array, axes: tuple, eager: bool = False) -> jax.Array:
    """In the place of Tunix's `shard`, which places nothing while this process has only a CPU."""
    sharding = NamedSharding(pxla.thread_resources.env.physical_mesh, PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(x, sharding)


def place_row(x: jax.Array, axes: tuple, eager: bool = False) -> jax.Array:
    """The same where weights are replicated: by rows alone."""
    return place_activation(x, ("fsdp",))


def rows(mesh: Mesh, shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
    """An array sharded by its first axis."""
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)


def model_of(given: Settings, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """Its Gemma 3."""
    how = {"remat": given.remat, "dtype": given.dtype, "replicated": given.replicated}
    return abstract_model(given.shape, mesh, **how)


def update(given: Settings, mesh: Mesh) -> Made:
    """Its train step, jitted as `PeftTrainer.jit_train_and_eval_step` does."""
    graphdef, state = model_of(given, mesh)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b1=0.9, b2=0.95))
    make = lambda: nnx.Optimizer(
        nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)),
        optimizer,
        wrt=nnx.Param,
    )
    optimizer_graphdef, optimizer_state = abstract(make, mesh, replicated=given.replicated)
    config = grpo_learner.GRPOConfig(num_generations=8, num_iterations=1, beta=0.0)
    config.temperature = 1.0
    its = object.__new__(trainer.Trainer)
    its._lora_enabled, its._has_aux = False, True
    its.gen_model_input_fn = lambda example: {"train_example": example, "algo_config": config}
    its.loss_fn = lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
        model, train_example, algo_config=algo_config, pad_id=PAD, eos_id=EOS[0]
    )
    B, S, T = given.sequences, given.prompt_length, given.budget
    example = common.TrainExample(
        prompt_ids=rows(mesh, (B, S)),
        prompt_mask=rows(mesh, (B, S), "bool"),
        completion_ids=rows(mesh, (B, T)),
        completion_mask=rows(mesh, (B, T), "bool"),
        advantages=rows(mesh, (B,), "float32"),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )

    def step(state, optimizer_state, example):
        model = nnx.merge(graphdef, state)
        optimizer = nnx.merge(optimizer_graphdef, optimizer_state)
        out = its._train_step(model, optimizer, example)
        return out, nnx.state(model), nnx.state(optimizer)

    return step, (state, optimizer_state, example), (1,)


def logps(given: Settings, mesh: Mesh) -> Made:
    """Its log-probs without gradient: the reference's, and the old ones."""
    graphdef, state = model_of(given, mesh)
    prompts = rows(mesh, (given.sequences, given.prompt_length))
    completions = rows(mesh, (given.sequences, given.budget))
    function = lambda *arguments: common.compute_per_token_logps(
        graphdef, *arguments, pad_id=PAD, eos_id=EOS[0]
    )
    return function, (state, prompts, completions), ()


def decode(given: Settings, mesh: Mesh) -> Made:
    """Its decode loop."""
    its, arguments = make_sampler(given, mesh)
    return its._decode_fn, arguments, (1,)


def prefill(given: Settings, mesh: Mesh) -> Made:
    """Its prefill, and the first token."""
    its, arguments = make_sampler(given, mesh)
    return lambda *arguments: its._prefill_fn(*arguments, None, echo=False), arguments, (1,)


def make_sampler(given: Settings, mesh: Mesh) -> tuple[sampler.Sampler, tuple]:
    """Its sampler; the weights as it holds them, and its state. The cache's place is the compiler's
    choice, as it is for Tunix."""
    graphdef, state = model_of(given, mesh)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    B, L = given.sequences, given.prompt_length + given.budget
    sizes = [given.shape[name] for name in ("num_layers", "num_kv_heads", "head_dim")]
    its = object.__new__(sampler.Sampler)
    its._transformer_graphdef, its._flattened_transformer_state = graphdef, leaves
    its._supports_decode_only_last_token = False
    its.tokenizer = tokenizer_adapter.TokenizerAdapter(Numbers())
    its.cache_config = sampler.CacheConfig(L, *sizes)
    its.eos_ids = np.array(EOS)
    num_layers, *of_heads = sizes
    of_rows = {
        "token_buffer": jax.ShapeDtypeStruct((B, L), jnp.int32),
        "positions": jax.ShapeDtypeStruct((B, L), jnp.int32),
        "cache": jax.eval_shape(
            lambda: sampler._init_cache(num_layers, L, B, *of_heads, given.dtype)
        ),
        "done": jax.ShapeDtypeStruct((B,), jnp.bool_),
    }
    if given.replicated:
        of_rows = jax.tree.map(lambda leaf: rows(mesh, leaf.shape, leaf.dtype), of_rows)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    sampling = sampler._SamplingState(
        **of_rows,
        decoding_step=scalar,
        total_sampling_steps=scalar,
        logits_buffer=None,
        logprobs_buffer=None,
        forbidden_token_ids=None,
        seed=jax.eval_shape(lambda: jax.random.PRNGKey(0)),
        sampling_mode="top_p",
        num_input_tokens=given.prompt_length,
        temperature=1.0,
        sampling_parameters={"top_p": 1.0, "top_k": None},
    )
    return its, (leaves, sampling)


PROGRAMS = {"update": update, "logps": logps, "decode": decode, "prefill": prefill}

if __name__ == "__main__":
    turns.Server(Side()).serve()
