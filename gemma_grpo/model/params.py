"""Parameter trees: split into adapters and base, joined, cast; and the random key."""

from typing import Any

import jax

from gemma_grpo.model.lora import SUFFIX
from gemma_grpo.model.settings import check_seed

PRNG = "threefry2x32"  # whatever JAX_DEFAULT_PRNG_IMPL is: rbg's draws depend on the devices


def random_key(seed: int) -> jax.Array:
    """The key of a random seed. Raises as `check_seed`."""
    check_seed(seed)
    return jax.random.key(seed, impl=PRNG)


def partition(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree in two: the adapters, and the base. `join` is its inverse."""
    adapter, base = {}, {}
    for name, value in params.items():
        if name.endswith(SUFFIX):
            adapter[name] = value
        elif isinstance(value, dict):
            inner, base[name] = partition(value)
            if inner:
                adapter[name] = inner
        else:
            base[name] = value
    return adapter, base


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two trees that share no leaf, merged into one."""
    joined = dict(second)
    for name, value in first.items():
        joined[name] = join(value, second[name]) if name in second else value
    return joined


def in_dtype(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The parameters cast to the compute dtype; the same arrays where they have it already."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)
