"""The matmuls that a run's programs do on a TPU are as precise as its dtype."""

from dataclasses import replace

import jax
import pytest
from jax.extend import core

from gemma_grpo import presets
from gemma_grpo.devices import mesh
from gemma_grpo.model.config import CONFIGS
from gemma_grpo.model.settings import LoRAConfig
from gemma_grpo.planning import programs

TWO_LAYERS = replace(CONFIGS["gemma3-1b"], num_layers=2)
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
CHANGES = {
    "all weights, in packs": {"pack_tokens": 1024},
    "adapters, padded": {"pack_tokens": 0, "lora": LoRAConfig(rank=4)},
}


def matmuls(jaxpr):
    """The precision of each matmul, those of kernels and branches too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                    yield from matmuls(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_matmul_of_a_float32_run_is_at_the_highest_precision(v5e, change):
    run = presets.preset("gemma3-1b")
    lengths = {"max_prompt_length": 128, "max_completion_length": 128}
    model = replace(run.model, dtype="float32", lora=change.get("lora", run.model.lora), **lengths)
    run = replace(
        run,
        model=model,
        evaluation=replace(run.evaluation, top_k=50),
        sft=replace(run.sft, pack_tokens=change["pack_tokens"]),
        grpo=replace(
            run.grpo,
            loss=replace(run.grpo.loss, beta=0.1),
            pack_tokens=change["pack_tokens"],
        ),
    )
    traced = 0
    for program in programs.of_run(run, TWO_LAYERS, mesh.data_mesh(v5e)):
        found = list(matmuls(program.trace().jaxpr.jaxpr))
        assert all(precision == HIGHEST for precision in found), program.name
        traced += len(found)
    assert traced > 50
