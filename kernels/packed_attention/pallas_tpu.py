"""Attention of packed completions to their prompts and themselves, for TPU. Knows no window, row or
platform.

Flash attention (Dao et al., arXiv 2205.14135) over a list of pairs of blocks: no score reaches HBM,
and pairs out of sight are not visited. Both passes go through the list by blocks of queries. The
backward pass makes all gradients on one way through it (5 products where two ways would make 7),
for which those of all keys of a head stand in VMEM.

Keys run down the sublanes and queries along the lanes: what is kept of each query is a row, and
reductions over keys are elementwise but for their last steps. The query heads of a key head are
side by side, H lanes each, and share the pair's mask.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_grpo.kernels.packed_attention import sights
from gemma_grpo.kernels.packed_attention.sights import Sight

LANES = 128
VMEM_LIMIT = 100 * 2**20  # of a v5e's 128 MiB; the rest is the compiler's
# A hidden score is below every maximum: its exponential is 0, also where a query sees nothing.
HIDDEN, LOWEST = -1e30, -1e20


def vmem_bytes(
    num_tokens: int, num_prompt_slots: int, *, heads_each: int, head_dim: int, dtype: jnp.dtype
) -> int:
    """What the backward pass holds in VMEM, the larger of the two. Inputs and outputs are there
    twice.

    Args:
        num_prompt_slots: of all prompts, P*S.
        heads_each: query heads of a key head.
    """
    itemsize = jnp.dtype(dtype).itemsize
    keys = sights.KEYS * (
        sights.blocks(num_prompt_slots, sights.KEYS) + sights.blocks(num_tokens, sights.KEYS)
    )
    queries = sights.QUERIES * heads_each * head_dim
    return (
        2 * keys * head_dim * (4 + 2 * itemsize)  # gradients of keys and values: sums, outputs
        + queries * (4 + 3 * 2 * itemsize)  # sum of the queries' gradient; it, they and theirs
        + 2 * 2 * sights.KEYS * head_dim * itemsize  # keys, values
        + 8 * sights.KEYS * sights.QUERIES * 4  # scores of a head on their way
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    scale: float,
    interpret: bool,
    q_XNH: Float[Array, "X N H"],
    k_XKH: Float[Array, "X K H"],
    v_XKH: Float[Array, "X K H"],
    prompt_k_PSKH: Float[Array, "P S K H"],
    prompt_v_PSKH: Float[Array, "P S K H"],
    sight: Sight,
) -> Float[Array, "X N H"]:
    """softmax(scale * q k^T) v over the keys in sight; 0 for a query that sees none."""
    return _attend(scale, interpret, q_XNH, k_XKH, v_XKH, prompt_k_PSKH, prompt_v_PSKH, sight)[0]


def _attend(scale, interpret, q_XNH, k_XKH, v_XKH, prompt_k_PSKH, prompt_v_PSKH, sight):
    """The result, and what the backward pass needs."""
    X, N, H = q_XNH.shape
    K = k_XKH.shape[1]
    q = _queries(q_XNH)
    k, v = _keys(prompt_k_PSKH, k_XKH), _keys(prompt_v_PSKH, v_XKH)
    spec, of_queries, of_statistics, in_specs = _specs(K, N // K, H, prompt_k_PSKH, sight)
    mixed, logsumexp = pl.pallas_call(
        partial(_forward_kernel, scale=scale),
        grid_spec=spec(
            in_specs=in_specs,
            out_specs=[of_queries, of_statistics],
            scratch_shapes=[
                pltpu.VMEM((N // K, sights.QUERIES), jnp.float32),
                pltpu.VMEM((N // K, sights.QUERIES), jnp.float32),
                pltpu.VMEM((N // K, H, sights.QUERIES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((K, N // K, len(q)), jnp.float32),
        ],
        name="packed_attention",
        interpret=interpret,
        **_compiler(products=2, q=q, k=k),
    )(sight.query_blocks, sight.key_blocks, q, k, v, sight.bounds)
    return mixed[:X].reshape(X, N, H), (q, k, v, mixed, logsumexp)


def _forward(scale, interpret, *operands):
    mixed_XNH, kept = _attend(scale, interpret, *operands)
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in operands[1:5:2]]
    return mixed_XNH, (kept, operands[-1], shapes)


def _backward(scale, interpret, residuals, cotangent_XNH):
    (q, k, v, mixed, logsumexp), sight, (own, prompts) = residuals
    X, N, H = cotangent_XNH.shape
    P, S, K, _ = prompts.shape
    cotangent = _queries(cotangent_XNH.astype(q.dtype))
    products = cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)
    delta = products.reshape(-1, K, N // K, H).sum(axis=-1).transpose(1, 2, 0)
    spec, of_queries, of_statistics, in_specs = _specs(K, N // K, H, prompts, sight)
    of_all_keys = pl.BlockSpec((len(k), H), lambda head, step, *_: (0, head))
    dq, dk, dv = pl.pallas_call(
        partial(_backward_kernel, scale=scale),
        grid_spec=spec(
            in_specs=[*in_specs, of_queries, of_statistics, of_statistics],
            out_specs=[of_queries, of_all_keys, of_all_keys],
            scratch_shapes=[
                pltpu.VMEM((N // K, H, sights.QUERIES), jnp.float32),
                pltpu.VMEM((len(k), H), jnp.float32),
                pltpu.VMEM((len(k), H), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q, k, v)],
        name="packed_attention_gradient",
        interpret=interpret,
        **_compiler(products=5, q=q, k=k),
    )(sight.query_blocks, sight.key_blocks, q, k, v, sight.bounds, cotangent, logsumexp, delta)
    start = sights.KEYS * sights.blocks(P * S, sights.KEYS)
    of_own = [each[start : start + X].reshape(own.shape) for each in (dk, dv)]
    of_prompts = [each[: P * S].reshape(prompts.shape) for each in (dk, dv)]
    return dq[:X].reshape(X, N, H), *of_own, *of_prompts, None


attend.defvjp(_forward, _backward)


def _queries(x_XNH):
    """In: [X, N, H].  Out: whole blocks of [X, N*H]."""
    X = len(x_XNH)
    missing = sights.QUERIES * sights.blocks(X, sights.QUERIES) - X
    return jnp.pad(x_XNH.reshape(X, -1), ((0, missing), (0, 0)))


def _keys(prompts_PSKH, own_XKH):
    """The row of keys, whole blocks of [P*S, K*H] and [X, K*H]."""
    P, S, K, H = prompts_PSKH.shape
    pieces = []
    for piece in (prompts_PSKH.reshape(P * S, K * H), own_XKH.reshape(-1, K * H)):
        missing = sights.KEYS * sights.blocks(len(piece), sights.KEYS) - len(piece)
        pieces.append(jnp.pad(piece.astype(own_XKH.dtype), ((0, missing), (0, 0))))
    return jnp.concatenate(pieces)


def _specs(num_key_heads, heads_each, head_dim, prompts_PSKH, sight):
    """The grid, and how its steps (key head, pair of blocks) take their pieces."""
    P, S, _, _ = prompts_PSKH.shape
    prompt_blocks = sights.blocks(P * S, sights.KEYS)
    of_queries = pl.BlockSpec(
        (sights.QUERIES, heads_each * head_dim), lambda head, step, q, k: (q[step], head)
    )
    of_keys = pl.BlockSpec((sights.KEYS, head_dim), lambda head, step, q, k: (k[step], head))
    of_bounds = pl.BlockSpec(
        (None, 2, sights.QUERIES),
        lambda head, step, q, k: (jnp.where(k[step] < prompt_blocks, 0, 1), 0, q[step]),
    )
    of_statistics = pl.BlockSpec(
        (None, heads_each, sights.QUERIES), lambda head, step, q, k: (head, 0, q[step])
    )
    spec = partial(
        pltpu.PrefetchScalarGridSpec, num_scalar_prefetch=2, grid=(num_key_heads, sight.count)
    )
    return spec, of_queries, of_statistics, [of_queries, of_keys, of_keys, of_bounds]


def _compiler(*, products, q, k):
    """What the compiler is told. The pairs are not known then: all of them, less the future."""
    pairs = len(q) * (len(k) - len(q) // 2)
    flops = 2 * products * pairs * q.shape[1]
    return dict(
        cost_estimate=pl.CostEstimate(
            flops=flops,
            bytes_accessed=(products * q.size + products * k.size) * q.dtype.itemsize,
            transcendentals=flops // (2 * products * (q.shape[1] // k.shape[1] or 1)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
    )


def _forward_kernel(
    query_blocks,
    key_blocks,
    q,  # [QUERIES, R*H]
    k,  # [KEYS, H]
    v,
    bounds,  # [2, QUERIES]
    mixed,  # [QUERIES, R*H]
    logsumexp,  # [R, QUERIES]
    top,  # [R, QUERIES]: the largest score so far
    total,  # [R, QUERIES]: the sum of exp(score - top) so far
    summed,  # [R, H, QUERIES]: that of exp(score - top) * value
    *,
    scale: float,
):
    is_first, is_last = _ends(query_blocks)

    @pl.when(is_first)
    def _():
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    is_seen = _is_seen(bounds, key_blocks, k)
    for r, head in enumerate(_heads(q, k)):
        row = slice(r, r + 1)
        scores = jnp.where(is_seen, _product(k[...], q[:, head], (1, 1)) * scale, HIDDEN)
        new_top = jnp.maximum(top[row], scores.max(axis=0, keepdims=True))
        weights = jnp.exp(scores - new_top)
        kept = jnp.exp(top[row] - new_top)
        top[row] = new_top
        total[row] = total[row] * kept + weights.sum(axis=0, keepdims=True)
        summed[r] = summed[r] * kept + _product(v[...], weights.astype(v.dtype), (0, 0))

    @pl.when(is_last)
    def _():
        # One weight is exp(0), unless nothing is seen.
        safe = jnp.maximum(total[...], 1.0)
        logsumexp[...] = top[...] + jnp.log(safe)
        for r, head in enumerate(_heads(q, k)):
            mixed[:, head] = (summed[r] / safe[r : r + 1]).T.astype(mixed.dtype)


def _backward_kernel(
    query_blocks,
    key_blocks,
    q,
    k,
    v,
    bounds,
    cotangent,  # [QUERIES, R*H]
    logsumexp,  # [R, QUERIES]
    delta,  # [R, QUERIES]: sum of cotangent * result over H
    dq,  # [QUERIES, R*H]
    dk,  # all keys, [C, H]
    dv,
    dq_sum,  # [R, H, QUERIES]
    dk_sum,  # [C, H]
    dv_sum,
    *,
    scale: float,
):
    step = pl.program_id(1)
    is_first, is_last = _ends(query_blocks)
    blocks = len(dk) // sights.KEYS

    @pl.when(step == 0)
    def _():
        @pl.loop(0, blocks)
        def _(block):
            dk_sum[_rows(block)] = jnp.zeros((sights.KEYS, dk.shape[1]), jnp.float32)
            dv_sum[_rows(block)] = jnp.zeros((sights.KEYS, dk.shape[1]), jnp.float32)

    @pl.when(is_first)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    rows, is_seen = _rows(key_blocks[step]), _is_seen(bounds, key_blocks, k)
    for r, head in enumerate(_heads(q, k)):
        row = slice(r, r + 1)
        scores = jnp.where(is_seen, _product(k[...], q[:, head], (1, 1)) * scale, HIDDEN)
        weights = jnp.exp(scores - logsumexp[row])
        dv_sum[rows] += _product(weights.astype(v.dtype), cotangent[:, head], (1, 0))
        towards = _product(v[...], cotangent[:, head], (1, 1))
        dscores = (weights * (towards - delta[row])).astype(k.dtype)
        dk_sum[rows] += _product(dscores, q[:, head], (1, 0))
        dq_sum[r] += _product(k[...], dscores, (0, 0))

    @pl.when(is_last)
    def _():
        for r, head in enumerate(_heads(q, k)):
            dq[:, head] = (dq_sum[r] * scale).T.astype(dq.dtype)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        @pl.loop(0, blocks)
        def _(block):
            dk[_rows(block)] = (dk_sum[_rows(block)] * scale).astype(dk.dtype)
            dv[_rows(block)] = dv_sum[_rows(block)].astype(dv.dtype)


def _ends(query_blocks):
    """Whether this step is the first, and the last, of its block of queries."""
    step = pl.program_id(1)
    here, before = query_blocks[step], query_blocks[jnp.maximum(step - 1, 0)]
    return (step == 0) | (here != before), here != query_blocks[step + 1]


def _is_seen(bounds, key_blocks, k):
    """[KEYS, QUERIES]"""
    start = key_blocks[pl.program_id(1)] * len(k)
    shape = len(k), bounds.shape[1]
    key = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (key >= bounds[0:1]) & (key < bounds[1:2])


def _heads(q, k):
    """The lanes of each query head."""
    H = k.shape[1]
    return [slice(lane, lane + H) for lane in range(0, q.shape[1], H)]


def _rows(block):
    return pl.ds(pl.multiple_of(block * sights.KEYS, sights.KEYS), sights.KEYS)


def _product(a, b, summed):
    """Matrix product over the axis of each that is named, accumulated in float32."""
    numbers = (((summed[0],), (summed[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)
