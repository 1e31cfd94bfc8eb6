"""The layers around attention: RMSNorm, RoPE and the gated MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from gemma_grpo.kernels.matmul import precision_of
from gemma_grpo.model import lora
from gemma_grpo.model.settings import NO_LORA, LoRAConfig


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale), computed in float32 whatever the input's dtype.

    Zhang & Sennrich, arXiv 1910.07467, eq. 4; Gemma stores the gain minus one, so it starts at 0.
    """

    def __init__(self, dim: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
        gain = 1.0 + self.scale[...].astype(jnp.float32)
        return (normed * gain.reshape((1,) * (x.ndim - 1) + gain.shape)).astype(x.dtype)


def project(
    x: Float[Array, "... I"], weight: Float[Array, "I O"], dtype: DTypeLike | None = None
) -> Float[Array, "... O"]:
    """x @ weight, in the dtype of both or in `dtype`, with the leading axes flattened: the weight's
    gradient is then one plain matmul, where XLA's CPU backend would transpose a three-axis operand
    through memory first."""
    flat = x.reshape(-1, x.shape[-1])
    out = jnp.matmul(
        flat, weight, precision=precision_of(x.dtype, weight.dtype), preferred_element_type=dtype
    )
    return out.reshape(*x.shape[:-1], -1)


def adapted(
    x_BLI: Float[Array, "B L I"],
    weight_IO: Float[Array, "I O"],
    adapter: lora.LoRA | None,
    keys_BL: Key[Array, "B L"] | None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B L O"]:
    """x @ weight, plus the adapter's output if there is one, in x's dtype or in `dtype`. The sum is
    rounded once: added to a rounded x @ weight, a small adapter would be lost."""
    if adapter is None:
        return project(x_BLI, weight_IO, dtype)
    out_BLO = project(x_BLI, weight_IO, jnp.float32) + adapter(x_BLI, keys_BL)
    return out_BLO.astype(dtype or x_BLI.dtype)


class GatedMLP(nnx.Module):
    """down(gelu(gate(x)) * up(x)): GeGLU with the tanh approximation.

    Shazeer, arXiv 2002.05202, eq. 6.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        lora_config: LoRAConfig = NO_LORA,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal()
        self.gate = nnx.Param(init(rngs.params(), (embed_dim, hidden_dim)))
        self.up = nnx.Param(init(rngs.params(), (embed_dim, hidden_dim)))
        self.down = nnx.Param(init(rngs.params(), (hidden_dim, embed_dim)))
        self.gate_lora = lora.make(embed_dim, hidden_dim, "mlp.gate", lora_config, rngs)
        self.up_lora = lora.make(embed_dim, hidden_dim, "mlp.up", lora_config, rngs)
        self.down_lora = lora.make(hidden_dim, embed_dim, "mlp.down", lora_config, rngs)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        keys_BL: Key[Array, "B L"] | None = None,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "B L D"]:
        """The output, in x's dtype or in `dtype`. `keys_BL`: dropout keys of the tokens, for
        adapters in training."""
        gate_BLF = adapted(x_BLD, self.gate[...], self.gate_lora, keys_BL)
        up_BLF = adapted(x_BLD, self.up[...], self.up_lora, keys_BL)
        # In float32: bfloat16 would round the constants of the tanh approximation.
        gelu_BLF = jax.nn.gelu(gate_BLF.astype(jnp.float32), approximate=True)
        inner_BLF = gelu_BLF.astype(x_BLD.dtype) * up_BLF
        return adapted(inner_BLF, self.down[...], self.down_lora, keys_BL, dtype)


def rope_table(
    positions_BL: Int[Array, "B L"], *, head_dim: int, base: float, scale: float = 1.0
) -> tuple[Float[Array, "B L h"], Float[Array, "B L h"]]:
    """Sine and cosine of position / scale * base^(-2i/H), for i < h = H/2, in float32.

    Su et al., arXiv 2104.09864, eq. 15.
    """
    exponent_h = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency_h = base**-exponent_h / scale
    angle_BLh = positions_BL[..., None].astype(jnp.float32) * frequency_h[None, None]
    return jnp.sin(angle_BLh), jnp.cos(angle_BLh)


def rotate(
    x_BLNH: Float[Array, "B L N H"],
    sin_BLh: Float[Array, "B L h"],
    cos_BLh: Float[Array, "B L h"],
) -> Float[Array, "B L N H"]:
    """Rotate each pair (i, i + H/2) of a head by its angle.

    Gemma pairs the two halves of a head, not neighbouring entries as the paper does.
    """
    sin, cos = sin_BLh[:, :, None], cos_BLh[:, :, None]
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLNH.dtype)
