"""Every op of `kernels/` compared with its reference there, on the device present.

Hidden states and embedding are drawn from a seed, in bfloat16 by default: a product of two is exact
in float32 on any backend. The references are plain float32 JAX. For an op that draws tokens, its
log-probs are compared with the reference's of the same tokens, and the tokens must be the
reference's in nearly every row: rounding may decide a tie.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_grpo.kernels import block_draw, packed_attention
from gemma_grpo.kernels.fused_sampling import fused_sampling
from gemma_grpo.kernels.fused_sampling import reference as fused_reference
from gemma_grpo.kernels.lm_head_logps import lm_head_logps
from gemma_grpo.kernels.lm_head_logps import reference as logps_reference
from gemma_grpo.kernels.matmul import einsum
from gemma_grpo.kernels.packed_attention import reference as attention_reference
from gemma_grpo.kernels.truncated_sampling import reference as truncated_reference
from gemma_grpo.kernels.truncated_sampling import truncated_sampling
from gemma_grpo.kernels.truncated_sampling.cases import TRUNCATIONS
from gemma_grpo.model.config import Gemma3Config
from gemma_grpo.model.packed import Packed

TOLERANCE = 2e-3  # log-probs of order 10: float32 sums of 262 144 terms, in any order
# Relative to the largest: in bfloat16 softmax is rounded before its matmul.
GRADIENT_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
SAME_TOKENS = 0.95  # of the rows, at least


@dataclass(frozen=True)
class Finding:
    """One comparison: the largest error, and the error allowed."""

    op: str
    setting: str
    quantity: str
    error: float
    allowed: float

    @property
    def passes(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


def compare(config: Gemma3Config, rows: int, seed: int, dtype: str) -> Iterator[Finding]:
    """Compares every op, with the sizes of the model's head and attention.

    Args:
        rows: hidden states.
        seed: of the inputs and the draws.
        dtype: of the inputs, bfloat16 or float32.
    """
    yield from compare_head(config.vocab_size, config.embed_dim, rows, seed, dtype)
    yield from compare_attention(config, seed, dtype)


def compare_head(V: int, D: int, rows: int, seed: int, dtype: str) -> Iterator[Finding]:
    """Compares the ops of the head, on one random head."""
    hidden_key, head_key, ids_key, draw_key = jax.random.split(jax.random.key(seed), 4)
    hidden_BD = jax.random.normal(hidden_key, (rows, D), dtype)
    embedding_VD = (3 * D**-0.5 * jax.random.normal(head_key, (V, D))).astype(dtype)
    keys_B = jax.random.split(draw_key, rows)
    for temperature in (0.0, 0.7, 1.0):
        yield from compare_fused(hidden_BD, embedding_VD, keys_B, temperature)
    for name in TRUNCATIONS:
        yield from compare_truncated(hidden_BD, embedding_VD, keys_B, name)
    ids_B = jax.random.randint(ids_key, (rows,), 0, V)
    yield from compare_logps(hidden_BD, embedding_VD, ids_B)


def compare_fused(hidden_BD, embedding_VD, keys_B, temperature: float) -> Iterator[Finding]:
    """Compares tokens, and the log-probs of the tokens drawn."""
    ours = partial(fused_sampling, temperature=temperature)
    ids_B, logps_B = jax.jit(ours)(hidden_BD, embedding_VD, keys_B)
    own_ids_B, _ = fused_reference.fused_sampling(
        hidden_BD, embedding_VD, keys_B, temperature=temperature
    )
    expected_B, _, _ = logps_reference.lm_head_logps(
        hidden_BD, embedding_VD, ids_B, temperature=temperature or 1.0
    )
    setting = f"T = {temperature}"
    yield _other_tokens("fused_sampling", setting, ids_B, own_ids_B)
    yield Finding("fused_sampling", setting, "log-prob", _largest(logps_B, expected_B), TOLERANCE)


def compare_truncated(hidden_BD, embedding_VD, keys_B, name: str) -> Iterator[Finding]:
    """Compares tokens, kept masses, and log-probs where the tokens are the same."""
    truncation, temperature = TRUNCATIONS[name], 0.8
    settings = truncation._asdict() | dict(temperature=temperature)
    drawn = jax.jit(lambda *a: truncated_sampling(*a, **settings))(hidden_BD, embedding_VD, keys_B)
    float32 = hidden_BD.astype(jnp.float32), embedding_VD.astype(jnp.float32)
    logits_BV = einsum("bd,vd->bv", *float32) / temperature
    noise = block_draw.noise(keys_B, len(embedding_VD))
    ids_B, logps_B, full_B, mass_B = truncated_reference.draw_truncated(
        logits_BV, noise, truncation
    )
    op, same = "truncated_sampling", np.asarray(drawn.ids == ids_B)
    yield _other_tokens(op, name, drawn.ids, ids_B)
    for quantity, ours, theirs in (
        ("log-prob, truncated", drawn.logps, logps_B),
        ("log-prob, full", drawn.full_logps, full_B),
        ("kept mass", drawn.kept_mass, mass_B),
    ):
        error = _largest(np.asarray(ours)[same], np.asarray(theirs)[same])
        yield Finding(op, name, quantity, error, TOLERANCE)


def compare_logps(hidden_BD, embedding_VD, ids_B) -> Iterator[Finding]:
    """Compares values, and gradients by hidden states and by embedding."""
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
        allowed = GRADIENT_TOLERANCE[hidden_BD.dtype.name]
        yield Finding(op, setting, f"gradient, {name}", error, allowed)


def compare_attention(config: Gemma3Config, seed: int, dtype: str) -> Iterator[Finding]:
    """Compares the result and all gradients of a packed row of two groups: prompts of 300 and 130
    tokens, three completions each. Only a TPU has a kernel here; on other devices the reference is
    compared with itself."""
    op = "packed_attention"
    prompts, completions = (2, 300), (6, 400)
    prompt_mask_PS = jnp.arange(300)[None] >= 300 - jnp.array([[300], [130]])
    lengths_B = jnp.array([400, 1, 300, 17, 128, 256])
    completion_mask_BT = jnp.arange(400)[None] < lengths_B[:, None]
    held = jnp.concatenate([prompt_mask_PS.reshape(-1), completion_mask_BT.reshape(-1)])
    slots_X = jnp.append(jnp.flatnonzero(held), jnp.full(9, held.size))
    segments = Packed.of(slots_X, prompts, completions).segments(prompt_mask_PS, completion_mask_BT)
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    X = len(slots_X)
    shapes = (X, N, H), (X, K, H), (X, K, H), (X, N, H)
    *operands, weights_XNH = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(jax.random.split(jax.random.key(seed), 4), shapes, strict=True)
    )
    for window in (128, None):
        reference = lambda *qkv, window=window: attention_reference.packed_attention(
            *qkv, segments, window=window, scale=H**-0.5
        )

        def ours(q, k, v, window=window, reference=reference):
            mixed = packed_attention.packed_attention(
                *(q[None], k[None], v[None]),
                packed_attention.make_block_mask(segments, window=window),
                scale=H**-0.5,
                fallback=lambda q, k, v: reference(q[0], k[0], v[0])[None].astype(q.dtype),
            )
            return mixed[0]

        @partial(jax.jit, static_argnums=0)
        def all_of(form, operands):
            mixed, back = jax.vjp(form, *operands)
            return mixed, *back(weights_XNH.astype(mixed.dtype))

        names = ("result", *(f"gradient, {side}" for side in ("q", "k", "v")))
        for name, value, expected in zip(
            names, all_of(ours, operands), all_of(reference, operands), strict=True
        ):
            expected = np.asarray(expected, np.float32)
            error = _largest(value, expected) / float(np.abs(expected).max())
            yield Finding(op, f"window {window}", name, error, GRADIENT_TOLERANCE[dtype])


def _other_tokens(op: str, setting: str, ids_B: jax.Array, expected_B: jax.Array) -> Finding:
    share = float(np.mean(np.asarray(ids_B) != np.asarray(expected_B)))
    return Finding(op, setting, "rows with another token", share, 1 - SAME_TOKENS)


def _largest(value, expected) -> float:
    """The largest absolute difference; of no values, NaN."""
    difference = np.asarray(value, np.float64) - np.asarray(expected, np.float64)
    return float(np.abs(difference).max(initial=0.0)) if difference.size else float("nan")
