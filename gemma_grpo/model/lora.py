"""Low-rank adapters beside projections: the module, and the merge into a base.

Hu et al., arXiv 2106.09685, eq. 3: h = W x + (alpha / r) B A x, with W frozen. The paper's weights
are [out, in]; here `a` is [in, r] and `b` [r, out]: h = x W + (alpha / r) (x a) b.

In a parameter tree an adapter is beside its weight, under the weight's name + "_lora".
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from gemma_grpo.kernels.matmul import precision_of
from gemma_grpo.model.settings import TARGETS, LoRAConfig

SUFFIX = "_lora"


class LoRA(nnx.Module):
    """One adapter: scale * dropout(x) a b, zero at initialization.

    `a` is uniform in ±1/sqrt(in), as in PEFT (a Kaiming uniform of slope sqrt(5)); `b` is 0.
    """

    def __init__(self, in_dim: int, out_dim: int, name: str, config: LoRAConfig, rngs: nnx.Rngs):
        bound = in_dim**-0.5
        shape = (in_dim, config.rank)
        self.a = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((config.rank, out_dim)))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.stream = TARGETS.index(name)  # adapters of one block drop independently

    def __call__(
        self, x: Float[Array, "B L I"], keys_BL: Key[Array, "B L"] | None
    ) -> Float[Array, "B L O"]:
        """The adapter's part of the output, in float32.

        Args:
            keys_BL: a dropout key for each token; None drops nothing.
        """
        if keys_BL is not None and self.dropout > 0:
            kept_of_token = lambda key: jax.random.bernoulli(
                jax.random.fold_in(key, self.stream), 1 - self.dropout, x.shape[2:]
            )
            kept = jax.vmap(jax.vmap(kept_of_token))(keys_BL)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        a, b = self.a[...], self.b[...]
        precision = precision_of(x.dtype, a.dtype, b.dtype)
        inner = jnp.matmul(x.reshape(-1, x.shape[-1]), a, precision=precision)
        out = jnp.matmul(inner, b, precision=precision, preferred_element_type=jnp.float32)
        return (out * self.scale).reshape(*x.shape[:-1], -1)


def make(in_dim: int, out_dim: int, name: str, config: LoRAConfig, rngs: nnx.Rngs) -> LoRA | None:
    """The adapter of the projection `name`, or None where the config gives it none."""
    return LoRA(in_dim, out_dim, name, config, rngs) if name in config.chosen else None


def merge_adapter(adapter: dict[str, Any], base: dict[str, Any], *, scale: float) -> dict[str, Any]:
    """The base with the adapters merged into its weights: W + scale * a b, in float32, then in W's
    dtype. A tree without adapters, which gives the same model.

    Args:
        adapter: of `partition`.
        base: the frozen weights; projections are [layer, in..., out...].
        scale: alpha / rank.
    """
    merged = dict(base)
    for name, value in adapter.items():
        if name.endswith(SUFFIX):
            weight = base[name.removesuffix(SUFFIX)]
            a, b = (value[side].astype(jnp.float32) for side in "ab")
            # A TPU's default precision would round both factors to bfloat16.
            product = jnp.einsum("lir,lro->lio", a, b, precision="highest")
            delta = scale * product.reshape(weight.shape)
            merged[name.removesuffix(SUFFIX)] = (weight + delta).astype(weight.dtype)
        else:
            merged[name] = merge_adapter(value, base[name], scale=scale)
    return merged
