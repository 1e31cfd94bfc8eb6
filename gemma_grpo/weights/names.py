"""The one table of names: our parameter tree against Hugging Face's `Gemma3ForCausalLM`, and the
change of layout each way.

Ours is a dotted path in the tree, with every layer in one array along a leading axis; theirs is one
tensor a layer. A projection of theirs is [out, in]; ours is [in, out] with the heads' axes apart.
Names and layouts of theirs: transformers' modeling_gemma3.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gemma_grpo.model import Gemma3Config, Params, abstract

LAYERS = "model.layers.{layer}."


@dataclass(frozen=True)
class Entry:
    """One leaf of our tree and what it is to them.

    Attributes:
        ours: dotted path.
        theirs: name of a tensor, with `{layer}` in it if each layer has one.
        in_axes: how many leading axes of a projection (of one layer, in our layout) are summed
            over; 0 is no projection, and its layout is theirs.
    """

    ours: str
    theirs: str
    in_axes: int = 0

    @property
    def stacked(self) -> bool:
        """Whether our leaf holds a tensor of each layer."""
        return "{layer}" in self.theirs

    def their_names(self, num_layers: int) -> list[str]:
        """The tensors of our leaf in their order along its leading axis; one where not stacked."""
        return [self.theirs.format(layer=i) for i in range(num_layers if self.stacked else 1)]

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one tensor of theirs, from that of one layer of ours."""
        if not self.in_axes:
            return tuple(shape)
        return math.prod(shape[self.in_axes :]), math.prod(shape[: self.in_axes])

    def to_ours(self, tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """One tensor of theirs as one layer of ours, of the given shape; a view."""
        return tensor.T.reshape(shape) if self.in_axes else tensor

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """One layer of ours as their tensor; the inverse of `to_ours`, a view."""
        if not self.in_axes:
            return array
        fan_out, fan_in = self.their_shape(array.shape)
        return array.reshape(fan_in, fan_out).T


TABLE = (
    Entry("embedding", "model.embed_tokens.weight"),
    Entry("layers.pre_attention_norm.scale", LAYERS + "input_layernorm.weight"),
    Entry("layers.attention.q_proj", LAYERS + "self_attn.q_proj.weight", in_axes=1),
    Entry("layers.attention.k_proj", LAYERS + "self_attn.k_proj.weight", in_axes=1),
    Entry("layers.attention.v_proj", LAYERS + "self_attn.v_proj.weight", in_axes=1),
    Entry("layers.attention.o_proj", LAYERS + "self_attn.o_proj.weight", in_axes=2),
    Entry("layers.attention.q_norm.scale", LAYERS + "self_attn.q_norm.weight"),
    Entry("layers.attention.k_norm.scale", LAYERS + "self_attn.k_norm.weight"),
    Entry("layers.post_attention_norm.scale", LAYERS + "post_attention_layernorm.weight"),
    Entry("layers.pre_mlp_norm.scale", LAYERS + "pre_feedforward_layernorm.weight"),
    Entry("layers.mlp.gate", LAYERS + "mlp.gate_proj.weight", in_axes=1),
    Entry("layers.mlp.up", LAYERS + "mlp.up_proj.weight", in_axes=1),
    Entry("layers.mlp.down", LAYERS + "mlp.down_proj.weight", in_axes=1),
    Entry("layers.post_mlp_norm.scale", LAYERS + "post_feedforward_layernorm.weight"),
    Entry("final_norm.scale", "model.norm.weight"),
)


def by_path(params: Params) -> dict[str, Any]:
    """The tree's leaves by dotted path, in the tree's order."""
    leaves = jax.tree.leaves_with_path(params)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def their_shapes(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of theirs for a model of these sizes, leaf by leaf of ours."""
    leaves = by_path(abstract(config)[1])
    return {
        name: entry.their_shape(leaves[entry.ours].shape[entry.stacked :])
        for entry in TABLE
        for name in entry.their_names(config.num_layers)
    }
