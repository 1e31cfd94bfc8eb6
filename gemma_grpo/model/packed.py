"""The tokens of [B, T] rows one behind another as one row [1, X], and back: with their padding
(`Rows`) or without it (`Packed`). Knows no layer, loss or prompt.

All that is done to each token alone (projections, MLP, norms, the head) is done to the packed row.
Attention has a kernel for it on TPU (`kernels/packed_attention`); elsewhere it sees [B, T] rows.
The idea is that of "unpadding": Zeng et al., "Boosting Distributed Training Performance of the
Unpadded BERT Model", arXiv 2208.08124.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@dataclass(frozen=True)
class Rows:
    """Every slot in its order, X = B*T.

    Attributes:
        shape: (B, T).
    """

    shape: tuple[int, int]

    def pack(self, x_BT: Shaped[Array, "B T *rest"]) -> Shaped[Array, "1 X *rest"]:
        """As one row."""
        return x_BT.reshape(1, -1, *x_BT.shape[2:])

    def unpack(self, x_1X: Shaped[Array, "1 X *rest"]) -> Shaped[Array, "B T *rest"]:
        """Undoes `pack` on tokens."""
        return x_1X.reshape(*self.shape, *x_1X.shape[2:])

    def firsts(self) -> Int[Array, " B"]:
        """The place of each row's first slot; X if it holds no token."""
        B, T = self.shape
        return jnp.arange(B) * T

    def between(self, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """`attend`, a function of [B, T, ...] arrays, as one of packed arrays."""
        return lambda *packed: self.pack(attend(*map(self.unpack, packed)))


@dataclass(frozen=True)
class Packed(Rows):
    """Where each token of the rows stands in the packed row, and the other way round.

    Attributes:
        slots: b*T + t of each packed token; B*T where the packed row is empty.
        places: for each slot z = b*T + t the place of its token; X where it holds none.
    """

    slots: Int[Array, " X"]
    places: Int[Array, " Z"]

    @classmethod
    def of(cls, slots_X: Int[Array, " X"], rows: tuple[int, int]) -> "Packed":
        """From the slots alone, which must differ from each other where they are below B*T."""
        X, Z = slots_X.shape[0], rows[0] * rows[1]
        places_Z = jnp.full(Z, X).at[slots_X].set(jnp.arange(X), mode="drop")
        return cls(rows, slots_X, places_Z)

    def pack(self, x_BT: Shaped[Array, "B T *rest"]) -> Shaped[Array, "1 X *rest"]:
        """Slots without a token are left out; 0 where the packed row is empty."""
        return _take(x_BT.reshape(-1, *x_BT.shape[2:]), self.slots, self.places)[None]

    def unpack(self, x_1X: Shaped[Array, "1 X *rest"]) -> Shaped[Array, "B T *rest"]:
        """Undoes `pack` on tokens; 0 in all other slots."""
        return _take(x_1X[0], self.places, self.slots).reshape(*self.shape, *x_1X.shape[2:])

    def firsts(self) -> Int[Array, " B"]:
        return self.places.reshape(self.shape)[:, 0]


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[index], 0 where the index is beyond the end. `inverse` is the same going back: by it the
    gradient is such a gather too, where autodiff would add up row by row."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _forward(x, index, inverse):
    return _take(x, index, inverse), (index, inverse)


def _backward(kept, cotangent):
    index, inverse = kept
    return _take(cotangent, inverse, index), None, None


_take.defvjp(_forward, _backward)
