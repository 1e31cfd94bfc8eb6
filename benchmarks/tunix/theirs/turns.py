"""What the sides' processes share: requests, the clock, names of weights, what a compiler says.

Imports nothing of ours, because Tunix's process imports this file too. A request is (name,
arguments), its answer a dictionary, both pickled with their arrays.
"""

import importlib.metadata
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

# Our name -> Tunix's, of what both keep once and of what Tunix keeps layer by layer.
ONCE = {"embedding": "embedder/input_embedding", "final_norm.scale": "final_norm/scale"}
OF_A_LAYER = {
    "attention.o_proj": "attn/attn_vec_einsum/w",
    "attention.q_norm.scale": "attn/_query_norm/scale",
    "attention.k_norm.scale": "attn/_key_norm/scale",
    "mlp.gate": "mlp/gate_proj/kernel",
    "mlp.up": "mlp/up_proj/kernel",
    "mlp.down": "mlp/down_proj/kernel",
    "pre_attention_norm.scale": "pre_attention_norm/scale",
    "post_attention_norm.scale": "post_attention_norm/scale",
    "pre_mlp_norm.scale": "pre_ffw_norm/scale",
    "post_mlp_norm.scale": "post_ffw_norm/scale",
}


class Server:
    """Answers requests by the methods of `side` that have their names."""

    def __init__(self, side: object):
        self.side, self.connection = side, Connection(int(sys.argv[1]))
        Path("/proc/self/oom_score_adj").write_text("800")  # if memory runs out, this process ends

    def serve(self, until: str = "", answer: dict | None = None) -> dict:
        """Give the answer that is due, if any, and answer up to the first request named `until`:
        its arguments, whose answer is due then. Where a request fails, or none can come any more,
        the process ends."""
        try:
            if answer is not None:
                self.connection.send(answer)
            while True:
                name, arguments = self.connection.recv()
                if name == until:
                    return arguments
                self.connection.send(getattr(self.side, name)(**arguments))
        except Exception:
            traceback.print_exc()
            os._exit(1)  # a library's threads may still be waiting


def start() -> Callable[[], dict[str, float]]:
    """Starts the clock, and returns what reads it: `wall` and `cpu` seconds (all threads of this
    process), `peak`, the most resident bytes meanwhile, and, where JAX's device reports it,
    `device_peak`, the most bytes on it so far."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    wall, cpu = time.perf_counter(), time.process_time()

    def read() -> dict[str, float]:
        reading = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        status = Path("/proc/self/status").read_text()
        reading["peak"] = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
        of_device = jax.devices()[0].memory_stats()
        return reading | ({"device_peak": of_device["peak_bytes_in_use"]} if of_device else {})

    return read


def versions(*packages: str) -> dict[str, str]:
    """Of the packages installed here."""
    return {name: importlib.metadata.version(name) for name in packages}


def first_moment(optimizer: Any) -> np.ndarray:
    """Adam's first moment of the final norm: the gradient that an optimizer saw, if it was its
    first."""
    return np.asarray(optax.tree.get(optimizer, "mu")["final_norm"]["scale"], np.float32)


def to_ours(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name ("layers.attention.q_proj") -> array, of Tunix's ("layers/0/attn/q_einsum/w").

    Ours are stacked over layers with the embedding axis first; Tunix has an array for each layer,
    the head axis first, keys and values in one.
    """
    num_layers = len({name.split("/")[1] for name in theirs if name.startswith("layers/")})
    stacked = lambda name: np.stack([theirs[f"layers/{n}/{name}"] for n in range(num_layers)])
    ours = {name: theirs[its] for name, its in ONCE.items()}
    ours |= {f"layers.{name}": stacked(its) for name, its in OF_A_LAYER.items()}
    k, v = np.moveaxis(stacked("attn/kv_einsum/w"), 1, 0)
    for name, heads in {"q": stacked("attn/q_einsum/w"), "k": k, "v": v}.items():
        ours[f"layers.attention.{name}_proj"] = np.ascontiguousarray(heads.swapaxes(1, 2))
    return ours


def compiled(traced: jax.stages.Traced) -> dict:
    """What the compiler says of a program, for its devices: whether it `fits`; where it does not
    `why`; else bytes a device (`arguments`, `temporaries`, `peak`), the `compile_cpu` seconds of
    all threads, and the optimised program's text (`hlo`)."""
    lowered = traced.lower()
    cpu = time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "why": " ".join(str(error).split())[:300]}
    figures = {"fits": True, "compile_cpu": time.process_time() - cpu}
    memory = executable.memory_analysis()
    return figures | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hlo": executable.as_text(),
    }
