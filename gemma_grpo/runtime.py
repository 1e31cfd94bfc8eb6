"""What both stages and evaluation share of a run: the model's graph, its frozen weights, the
tokenizer, the devices, the budgets. Knows no stage."""

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_grpo import mesh as meshes
from gemma_grpo import model as gemma3
from gemma_grpo.model import WHOLE, Layout, LoRAConfig, Params, Remat
from gemma_grpo.tokenizer import Tokenizer
from gemma_grpo.train_state import in_dtype


@dataclass(frozen=True)
class Runtime:
    """How the model is run.

    Attributes:
        graphdef: of the model, adapters included; what is trained of its parameters is given apart.
        frozen: the rest of its parameters, in the dtype computed in: the base under adapters, or
            nothing where all weights are trained.
        lora: the adapters, if any.
        tokenizer: the model's own.
        mesh: devices along the data axis.
        instruction: put before every question; "" for none.
        max_prompt_length: S, tokens.
        max_completion_length: T, tokens, stop token included.
        dtype: computed in; master weights are float32 regardless.
        remat: see `model.forward_groups`.
        seed: that everything random in the run follows from.
        layout: of the weights while sampling.
    """

    graphdef: nnx.GraphDef
    frozen: Params
    lora: LoRAConfig
    tokenizer: Tokenizer
    mesh: Mesh
    instruction: str
    max_prompt_length: int
    max_completion_length: int
    dtype: str
    remat: Remat
    seed: int
    layout: Layout = WHOLE

    def full(self, params: Params) -> Params:
        """All parameters to sample with, in the dtype computed in: what is trained in its layout,
        each array moved once, and only where it does not lie so already; the frozen ones beside it
        (not copied)."""
        computing = in_dtype(params, self.dtype)
        places = meshes.places(self.mesh, self.layout.specs(computing))
        return gemma3.join(jax.device_put(computing, places), self.frozen)

    def dropout_keys(self, step: int, num_prompts: int) -> dict[str, np.ndarray]:
        """The batch's entry with which adapters drop inputs at `step`, or no entry without dropout:
        raw key words, a row for each prompt, so that they are split like any other rows."""
        if not self.lora.rank or not self.lora.dropout:
            return {}
        key = jax.random.fold_in(jax.random.key(self.seed + 1), step)
        return {"dropout_keys": np.asarray(jax.random.key_data(jax.random.split(key, num_prompts)))}

    def check_rows(self, sizes: dict[str, int]) -> None:
        """Raises UserError if one of the named sizes does not split over the devices."""
        for name, size in sizes.items():
            meshes.check_divisible(self.mesh, name=name, size=size)
