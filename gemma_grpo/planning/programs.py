"""The programs of a run as shapes: what training and evaluation jit, lowered without any weights.

The functions are those that `train` calls, and the arguments are like its own, so that what is
compiled here is found again in the compilation cache. Left out are programs of single operations,
as JAX makes them of each one outside of a jitted function.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gemma_grpo import model as gemma3
from gemma_grpo import runtime, weights
from gemma_grpo.config import RunConfig, teacher_model
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation.config import GREEDY, SamplingConfig
from gemma_grpo.generation.rollout import RolloutConfig, make_rollout
from gemma_grpo.model import Gemma3Config, ModelConfig
from gemma_grpo.planning import batches
from gemma_grpo.runtime import LAYOUTS
from gemma_grpo.training import grpo, sft
from gemma_grpo.training import state as train_state
from gemma_grpo.training.update import UpdateConfig

Kind = Literal["rollout", "score", "update", "copy"]
# Names of programs.
OF_EVALUATION = ("reshard", "greedy", "sampled")
OF_STAGE = {
    "sft": ("sft update",),
    "grpo": ("reshard", "rollout", "advantages", "reference", "teacher", "old", "update"),
}


@dataclass(frozen=True)
class Program:
    """A jitted function and its arguments, each with its sharding.

    Attributes:
        resident: bytes on each device that are alive while it runs, beside its arguments.
        kind: what its work is counted by; "copy" multiplies no matrices.
        stage: whose batch an update or score takes.
        size: P and G, prompts of its batch and completions of each; 0 of a copy.
        static: arguments by keyword that it is compiled for.
        teacher: the architecture where the model is not the run's own but its teacher.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resident: int
    kind: Kind
    stage: batches.Stage = "grpo"
    size: tuple[int, int] = (0, 0)
    static: dict[str, Any] = field(default_factory=dict)
    teacher: Gemma3Config | None = None

    def trace(self) -> jax.stages.Traced:
        """Traced for the mesh's devices; `.lower()` and `.compile()` are the next steps."""
        return self.function.trace(*self.arguments, **self.static)


class SpecialIds(NamedTuple):
    """What a rollout knows of the tokenizer."""

    stop_ids: tuple[int, ...]
    pad_id: int


GEMMA_IDS = SpecialIds((1, 106), 0)  # <eos> and <end_of_turn>; <pad>


def model_of(settings: ModelConfig) -> tuple[Gemma3Config, SpecialIds]:
    """The architecture by its own name, or that of weights at hand, and the tokenizer's ids."""
    if settings.weights in gemma3.CONFIGS and settings.weights != weights.NANO:
        return gemma3.CONFIGS[settings.weights], GEMMA_IDS
    source = weights.open_source(settings.weights)
    tokenizer = runtime.load_tokenizer(settings, source)
    return source.config, SpecialIds(tokenizer.stop_ids, tokenizer.pad_id)


def model_config(where: str) -> Gemma3Config:
    """The architecture by its own name, or that of weights at hand."""
    return gemma3.CONFIGS[where] if where in gemma3.CONFIGS else weights.open_source(where).config


def teacher_of(run: RunConfig) -> Gemma3Config | None:
    """The architecture of the run's teacher, if it has one."""
    return model_config(teacher_model(run).weights) if run.has_teacher else None


def of_run(
    run: RunConfig,
    config: Gemma3Config,
    mesh: Mesh,
    ids: SpecialIds = GEMMA_IDS,
    stages: Sequence[str] | None = None,
) -> list[Program]:
    """Every program of `run`, each once: those of evaluation, then stage by stage. `state` makes a
    stage's state of weights; `reshard` makes the sampler's weights; `greedy` and `sampled` are the
    rollouts of evaluation; `own` that of own demonstrations; `sft update`; and those of a GRPO
    step, with its `advantages`.

    Args:
        stages: those still to be trained; None: all.
    """
    model, stages = _Model(run, config, mesh, ids), run.stage_list if stages is None else stages
    found = [_state(model)] if stages else []
    found += [_reshard(model), *_evaluators(model)]
    if "sft" in stages:
        found += [*_own_rollout(model), _sft_update(model)]
    if "grpo" in stages:
        rollout, *others = of_step(run, config, mesh, ids)
        found += [rollout, model.advantages(), *others]
    return [program for program in found if program.arguments[0]]  # nothing to reshard: none


def of_step(
    run: RunConfig, config: Gemma3Config, mesh: Mesh, ids: SpecialIds = GEMMA_IDS
) -> list[Program]:
    """What one GRPO step of `run` executes on the devices, in order: `rollout`; `reference`,
    `teacher` and `old`, if the step needs those log-probs; `update`."""
    model, settings, stage = _Model(run, config, mesh, ids), run.model, run.grpo
    trainer = model.trainer()
    state = jax.eval_shape(
        train_state.make_init(model.master, trainer.optimizer, mesh), model.master
    )
    state = _fsdp(mesh, state)
    reference = _fsdp(mesh, _cast(model.master, settings.dtype) if stage.loss.beta > 0 else {})
    # All are scored before any log-probs join the packs.
    packs, size = model.packs("grpo"), batches.size(run, "grpo")
    scored = packs
    of_state, of_reference = _bytes_on_each(state), _bytes_on_each(reference)
    rollout = model.rollout(size, SamplingConfig(temperature=stage.temperature))
    programs = [
        Program("rollout", *rollout, model.held + of_state + of_reference, "rollout", size=size)
    ]
    if stage.loss.beta > 0:
        arguments = (reference, model.frozen, packs)
        beside = model.held + of_state
        programs.append(Program("reference", trainer.score, arguments, beside, "score", size=size))
        scored = _with_logps(scored, "ref_logps")
    if teacher := model.teacher:
        arguments = (teacher.params, {}, packs)
        beside = model.held - _bytes_on_each(teacher.params) + of_state + of_reference
        score = trainer.score_teacher
        programs.append(
            Program("teacher", score, arguments, beside, "score", size=size, teacher=teacher.config)
        )
        scored = _with_logps(scored, "teacher_logps")
    if stage.num_iterations > 1:
        arguments = (state.params, model.frozen, packs)
        beside = model.held + of_state - _bytes_on_each(state.params) + of_reference
        programs.append(Program("old", trainer.score, arguments, beside, "score", size=size))
        scored = _with_logps(scored, "old_logps")
    arguments = (state, model.frozen, scored)
    beside = model.held + of_reference
    programs.append(Program("update", trainer.update, arguments, beside, "update", size=size))
    return programs


class _Teacher(NamedTuple):
    config: Gemma3Config
    graphdef: nnx.GraphDef
    params: gemma3.Params  # shapes, as `runtime.load_teacher` places them


class _Model:
    """The arrays of a run's model as shapes with shardings, and what programs are made with.

    Attributes:
        master: what is trained, float32, as training keeps it.
        sampling: the same as a rollout reads it.
        frozen: the rest, in the dtype computed in.
        teacher: that is distilled, if any.
        base: bytes on each device of what the run began with, the teacher included.
        held: the same and, in GRPO, what the stage began with.
    """

    def __init__(self, run: RunConfig, config: Gemma3Config, mesh: Mesh, ids: SpecialIds):
        self.run, self.mesh, self.ids = run, mesh, ids
        self.layout = LAYOUTS[run.model.rollout_layout]
        self.graphdef, shapes = gemma3.abstract(config, run.model.lora)
        adapter, base = gemma3.partition(shapes)
        trained, frozen = (adapter, base) if run.model.lora.rank else (shapes, {})
        self.master = _fsdp(mesh, _cast(trained, "float32"))
        self.frozen = _replicated(mesh, _cast(frozen, run.model.dtype))
        self.places = meshes.named_shardings(mesh, self.layout.specs(trained))
        self.sampling = meshes.with_shardings(_cast(trained, run.model.dtype), self.places)
        self.teacher, config = None, teacher_of(run)
        if config is not None:
            graphdef, shapes = gemma3.abstract(config)
            params = _fsdp(mesh, _cast(shapes, run.model.dtype))
            self.teacher = _Teacher(config, graphdef, params)
        self.base = _bytes_on_each(self.master)
        self.base += _bytes_on_each(self.teacher.params) if self.teacher else 0
        self.held = self.base + (len(run.stage_list) - 1) * _bytes_on_each(self.master)

    def packs(self, stage: batches.Stage) -> tuple[dict, ...]:
        """Of an update."""
        rows = meshes.batch_sharding(self.mesh)
        of_host = batches.packs(self.run, stage, self.mesh.size)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), of_host
        )

    def trainer(self) -> grpo.Trainer:
        """Of GRPO."""
        settings, teacher = self.run.model, self.teacher and self.teacher.graphdef
        how = {"dtype": settings.dtype, "remat": settings.remat, "teacher": teacher}
        return grpo.make_trainer(self.run.grpo, self.graphdef, self.mesh, **how)

    def advantages(self) -> Program:
        """Of a GRPO step."""
        config, rows = self.run.grpo, meshes.batch_sharding(self.mesh)
        rewards = jax.ShapeDtypeStruct(batches.size(self.run, "grpo"), jnp.float32, sharding=rows)
        static = {"scale": config.scale, "baseline": config.baseline}
        arguments = (rewards, self.mesh)
        return Program("advantages", self.trainer().advantages, arguments, 0, "copy", static=static)

    def rollout(
        self, size: tuple[int, int], sampling: SamplingConfig, extra_length: int = 0
    ) -> tuple[Any, tuple]:
        """The program that samples a batch of `size`, and its arguments; its prompts may take
        `extra_length` tokens beside the problem's own."""
        settings, (P, G), rows = self.run.model, size, meshes.batch_sharding(self.mesh)
        config = RolloutConfig(
            num_generations=G,
            max_completion_length=settings.max_completion_length,
            stop_ids=self.ids.stop_ids,
            pad_id=self.ids.pad_id,
            sampling=sampling,
        )
        prompt_ids, prompt_mask = (
            jax.ShapeDtypeStruct(
                (P, settings.max_prompt_length + extra_length), dtype, sharding=rows
            )
            for dtype in (jnp.int32, jnp.bool_)
        )
        params = gemma3.join(self.sampling, self.frozen)
        key = jax.eval_shape(lambda: gemma3.random_key(0))  # without a sharding, as a run's key is
        rollout = make_rollout(self.graphdef, self.mesh, config, layout=self.layout)
        return rollout, (params, prompt_ids, prompt_mask, key)


def _state(model: _Model) -> Program:
    """Of both stages: their optimizers have states of the same shapes."""
    run = model.run
    config = run.sft if "sft" in run.stage_list else run.grpo
    optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
    make = train_state.make_init(model.master, optimizer, model.mesh)
    return Program("state", make, (model.master,), model.held, "copy")


def _reshard(model: _Model) -> Program:
    """At its worst in a GRPO step, beside the moments and a reference."""
    dtype, grpo_config = model.run.model.dtype, model.run.grpo
    moving = meshes.to_move(model.master, model.places, dtype)
    leaves = jax.tree.leaves(model.master)
    beside = 2 * _bytes_on_each(model.master) + model.held
    if grpo_config.loss.beta > 0:
        beside += _bytes_on_each(_fsdp(model.mesh, _cast(model.master, dtype)))
    return Program(
        "reshard",
        meshes.resharded,
        ([leaves[n] for n in moving],),
        beside,
        "copy",
        static={"dtype": dtype, "shardings": tuple(moving.values())},
    )


def _evaluators(model: _Model) -> list[Program]:
    config, beside = model.run.evaluation, model.base + _bytes_on_each(model.master)
    prompts = batches.evaluation_prompts(model.run, model.mesh.size)
    sizes = {"greedy": ((prompts["greedy"], 1), GREEDY)}
    if k := config.num_samples:
        sizes["sampled"] = (prompts["sampled"], k), config.sampling
    return [
        Program(name, *model.rollout(size, sampling), beside, "rollout", size=size)
        for name, (size, sampling) in sizes.items()
    ]


def _own_rollout(model: _Model) -> list[Program]:
    """Of own demonstrations, if they are sampled."""
    if not model.run.samples_demonstrations:
        return []
    own = model.run.sft.own
    size, sampling = (own.prompts, own.num_samples), SamplingConfig(temperature=own.temperature)
    rollout = model.rollout(size, sampling, own.extra_length)
    return [Program("own", *rollout, model.held, "rollout", stage="sft", size=size)]


def _sft_update(model: _Model) -> Program:
    run, mesh = model.run, model.mesh
    how = UpdateConfig(run.model.dtype, run.model.remat)
    optimizer, update = sft.make_trainer(run.sft, model.graphdef, mesh, how)
    state = jax.eval_shape(train_state.make_init(model.master, optimizer, mesh), model.master)
    arguments = (_fsdp(mesh, state), model.frozen, model.packs("sft"))
    size = batches.size(run, "sft")
    return Program("sft update", update, arguments, model.base, "update", stage="sft", size=size)


def _replicated(mesh: Mesh, tree: Any) -> Any:
    return meshes.with_shardings(tree, jax.tree.map(lambda _: meshes.replicated(mesh), tree))


def _fsdp(mesh: Mesh, tree: Any) -> Any:
    return meshes.with_shardings(tree, meshes.fsdp_shardings(mesh, tree))


def _bytes_on_each(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _cast(shapes: gemma3.Params, dtype: str) -> gemma3.Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def _with_logps(packs: tuple[dict, ...], name: str) -> tuple[dict, ...]:
    return tuple(of_shape | {name: of_shape["sampler_logps"]} for of_shape in packs)
