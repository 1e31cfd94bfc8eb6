"""gemma_grpo: teach Gemma 3 to show its work, first by SFT and then by GRPO, in JAX.

The flow of one training step, and where each arrow is made:

    problems -> prompts       data/, text/prompts.py
    -> tokens                 text/tokenizer.py, text/padding.py
    -> rollout                generation/rollout.py
    -> rewards                rewards/
    -> advantages             objective/advantages.py
    -> loss                   objective/losses.py
    -> update                 training/grpo.py, training/grpo_update.py

Letters that array names end in, one per axis:

    P prompts   G generations per prompt   B = P*G rows, group-major: row b = p*G + g
    S prompt slots (left-padded)   T completion slots (right-padded)   L = S + T   C cache slots
    D embed_dim   F hidden_dim   N query heads   K kv heads   R = N/K   H head_dim   V vocab

From Python (docs/api.md) the names of `__all__` are there; they are loaded when they are used.
Everything else may change.

At the top are the commands (`python -m gemma_grpo.X`) and what ties a run together. Imports point
down, from each line to those below it (tests/test_rooms.py):

    train evaluate generate export rescore    the commands
    ablation pretrain plan verify_kernels    commands too
    api         what the commands do, for Python
    view        the page of a run, and its command
    pipeline    a run, stage by stage
    planning    will it fit, and how long will it take
    cli         what the commands share
    config presets    a run's settings
    training      the two stages and the update they share
    evaluation    how good, how sure
    generation    problems to completions
    runtime       the loaded model, its tokenizer and its devices
    rewards       what a completion earns
    weights       checkpoints of others, in and out
    records       what a run leaves on disk
    devices       the mesh, and the processes on it
    model         Gemma 3
    objective     advantages and losses, pure math
    text          text to padded ids and back
    data          problems
    errors kernels    the user's errors; one folder for each fused op
"""

import importlib
from typing import Any

_HOME = {  # where each public name is; nothing is imported before it is used
    "fit": "api",
    "resume": "api",
    "load": "api",
    "Result": "api",
    "preset": "presets",
    "RunConfig": "config",
    "Problem": "data.problem",
    "Sample": "rewards",
    "batch_reward": "rewards",
    "UserError": "errors",
    "InterruptedRunError": "errors",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
