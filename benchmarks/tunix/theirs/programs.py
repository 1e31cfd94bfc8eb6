"""Tunix's own programs as shapes, lowered and compiled without a weight. Run by its own Python.

Imports nothing of gemma_grpo. The programs are `_train_step` of its trainer with its GRPO loss,
`compute_per_token_logps`, and `_decode_fn` of its sampler; nothing of them is copied here.
"""

import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import traced
import turns
from flax import nnx
from jax.experimental import topologies
from jax.interpreters import pxla
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.generate import sampler, tokenizer_adapter
from tunix.rl import algo_core, common, trainer
from tunix.rl.grpo import grpo_learner
from tunix.utils import sharding_utils
from worker import PACKAGES, PAD, Numbers, model_config

AXES = ("fsdp", "tp")
EOS = (1, 106)
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Settings:
    """What a program is lowered for; `sequences` are all rows, over all devices."""

    shape: dict
    dtype: str
    remat: str
    sequences: int
    prompt_length: int
    budget: int
    fsdp: int
    tp: int
    replicated: bool
    topology: str


def compile_program(program: str, hlo: str, **settings: Any) -> dict:
    """Compile one of PROGRAMS; its HLO goes to a file, its figures come back."""
    given = Settings(**settings)
    mesh = _mesh(given)
    if given.topology != "cpu":
        _place_activations(replicated=given.replicated)
    with mesh:
        function, arguments, donated = PROGRAMS[program](given, mesh)
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"fits": False, "why": " ".join(str(error).split())[:300]} | _versions()
    memory = executable.memory_analysis()
    with open(hlo, "w") as file:
        file.write(executable.as_text())
    return {
        "fits": True,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "compile_wall": time.perf_counter() - wall,
        "compile_cpu": time.process_time() - cpu,
    } | _versions()


def count_flops(program: str, turns: int, **settings: Any) -> dict:
    """Matmul FLOPs of one run, with this many turns of the decode loop."""
    given = Settings(**settings)
    function, arguments, _ = PROGRAMS[program](given, _mesh(given))
    counted = traced.matmul_flops(jax.jit(function).trace(*arguments), turns=turns)
    return {"flops": counted} | _versions()


def _versions() -> dict:
    return {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}


def _mesh(given: Settings) -> Mesh:
    if given.topology == "cpu":
        devices = jax.devices()
    else:
        os.environ.update(_ENVIRONMENT)
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=given.topology, chips_per_host_bounds=(2, 4, 1)
        ).devices
    return Mesh(np.array(devices).reshape(given.fsdp, given.tp), AXES)


def _place_activations(*, replicated: bool) -> None:
    """Tunix places no activation while this process has only a CPU; here the TPU is elsewhere."""

    def shard(x: jax.Array, axes: tuple, eager: bool = False) -> jax.Array:
        spec = PartitionSpec("fsdp") if replicated else PartitionSpec(*axes)
        mesh = pxla.thread_resources.env.physical_mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    sharding_utils.shard = shard


def _model(given: Settings, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    from tunix.models.gemma3 import model as gemma3

    config = model_config(given.shape, remat=given.remat, dtype=given.dtype)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0))))
    return graphdef, _placed(state, mesh, replicated=given.replicated)


def _placed(state: nnx.State, mesh: Mesh, *, replicated: bool = False) -> nnx.State:
    """Shapes with the places that Tunix's own annotations give them."""

    def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec | None) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if replicated or spec is None else spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, state, nnx.get_partition_spec(state))


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)


def _train(given: Settings, mesh: Mesh) -> tuple[Callable, tuple, tuple]:
    """Its train step, jitted as `PeftTrainer.jit_train_and_eval_step` does."""
    graphdef, state = _model(given, mesh)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b1=0.9, b2=0.95))
    make = lambda state: nnx.Optimizer(nnx.merge(graphdef, state), optimizer, wrt=nnx.Param)
    optimizer_graphdef, optimizer_state = nnx.split(nnx.eval_shape(make, state))
    optimizer_state = _placed(optimizer_state, mesh, replicated=given.replicated)
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
        prompt_ids=_rows(mesh, (B, S)),
        prompt_mask=_rows(mesh, (B, S), "bool"),
        completion_ids=_rows(mesh, (B, T)),
        completion_mask=_rows(mesh, (B, T), "bool"),
        advantages=_rows(mesh, (B,), "float32"),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )

    def step(state, optimizer_state, example):
        model = nnx.merge(graphdef, state)
        optimizer = nnx.merge(optimizer_graphdef, optimizer_state)
        out = its._train_step(model, optimizer, example)
        return out, nnx.state(model), nnx.state(optimizer)

    return step, (state, optimizer_state, example), (1,)


def _logps(given: Settings, mesh: Mesh) -> tuple[Callable, tuple, tuple]:
    """Its log-probs without gradient: the reference's, and the old ones."""
    graphdef, state = _model(given, mesh)
    prompts = _rows(mesh, (given.sequences, given.prompt_length))
    completions = _rows(mesh, (given.sequences, given.budget))

    def logps(state, prompts, completions):
        return common.compute_per_token_logps(
            graphdef, state, prompts, completions, pad_id=PAD, eos_id=EOS[0]
        )

    return logps, (state, prompts, completions), ()


def _decode(given: Settings, mesh: Mesh) -> tuple[Callable, tuple, tuple]:
    """Its decode loop."""
    its, leaves, sampling = _sampler(given, mesh)
    return its._decode_fn, (leaves, sampling), (1,)


def _prefill(given: Settings, mesh: Mesh) -> tuple[Callable, tuple, tuple]:
    """Its prefill, and the first token."""
    its, leaves, sampling = _sampler(given, mesh)
    prefill = lambda leaves, sampling: its._prefill_fn(leaves, sampling, None, echo=False)
    return prefill, (leaves, sampling), (1,)


def _sampler(given: Settings, mesh: Mesh) -> tuple[sampler.Sampler, list, sampler._SamplingState]:
    """Its sampler, the weights as it holds them, and its state. The cache's place is the
    compiler's choice, as it is for Tunix."""
    graphdef, state = _model(given, mesh)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    B, L = given.sequences, given.prompt_length + given.budget
    sizes = given.shape["num_layers"], given.shape["num_kv_heads"], given.shape["head_dim"]
    its = object.__new__(sampler.Sampler)
    its._transformer_graphdef, its._flattened_transformer_state = graphdef, leaves
    its._supports_decode_only_last_token = False
    its.tokenizer = tokenizer_adapter.TokenizerAdapter(Numbers())
    its.cache_config = sampler.CacheConfig(L, *sizes)
    its.eos_ids = np.array(EOS)

    def rows(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _rows(mesh, leaf.shape, leaf.dtype) if given.replicated else leaf

    num_layers, num_kv_heads, head_dim = sizes
    empty = lambda: sampler._init_cache(num_layers, L, B, num_kv_heads, head_dim, given.dtype)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    sampling = sampler._SamplingState(
        decoding_step=scalar,
        token_buffer=rows(jax.ShapeDtypeStruct((B, L), jnp.int32)),
        positions=rows(jax.ShapeDtypeStruct((B, L), jnp.int32)),
        cache=jax.tree.map(rows, jax.eval_shape(empty)),
        done=rows(jax.ShapeDtypeStruct((B,), jnp.bool_)),
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
    return its, leaves, sampling


PROGRAMS = {"train": _train, "logps": _logps, "decode": _decode, "prefill": _prefill}

if __name__ == "__main__":
    turns.serve({"compile": compile_program, "flops": count_flops})
