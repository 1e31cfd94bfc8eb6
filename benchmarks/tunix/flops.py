"""Matrix products of one GRPO step, both sides: operations as executed, counted before a compiler.

python -m benchmarks.tunix.flops [--model gemma3-1b]
needs the environment of `python -m benchmarks.tunix.install`

8 prompts x 8, 512 + 800 tokens, beta 0, mu 1, all weights trained, at the full budgets: one row of
the trace runs into them, and neither side drops rows or slots before the longest has ended. Parts:
the rollout (prefill and decode loop) and the update, without remat on either side, for what each
has to compute once.
"""

import dataclasses
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import tyro

from benchmarks.tunix import install
from benchmarks.tunix.sides import start_theirs
from gemma_grpo import mesh, presets, programs
from gemma_grpo import model as gemma3
from gemma_grpo.traced import matmul_flops


def main(model: str = "gemma3-1b", environment: Path | None = None) -> None:
    """Count, and print a row for each side and part.

    Args:
        model: architecture.
        environment: folder of Tunix's environment.
    """
    jax.config.update("jax_platforms", "cpu")
    run = presets.preset("gemma3-1b")
    run = replace(run, model=replace(run.model, remat=False, rollout_layout="data"))
    budget = run.model.max_completion_length
    made = programs.of_step(run, gemma3.CONFIGS[model], mesh.data_mesh(jax.devices()[:1]))
    ours = {one.name: matmul_flops(one.trace(), turns=budget) for one in made}
    settings = {
        "shape": dataclasses.asdict(gemma3.CONFIGS[model]),
        "dtype": run.model.dtype,
        "remat": "NONE",
        "sequences": run.grpo.prompts_per_step * run.grpo.num_generations,
        "prompt_length": run.model.max_prompt_length,
        "budget": budget,
        "fsdp": 1,
        "tp": 1,
        "replicated": False,
        "topology": "cpu",
    }
    with tempfile.TemporaryDirectory() as name:
        side = start_theirs(
            environment or install.default_folder(),
            devices=1,
            folder=Path(name),
            script="programs.py",
        )
        theirs = {
            program: side.call("flops", program=program, **settings)["flops"]
            for program in ("prefill", "decode", "train")
        }
        side.close()
    parts = {
        "rollout": (ours["rollout"], theirs["prefill"] + theirs["decode"]),
        "update": (ours["update"], theirs["train"]),
    }
    parts["step"] = tuple(map(sum, zip(*parts.values(), strict=True)))
    for part, (own, other) in parts.items():
        row = {"benchmark": "tunix/flops", "model": model, "part": part}
        row |= {name: settings[name] for name in ("sequences", "prompt_length", "budget", "remat")}
        print(json.dumps(row | {"ours": own, "tunix": other, "ratio": round(other / own, 2)}))


if __name__ == "__main__":
    tyro.cli(main)
