"""Parameter trees: adapters and base, split and joined, casts to the compute dtype, and the key."""

from typing import Any

import jax

from gemma_grpo.model.lora import SUFFIX
from gemma_grpo.model.settings import check_seed

PRNG = "threefry2x32"  # named: JAX_DEFAULT_PRNG_IMPL may say rbg, whose draws depend on the devices


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
    """Two trees without a common leaf as one."""
    joined = dict(second)
    for name, value in first.items():
        joined[name] = join(value, second[name]) if name in second else value
    return joined


def in_dtype(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The parameters to compute with: a cast copy of the master weights, or themselves."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)
