"""Attention under a mask by segments in plain JAX, by blocks: no array of queries x keys ever exists.

For where no kernel takes such a mask: a CPU, and long rows elsewhere. Softmax goes along a query's keys block by block
with a running maximum (online softmax, arXiv 2112.05682), and the gradient computes each block's scores again from the
log-sum-exp that is kept (arXiv 2307.08691, algorithm 2). Blocks of keys that a block of queries cannot see are skipped.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from refine_jax.models.layers import CHECKPOINT_NAME
from refine_jax.models.segments import Segments, attention_mask

Array = jax.Array
# Queries times the heads that share a key head, and keys, in a block: on a CPU, whose cache must hold the scores of one
# key head, and elsewhere.
_CPU_BLOCK = (512, 1024)
_BLOCK = (4096, 1024)
_UNSEEN = np.float32(-1e30)


def blockwise_attention(
    q: Array, k: Array, v: Array, queries: Segments, keys: Segments, *, one_head_at_a_time: bool = False
) -> Array:
    """q [B, Sq, H, D], k, v [B, Sk, K, D], queries [B, Sq], keys [B, Sk] -> [B, Sq, H, D]; 0 where nothing is seen.

    one_head_at_a_time: for a CPU; otherwise all heads of a row are computed together.
    """
    (_, length, heads, depth), (kv_heads, key_size) = q.shape, (k.shape[2], k.shape[1])
    shared = heads // kv_heads
    largest_q, largest_k = _CPU_BLOCK if one_head_at_a_time else _BLOCK
    block_q, block_k = _block(length, largest_q // shared), _block(key_size, largest_k)

    def padded(x: Array, block: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))

    def blocks(segments: Segments, block: int) -> Segments:  # [B, S] -> [B, blocks, block]
        free = jax.tree.map(lambda x: padded(x, block), segments.replace(sample=segments.sample + 1))
        free = free.replace(sample=free.sample - 1)
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, block), free)

    q, k, v = padded(q, block_q), padded(k, block_k), padded(v, block_k)
    # [B, K, blocks, shared heads x queries, D] and [B, K, blocks, keys, D]
    q = q.reshape(q.shape[0], -1, block_q, kv_heads, shared, depth).transpose(0, 3, 1, 4, 2, 5)
    q = q.reshape(*q.shape[:3], shared * block_q, depth)
    k, v = (x.reshape(x.shape[0], -1, block_k, kv_heads, x.shape[3]).transpose(0, 3, 1, 2, 4) for x in (k, v))
    out = _attend(q, k, v, blocks(queries, block_q), blocks(keys, block_k), one_head_at_a_time)
    out = out.reshape(*out.shape[:3], shared, block_q, -1).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(out.shape[0], -1, heads, out.shape[-1])[:, :length]


def _block(length: int, largest: int) -> int:
    """The size of a block: as few as `largest` allows, all alike, a multiple of 8."""
    count = -(-length // largest)
    return -(-length // (8 * count)) * 8


def visible_blocks(queries: Segments, keys: Segments) -> Array:
    """Which blocks of keys some query of a block may see: [blocks, queries], [blocks, keys] -> [blocks, blocks] bool.

    From the range of samples in a block and, where that is one sample, the range of its segments: never too few.
    """
    limits = np.iinfo(np.int32)

    def ends(segments: Segments) -> tuple[Array, ...]:
        real = segments.sample >= 0
        least = lambda x: jnp.min(jnp.where(real, x, limits.max), axis=1)
        most = lambda x: jnp.max(jnp.where(real, x, -1), axis=1)
        return least(segments.sample), most(segments.sample), least(segments.segment), most(segments.segment)

    (low, high, _, newest), (first, last, oldest, _) = ends(queries), ends(keys)
    low, high, newest = low[:, None], high[:, None], newest[:, None]
    later = (low == high) & (first == last) & (oldest > newest)
    return (first <= high) & (low <= last) & ~later


def _todo(visible: Array) -> tuple[Array, Array]:
    """Which blocks to visit, those first, and how many they are: [rows, blocks] int32, [rows] int32."""
    order = jnp.argsort(~visible, axis=1, stable=True).astype(jnp.int32)
    return order, jnp.sum(visible, axis=1, dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, queries: Segments, keys: Segments, one_head_at_a_time: bool) -> Array:
    """q [B, K, blocks, shared x queries, D], k, v [B, K, blocks, keys, D], segments [B, blocks, …] -> as q."""
    return _over_heads(_forward, one_head_at_a_time, (q, k, v), queries, keys)[0]


def _attend_forward(q, k, v, queries, keys, one_head_at_a_time):
    out, total = _over_heads(_forward, one_head_at_a_time, (q, k, v), queries, keys)
    out, total = checkpoint_name(out, CHECKPOINT_NAME), checkpoint_name(total, CHECKPOINT_NAME)
    return out, (q, k, v, queries, keys, out, total)


def _attend_backward(one_head_at_a_time, kept, cotangent):
    q, k, v, queries, keys, out, total = kept
    slope = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    arrays = (q, k, v, total, slope, cotangent)
    return *_over_heads(_backward, one_head_at_a_time, arrays, queries, keys), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _over_heads(run, one_head_at_a_time: bool, arrays: tuple[Array, ...], queries: Segments, keys: Segments):
    """`run(*arrays, queries, keys, todo)` for each row and key head of arrays [B, K, …] and segments [B, …]."""

    def row(operands):
        arrays, queries, keys = operands
        todo = _todo(visible_blocks(queries, keys))
        head = lambda arrays: run(*arrays, queries, keys, todo)
        # The blocks to visit are the same for all heads: what is mapped over heads stays one loop.
        return jax.lax.map(head, arrays) if one_head_at_a_time else jax.vmap(head)(arrays)

    return jax.lax.map(row, (arrays, queries, keys))


def _scores(q: Array, k: Array, queries: Segments, keys: Segments) -> tuple[Array, Array]:
    """Of a block: scores [shared, queries, keys] float32 and the mask [queries, keys]."""
    batch = lambda segments: jax.tree.map(lambda x: x[None], segments)
    allowed = attention_mask(batch(queries), batch(keys))[0, 0]
    scores = jnp.einsum("td,sd->ts", q, k, preferred_element_type=jnp.float32) * np.float32(q.shape[-1] ** -0.5)
    return scores.reshape(-1, *allowed.shape), allowed


def _forward(q: Array, k: Array, v: Array, queries: Segments, keys: Segments, todo: tuple[Array, Array]):
    """One key head: q [blocks, T, D], k, v [blocks, keys, D] -> out, like q, and log-sum-exp [blocks, T] float32."""

    def block(operands):
        q, queries, order, count = operands

        def step(i, carry):
            most, total, out = carry
            j = order[i]
            scores, allowed = _scores(q, k[j], queries, jax.tree.map(lambda x: x[j], keys))
            scores = jnp.where(allowed, scores, _UNSEEN).reshape(most.shape[0], -1)
            higher = jnp.maximum(most, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(most - higher)
            part = jnp.einsum("ts,sd->td", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[:, None] + part

        rows = q.shape[0]
        empty = (jnp.full(rows, _UNSEEN), jnp.zeros(rows), jnp.zeros((rows, v.shape[-1])))
        most, total, out = jax.lax.fori_loop(0, count, step, empty)
        something = most > _UNSEEN
        total = jnp.where(something, total, 1.0)
        out = jnp.where(something[:, None], out / total[:, None], 0.0)
        return out.astype(q.dtype), most + jnp.log(total)

    return jax.lax.map(block, (q, queries, *todo))


def _backward(q, k, v, total, slope, cotangent, queries: Segments, keys: Segments, todo: tuple[Array, Array]):
    """One key head's gradients of q, k and v; total, slope [blocks, T] float32, the rest as in `_forward`."""
    scale = np.float32(q.shape[-1] ** -0.5)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block(sums, operands):
        q, total, slope, cotangent, queries, order, count = operands

        def step(i, carry):
            of_q, of_k, of_v = carry
            j = order[i]
            scores, allowed = _scores(q, k[j], queries, jax.tree.map(lambda x: x[j], keys))
            total_, shape = total.reshape(*scores.shape[:2], 1), (q.shape[0], -1)
            weights = jnp.where(allowed, jnp.exp(scores - total_), 0.0).reshape(shape)
            inner = weights * (product("td,sd->ts", cotangent, v[j]) - slope[:, None]) * scale
            weights, inner = weights.astype(cotangent.dtype), inner.astype(q.dtype)
            of_q = of_q + product("ts,sd->td", inner, k[j])
            of_k = of_k.at[j].add(product("ts,td->sd", inner, q))
            return of_q, of_k, of_v.at[j].add(product("ts,td->sd", weights, cotangent))

        of_q, *sums = jax.lax.fori_loop(0, count, step, (jnp.zeros(q.shape, jnp.float32), *sums))
        return tuple(sums), of_q.astype(q.dtype)

    sums = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (of_k, of_v), of_q = jax.lax.scan(block, sums, (q, total, slope, cotangent, queries, *todo))
    return of_q, of_k.astype(k.dtype), of_v.astype(v.dtype)
