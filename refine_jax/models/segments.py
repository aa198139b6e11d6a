"""Which token may see which: sequences of texts and images as segments, and attention's mask as their property.

Where a token stands in an array (in which stream, after which padding) says nothing; `Segments` says it, five small
arrays, and one rule (`attention_mask`) covers prompts, packed training sequences and cached prefixes. At training
lengths the mask itself would be gigabytes a row: `SegmentMask` is that mask unmade, for kernels that need only parts of
it. arXiv 2505.14683, section 2; the noisy target of arXiv 2604.25636 is a segment that no other sees.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

# A span of keys is two numbers in the halves of an int32; this one stands for keys that are not a span.
_MOST_KEYS = 2**16 - 1
BROKEN = -1


@struct.dataclass
class Segments:
    """What every token of a stream is in its sequence; arrays [B, S].

    sample (int32): which of the sequences packed into a row, -1 for padding. segment (int32): which segment of its
    sample, counted from 0; a text, or an image with its two marks, is a segment. index (int32): the order inside the
    sample; it is looked at inside causal segments. position (int32): of the rotary embedding; all tokens of an image
    share one. causal (bool): the segment is read from left to right (text), otherwise every token of it sees all of it.
    noisy (bool): no other segment sees it (the target of the denoising).
    """

    sample: Array
    segment: Array
    index: Array
    position: Array
    causal: Array
    noisy: Array


def segment(
    size: int,
    *,
    count: Any,
    segment: Any,
    position: Any,
    sample: Any = 0,
    index: Any = 0,
    causal: bool = False,
    noisy: bool = False,
) -> Segments:
    """One segment a row, `count` tokens that exist and padding up to `size`: arrays [B, size].

    count, segment, position, sample, index: integers or [B] arrays, the last three of the first token. A causal segment
    counts positions on, any other shares one.
    """
    values = [jnp.atleast_1d(jnp.asarray(x, jnp.int32)) for x in (count, segment, position, sample, index)]
    rows = max(len(x) for x in values)
    count, segment, position, sample, index = (jnp.broadcast_to(x, (rows,))[:, None] for x in values)
    order = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (rows, size))
    flag = lambda value: jnp.full((rows, size), value)
    return Segments(
        sample=jnp.where(order < count, sample, -1),
        segment=jnp.broadcast_to(segment, (rows, size)),
        index=index + order,
        position=position + (order if causal else jnp.zeros_like(order)),
        causal=flag(causal),
        noisy=flag(noisy),
    )


def join(*parts: Segments | None) -> Segments:
    """Segments one after the other along the length, as their tokens are; parts that are None are left out."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *(part for part in parts if part is not None))


def attention_mask(q: Segments, k: Segments) -> Array:
    """Whether a query may see a key: [B, Sq], [B, Sk] -> [B, 1, Sq, Sk] bool.

    Within a sample: every token of an earlier segment that is not noisy, and of its own segment every token, or, where
    that is causal, those up to itself. Padding sees nothing and is not seen.
    """
    rows = lambda x: x[:, None, :, None]
    columns = lambda x: x[:, None, None, :]
    same = (rows(q.sample) == columns(k.sample)) & (columns(k.sample) >= 0)
    before = (columns(k.segment) < rows(q.segment)) & ~columns(k.noisy)
    own = (columns(k.segment) == rows(q.segment)) & (~rows(q.causal) | (columns(k.index) <= rows(q.index)))
    return same & (before | own)


# ----------------------------------------------------------------------------------------------------- the mask, unmade
@struct.dataclass
class SegmentMask:
    """`attention_mask(queries, keys)` before it is an array. Make it with `segment_mask`.

    queries [B, Sq], keys [B, Sk]. span ([B, Sq] int32 or None): which of the keys, once they are in `order`, a query
    sees: from the low half of its bits on, before the high half (`in_span`). order: (which key comes where, where each
    key goes), 2 x [B, Sk] int32.
    """

    queries: Segments
    keys: Segments
    span: Array | None = None
    order: tuple[Array, Array] | None = None

    def dense(self) -> Array:
        """The mask: [B, 1, Sq, Sk] bool."""
        return attention_mask(self.queries, self.keys)


def segment_mask(queries: Segments, keys: Segments, *, one_target: bool = False) -> SegmentMask:
    """The mask of `attention_mask`, unmade; queries [B, Sq], keys [B, Sk].

    one_target: says that a sample has at most one noisy segment, which is not causal, and that the tokens of a segment
    agree in `causal` and `noisy`. With the keys sorted by sample, noisy ones first, by segment and by index, what a
    query sees is then a span of them, and a kernel that knows no masks can run. Where it is not, the promise being
    broken, the query has the span `BROKEN`, and attention by spans gives it NaN.
    """
    if not one_target or keys.sample.shape[1] > _MOST_KEYS:
        return SegmentMask(queries, keys)
    return SegmentMask(queries, keys, *_spans(queries, keys))


def _spans(q: Segments, k: Segments) -> tuple[Array, tuple[Array, Array]]:
    """The span of every query and the order of the keys: [B, Sq], 2 x [B, Sk].

    All by counting pairs, which compiles to sums that hold none of them; a TPU takes a minute to compile a sort.
    """
    size = k.sample.shape[1]
    count = lambda pairs: jnp.sum(pairs, axis=2, dtype=jnp.int32)
    rows, columns = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    # Where a key goes: how many come before it, by the first field in which they differ.
    before = jnp.arange(size) < jnp.arange(size)[:, None]
    for x in (k.index, k.segment, ~k.noisy, k.sample):
        before = (columns(x) < rows(x)) | ((columns(x) == rows(x)) & before)
    place = count(before)
    order = jax.vmap(lambda at: jnp.zeros(size, jnp.int32).at[at].set(jnp.arange(size, dtype=jnp.int32)))(place)

    allowed = attention_mask(q, k)[:, 0]
    targets = count((rows(q.sample) == columns(k.sample)) & columns(k.noisy))
    clean = count(allowed & columns(~k.noisy))
    start = count(columns(k.sample) < rows(q.sample)) + jnp.where(q.noisy, 0, targets)
    end = start + jnp.where(q.noisy, targets, 0) + clean
    seen = count(allowed)
    span = jnp.where(end - start == seen, start | end << 16, BROKEN)
    return jnp.where(seen == 0, 0, span), (order, place)


def low_of(span: Array) -> Array:
    """The first key of a span, as `in_span` counts them."""
    return span & _MOST_KEYS


def high_of(span: Array) -> Array:
    """The end of a span: the first key behind it."""
    return jax.lax.shift_right_logical(span, jnp.full_like(span, 16))


def in_span(span: Array, place: Array) -> Array:
    """Whether the key at a place of `SegmentMask.order` is in a span: int32 arrays of one shape -> bool."""
    return (place >= low_of(span)) & (place < high_of(span))
