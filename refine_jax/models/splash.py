"""Splash attention, JAX's kernel for TPUs, under the masks of this package: by key, and by segment as spans of keys.

A mask by segment needs no array: with the keys in `SegmentMask.order` a query sees a span of them, two numbers in one
int32. The kernel knows how to compute a mask from one int32 a query (for a causal mask, the query's place) and runs the
blocks that a table names; both may be dynamic. Its masks from arrays (`process_dynamic_mask`) hold up to 4 bytes a
score and kernel, for a row of 40 960 tokens 19 GiB on a v6e where spans take 1 GiB, and fail under `jax.jit` (0.10.2).

Splash attention is JAX's own and not tokamax's (0.0.12): tokamax takes no mask by key on a TPU (`k_end` and batched
boolean masks raise NotImplementedError), offers its newer splash kernel under a private name only, picks a kernel by
the default device, which is a CPU while a TPU program is compiled ahead of time, and pins typeguard, pydantic and qwix.
Its kernel takes segment ids like this one: the day it is public, this module is the place to change.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from refine_jax.models.layers import CHECKPOINT_NAME
from refine_jax.models.segments import BROKEN, high_of, in_span, low_of

Array = jax.Array

_LANES = 128
# The fused gradient kernel does five products where two kernels do seven, but writes a part of dq for every block of
# keys, also of those that are skipped: where there are more blocks, two kernels. A mask by key skips next to none.
_MOST_FUSED = 64
_MOST_FUSED_SPANS = 8
# The span of one key.
_FIRST = 1 << 16


def something_seen(q: Array, seen: Array) -> tuple[Array, Array]:
    """For kernels that need a key for every query: where an item sees none, its queries are 0 and see all, evenly."""
    some = jnp.any(seen, axis=1, keepdims=True)
    return jnp.where(some[:, :, None, None], q, jnp.zeros((), q.dtype)), seen | ~some


def block_size(length: int, largest: int = 1024) -> int:
    """The block, a multiple of 128, into which a kernel cuts `length`: little padding first, then large blocks.

    A block of queries reads all keys once, so blocks below 512 wait for memory: lengths up to `largest` are one block.
    """
    if length <= largest:
        return -(-length // _LANES) * _LANES
    return min(range(largest // 2, largest + 1, _LANES), key=lambda block: (-(-length // block) * block, -block))


def splash_attention(
    q: Array, k: Array, v: Array, of_queries: None, seen: Array | None, *, interpret: bool = False
) -> Array:
    """JAX's splash attention kernel: q [B, Sq, H, D], k, v [B, Sk, K, D], seen [B, Sk] -> [B, Sq, H, D].

    Lengths are padded to blocks and heads to 128 features; padded and unseen keys form a segment that no query is in.
    """
    length, keys, depth = q.shape[1], k.shape[1], q.shape[-1]
    if seen is not None:
        q, seen = something_seen(q, seen)
    elif keys % block_size(keys):
        seen = jnp.ones((q.shape[0], keys), bool)
    q, k, v = _for_splash(q, k, v)
    kernel = _splash_kernel(q.shape[1], q.shape[2], k.shape[2], _MOST_FUSED, interpret)
    if seen is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        seen = jnp.pad(seen, ((0, 0), (0, k.shape[2] - keys)))
        segments = splash.SegmentIds(q=jnp.ones(q.shape[2], jnp.int32), kv=seen.astype(jnp.int32))
        out = jax.vmap(kernel, in_axes=(0, 0, 0, splash.SegmentIds(None, 0)))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :length, :, :depth]


def _for_splash(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """[B, S, H, D] -> [B, H, S', D'], padded to blocks and lanes; q scaled, because the kernel knows no scale."""

    def padded(x: Array) -> Array:
        length, depth = x.shape[1], x.shape[3]
        x = jnp.pad(x, ((0, 0), (0, -length % block_size(length)), (0, 0), (0, -depth % _LANES)))
        return x.swapaxes(1, 2)

    return padded((q.astype(jnp.float32) * np.float32(q.shape[-1] ** -0.5)).astype(q.dtype)), padded(k), padded(v)


def _splash_kernel(
    heads: int, length: int, keys: int, most_fused: int, interpret: bool
) -> splash.SplashAttentionKernel:
    """The kernel for padded lengths, without a mask."""
    block_q, block_kv = block_size(length), block_size(keys)
    # One kernel for the three gradients: five matrix products where two kernels need seven.
    fused = keys // block_kv <= most_fused
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_half(block_kv),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=_half(block_kv),
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.FullMask((length, keys))] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )


def splash_spans(q: Array, k: Array, v: Array, of_queries: Any, of_keys: Any, *, interpret: bool = False) -> Array:
    """The same kernel where queries see spans of the keys, once sorted: `SegmentMask.span` [B, Sq] and `.order`.

    The kernel computes masks from one int32 a query (`mask_function`, which for a causal mask gets the query's place)
    and runs those blocks that `block_mask` names; both may be dynamic. A row after the other: its blocks are its own.
    """
    (_, span), (_, order) = of_queries, of_keys
    length, depth = q.shape[1], q.shape[-1]
    k, v = permuted(k, order), permuted(v, order)
    q, k, v = _for_splash(q, k, v)
    kernel = _splash_kernel(q.shape[1], q.shape[2], k.shape[2], _MOST_FUSED_SPANS, interpret)
    # A query that sees nothing takes the first key, so that its softmax has something to divide by.
    nothing = high_of(span) == 0
    spans = jnp.where(nothing | (span == BROKEN), _FIRST, span)
    spans = jnp.pad(spans, ((0, 0), (0, q.shape[2] - length)), constant_values=_FIRST)

    def row(q: Array, k: Array, v: Array, span: Array) -> Array:
        sizes = kernel.kwargs["block_sizes"]
        by_query, by_key = _span_blocks(span, k.shape[1], sizes.block_q, sizes.block_kv)
        of_dq = None if sizes.use_fused_bwd_kernel else by_query
        options = kernel.kwargs | {"mask_function": in_span}
        return splash.SplashAttentionKernel(by_query, of_dq, by_key, **options)(q, k, v)

    out = jax.vmap(row)(q, k, v, spans)
    out = out.swapaxes(1, 2)[:, :length, :, :depth]
    out = jnp.where(nothing[..., None, None], jnp.zeros((), out.dtype), out)
    return jnp.where((span == BROKEN)[..., None, None], jnp.full((), jnp.nan, out.dtype), out)


def _span_blocks(span: Array, keys: int, block_q: int, block_kv: int) -> tuple[MaskInfo, MaskInfo]:
    """Which blocks of queries and keys meet, for the kernels that go along the keys and along the queries."""
    starts = jnp.arange(0, keys, block_kv)
    low, high = low_of(span)[:, None], high_of(span)[:, None]
    meet = ((low < starts + block_kv) & (high > starts) & (low < high)).reshape(-1, block_q, len(starts)).any(axis=1)

    def info(axis: int) -> MaskInfo:
        # At a block that is skipped the last one stays where it is, and nothing is fetched.
        fetched = jnp.where(meet, jax.lax.broadcasted_iota(jnp.int32, meet.shape, axis), 0)
        fetched = jax.lax.cummax(fetched, axis=axis)
        return MaskInfo(
            data_next=fetched[None],
            mask_next=None,
            block_mask=meet.astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=span,
        )

    return info(1), info(0)


@jax.custom_vjp
def permuted(x: Array, order: tuple[Array, Array]) -> Array:
    """x [B, S, …] in another order: (which comes where, where each goes), 2 x [B, S] int32. So is its gradient."""
    return jnp.take_along_axis(x, order[0].reshape(*order[0].shape, *(1,) * (x.ndim - 2)), axis=1)


permuted.defvjp(
    lambda x, order: (permuted(x, order), order),
    lambda order, g: (permuted(g, order[::-1]), None),
)


def _half(block: int) -> int:
    """The part of a block that is computed at once, while the next part's scores are on their way."""
    return block // 2 if block % (2 * _LANES) == 0 else block
