"""How the embedding and the MLPs are laid out when the model runs: replicated, or tensor-parallel.

In both layouts a device has its own rows of every activation and cache, and all attention weights.
In the tensor-parallel one it has only a shard of 1/n of each MLP's hidden units and of the
vocabulary: the rows of all devices are gathered before the MLP, and its partial sums are
reduce-scattered back to their rows after it (Megatron-LM, Shoeybi et al., arXiv 1909.08053, section
3, with the rows split in between as in Korthikanti et al., arXiv 2205.05198, section 4.2.2). The
FLOPs stay the same, and a device reads 1/n of these weights, which is faster where few rows run at
a time: in decoding.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from gemma_grpo.errors import UserError
from gemma_grpo.kernels import block_draw
from gemma_grpo.model.config import Gemma3Config

# The sharded axis of each array. Block weights are [layer, in, out]. Adapters are sharded like
# their weights, on the side of the hidden units.
_SHARDED_AXIS = {
    "embedding": 0,
    "layers.mlp.gate": 2,
    "layers.mlp.gate_lora.b": 2,
    "layers.mlp.up": 2,
    "layers.mlp.up_lora.b": 2,
    "layers.mlp.down": 1,
    "layers.mlp.down_lora.a": 1,
}


@dataclass(frozen=True)
class Layout:
    """All weights replicated: a device runs its rows without communication.

    The B rows are this device's own; the R rows are those of all devices that share the sharded
    weights, in order. Here the two are the same.

    Attributes:
        axis_name: the mesh axis that the vocabulary is sharded over; None where it is replicated.
        partial_dtype: dtype of a device's partial sums, for `scatter`; None: the model's own.
    """

    axis_name: str | None = None
    partial_dtype: ClassVar[DTypeLike | None] = None

    def gather(self, own: Shaped[Array, "B *rest"]) -> Shaped[Array, "R *rest"]:
        """All rows, from the own rows of each device."""
        return own

    def scatter(self, partial: Float[Array, "R *rest"]) -> Float[Array, "B *rest"]:
        """Own rows of the sum over the devices of their partial sums."""
        return partial

    def own(self, everyone: Shaped[Array, "R *rest"]) -> Shaped[Array, "B *rest"]:
        """Own rows, from all rows, which every device has: the inverse of `gather`."""
        return everyone

    def lookup(
        self, embedding_VD: Float[Array, "V D"], ids: Int[Array, "R ..."]
    ) -> Float[Array, "R ... D"]:
        """This device's partial sum of the ids' embeddings, for `scatter`."""
        return embedding_VD[ids] if embedding_VD.dtype == jnp.float32 else _rows(embedding_VD, ids)

    def specs(self, params: PyTree) -> PyTree:
        """A `PartitionSpec` for each array (or shape) of `params`."""
        return jax.tree.map(lambda _: PartitionSpec(), params)

    def check(self, config: Gemma3Config, num_devices: int) -> None:
        """Raises UserError if a model of this shape does not divide over the devices."""


REPLICATED = Layout()


@jax.custom_vjp
def _rows(embedding_VD, ids):
    """embedding_VD[ids]; each row's gradient is summed in float32 and rounded once: in bfloat16 a
    sum stops growing after a few hundred similar terms."""
    return embedding_VD[ids]


def _rows_forward(embedding_VD, ids):
    return embedding_VD[ids], (embedding_VD, ids)


def _rows_backward(kept, gradient):
    embedding_VD, ids = kept
    num_ids, D = ids.size, embedding_VD.shape[1]
    # `unique` fills up with the smallest id, whose extra terms are 0.
    occurring, which = jnp.unique(ids, return_inverse=True, size=num_ids)
    terms = gradient.reshape(num_ids, D).astype(jnp.float32)
    sums = jnp.zeros((num_ids, D), jnp.float32).at[which.reshape(-1)].add(terms)
    zeros_VD = jnp.zeros_like(embedding_VD)
    return zeros_VD.at[occurring].add(sums.astype(embedding_VD.dtype)), None


_rows.defvjp(_rows_forward, _rows_backward)


@dataclass(frozen=True)
class TensorParallel(Layout):
    """MLPs and embedding sharded. All but `specs` and `check` is for use inside `shard_map`."""

    axis_name: str
    partial_dtype = jnp.float32  # bfloat16 would round every partial sum and every addition

    def gather(self, own):
        return jax.lax.all_gather(own, self.axis_name, tiled=True)

    def scatter(self, partial):
        return jax.lax.psum_scatter(partial, self.axis_name, tiled=True)

    def own(self, everyone):
        num_own = everyone.shape[0] // jax.lax.axis_size(self.axis_name)
        first = jax.lax.axis_index(self.axis_name) * num_own
        return jax.lax.dynamic_slice_in_dim(everyone, first, num_own)

    def lookup(self, embedding_VD, ids):
        shard_size = len(embedding_VD)
        here = ids - jax.lax.axis_index(self.axis_name) * shard_size
        here = jnp.where(here < 0, shard_size, here)  # a negative index would count from the end
        return embedding_VD.at[here].get(mode="fill", fill_value=0)

    def specs(self, params):
        def spec(path, _):
            axis = _SHARDED_AXIS.get(jax.tree_util.keystr(path, simple=True, separator="."))
            return (
                PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, self.axis_name)
            )

        return jax.tree.map_with_path(spec, params)

    def check(self, config, num_devices):
        if num_devices == 1:
            return
        for name, size, unit in (
            ("hidden_dim", config.hidden_dim, 1),
            ("vocab_size", config.vocab_size, block_draw.BLOCK),
        ):
            if size % (num_devices * unit):
                raise UserError(
                    f"model.rollout_layout=tensor_parallel: {name}={size} is not a multiple of "
                    f"{num_devices * unit}, as {num_devices} devices need; use data"
                )
