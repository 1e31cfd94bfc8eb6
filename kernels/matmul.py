"""Matmuls that multiply float32 operands in float32 on every device."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def precision_of(*dtypes: DTypeLike) -> jax.lax.Precision | None:
    """The highest precision if all operands are float32, else JAX's default.

    By default a TPU rounds float32 operands to bfloat16, and a GPU to TF32. bfloat16 is exact by
    default; the TPU's kernel compiler refuses it at any other precision.
    """
    is_float32 = all(dtype == jnp.float32 for dtype in dtypes)
    return jax.lax.Precision.HIGHEST if is_float32 else None


def einsum(equation: str, a: jax.Array, b: jax.Array) -> Float[Array, "..."]:
    """`jnp.einsum` of two operands, accumulated and returned in float32."""
    precision = precision_of(a.dtype, b.dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
