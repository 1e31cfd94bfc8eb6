"""Attention within a packed row of prompts and completions, for TPU.

Flash attention (Dao et al., arXiv 2205.14135) over a list of pairs of blocks: no score reaches HBM,
and pairs that the block mask leaves out are not visited. Both passes go through the list by query
block. The backward pass computes all gradients in one pass over it (5 matmuls instead of 7 in two
passes), and therefore holds the gradients of all keys of a head in VMEM.

Keys run down the sublanes and queries along the lanes: what is kept per query is a row, and
reductions over keys are elementwise except for their last steps. The query heads of a key head are
adjacent, H lanes each, and share the pair's mask.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_grpo.kernels import dispatch
from gemma_grpo.kernels.matmul import precision_of
from gemma_grpo.kernels.packed_attention import block_masks
from gemma_grpo.kernels.packed_attention.block_masks import BlockMask, blocks

LANES = 128
# A hidden score is below every maximum, so its exponential is 0, even if a query sees nothing.
HIDDEN, LOWEST = -1e30, -1e20


def vmem_limit() -> int:
    """Bytes that a kernel may take: 100 of a v5e's 128 MiB; the rest is for the compiler."""
    return dispatch.vmem_bytes() * 100 // 128


def vmem_bytes(num_tokens: int, *, heads_each: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Bytes that the backward pass, which needs more than the forward, holds in VMEM. Inputs and
    outputs are double-buffered.

    Args:
        num_tokens: of the row.
        heads_each: query heads per key head.
    """
    itemsize = jnp.dtype(dtype).itemsize
    keys = block_masks.KEYS * blocks(num_tokens, block_masks.KEYS)
    queries = block_masks.QUERIES * heads_each * head_dim
    return (
        2 * keys * head_dim * (4 + 2 * itemsize)  # gradients of keys and values: sums, outputs
        + queries * (4 + 3 * 2 * itemsize)  # dq's sum; queries, cotangents, dq
        + 2 * 2 * block_masks.KEYS * head_dim * itemsize  # keys, values
        + 8 * block_masks.KEYS * block_masks.QUERIES * 4  # intermediate scores of a head
    )


def attend(
    q_XNH: Float[Array, "X N H"],
    k_XKH: Float[Array, "X K H"],
    v_XKH: Float[Array, "X K H"],
    block_mask: BlockMask,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "X N H"]:
    """softmax(scale * q k^T) v over the keys that the mask shows; 0 for a query that sees none."""
    X, N, H = q_XNH.shape
    q = _whole_blocks(q_XNH.reshape(X, N * H), block_masks.QUERIES)
    k, v = (_whole_blocks(x.reshape(X, -1), block_masks.KEYS) for x in (k_XKH, v_XKH))
    sizes = _Sizes(H, N // k_XKH.shape[1], k_XKH.shape[1])
    return _attend(sizes, scale, interpret, q, k, v, block_mask)[:X].reshape(X, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(sizes, scale, interpret, q, k, v, block_mask):
    """As `attend`, on whole blocks: [X, N*H] queries and [C, K*H] keys and values."""
    return _forward(sizes, scale, interpret, q, k, v, block_mask)[0]


def _forward(sizes, scale, interpret, q, k, v, block_mask):
    shape = sizes.heads_each, block_masks.QUERIES
    spec, of_queries, of_statistics, in_specs = _specs(sizes, block_mask)
    mixed, logsumexp = pl.pallas_call(
        partial(_forward_kernel, scale=scale),
        grid_spec=spec(
            in_specs=in_specs,
            out_specs=[of_queries, of_statistics],
            scratch_shapes=[
                pltpu.VMEM(shape, jnp.float32),
                pltpu.VMEM(shape, jnp.float32),
                pltpu.VMEM((sizes.heads_each, sizes.head_dim, block_masks.QUERIES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((sizes.key_heads, sizes.heads_each, len(q)), jnp.float32),
        ],
        name="packed_attention",
        interpret=interpret,
        **_compiler(sizes, q, k, matmuls=2),
    )(block_mask.query_blocks, block_mask.key_blocks, q, k, v, block_mask.bounds)
    return mixed, (q, k, v, block_mask, mixed, logsumexp)


def _backward(sizes, scale, interpret, residuals, cotangent):
    q, k, v, block_mask, mixed, logsumexp = residuals
    elementwise = cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)
    by_head = elementwise.reshape(len(q), sizes.key_heads, sizes.heads_each, sizes.head_dim)
    delta = by_head.sum(axis=-1).transpose(1, 2, 0)
    spec, of_queries, of_statistics, in_specs = _specs(sizes, block_mask)
    of_all_keys = pl.BlockSpec((len(k), sizes.head_dim), lambda head, step, *_: (0, head))
    of_head = pltpu.VMEM((len(k), sizes.head_dim), jnp.float32)
    gradients = pl.pallas_call(
        partial(_backward_kernel, scale=scale),
        grid_spec=spec(
            in_specs=[*in_specs, of_queries, of_statistics, of_statistics],
            out_specs=[of_queries, of_all_keys, of_all_keys],
            scratch_shapes=[
                pltpu.VMEM((sizes.heads_each, sizes.head_dim, block_masks.QUERIES), jnp.float32),
                of_head,
                of_head,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q, k, v)],
        name="packed_attention_gradient",
        interpret=interpret,
        **_compiler(sizes, q, k, matmuls=5),
    )(
        block_mask.query_blocks,
        block_mask.key_blocks,
        q,
        k,
        v,
        block_mask.bounds,
        cotangent,
        logsumexp,
        delta,
    )
    return *gradients, None


_attend.defvjp(_forward, _backward)


class _Sizes(NamedTuple):
    """Sizes that the shapes of flat arrays do not show."""

    head_dim: int  # H
    heads_each: int  # query heads per key head
    key_heads: int  # K


def _whole_blocks(x, size):
    return jnp.pad(x, ((0, size * blocks(len(x), size) - len(x)), (0, 0)))


def _specs(sizes, block_mask):
    """The grid, and the blocks that its steps (key head, pair of blocks) take."""
    of_queries = pl.BlockSpec(
        (block_masks.QUERIES, sizes.heads_each * sizes.head_dim),
        lambda head, step, queries, keys: (queries[step], head),
    )
    of_keys = pl.BlockSpec(
        (block_masks.KEYS, sizes.head_dim), lambda head, step, queries, keys: (keys[step], head)
    )
    of_bounds = pl.BlockSpec(
        (2, 2, block_masks.QUERIES), lambda head, step, queries, keys: (0, 0, queries[step])
    )
    of_statistics = pl.BlockSpec(
        (None, sizes.heads_each, block_masks.QUERIES),
        lambda head, step, queries, keys: (head, 0, queries[step]),
    )
    spec = partial(
        pltpu.PrefetchScalarGridSpec,
        num_scalar_prefetch=2,
        grid=(sizes.key_heads, block_mask.count),
    )
    return spec, of_queries, of_statistics, [of_queries, of_keys, of_keys, of_bounds]


def _compiler(sizes, q, k, *, matmuls):
    """Cost estimate and compiler settings. The number of pairs is not known at compile time: the
    estimate takes all causal ones."""
    heads = q.shape[1] // sizes.head_dim
    pairs = heads * len(q) * len(k) // 2
    return dict(
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * pairs * sizes.head_dim,
            bytes_accessed=matmuls * (q.size + k.size) * q.dtype.itemsize,
            transcendentals=pairs,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
    )


def _forward_kernel(
    query_blocks,
    key_blocks,
    q,  # [QUERIES, R*H]
    k,  # [KEYS, H]
    v,
    bounds,  # [2, 2, QUERIES]
    mixed,  # [QUERIES, R*H]
    logsumexp,  # [R, QUERIES]
    top,  # [R, QUERIES]: the largest score so far
    total,  # [R, QUERIES]: the sum of exp(score - top) so far
    summed,  # [R, H, QUERIES]: the sum of exp(score - top) * value so far
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
        scores = jnp.where(is_seen, _matmul(k[...], q[:, head], (1, 1)) * scale, HIDDEN)
        new_top = jnp.maximum(top[row], scores.max(axis=0, keepdims=True))
        weights = jnp.exp(scores - new_top)
        kept = jnp.exp(top[row] - new_top)
        top[row] = new_top
        total[row] = total[row] * kept + weights.sum(axis=0, keepdims=True)
        summed[r] = summed[r] * kept + _matmul(v[...], weights.astype(v.dtype), (0, 0))

    @pl.when(is_last)
    def _():
        # The total is at least exp(0) = 1, unless the query sees nothing.
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
    num_blocks = len(dk) // block_masks.KEYS

    @pl.when(step == 0)
    def _():
        @pl.loop(0, num_blocks)
        def _(block):
            dk_sum[_rows(block)] = jnp.zeros((block_masks.KEYS, dk.shape[1]), jnp.float32)
            dv_sum[_rows(block)] = jnp.zeros((block_masks.KEYS, dk.shape[1]), jnp.float32)

    @pl.when(is_first)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    rows, is_seen = _rows(key_blocks[step]), _is_seen(bounds, key_blocks, k)
    for r, head in enumerate(_heads(q, k)):
        row = slice(r, r + 1)
        scores = jnp.where(is_seen, _matmul(k[...], q[:, head], (1, 1)) * scale, HIDDEN)
        weights = jnp.exp(scores - logsumexp[row])
        dv_sum[rows] += _matmul(weights.astype(v.dtype), cotangent[:, head], (1, 0))
        towards = _matmul(v[...], cotangent[:, head], (1, 1))
        dscores = (weights * (towards - delta[row])).astype(k.dtype)
        dk_sum[rows] += _matmul(dscores, q[:, head], (1, 0))
        dq_sum[r] += _matmul(k[...], dscores, (0, 0))

    @pl.when(is_last)
    def _():
        for r, head in enumerate(_heads(q, k)):
            dq[:, head] = (dq_sum[r] * scale).T.astype(dq.dtype)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        @pl.loop(0, num_blocks)
        def _(block):
            dk[_rows(block)] = (dk_sum[_rows(block)] * scale).astype(dk.dtype)
            dv[_rows(block)] = dv_sum[_rows(block)].astype(dv.dtype)


def _ends(query_blocks):
    """Whether this step is the first, and the last, of its block of queries."""
    step = pl.program_id(1)
    here, before = query_blocks[step], query_blocks[jnp.maximum(step - 1, 0)]
    return (step == 0) | (here != before), here != query_blocks[step + 1]


def _is_seen(bounds, key_blocks, k):
    """Which keys of the pair its queries see, [KEYS, QUERIES]."""
    start = key_blocks[pl.program_id(1)] * len(k)
    shape = len(k), bounds.shape[2]
    key = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    in_range = lambda which: (key >= bounds[which, 0:1]) & (key < bounds[which, 1:2])
    return in_range(0) | in_range(1)


def _heads(q, k):
    """The lanes of each query head."""
    H = k.shape[1]
    return [slice(lane, lane + H) for lane in range(0, q.shape[1], H)]


def _rows(block):
    return pl.ds(pl.multiple_of(block * block_masks.KEYS, block_masks.KEYS), block_masks.KEYS)


def _matmul(a, b, summed):
    """Matmul that contracts axis `summed[0]` of `a` and `summed[1]` of `b`, in float32."""
    numbers = (((summed[0],), (summed[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, numbers, precision=precision_of(a.dtype, b.dtype), preferred_element_type=jnp.float32
    )
