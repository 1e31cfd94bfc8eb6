"""The first command on a new device: every op of `kernels/` against its reference, there.

python -m gemma_grpo.verify_kernels              tables of errors; exit status 1 if one is off

Hidden states and embedding are bfloat16 (their products are exact in float32, on any backend) and
drawn from a seed; the references are plain float32 jax. An op that draws is held to the log-prob
that the reference gives the same word, and to drawing the reference's word in nearly every row:
rounding may turn a tie.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from gemma_grpo import cli
from gemma_grpo.kernels import block_draw, packed_attention
from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.fused_sampling import reference as fused_reference
from gemma_grpo.kernels.lm_head_logps import lm_head_logps
from gemma_grpo.kernels.lm_head_logps import reference as logps_reference
from gemma_grpo.kernels.packed_attention import reference as attention_reference
from gemma_grpo.kernels.truncated_sampling import reference as truncated_reference
from gemma_grpo.kernels.truncated_sampling import truncated_sampling
from gemma_grpo.kernels.truncated_sampling.cases import TRUNCATIONS
from gemma_grpo.model import CONFIGS, Gemma3Config

TOLERANCE = 2e-3  # log-probs of order 10: float32 sums of 262 144 terms, in any order
GRADIENT_TOLERANCE = 2e-2  # relative to the largest: softmax in bfloat16 before its product
SAME_WORDS = 0.95  # of the rows, at least


@dataclass(frozen=True)
class Finding:
    """One comparison: the largest error, and what it may be."""

    op: str
    setting: str
    quantity: str
    error: float
    allowed: float

    @property
    def passes(self) -> bool:
        """NaN does not."""
        return self.error <= self.allowed


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: tyro.cli(verify, args=arguments))


def verify(size: Literal["nano", "270m", "1b"] = "nano", rows: int = 64, seed: int = 0) -> int:
    """Compare every op with its reference on the device present.

    Args:
        size: of the model whose head is taken; 1b is what a TPU should be asked.
        rows: hidden states.
        seed: of everything drawn.

    Returns:
        0 if all are within tolerance, else 1.
    """
    cli.check_tpu()
    device, config = jax.devices()[0], CONFIGS[f"gemma3-{size}"]
    V, D = config.vocab_size, config.embed_dim
    print(f"{device.device_kind}, jax {jax.__version__}, {size}: V {V}, D {D}, {rows} rows")
    print(f"{'op':20}{'setting':16}{'quantity':24}{'error':>10}{'allowed':>10}")
    findings = [*compare_all(V, D, rows, seed), *compare_attention(config, seed)]
    for found in findings:
        verdict = "" if found.passes else "  OFF"
        print(
            f"{found.op:20}{found.setting:16}{found.quantity:24}{found.error:10.1e}"
            f"{found.allowed:10.1e}{verdict}"
        )
    return 0 if all(found.passes for found in findings) else 1


def compare_all(V: int, D: int, rows: int, seed: int) -> Iterator[Finding]:
    """Every op on one drawn head."""
    hidden_key, head_key, ids_key, draw_key = jax.random.split(jax.random.key(seed), 4)
    hidden_BD = jax.random.normal(hidden_key, (rows, D), jnp.bfloat16)
    embedding_VD = (3 * D**-0.5 * jax.random.normal(head_key, (V, D))).astype(jnp.bfloat16)
    keys_B = jax.random.split(draw_key, rows)
    for temperature in (0.0, 0.7, 1.0):
        yield from compare_fused(hidden_BD, embedding_VD, keys_B, temperature)
    for name in TRUNCATIONS:
        yield from compare_truncated(hidden_BD, embedding_VD, keys_B, name)
    ids_B = jax.random.randint(ids_key, (rows,), 0, V)
    yield from compare_logps(hidden_BD, embedding_VD, ids_B)


def compare_fused(hidden_BD, embedding_VD, keys_B, temperature: float) -> Iterator[Finding]:
    """Words, and the log-probs of the words drawn."""
    settings = dict(temperature=temperature)
    ids_B, logps_B = jax.jit(lambda *a: fused_sampling(*a, **settings))(
        hidden_BD, embedding_VD, keys_B
    )
    own_ids_B, _ = fused_reference.fused_sampling(hidden_BD, embedding_VD, keys_B, **settings)
    expected_B, _, _ = logps_reference.lm_head_logps(
        hidden_BD, embedding_VD, ids_B, temperature=temperature or 1.0
    )
    setting = f"T = {temperature}"
    yield _other_words("fused_sampling", setting, ids_B, own_ids_B)
    yield Finding("fused_sampling", setting, "log-prob", _largest(logps_B, expected_B), TOLERANCE)


def compare_truncated(hidden_BD, embedding_VD, keys_B, name: str) -> Iterator[Finding]:
    """Words, kept masses, and the log-probs where the words are the same."""
    truncation, temperature = TRUNCATIONS[name], 0.8
    settings = truncation._asdict() | dict(temperature=temperature)
    drawn = jax.jit(lambda *a: truncated_sampling(*a, **settings))(hidden_BD, embedding_VD, keys_B)
    logits_BV = hidden_BD.astype(jnp.float32) @ embedding_VD.astype(jnp.float32).T / temperature
    noise = block_draw.noise(keys_B, len(embedding_VD))
    ids_B, logps_B, full_B, mass_B = truncated_reference.draw_truncated(
        logits_BV, *noise, truncation
    )
    op, same = "truncated_sampling", np.asarray(drawn.ids == ids_B)
    yield _other_words(op, name, drawn.ids, ids_B)
    for quantity, ours, theirs in (
        ("log-prob, truncated", drawn.logps, logps_B),
        ("log-prob, full", drawn.full_logps, full_B),
        ("kept mass", drawn.kept_mass, mass_B),
    ):
        error = _largest(np.asarray(ours)[same], np.asarray(theirs)[same])
        yield Finding(op, name, quantity, error, TOLERANCE)


def compare_logps(hidden_BD, embedding_VD, ids_B) -> Iterator[Finding]:
    """Values, and the gradients of both sides."""
    op, setting = "lm_head_logps", "T = 0.9"
    ours = lambda h, e: lm_head_logps(h, e, ids_B, temperature=0.9)
    theirs = lambda h, e: logps_reference.lm_head_logps(h, e, ids_B, temperature=0.9)
    for name, value, expected in zip(
        ("log-prob", "logsumexp", "entropy"),
        jax.jit(ours)(hidden_BD, embedding_VD),
        jax.jit(theirs)(hidden_BD, embedding_VD),
        strict=True,
    ):
        yield Finding(op, setting, name, _largest(value, expected), TOLERANCE)
    gradient = lambda f: jax.jit(jax.grad(lambda h, e: f(h, e)[0].sum(), (0, 1)))
    pairs = zip(
        gradient(ours)(hidden_BD, embedding_VD),
        gradient(theirs)(hidden_BD, embedding_VD),
        strict=True,
    )
    for name, (value, expected) in zip(("hidden states", "embedding"), pairs, strict=True):
        expected = np.asarray(expected, np.float32)
        error = _largest(value, expected) / float(np.abs(expected).max())
        yield Finding(op, setting, f"gradient, {name}", error, GRADIENT_TOLERANCE)


def compare_attention(config: Gemma3Config, seed: int) -> Iterator[Finding]:
    """The result, and all gradients, of two groups of three completions behind left-padded prompts.
    Only a TPU has a form of its own here; elsewhere the reference meets itself."""
    op, S, T = "packed_attention", 300, 400
    lengths_B = np.array([400, 1, 300, 17, 128, 256])
    is_kept = np.arange(T) < lengths_B[:, None]
    rows_X, slots_X = (np.append(x, np.zeros(9, int)) for x in np.nonzero(is_kept))
    is_token_X = np.arange(len(rows_X)) < lengths_B.sum()
    who = [jnp.asarray(x) for x in (rows_X, slots_X, is_token_X, np.array([S, 130]))]
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    shapes = (len(rows_X), N, H), *[(len(rows_X), K, H)] * 2, *[(2, S, K, H)] * 2
    *operands, weights_XNH = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), 6), (*shapes, shapes[0]), strict=True
        )
    )
    for window in (128, None):
        settings = dict(num_rows=len(lengths_B), window=window)
        law = lambda *a, settings=settings: attention_reference.packed_attention(
            *a, *who, **settings, scale=H**-0.5
        )

        def ours(q, k, v, *of_prompts, settings=settings, law=law):
            mixed = packed_attention.packed_attention(
                *(q[None], k[None], v[None], *of_prompts),
                packed_attention.sight(*who, num_prompt_slots=S, **settings),
                scale=H**-0.5,
                elsewhere=lambda q, k, v: law(q[0], k[0], v[0], *of_prompts)[None].astype(q.dtype),
            )
            return mixed[0]

        @partial(jax.jit, static_argnums=0)
        def all_of(form, operands):
            mixed, back = jax.vjp(form, *operands)
            return mixed, *back(weights_XNH.astype(mixed.dtype))

        names = (
            "result",
            *(f"gradient, {side}" for side in ("q", "k", "v", "prompt k", "prompt v")),
        )
        for name, value, expected in zip(
            names, all_of(ours, operands), all_of(law, operands), strict=True
        ):
            expected = np.asarray(expected, np.float32)
            error = _largest(value, expected) / float(np.abs(expected).max())
            yield Finding(op, f"window {window}", name, error, GRADIENT_TOLERANCE)


def _other_words(op: str, setting: str, ids_B: jax.Array, expected_B: jax.Array) -> Finding:
    share = float(np.mean(np.asarray(ids_B) != np.asarray(expected_B)))
    return Finding(op, setting, "rows with another word", share, 1 - SAME_WORDS)


def _largest(value, expected) -> float:
    """The largest absolute difference; of no values, NaN."""
    difference = np.asarray(value, np.float64) - np.asarray(expected, np.float64)
    return float(np.abs(difference).max(initial=0.0)) if difference.size else float("nan")


if __name__ == "__main__":
    sys.exit(main())
