"""A model small enough to run in a blink, and prompts for it; every feature of Gemma 3 in use."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_grpo import model
from gemma_grpo.devices import mesh
from gemma_grpo.model import NO_LORA, Gemma3Config, LoRAConfig
from gemma_grpo.runtime import Runtime
from gemma_grpo.text import padding
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights.assets import NANO_TOKENIZER

TINY = Gemma3Config(
    vocab_size=40,
    num_layers=2,
    embed_dim=16,
    hidden_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_window=5,
    query_pre_attn_scalar=6.0,
    pattern=2,
)
PAD, BOS = 0, 2


def tiny_model(seed: int = 0, scale: float = 3.0) -> tuple[nnx.GraphDef, model.Params]:
    """A graph and random parameters; `scale` sharpens the output, so that tokens really differ."""
    graphdef, params = drawn_model(TINY, seed=seed)
    return graphdef, params | {"embedding": params["embedding"] * scale}


def tiny_runtime(
    num_devices: int = 1,
    *,
    instruction: str = "",
    max_prompt_length: int = 48,
    max_completion_length: int = 9,
) -> Runtime:
    """The tiny model with nano's tokenizer, in float32."""
    return Runtime(
        graphdef=tiny_model()[0],
        frozen={},
        lora=NO_LORA,
        tokenizer=Tokenizer(NANO_TOKENIZER),
        mesh=mesh.data_mesh(jax.devices()[:num_devices]),
        instruction=instruction,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        dtype="float32",
        remat="none",
        seed=0,
    )


def drawn_model(
    config: Gemma3Config, lora_config: LoRAConfig = NO_LORA, *, seed: int = 0
) -> tuple[nnx.GraphDef, model.Params]:
    """As a model is born, but for adapters that do something. NumPy draws it: JAX would compile
    dozens of programs for it, in every process."""
    graphdef, shapes = model.abstract(config, lora_config)
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        deviation = 0.0 if path[-1].key == "scale" else config.embed_dim**-0.5
        return jnp.asarray(rng.normal(0, deviation, leaf.shape), jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_adapter(
    config: Gemma3Config, lora_config: LoRAConfig, *, scale: float = 0.3, seed: int = 0
) -> model.Params:
    """Adapters that do something, their b drawn too."""
    shapes, _ = model.partition(model.abstract(config, lora_config)[1])
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), shapes
    )


def tiny_prompts(num: int, *, length: int = 8, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts of different lengths, with their mask."""
    rng = np.random.default_rng(seed)
    rows = [
        [BOS, *rng.integers(4, TINY.vocab_size, rng.integers(1, length)).tolist()]
        for _ in range(num)
    ]
    return padding.pad_left(rows, length=length, pad_id=PAD)


def host(tree):
    """The arrays of a tree as numpy."""
    return jax.tree.map(np.asarray, tree)
