"""The ops of `kernels/` and the plain XLA forms they replace, head included. Times nothing.

Plain forms: all logits and `jax.random.categorical`; the reference's sort and `categorical`;
`log_softmax` of all logits.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.lm_head_logps import lm_head_logps
from gemma_grpo.kernels.lm_head_logps import reference as logps_reference
from gemma_grpo.kernels.truncated_sampling import reference as truncated_reference
from gemma_grpo.kernels.truncated_sampling import truncated_sampling
from gemma_grpo.kernels.truncated_sampling.cases import TRUNCATIONS
from gemma_grpo.planning import topology

OPS = ("fused_sampling", "truncated_sampling", "lm_head_logps")
SIDES = ("ours", "plain")
TRUNCATED = ("top-k", "top-p", "top-k, top-p")  # those that the plain form sorts for


class Sides(NamedTuple):
    """Functions of (hidden_XD, embedding_VD, keys_X), or of token ids in place of keys."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]


class Shapes(NamedTuple):
    """Of one call: vocab_size, embed_dim, rows or tokens, and the dtype of what is multiplied."""

    vocab_size: int
    embed_dim: int
    rows: int
    dtype: str


def sides_of(op: str) -> dict[str, Sides]:
    """By setting."""
    return {"fused_sampling": _fused, "truncated_sampling": _truncated, "lm_head_logps": _logps}[
        op
    ]()


def lowered(
    op: str, setting: str, side: Literal["ours", "plain"], shapes: Shapes, where: str
) -> jax.stages.Lowered:
    """A side for one chip of a topology, not compiled yet."""
    function = getattr(sides_of(op)[setting], side)
    on_chip = NamedSharding(Mesh(np.array(topology.devices(where)[:1]), ("chip",)), PartitionSpec())
    described = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on_chip)
    V, D, X, dtype = shapes
    arguments = described(X, D, dtype=dtype), described(V, D, dtype=dtype)
    if op == "lm_head_logps":
        return jax.jit(function).lower(*arguments, described(X, dtype=jnp.int32))
    with_keys = lambda h, e, raw_keys: function(h, e, jax.random.wrap_key_data(raw_keys))
    return jax.jit(with_keys).lower(*arguments, described(X, 2, dtype=jnp.uint32))


def _fused() -> dict[str, Sides]:
    return {
        "T = 1": Sides(
            lambda h, e, keys: fused_sampling(h, e, keys, temperature=1.0),
            lambda h, e, keys: _plain_draw(_plain_logits(h, e), keys),
        )
    }


def _truncated() -> dict[str, Sides]:
    return {
        name: Sides(
            lambda h, e, keys, t=TRUNCATIONS[name]: truncated_sampling(
                h, e, keys, temperature=1.0, **t._asdict()
            ),
            lambda h, e, keys, t=TRUNCATIONS[name]: _plain_draw(
                truncated_reference.truncate(_plain_logits(h, e), t), keys
            ),
        )
        for name in TRUNCATED
    }


def _logps() -> dict[str, Sides]:
    ours = lambda h, e, ids: lm_head_logps(h, e, ids).logps
    plain = lambda h, e, ids: logps_reference.lm_head_logps(h, e, ids)[0]
    gradient = lambda f, sides: jax.grad(lambda h, e, ids: f(h, e, ids).sum(), sides)
    return {
        "forward": Sides(ours, plain),
        "forward and backward, frozen embedding": Sides(gradient(ours, 0), gradient(plain, 0)),
        "forward and backward, trained embedding": Sides(
            gradient(ours, (0, 1)), gradient(plain, (0, 1))
        ),
    }


def _plain_logits(hidden_BD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    return jnp.einsum("bd,vd->bv", hidden_BD, embedding_VD, preferred_element_type=jnp.float32)


def _plain_draw(logits_BV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    ids_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    logps_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return ids_B, jnp.take_along_axis(logps_BV, ids_B[:, None], axis=-1)
