"""A model small enough to run in a blink, and prompts for it; every feature of Gemma 3 in use."""

import jax
import numpy as np
from flax import nnx

from gemma_grpo import model
from gemma_grpo.model import Gemma3Config
from gemma_grpo.text import padding

TINY = Gemma3Config(
    vocab_size=40,
    num_layers=3,
    embed_dim=16,
    hidden_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_window=5,
    query_pre_attn_scalar=6.0,
    pattern=3,
)
PAD, BOS = 0, 2


def tiny_model(seed: int = 0, scale: float = 3.0) -> tuple[nnx.GraphDef, model.Params]:
    """A graph and random parameters; `scale` sharpens the output, so that tokens really differ."""
    graphdef, params = model.split(model.Gemma3(TINY, rngs=nnx.Rngs(seed)))
    return graphdef, params | {"embedding": params["embedding"] * scale}


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
