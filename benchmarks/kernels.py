"""Each op of `kernels/` against plain XLA on the device present, head included.

python -m benchmarks.kernels [--op fused_sampling] [--size 270m]

A row an op and setting. The two sides take turns (ABAB); `ratio` is the plain median over the
op's. The plain forms: all logits and `jax.random.categorical`; the reference's sort and
`categorical`; `log_softmax` of all logits. Temporaries are the compiler's, in MB.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from benchmarks.timing import print_row
from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.lm_head_logps import lm_head_logps
from gemma_grpo.kernels.lm_head_logps import reference as logps_reference
from gemma_grpo.kernels.truncated_sampling import reference as truncated_reference
from gemma_grpo.kernels.truncated_sampling import truncated_sampling
from gemma_grpo.kernels.truncated_sampling.cases import TRUNCATIONS
from gemma_grpo.model import CONFIGS

Pair = tuple[str, Callable[..., Any], Callable[..., Any]]


def main(
    op: Literal["all", "fused_sampling", "truncated_sampling", "lm_head_logps"] = "all",
    size: Literal["nano", "270m", "1b"] = "270m",
    dtype: Literal["float32", "bfloat16"] = "float32",
    rows: int = 16,
    tokens: int = 512,
    repeats: int = 5,
) -> None:
    """Time the ops.

    Args:
        op: which, or all.
        size: of the model whose head is taken.
        dtype: of hidden states and embedding.
        rows: of a decode step.
        tokens: of the log-probs.
        repeats: timed calls of each side, after one that warms up.
    """
    config = CONFIGS[f"gemma3-{size}"]
    V, D = config.vocab_size, config.embed_dim
    keys = jax.random.split(jax.random.key(0), 3)
    embedding_VD = (3 * D**-0.5 * jax.random.normal(keys[0], (V, D))).astype(dtype)
    for name, pairs, count in (
        ("fused_sampling", fused_pairs(), rows),
        ("truncated_sampling", truncated_pairs(), rows),
        ("lm_head_logps", logps_pairs(), tokens),
    ):
        if op not in ("all", name):
            continue
        hidden_XD = jax.random.normal(keys[1], (count, D), dtype)
        others = jax.random.split(keys[2], count)
        if name == "lm_head_logps":
            others = jax.random.randint(keys[2], (count,), 0, V)
        for setting, ours, plain in pairs:
            sides = [
                jax.jit(side).lower(hidden_XD, embedding_VD, others).compile()
                for side in (ours, plain)
            ]
            medians = interleaved_medians(sides, (hidden_XD, embedding_VD, others), repeats)
            print_row(
                benchmark="kernels",
                op=name,
                setting=setting,
                size=size,
                dtype=dtype,
                rows=count,
                ms={"ours": medians[0] * 1e3, "plain": medians[1] * 1e3},
                ratio=round(medians[1] / medians[0], 2),
                temporaries_mb=[
                    round(side.memory_analysis().temp_size_in_bytes / 1e6, 1) for side in sides
                ],
            )


def interleaved_medians(
    sides: list[Callable[..., Any]], arguments: tuple[Any, ...], repeats: int
) -> list[float]:
    """Median wall-clock seconds of each, taken in turns."""
    seconds = [[] for _ in sides]
    for _ in range(1 + repeats):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(side(*arguments))
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in seconds]


def _plain_logits(hidden_BD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    return jnp.einsum("bd,vd->bv", hidden_BD, embedding_VD, preferred_element_type=jnp.float32)


def _plain_draw(logits_BV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    ids_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    logps_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return ids_B, jnp.take_along_axis(logps_BV, ids_B[:, None], axis=-1)


def fused_pairs() -> Iterator[Pair]:
    """Drawing from all words."""
    yield (
        "T = 1",
        lambda h, e, keys: fused_sampling(h, e, keys, temperature=1.0),
        lambda h, e, keys: _plain_draw(_plain_logits(h, e), keys),
    )


def truncated_pairs() -> Iterator[Pair]:
    """Drawing from the kept ones."""
    for name in ("top-k", "top-p", "top-k, top-p"):
        truncation = TRUNCATIONS[name]
        yield (
            name,
            lambda h, e, keys, t=truncation: truncated_sampling(
                h, e, keys, temperature=1.0, **t._asdict()
            ),
            lambda h, e, keys, t=truncation: _plain_draw(
                truncated_reference.truncate(_plain_logits(h, e), t), keys
            ),
        )


def logps_pairs() -> Iterator[Pair]:
    """Forward, and forward and backward with the embedding frozen and trained."""
    ours = lambda h, e, ids: lm_head_logps(h, e, ids).logps
    plain = lambda h, e, ids: logps_reference.lm_head_logps(h, e, ids)[0]
    yield "forward", ours, plain
    for setting, sides in (("frozen embedding", 0), ("trained embedding", (0, 1))):
        gradient = lambda f, s=sides: jax.grad(lambda h, e, ids: f(h, e, ids).sum(), s)
        yield f"forward and backward, {setting}", gradient(ours), gradient(plain)


if __name__ == "__main__":
    tyro.cli(main)
