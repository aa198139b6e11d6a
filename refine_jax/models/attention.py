"""Attention: the one door to the kernels.

Which kernel runs is decided by the platform that a program is lowered for: splash attention (`jax.experimental.pallas`)
on a TPU, cuDNN's flash attention on an NVIDIA GPU, XLA elsewhere and for short sequences. None of them ever holds a
mask of queries x keys. Under a mesh the kernels run in `jax.shard_map` by the logical rules in force: ``batch`` and
``act_heads`` are split as they are, queries stay split along ``length``, keys and values are gathered there.

Splash attention is JAX's own and not tokamax's (0.0.12): tokamax takes no mask by key on a TPU (`k_end` and batched
boolean masks raise NotImplementedError), offers its newer splash kernel under a private name only, picks a kernel by
the default device, which is a CPU while a TPU program is compiled ahead of time, and pins typeguard, pydantic and qwix.
Its kernel takes segment ids like this one: the day it is public, `_splash_kernel` is the place to change.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType, PartitionSpec

from refine_jax.models.layers import CHECKPOINT_NAME, fit_spec

Array = jax.Array
Kernel = Callable[[Array, Array, Array, Array | None], Array]

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

# From this many scores a head, a kernel pays; on a CPU, which is then kept waiting for memory, one head after another.
_MANY_SCORES = 1024 * 1024
_BLOCK = 256
_LANES = 128
_WIDEST_HEAD = 256


def attention(
    q: Array | Sequence[Array],
    k: Array | Sequence[Array],
    v: Array | Sequence[Array],
    *,
    mask: Array | None = None,
    impl: str = "auto",
) -> Array | tuple[Array, ...]:
    """Softmax attention at scale 1/sqrt(D), softmax in float32. The one door to attention kernels.

    q [B, Sq, H, D]; k, v [B, Sk, K, D] where K divides H (grouped heads); mask bool, broadcastable to
    [B, 1 | H, Sq, Sk], True where a query may see a key. A query that may see nothing attends evenly.
    Returns [B, Sq, H, D] in q's dtype. q, or k and v, may also be tuples of pieces that follow one another along the
    length (text, then image): each piece stays split over the mesh as it is, which their concatenation would not; a
    tuple for q returns one.
    impl: "auto" | "xla" | "cudnn" (NVIDIA, 16-bit only) | "splash" (TPU); the last two take masks by key,
    [B, 1, 1, Sk]. Raises ValueError for another name or mask.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention impl {impl!r}: use one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    pieces = tuple(_pieces(x) for x in (q, k, v))
    (batch, _, heads, depth), (_, _, kv_heads, _) = pieces[0][0].shape, pieces[1][0].shape
    length, keys = (sum(piece.shape[1] for piece in x) for x in pieces[:2])
    by_key = mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1)
    if impl in ("cudnn", "splash") and not by_key:
        raise ValueError(f"attention impl {impl!r}: takes masks by key [B, 1, 1, Sk], this one is {mask.shape}")
    seen = None
    if by_key and mask is not None:
        seen = jnp.broadcast_to(mask[:, 0, 0], (batch, keys))

    whole = partial(_joined, lambda q, k, v, seen: _whole_attention(q, k, v, mask))
    split = {
        "splash": partial(_on_mesh, _splash_attention),
        "cudnn": partial(_on_mesh, _cudnn_attention),
    }
    if impl == "xla" or (impl == "auto" and not (by_key and length * keys >= _MANY_SCORES)):
        out = whole(*pieces, seen)
    elif impl in split:
        out = split[impl](*pieces, seen)
    else:
        choices = {}
        if heads == kv_heads:
            choices["cpu"] = partial(_joined, _blocked_attention)
        if depth <= _WIDEST_HEAD:
            choices["tpu"] = split["splash"]
        if _cudnn_takes(*(piece[0] for piece in pieces)):
            choices["cuda"] = split["cudnn"]
        # Under a mesh the platform is known already. The general way is right too, but a gradient through it keeps what
        # every branch, taken or not, would need: all scores, for one.
        platform = _mesh_platform()
        if platform is not None:
            out = choices.get(platform, whole)(*pieces, seen)
        else:
            out = jax.lax.platform_dependent(*pieces, seen, **choices, default=whole)
    return out if isinstance(q, (tuple, list)) else out[0]


def _pieces(x: Array | Sequence[Array]) -> tuple[Array, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _mesh_platform() -> str | None:
    """The platform of the mesh in force, as lowering calls it; None where there is no mesh, or one of no devices."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None)
    return "cuda" if platform == "gpu" else platform


def _joined(
    kernel: Kernel, q: Sequence[Array], k: Sequence[Array], v: Sequence[Array], seen: Array | None
) -> tuple[Array, ...]:
    """`kernel` over the pieces joined along the length; its result cut like q."""
    ends = np.cumsum([piece.shape[1] for piece in q])[:-1]
    join = lambda x: x[0] if len(x) == 1 else jnp.concatenate(x, axis=1)
    return tuple(jnp.split(kernel(join(q), join(k), join(v), seen), ends, axis=1))


def _on_mesh(
    kernel: Kernel, q: Sequence[Array], k: Sequence[Array], v: Sequence[Array], seen: Array | None
) -> tuple[Array, ...]:
    """`kernel` on every device of the mesh in force: its rows, its heads and its queries, against all keys.

    The compiler cannot split a kernel by itself. Which queries a device has does not matter to them, so the pieces of q
    are joined on the device, and never across devices. A piece that the mesh does not divide is whole everywhere.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if mesh.empty or mesh.size == 1 or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return _joined(kernel, q, k, v, seen)
    axes = nn.logical_to_mesh_axes(("batch", "length", "act_heads"), rules)
    rows, columns, heads = (() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in axes)
    if k[0].shape[2] % math.prod(mesh.shape[axis] for axis in heads):
        heads = ()

    def place(piece: Array) -> PartitionSpec:
        return PartitionSpec(*fit_spec((rows, columns, heads, None), piece.shape, mesh.shape))

    def local(q, k, v, seen):
        return _joined(kernel, q, gather(k, specs[1]), gather(v, specs[2]), seen)

    def gather(pieces: Sequence[Array], specs: Sequence[PartitionSpec]) -> tuple[Array, ...]:
        whole = lambda x, spec: jax.lax.all_gather(x, spec[1], axis=1, tiled=True) if spec[1] else x
        return tuple(whole(x, spec) for x, spec in zip(pieces, specs))

    specs = tuple(tuple(place(piece) for piece in x) for x in (q, k, v))
    of_seen = None if seen is None else PartitionSpec(specs[0][0][0], None)
    # Kernels do not say over which mesh axes their results vary, so that cannot be checked.
    run = jax.shard_map(local, in_specs=(*specs, of_seen), out_specs=specs[0], check_vma=False)
    return run(q, k, v, seen)


# ----------------------------------------------------------------------------------------------------------------- XLA


def _whole_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """All scores at once."""
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


def _blocked_attention(q: Array, k: Array, v: Array, seen: Array | None) -> Array:
    """One head and `_BLOCK` queries at a time, so that the scores stay in a CPU's cache: 2.5 times faster at 3 200.

    q, k, v [B, S, H, D]; seen [B, Sk].
    """
    batch, length, heads, depth = q.shape
    keys, blocks = k.shape[1], -(-length // _BLOCK)
    q = jnp.pad(q, ((0, 0), (0, blocks * _BLOCK - length), (0, 0), (0, 0)))
    outwards = lambda x: x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], x.shape[3])
    seen = jnp.ones((batch, keys), bool) if seen is None else seen
    seen = jnp.repeat(seen, heads, axis=0)

    def head(operands: tuple[Array, Array, Array, Array]) -> Array:
        queries, k, v, seen = operands

        def block(q: Array) -> Array:
            logits = jnp.einsum("td,sd->ts", q, k, preferred_element_type=jnp.float32) * np.float32(depth**-0.5)
            logits = jnp.where(seen, logits, np.float32(-1e30))
            weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
            out = jnp.einsum("ts,sd->td", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return out / jnp.sum(weights, axis=-1, keepdims=True)

        return jax.lax.map(block, queries.reshape(blocks, _BLOCK, depth)).astype(v.dtype)

    out = jax.lax.map(head, (outwards(q), outwards(k), outwards(v), seen))
    out = out.reshape(batch, heads, blocks * _BLOCK, -1)[:, :, :length].swapaxes(1, 2)
    return checkpoint_name(out, CHECKPOINT_NAME)


def _something_seen(q: Array, seen: Array) -> tuple[Array, Array]:
    """For kernels that need a key for every query: where an item sees none, its queries are 0 and see all, evenly."""
    some = jnp.any(seen, axis=1, keepdims=True)
    return jnp.where(some[:, :, None, None], q, jnp.zeros((), q.dtype)), seen | ~some


# ----------------------------------------------------------------------------------------------------------------- TPU


def block_size(length: int, largest: int = 1024) -> int:
    """The block, a multiple of 128, into which a kernel cuts `length`: little padding first, then large blocks.

    A block of queries reads all keys once, so blocks below 512 wait for memory: lengths up to `largest` are one block.
    """
    if length <= largest:
        return -(-length // _LANES) * _LANES
    return min(range(largest // 2, largest + 1, _LANES), key=lambda block: (-(-length // block) * block, -block))


def _splash_attention(q: Array, k: Array, v: Array, seen: Array | None, *, interpret: bool = False) -> Array:
    """JAX's splash attention kernel: q [B, Sq, H, D], k, v [B, Sk, K, D], seen [B, Sk] -> [B, Sq, H, D].

    Lengths are padded to blocks and heads to 128 features; padded and unseen keys form a segment that no query is in.
    """
    length, keys, depth = q.shape[1], k.shape[1], q.shape[-1]
    block_q, block_kv = block_size(length), block_size(keys)
    if seen is not None:
        q, seen = _something_seen(q, seen)
    elif keys % block_kv:
        seen = jnp.ones((q.shape[0], keys), bool)

    def padded(x: Array, block: int) -> Array:  # [B, S, H, D] -> [B, H, S', D']
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, -depth % _LANES)))
        return x.swapaxes(1, 2)

    # The kernel knows no scale.
    q = (q.astype(jnp.float32) * np.float32(depth**-0.5)).astype(q.dtype)
    q, k, v = padded(q, block_q), padded(k, block_kv), padded(v, block_kv)
    kernel = _splash_kernel(q.shape[1], q.shape[2], k.shape[2], block_q, block_kv, interpret)
    if seen is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        seen = jnp.pad(seen, ((0, 0), (0, k.shape[2] - keys)))
        segments = splash.SegmentIds(q=jnp.ones(q.shape[2], jnp.int32), kv=seen.astype(jnp.int32))
        out = jax.vmap(kernel, in_axes=(0, 0, 0, splash.SegmentIds(None, 0)))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :length, :, :depth]


def _splash_kernel(
    heads: int, length: int, keys: int, block_q: int, block_kv: int, interpret: bool
) -> splash.SplashAttentionKernel:
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_half(block_kv),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=_half(block_kv),
        # One kernel for the three gradients: five matrix products where two kernels need seven.
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.FullMask((length, keys))] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )


def _half(block: int) -> int:
    """The part of a block that is computed at once, while the next part's scores are on their way."""
    return block // 2 if block % (2 * _LANES) == 0 else block


# ----------------------------------------------------------------------------------------------------------------- GPU


def _cudnn_takes(q: Array, k: Array, v: Array) -> bool:
    """Whether cuDNN is there and takes such arrays (16 bit, heads of up to 128 or, from Hopper on, 256 features)."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    try:
        jax.eval_shape(partial(jax.nn.dot_product_attention, implementation="cudnn"), *shapes)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def _cudnn_attention(q: Array, k: Array, v: Array, seen: Array | None) -> Array:
    """cuDNN's flash attention; arguments as in `_splash_attention`."""
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if seen is None:
        out = attend(q, k, v)
    else:
        q, seen = _something_seen(q, seen)
        k, v, lengths = seen_first(k, v, seen)
        out = attend(q, k, v, key_value_seq_lengths=lengths)
    return checkpoint_name(out, CHECKPOINT_NAME)


def seen_first(k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
    """Keys and values [B, S, K, D] with those that are `seen` [B, S] in front, and how many those are, [B] int32.

    cuDNN takes a length in place of a mask, and attention does not depend on the order of the keys.
    """
    order = jnp.argsort(~seen, axis=1, stable=True)[:, :, None, None]
    moved = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
    return *moved, jnp.sum(seen, axis=1, dtype=jnp.int32)
