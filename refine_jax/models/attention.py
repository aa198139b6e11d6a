"""Attention: the one door to the kernels.

Which kernel runs is decided by the platform that a program is lowered for: splash attention (`jax.experimental.pallas`)
on a TPU, cuDNN's flash attention on an NVIDIA GPU (16 bit), XLA elsewhere and for short sequences. Under a mesh the
kernels run in `jax.shard_map` by the logical rules in force: ``batch`` and ``act_heads`` are split as they are, queries
stay split along ``length``, keys and values are gathered there.

A mask is by key (padding), by segment (`segments.SegmentMask`: packed sequences), or any other array; that one goes to
XLA with all scores. By segment, splash gets spans of keys and no mask (`splash.splash_spans`). cuDNN takes a bias of 2
bytes a score, and 2 more for a gradient of it that nobody wants (jax's #39512 ends that), so it gets rows of up to
`_LARGEST_BIAS` scores; longer ones, and those of a CPU, go to `blockwise`, plain JAX whose memory does not grow so.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from refine_jax.models.blockwise import blockwise_attention
from refine_jax.models.layers import CHECKPOINT_NAME, fit_spec, mesh_platform
from refine_jax.models.segments import SegmentMask, attention_mask
from refine_jax.models.splash import something_seen, splash_attention, splash_spans

Array = jax.Array
# q, k, v and what a mask knows of each query, arrays [B, Sq], and of each key, arrays [B, Sk].
Kernel = Callable[[Array, Array, Array, Any, Any], Array]

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "blocks")

# From this many scores a head, a kernel pays; on a CPU, which is then kept waiting for memory, one head after another.
_MANY_SCORES = 1024 * 1024
_MANY_SCORES_CPU = 128 * 1024
# Scores a device that are not held at once, where no kernel takes the arrays (a GPU's float32): 4 GiB.
_MOST_SCORES = 2**30
_BLOCK = 1024
_WIDEST_HEAD = 256
_LARGEST_BIAS = 2**28


def attention(
    q: Array | Sequence[Array],
    k: Array | Sequence[Array],
    v: Array | Sequence[Array],
    *,
    mask: Array | SegmentMask | None = None,
    impl: str = "auto",
) -> Array | tuple[Array, ...]:
    """Softmax attention at scale 1/sqrt(D), softmax in float32. The one door to attention kernels.

    q [B, Sq, H, D]; k, v [B, Sk, K, D] where K divides H (grouped heads); mask bool, broadcastable to
    [B, 1 | H, Sq, Sk], True where a query may see a key, or a `SegmentMask` of [B, Sq], [B, Sk]. A query that may see
    nothing attends evenly, or, where the mask is by segment, brings 0.
    Returns [B, Sq, H, D] in q's dtype. q, or k and v, may also be tuples of pieces that follow one another along the
    length (text, then image): each piece stays split over the mesh as it is, which their concatenation would not; a
    tuple for q returns one.
    impl: "auto" | "xla" | "cudnn" (NVIDIA, 16-bit only) | "splash" (TPU) | "blocks" (masks by segment alone; their
    memory grows with Sq + Sk); cuDNN and splash take masks by key, [B, 1, 1, Sk], and by segment, splash these with
    spans (`segments.segment_mask(one_target=True)`). Raises ValueError for another name or mask.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention impl {impl!r}: use one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    pieces = tuple(_pieces(x) for x in (q, k, v))
    batch, _, heads, depth = pieces[0][0].shape
    length, keys = (sum(piece.shape[1] for piece in x) for x in pieces[:2])
    by_segment = isinstance(mask, SegmentMask)
    by_key = not by_segment and (mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1))
    of_queries = of_keys = None
    if by_segment:
        of_queries, of_keys = (mask.queries, mask.span), (mask.keys, mask.order)
    elif by_key and mask is not None:
        of_keys = jnp.broadcast_to(mask[:, 0, 0], (batch, keys))
    if impl in ("cudnn", "splash", "blocks"):
        _check_mask(impl, mask, by_key, by_segment)

    whole = partial(_joined, lambda q, k, v, *_: _whole_attention(q, k, v, mask))
    split = {
        "splash": partial(_on_mesh, splash_spans if by_segment else splash_attention),
        "cudnn": partial(_on_mesh, _cudnn_masked if by_segment else _cudnn_attention),
        "blocks": partial(_on_mesh, _blocks_attention),
    }
    least = _MANY_SCORES_CPU if by_key else _MANY_SCORES
    if impl == "xla" or (impl == "auto" and not ((by_key or by_segment) and length * keys >= least)):
        out = whole(*pieces, of_queries, of_keys)
    elif impl in split:
        out = split[impl](*pieces, of_queries, of_keys)
    else:
        choices, otherwise = {}, whole
        if by_key:
            choices["cpu"] = partial(_joined, lambda q, k, v, _, seen: _blocked_attention(q, k, v, seen))
        else:
            choices["cpu"] = partial(_on_mesh, partial(_blocks_attention, one_head_at_a_time=True))
            otherwise = split["blocks"]
        many = length * keys >= _MANY_SCORES
        if by_key and many and batch * heads * length * keys > _MOST_SCORES * max(1, _devices()):
            otherwise = partial(_on_mesh, lambda q, k, v, _, seen: _blocked_attention(q, k, v, seen, remat=True))
        if many and depth <= _WIDEST_HEAD and (by_key or mask.span is not None):
            choices["tpu"] = split["splash"]
        even = length % 2 == keys % 2 == 0  # cuDNN's condition for a bias
        takes = many and _cudnn_takes(*(piece[0] for piece in pieces))
        if takes and (by_key or even and length * keys <= _LARGEST_BIAS):
            choices["cuda"] = split["cudnn"]
        # Under a mesh the platform is known already. The general way is right too, but a gradient through it keeps what
        # every branch, taken or not, would need: all scores, for one.
        platform = mesh_platform()
        if platform is not None:
            out = choices.get(platform, otherwise)(*pieces, of_queries, of_keys)
        else:
            out = jax.lax.platform_dependent(*pieces, of_queries, of_keys, **choices, default=otherwise)
    return out if isinstance(q, (tuple, list)) else out[0]


def _devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _check_mask(impl: str, mask: Array | SegmentMask | None, by_key: bool, by_segment: bool) -> None:
    if impl == "blocks" and not by_segment:
        raise ValueError("attention impl 'blocks': takes masks by segment; give a SegmentMask, or another impl")
    if not (by_key or by_segment):
        raise ValueError(f"attention impl {impl!r}: takes masks by key [B, 1, 1, Sk], this one is {mask.shape}")
    if impl == "splash" and by_segment and mask.span is None:
        raise ValueError("attention impl 'splash': this SegmentMask has no spans; make it with one_target=True")


def _pieces(x: Array | Sequence[Array]) -> tuple[Array, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _joined(
    kernel: Kernel, q: Sequence[Array], k: Sequence[Array], v: Sequence[Array], of_queries: Any, of_keys: Any
) -> tuple[Array, ...]:
    """`kernel` over the pieces joined along the length; its result cut like q."""
    join = lambda x: x[0] if len(x) == 1 else jnp.concatenate(x, axis=1)
    return _cut(kernel(join(q), join(k), join(v), of_queries, of_keys), q)


def _cut(x: Array, like: Sequence[Array]) -> tuple[Array, ...]:
    """x [B, S, …] in pieces as long as those."""
    return tuple(jnp.split(x, np.cumsum([piece.shape[1] for piece in like])[:-1], axis=1))


def _on_mesh(
    kernel: Kernel, q: Sequence[Array], k: Sequence[Array], v: Sequence[Array], of_queries: Any, of_keys: Any
) -> tuple[Array, ...]:
    """`kernel` on every device of the mesh in force: its rows, its heads and its queries, against all keys.

    The compiler cannot split a kernel by itself. Which queries a device has does not matter to them, so the pieces of q
    are joined on the device, and never across devices. A piece that the mesh does not divide is whole everywhere.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if mesh.empty or mesh.size == 1 or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return _joined(kernel, q, k, v, of_queries, of_keys)
    axes = nn.logical_to_mesh_axes(("batch", "length", "act_heads"), rules)
    rows, columns, heads = (() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in axes)
    if k[0].shape[2] % math.prod(mesh.shape[axis] for axis in heads):
        heads = ()

    def place(piece: Array) -> PartitionSpec:
        return PartitionSpec(*fit_spec((rows, columns, heads, None), piece.shape, mesh.shape))

    def local(q, k, v, of_queries, of_keys):
        of_queries = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *of_queries)
        return _joined(kernel, q, gather(k, specs[1]), gather(v, specs[2]), of_queries, of_keys)

    def gather(pieces: Sequence[Array], specs: Sequence[PartitionSpec]) -> tuple[Array, ...]:
        whole = lambda x, spec: jax.lax.all_gather(x, spec[1], axis=1, tiled=True) if spec[1] else x
        return tuple(whole(x, spec) for x, spec in zip(pieces, specs))

    specs = tuple(tuple(place(piece) for piece in x) for x in (q, k, v))
    leaves, tree = jax.tree.flatten(of_queries)
    of_pieces = tuple(tree.unflatten(part) for part in zip(*(_cut(x, q) for x in leaves))) or (of_queries,) * len(q)
    of_specs = tuple(PartitionSpec(*spec[:2]) for spec in specs[0]), PartitionSpec(specs[0][0][0], None)
    # Kernels do not say over which mesh axes their results vary, so that cannot be checked.
    run = jax.shard_map(local, in_specs=(*specs, *of_specs), out_specs=specs[0], check_vma=False)
    return run(q, k, v, of_pieces, of_keys)


# ----------------------------------------------------------------------------------------------------------------- XLA


def _whole_attention(q: Array, k: Array, v: Array, mask: Array | SegmentMask | None) -> Array:
    """All scores at once."""
    if isinstance(mask, SegmentMask):
        mask = mask.dense()
        return _seen_alone(_whole_attention(q, k, v, mask), mask)
    batch, length, heads, depth = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    # Heads go outwards by hand: gradients of the [B, S, H, D] contraction are 1.3 times slower on a CPU. Queries that
    # share a key head stand one after the other along its query axis.
    q = q.swapaxes(1, 2).reshape(batch, kv_heads, -1, depth)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * np.float32(depth**-0.5)
    logits = logits.reshape(batch, heads, length, keys)
    if mask is not None:
        logits = jnp.where(mask, logits, np.float32(-1e30))
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(batch, kv_heads, -1, keys)
    out = jnp.einsum("bhts,bhsd->bhtd", weights, v)
    return checkpoint_name(out.reshape(batch, heads, length, -1).swapaxes(1, 2), CHECKPOINT_NAME)


def _blocked_attention(q: Array, k: Array, v: Array, seen: Array | None, remat: bool = False) -> Array:
    """One head and up to `_BLOCK` queries at a time, so that the scores stay in a CPU's cache: twice as fast, or more.

    q [B, S, H, D], k, v [B, Sk, K, D] where K divides H; seen [B, Sk]. remat: a gradient makes the scores again.
    """
    batch, length, heads, depth = q.shape
    keys, kv_heads, blocks = k.shape[1], k.shape[2], -(-length // _BLOCK)
    size = -(-length // (8 * blocks)) * 8
    q = jnp.pad(q, ((0, 0), (0, blocks * size - length), (0, 0), (0, 0)))
    outwards = lambda x: x.swapaxes(1, 2).reshape(batch * kv_heads, -1, x.shape[3])
    seen = jnp.ones((batch, keys), bool) if seen is None else seen
    seen = jnp.repeat(seen, kv_heads, axis=0)

    def head(operands: tuple[Array, Array, Array, Array]) -> Array:
        queries, k, v, seen = operands

        def block(q: Array) -> Array:
            logits = jnp.einsum("td,sd->ts", q, k, preferred_element_type=jnp.float32) * np.float32(depth**-0.5)
            logits = jnp.where(seen, logits, np.float32(-1e30))
            weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
            out = jnp.einsum("ts,sd->td", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return out / jnp.sum(weights, axis=-1, keepdims=True)

        return jax.lax.map(block, queries.reshape(-1, size, depth)).astype(v.dtype)

    out = jax.lax.map(jax.checkpoint(head) if remat else head, (outwards(q), outwards(k), outwards(v), seen))
    out = out.reshape(batch, heads, blocks * size, -1)[:, :, :length].swapaxes(1, 2)
    return checkpoint_name(out, CHECKPOINT_NAME)


def _blocks_attention(q: Array, k: Array, v: Array, of_queries: Any, of_keys: Any, **options: bool) -> Array:
    """`blockwise_attention` as a kernel."""
    return blockwise_attention(q, k, v, of_queries[0], of_keys[0], **options)


def _seen_alone(out: Array, mask: Array) -> Array:
    """out [B, Sq, H, D], 0 where a query's mask [B, 1, Sq, Sk] is all False."""
    return jnp.where(jnp.any(mask, axis=3).swapaxes(1, 2)[..., None], out, jnp.zeros((), out.dtype))


# ----------------------------------------------------------------------------------------------------------------- GPU


def _cudnn_takes(q: Array, k: Array, v: Array) -> bool:
    """Whether cuDNN is there and takes such arrays (16 bit, heads of up to 128 or, from Hopper on, 256 features)."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    try:
        jax.eval_shape(partial(jax.nn.dot_product_attention, implementation="cudnn"), *shapes)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def _cudnn_attention(q: Array, k: Array, v: Array, of_queries: None, seen: Array | None) -> Array:
    """cuDNN's flash attention; arguments as in `splash_attention`."""
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if seen is None:
        out = attend(q, k, v)
    else:
        q, seen = something_seen(q, seen)
        k, v, lengths = seen_first(k, v, seen)
        out = attend(q, k, v, key_value_seq_lengths=lengths)
    return checkpoint_name(out, CHECKPOINT_NAME)


def _cudnn_masked(q: Array, k: Array, v: Array, of_queries: Any, of_keys: Any) -> Array:
    """The same under a mask by segment, which becomes an array."""
    mask = attention_mask(of_queries[0], of_keys[0])
    out = checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn"), CHECKPOINT_NAME)
    return _seen_alone(out, mask)


def seen_first(k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
    """Keys and values [B, S, K, D] with those that are `seen` [B, S] in front, and how many those are, [B] int32.

    cuDNN takes a length in place of a mask, and attention does not depend on the order of the keys.
    """
    order = jnp.argsort(~seen, axis=1, stable=True)[:, :, None, None]
    moved = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
    return *moved, jnp.sum(seen, axis=1, dtype=jnp.int32)
