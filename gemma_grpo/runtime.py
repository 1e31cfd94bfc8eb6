"""A run's model as loaded: its graph, frozen weights, tokenizer and devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_grpo import model as gemma3
from gemma_grpo import weights
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.errors import UserError
from gemma_grpo.model import (
    REPLICATED,
    Layout,
    LoRAConfig,
    ModelConfig,
    Params,
    Remat,
    check_seed,
)
from gemma_grpo.text import prompts
from gemma_grpo.text.tokenizer import Tokenizer

# Most embedding rows without a token: Hugging Face's 4B and up have 262,208 for 262,144 tokens.
SURPLUS_ROWS = 64
LAYOUTS = {"data": gemma3.REPLICATED, "tensor_parallel": gemma3.TensorParallel(meshes.DATA)}


@dataclass(frozen=True)
class Teacher:
    """A model that is distilled; its sizes may differ from the student's.

    Attributes:
        graphdef: the model's graph, without adapters: these are merged into the weights.
        params: all parameters, in the student's compute dtype, sharded (FSDP).
    """

    graphdef: nnx.GraphDef
    params: Params


@dataclass(frozen=True)
class Runtime:
    """How the model is run.

    Attributes:
        graphdef: the model's graph, adapters included. The trained parameters are kept elsewhere.
        frozen: the other parameters, in the compute dtype: the base under adapters, or nothing if
            all weights are trained.
        lora: the adapters, if any.
        tokenizer: the model's own.
        mesh: devices along the data axis.
        instruction: put before every question; "" for none.
        max_prompt_length: S, tokens.
        max_completion_length: T, tokens, stop token included.
        dtype: the compute dtype; master weights are always float32.
        remat: see `model.forward_groups`.
        seed: of everything random in the run.
        layout: of the weights while sampling.
        teacher: the model that GRPO distils, if any.
    """

    graphdef: nnx.GraphDef
    frozen: Params
    lora: LoRAConfig
    tokenizer: Tokenizer
    mesh: Mesh
    instruction: str
    max_prompt_length: int
    max_completion_length: int
    dtype: str
    remat: Remat
    seed: int
    layout: Layout = REPLICATED
    teacher: Teacher | None = None

    def sampling_params(self, params: Params) -> Params:
        """All parameters to sample with, in the compute dtype: the trained ones resharded to the
        layout by a program on the devices, the frozen ones as they are (not copied)."""
        shardings = meshes.named_shardings(self.mesh, self.layout.specs(params))
        return gemma3.join(meshes.reshard(params, shardings, self.dtype), self.frozen)

    def encode_question(self, prompt: str) -> list[int]:
        """The ids of a question as a chat turn, with the instruction before it. Raises UserError
        for half a surrogate pair."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {prompt[:40]!r}: no text that UTF-8 can hold") from error
        return self.tokenizer.encode_prompt(self.question(prompt))

    def question(self, prompt: str) -> str:
        """The user's turn: the instruction, if any, on a line of its own before the prompt."""
        return prompts.question(self.instruction, prompt)

    def encode_prompts(
        self, problems: Sequence[prompts.Problem], *, kind: str = ""
    ) -> list[list[int]]:
        """Each problem's chat turn as ids. Raises UserError for one over the budget, and names it
        as a problem of this `kind`."""
        return prompts.encode_prompts(
            problems,
            self.tokenizer,
            instruction=self.instruction,
            max_prompt_length=self.max_prompt_length,
            kind=kind,
        )

    def encode_completions(self, problems: Sequence[prompts.Problem]) -> list[list[int]]:
        """Each worked solution as ids with its stop token. Raises UserError for one that is missing
        or over the budget."""
        return prompts.encode_completions(
            problems, self.tokenizer, max_completion_length=self.max_completion_length
        )

    @property
    def lengths(self) -> tuple[int, int]:
        """S and T, tokens."""
        return self.max_prompt_length, self.max_completion_length

    @property
    def key(self) -> jax.Array:
        """The key that all draws fold in."""
        return gemma3.random_key(self.seed)

    def dropout_keys(
        self, step: int, num_prompts: int, num_generations: int
    ) -> dict[str, np.ndarray]:
        """The batch's dropout keys for the adapters at `step`, none without dropout: raw key data,
        `dropout_keys` with a row per prompt and `completion_dropout_keys` with a row per
        completion. What a row drops does not depend on where it is computed."""
        if not self.lora.rank or not self.lora.dropout:
            return {}
        key = jax.random.fold_in(jax.random.key(self.seed + 1, impl=gemma3.PRNG), step)
        keys_P = jax.random.split(key, num_prompts)
        keys_B = jax.vmap(lambda key: jax.random.split(key, num_generations))(keys_P).reshape(-1)
        raw = lambda keys: np.asarray(jax.random.key_data(keys))
        return {"dropout_keys": raw(keys_P), "completion_dropout_keys": raw(keys_B)}

    def check_rows(self, sizes: dict[str, int]) -> None:
        """Raises UserError if one of the named sizes does not divide over the devices."""
        for name, size in sizes.items():
            meshes.check_divisible(self.mesh, name=name, size=size)


def load_model(
    settings: ModelConfig,
    *,
    seed: int,
    trained: Path | None = None,
    mesh: Mesh | None = None,
    source: weights.Source | None = None,
) -> tuple[Runtime, Params]:
    """The runtime, and the parameters to train: all, or the adapters alone.

    Args:
        settings: the base model, the adapters, how it is run.
        seed: of the runtime, and of fresh adapters.
        trained: file of trained parameters that a stage wrote; None takes the base's, or fresh
            adapters.
        mesh: the devices to run on; None takes all.
        source: the base model's checkpoint if it is open already; None opens it.

    Raises:
        UserError: files that are missing, damaged or of another model, a model that does not divide
            over the devices in its rollout layout, or a seed out of range.
    """
    check_seed(seed)
    source = weights.open_source(settings.weights) if source is None else source
    tokenizer = load_tokenizer(settings, source)
    graphdef, shapes = gemma3.abstract(source.config, settings.lora)
    adapter_shapes, base_shapes = gemma3.partition(shapes)
    mesh = meshes.data_mesh() if mesh is None else mesh
    layout = LAYOUTS[settings.rollout_layout]
    layout.check(source.config, mesh.size)
    trained_shapes = adapter_shapes if settings.lora.rank else shapes
    shardings = meshes.fsdp_shardings(mesh, trained_shapes)
    if trained is not None:
        params = weights.load(trained, meshes.with_shardings(trained_shapes, shardings))
    elif settings.lora.rank:
        # Placed on the mesh now: a stage's weights are read back with these shardings.
        fresh = gemma3.init_adapter(source.config, settings.lora, seed=seed)
        params = jax.tree.map(meshes.place, jax.device_get(fresh), shardings)
    else:
        params = weights.assemble(source, base_shapes, dtype="float32", sharding=shardings)
    frozen = {}
    if settings.lora.rank:
        frozen = weights.assemble(
            source, base_shapes, dtype=settings.dtype, sharding=meshes.replicated(mesh)
        )
    runtime = Runtime(
        graphdef=graphdef,
        frozen=frozen,
        lora=settings.lora,
        tokenizer=tokenizer,
        mesh=mesh,
        instruction=settings.instruction,
        max_prompt_length=settings.max_prompt_length,
        max_completion_length=settings.max_completion_length,
        dtype=settings.dtype,
        remat=settings.remat,
        seed=seed,
        layout=layout,
    )
    return runtime, params


def load_teacher(settings: ModelConfig, trained: Path | None, student: Runtime) -> Teacher:
    """A model to distil on the student's devices.

    Args:
        settings: its base model and adapters; the rest is taken from the student.
        trained: file of trained parameters that a stage wrote; None takes the base's.

    Raises:
        UserError: files that are missing, damaged or of another model, or a tokenizer that differs
            from the student's.
    """
    source = weights.open_source(settings.weights)
    tokenizer = load_tokenizer(settings, source)
    if difference := tokenizer.difference(student.tokenizer):
        raise UserError(
            f"{source.path}: a teacher must have the student's tokenizer, but {difference}"
        )
    graphdef, shapes = gemma3.abstract(source.config)
    shardings = meshes.fsdp_shardings(student.mesh, shapes)
    if trained is None:
        params = weights.assemble(source, shapes, dtype=student.dtype, sharding=shardings)
        return Teacher(graphdef, params)
    if not settings.lora.rank:
        stored = weights.load(trained, meshes.with_shardings(shapes, shardings))
        return Teacher(graphdef, gemma3.in_dtype(stored, student.dtype))
    adapters, _ = gemma3.partition(gemma3.abstract(source.config, settings.lora)[1])
    places = meshes.fsdp_shardings(student.mesh, adapters)
    merge = partial(gemma3.merge_adapter, scale=settings.lora.alpha / settings.lora.rank)
    merged = jax.jit(merge, out_shardings=shardings)(
        weights.load(trained, meshes.with_shardings(adapters, places)),
        weights.assemble(source, shapes, dtype="float32", sharding=shardings),
    )
    return Teacher(graphdef, gemma3.in_dtype(merged, student.dtype))


def write_model(
    out: Path,
    runtime: Runtime,
    params: Params,
    base: str,
    *,
    dtype: str = "float32",
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes the model as a Hugging Face folder, adapters merged into the weights.

    Args:
        out: the folder to make.
        runtime, params: of `load_model`, in float32: adapters are merged before rounding.
        base: the weights that the model began with.
        dtype: of the files: float32 (exactly what was trained), bfloat16 or float16.
        texts: further files by name.

    Raises:
        UserError: something is at `out` already, or it cannot be written.
    """
    lora = runtime.lora
    if lora.rank:
        params = gemma3.merge_adapter(params, runtime.frozen, scale=lora.alpha / lora.rank)
    sizes = weights.open_source(base).config
    tensors = weights.hf_tensors(params, sizes)
    weights.write_folder(
        out, tensors, sizes, dtype=np.dtype(dtype), tokenizer=runtime.tokenizer, texts=texts
    )


def hub_name(base: str) -> str:
    """The base's name on Hugging Face; "" if it is not known."""
    return weights.hub_name(weights.open_source(base))


def write_adapters(
    out: Path,
    runtime: Runtime,
    params: Params,
    base: str,
    *,
    texts: Mapping[str, str] | None = None,
) -> str | None:
    """Writes the adapters alone, in PEFT's format. Arguments and errors as for `write_model`.

    Returns:
        A warning if PEFT cannot load that base, or only on this machine.
    """
    source = weights.open_source(base)
    weights.write_adapter(out, params, runtime.lora, base=source, texts=texts)
    if not (source.path / "config.json").is_file():
        return (
            f"PEFT cannot load {source.path}: give it the same model's Hugging Face folder as base"
        )
    if weights.hub_name(source):
        return None
    return (
        f"adapter_config.json names a folder of this machine, {source.path}: elsewhere give PEFT "
        f"the base, as in {out / 'README.md'}"
    )


def load_tokenizer(settings: ModelConfig, source: weights.Source) -> Tokenizer:
    """The tokenizer of the settings, or else of the checkpoint. Raises UserError if it is missing
    or does not fit the embedding."""
    tokenizer = Tokenizer(settings.tokenizer or weights.tokenizer_path(source))
    if not 0 <= source.config.vocab_size - tokenizer.vocab_size <= SURPLUS_ROWS:
        raise UserError(
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} tokens, but {source.path} has "
            f"{source.config.vocab_size}; use the model's own tokenizer"
        )
    return tokenizer
