"""What both stages and evaluation share of a run: the model's graph, the tokenizer, the devices,
the budgets. Knows no stage."""

from dataclasses import dataclass

from flax import nnx
from jax.sharding import Mesh

from gemma_grpo import mesh as meshes
from gemma_grpo.tokenizer import Tokenizer


@dataclass(frozen=True)
class Runtime:
    """How the model is run.

    Attributes:
        graphdef: of the model; parameters are given apart.
        tokenizer: the model's own.
        mesh: devices along the data axis.
        instruction: put before every question; "" for none.
        max_prompt_length: S, tokens.
        max_completion_length: T, tokens, stop token included.
        dtype: computed in; master weights are float32 regardless.
        logits_chunk: tokens whose logits exist at a time in training; 0 for all.
        remat: recompute blocks in the backward pass.
        seed: that everything random in the run follows from.
    """

    graphdef: nnx.GraphDef
    tokenizer: Tokenizer
    mesh: Mesh
    instruction: str
    max_prompt_length: int
    max_completion_length: int
    dtype: str
    logits_chunk: int
    remat: bool
    seed: int

    def check_rows(self, sizes: dict[str, int]) -> None:
        """Raises UserError if one of the named sizes does not split over the devices."""
        for name, size in sizes.items():
            meshes.check_divisible(self.mesh, name=name, size=size)
