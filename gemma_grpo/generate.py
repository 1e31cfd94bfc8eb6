"""The generation command: completions of one prompt by a run's model or a weights file.

python -m gemma_grpo.generate RUN_OR_WEIGHTS --prompt "What is 12 + 7?" [--temperature 1 --num 4]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from gemma_grpo import cli, collect, padding, pipeline
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError
from gemma_grpo.mesh import data_mesh


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: tyro.cli(_generate, args=arguments, description=__doc__))


def _generate(
    run_or_weights: tyro.conf.Positional[Path],
    prompt: str,
    num: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Complete a prompt.

    Args:
        run_or_weights: a run directory (its last finished stage) or a gemma3-nano safetensors file.
        prompt: the user's turn; the chat marks are put around it.
        num: completions.
        temperature: 0 takes the likeliest token each time.
        top_k: sample from the so many likeliest tokens; 0 from all.
        top_p: sample from the smallest set of likeliest tokens with this mass; 1 from all.
        seed: of the draw.
        json_output: print one JSON line a completion, with its log-prob, instead of the text.
    """
    if num < 1:
        raise UserError(f"--num {num}: must be at least 1")
    run = cli.trained(run_or_weights)
    runtime, params = pipeline.load_model(run.model, seed=seed)
    runtime = replace(runtime, mesh=data_mesh(jax.devices()[:1]))
    sampler = collect.make_sampler(
        runtime, num_generations=num, temperature=temperature, top_k=top_k, top_p=top_p
    )
    encoded = padding.encode_prompts(
        [Problem(prompt, answer="")],
        runtime.tokenizer,
        instruction=runtime.instruction,
        max_prompt_length=runtime.max_prompt_length,
    )
    ids, mask = padding.pad_left(
        encoded, length=runtime.max_prompt_length, pad_id=runtime.tokenizer.pad_id
    )
    drawn = jax.device_get(sampler.rollout(params, ids, mask, jax.random.key(seed)))
    for row in range(num):
        kept = drawn.completion_mask[row]
        text = runtime.tokenizer.decode(drawn.completion_ids[row][kept].tolist())
        if json_output:
            logp = float(np.sum(drawn.sampler_logps[row][kept]))
            line = {"completion": text, "logp": logp, "stopped": bool(drawn.stopped[row])}
            print(json.dumps(line, ensure_ascii=False))
        else:
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
