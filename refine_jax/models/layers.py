"""Layers that every network shares: dense with optional LoRA, norms, rotary tables.

Parameters carry logical axis names (`flax.linen.with_logical_partitioning`); `flax.linen.meta.unbox` removes the boxes.
Networks are applied with plain (unboxed) trees. Names in use:

- parameters: ``layers`` (scanned blocks), ``embed``, ``heads`` (heads x head_dim), ``mlp``, ``vocab``, ``norm``,
  ``time``, ``in_channels``, ``out_channels``, ``conv_in``, ``conv_out``; of adapters ``lora_rank``, and ``lora_embed``
  where the kernel has ``embed``;
- activations: ``batch``, ``length`` (image tokens), ``text_length``, ``act_embed``, ``act_heads``, ``act_mlp``, and
  ``time_rows``, ``act_time`` of a timestep's embedding, a vector a sample. They differ from the parameters' names
  because the residual stream is normally whole along the features on which FSDP splits the kernels.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from refine_jax.errors import RefineError
from refine_jax.models import quantize

Array = jax.Array
Initializer = Callable[..., Array]

# The name under which a remat policy may keep what attention returns (and, for splash, the softmax's log-sum-exp).
CHECKPOINT_NAME = "attention"

# Rows of a tile of 16-bit numbers in a TPU's memory.
_TILE_ROWS = 16

default_kernel_init = nn.initializers.lecun_normal()


def constrain(x: Array, *names: str | None) -> Array:
    """Pin an activation's sharding by logical axis names; the identity where no rules or no mesh are in force.

    A dimension named None, or one that its mesh axes do not divide, is left to the compiler.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if not rules or mesh.empty:
        return x
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    spec = fit_spec(nn.logical_to_mesh_axes(names, rules), x.shape, mesh.shape, free)
    spec = [free if name is None else axes for name, axes in zip(names, spec)]
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def gathered_in_turn(kernel: Array, names: Sequence[str | None]) -> Array:
    """`kernel [in, out]` with one dimension whole, where the mesh splits both of them along axes that split the batch.

    Such weights come together for a product in two gathers, over few devices each, and their gradients go back the same
    way: scattered along the dimension that is kept (the one of more parts), summed and cut along the other. In one
    collective over all devices the TPU's compiler sums whole gradients on each of them. The identity elsewhere.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if not rules or mesh.empty:
        return kernel
    group = lambda axes: (axes,) if isinstance(axes, str) else tuple(axes or ())
    split = [group(axes) for axes in fit_spec(nn.logical_to_mesh_axes(names, rules), kernel.shape, mesh.shape)]
    rows = set(group(nn.logical_to_mesh_axes(("batch",), rules)[0]))
    if not all(set(axes) & rows for axes in split):
        return kernel
    parts = [math.prod(mesh.shape[axis] for axis in axes) for axes in split]
    # Of equals the one whose parts are whole tiles: others are not scattered.
    order = [(count, size // count % _TILE_ROWS == 0) for count, size in zip(parts, kernel.shape)]
    kept = [axes if index == order.index(max(order)) else None for index, axes in enumerate(split)]
    return jax.lax.with_sharding_constraint(kernel, jax.sharding.PartitionSpec(*kept))


def mesh_platform() -> str | None:
    """The platform of the mesh in force, as lowering calls it; None where there is no mesh, or one of no devices."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None)
    return "cuda" if platform == "gpu" else platform


def each_row(function: Callable[[Array], Any], x: Array) -> Any:
    """`function` of x [B, ...], row by row on a CPU: arrays [B, ...]. For networks with convolutions, in inference.

    A CPU's convolution rounds the last pixels of a batch in another way than the others, so that a picture's result
    would depend on its place. On a mesh of several devices, whose rows lie apart, and elsewhere, all rows at once.
    """
    if x.shape[0] == 1:
        return function(x)
    rows = lambda x: jax.tree.map(lambda y: y[:, 0], jax.lax.map(lambda row: function(row[None]), x))
    platform = mesh_platform()
    if platform is None:
        return jax.lax.platform_dependent(x, cpu=rows, default=function)
    return (rows if platform == "cpu" and jax.sharding.get_abstract_mesh().size == 1 else function)(x)


def take_rows(table: Array, ids: Array, dtype: Any, names: Sequence[str | None]) -> Array:
    """Rows of `table [rows, features]` by ids [B, ...], clipped to it: [B, ..., features] in `dtype`.

    Where the mesh splits the features along axes that split the batch, gradients change sides before they are added up:
    each device has all rows' gradients of its features. Otherwise every device adds its own to a whole table, and
    these are summed.
    """
    out = jnp.take(table, ids, axis=0, mode="clip").astype(dtype)
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if not rules or mesh.empty:
        return out
    group = lambda axes: (axes,) if isinstance(axes, str) else tuple(axes or ())
    features = group(fit_spec(nn.logical_to_mesh_axes(names, rules), table.shape, mesh.shape)[1])
    rows = tuple(axis for axis in group(nn.logical_to_mesh_axes(("batch",), rules)[0]) if axis not in features)
    batch = fit_spec([rows], out.shape[:1], mesh.shape)
    spec = jax.sharding.PartitionSpec(*batch, *[None] * (out.ndim - 2), features or None)

    @jax.custom_vjp
    def same(x: Array) -> Array:
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.with_sharding_constraint(g, spec),))
    return same(out) if features else out


def fit_spec(
    spec: Sequence[Any], shape: Sequence[int], mesh_shape: Mapping[str, int], otherwise: Any = None
) -> list[Any]:
    """The mesh axes of each dimension of `shape`: `otherwise` where they do not divide it, None for size 1."""
    fitted = []
    for size, axes in zip(shape, (*spec, *[None] * (len(shape) - len(spec)))):
        group = (axes,) if isinstance(axes, str) else tuple(axes or ())
        count = math.prod(mesh_shape[axis] for axis in group)
        fitted.append(otherwise if size % count else axes if count > 1 else None)
    return fitted


def remat_policy(name: str) -> Callable[..., bool] | None:
    """What a rematerialised block keeps for its gradient: "full" nothing, "attention" what attention returned (the
    kernel is not run again), "dots" that and the products with weights (only what is cheap is computed again),
    otherwise the name of a `jax.checkpoint_policies` policy. Raises RefineError.
    """
    policies = jax.checkpoint_policies
    plain = ("dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable", "nothing_saveable")
    known: dict[str, Callable[..., bool] | None] = {name: getattr(policies, name) for name in plain}
    known["full"] = None
    known["attention"] = policies.save_only_these_names(CHECKPOINT_NAME)
    known["dots"] = policies.save_from_both_policies(known["attention"], policies.dots_with_no_batch_dims_saveable)
    if name not in known:
        raise RefineError(f"remat {name!r}: choose one of {', '.join(known)}")
    return known[name]


class Dense(nn.Module):
    """`y = x @ kernel + bias`, plus `(x @ a) @ b` where the collection ``lora`` holds ``a`` and ``b`` at this path.

    Parameters: ``kernel [in, out]``, ``bias [out]``. LoRA: ``a [in, r]``, ``b [r, out]`` with the scale alpha / r
    already folded into ``b``; several adapters stack by concatenation along r. With no ``lora`` entry this is the base
    layer.

    With `param_dtype` "int8" the kernel is int8 and ``kernel_scale [out] float32`` stands beside it (`quantize`); a
    fresh initialisation is zero, for such weights are made from others. The bias is in `dtype`.
    """

    features: int
    kernel_axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., in] -> [..., features] in `dtype`."""
        dtype, quantized = jnp.dtype(self.dtype), self.param_dtype in quantize.KINDS
        init = nn.initializers.zeros_init() if quantized else self.kernel_init
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.kernel_axes),
            (x.shape[-1], self.features),
            jnp.dtype(self.param_dtype),
        )
        x = x.astype(dtype)
        if not quantized:  # gathered in the smaller of the two dtypes
            kernel = kernel.astype(dtype)
        if "time" not in self.kernel_axes:  # those act on a vector a sample, which is split like their rows instead
            kernel = gathered_in_turn(kernel, self.kernel_axes)
        y = jnp.dot(x, kernel.astype(dtype))
        if quantized:
            ones = nn.with_logical_partitioning(nn.initializers.ones_init(), self.kernel_axes[1:])
            scale = self.param(quantize.SCALE, ones, (self.features,), jnp.float32)
            y = (y.astype(jnp.float32) * scale).astype(dtype)
        if self.has_variable("lora", "a"):
            a = nn.meta.unbox(self.get_variable("lora", "a"))
            b = nn.meta.unbox(self.get_variable("lora", "b"))
            y = y + jnp.dot(jnp.dot(x, a.astype(dtype)), b.astype(dtype))
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(self.bias_init, self.kernel_axes[1:]),
                (self.features,),
                jnp.dtype(quantize.floating(self.param_dtype, self.dtype)),
            )
            y = y + bias.astype(dtype)
        return y


def param_shapes(model: Any, fields: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Shapes of `model.init(key, names)`, in logical boxes, traced once for every architecture.

    model: a frozen dataclass of networks' configurations, of which `init` reads `fields` alone.
    """
    read = type(model)(**{field: getattr(model, field) for field in fields})
    return {name: jax.tree.map(lambda leaf: leaf, _network_shapes(read, name)) for name in names}


@functools.lru_cache(maxsize=64)
def _network_shapes(model: Any, name: str) -> Any:
    return jax.eval_shape(lambda: model.init(jax.random.key(0), (name,)))[name]


def init_lora(
    key: Array, params: Mapping[str, Any], targets: str, rank: int, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """A fresh ``lora`` collection for the dense layers whose "/"-joined path the expression `targets` matches fully.

    `a` is uniform in ±1/sqrt(in), `b` zero, so that the adapted network starts as the base. Kernels may be stacked:
    [..., in, out] gives a [..., in, rank], b [..., rank, out]; of kernels in their logical boxes, a and b are boxed
    too, the rank named ``lora_rank`` and ``embed`` ``lora_embed``. Raises RefineError where nothing matches.

    >>> init_lora(key, params, r"blocks/attn/(to_q|to_k|to_v|to_out)", 256)
    {"blocks": {"attn": {"to_q": {"a": [60, 3072, 256], "b": [60, 256, 3072]}, …}}}
    """
    lora: dict[tuple[str, ...], Any] = {}
    for path, kernel in traverse_util.flatten_dict(params).items():
        if path[-1] != "kernel" or not re.fullmatch(targets, "/".join(path[:-1])):
            continue
        *stack, inputs, outputs = nn.meta.unbox(kernel).shape
        key, own = jax.random.split(key)
        bound = inputs**-0.5
        a = jax.random.uniform(own, (*stack, inputs, rank), dtype, -bound, bound)
        b = jnp.zeros((*stack, rank, outputs), dtype)
        if isinstance(kernel, nn.meta.AxisMetadata):
            *above, rows, columns = ("lora_embed" if name == "embed" else name for name in kernel.names)
            a = kernel.replace(value=a, names=(*above, rows, "lora_rank"))
            b = kernel.replace(value=b, names=(*above, "lora_rank", columns))
        lora[(*path[:-1], "a")], lora[(*path[:-1], "b")] = a, b
    if not lora:
        raise RefineError(f"LoRA targets {targets!r}: no dense layer has such a path")
    return traverse_util.unflatten_dict(lora)


def scale_lora(lora: Mapping[str, Any], scale: float) -> Any:
    """A ``lora`` collection as `Dense` reads it: the scale alpha / rank folded into b."""
    fold = lambda path, leaf: leaf * scale if path[-1].key == "b" and scale != 1.0 else leaf
    return jax.tree_util.tree_map_with_path(fold, lora)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, float32 inside. Parameter: ``scale [features]``."""

    eps: float = 1e-6
    axis_name: str | None = "norm"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., features] -> the same shape in `dtype`."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis_name,)),
            (x.shape[-1],),
            jnp.dtype(self.param_dtype),
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)).astype(jnp.dtype(self.dtype))


class LayerNorm(nn.Module):
    """Layer norm over the last axis with an affine map, float32 inside. Parameters: ``scale``, ``bias [features]``."""

    eps: float = 1e-6
    axis_name: str | None = "norm"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., features] -> the same shape in `dtype`."""
        shape, kind = (x.shape[-1],), jnp.dtype(self.param_dtype)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", nn.with_logical_partitioning(ones, (self.axis_name,)), shape, kind)
        bias = self.param("bias", nn.with_logical_partitioning(zeros, (self.axis_name,)), shape, kind)
        y = layer_norm(x, self.eps) * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return y.astype(jnp.dtype(self.dtype))


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Layer norm over the last axis without affine map: [..., C] any dtype -> [..., C] float32.

    The result stays float32 so that a modulation that follows it is not rounded twice.
    """
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def timestep_embedding(t: Array, dim: int, *, scale: float = 1.0, max_period: float = 10000.0) -> Array:
    """Sinusoidal embedding, cosines first: t [B] -> [B, dim] float32, ``dim`` even.

    Equals diffusers' `get_timestep_embedding(flip_sin_to_cos=True, downscale_freq_shift=0)`.
    """
    half = dim // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(max_period)) / np.float32(half))
    # The reference multiplies by `scale` last; at scale 1000 the order is visible in float32.
    angles = np.float32(scale) * (t.astype(jnp.float32)[:, None] * frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_frequencies(dim: int, theta: float = 10000.0) -> np.ndarray:
    """Angular frequencies theta^(-2i/dim), i < dim/2: [dim // 2] float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.power(np.float32(theta), exponents)


def rotary_angles(positions: Array, axes_dims: Sequence[int], theta: float = 10000.0) -> tuple[Array, Array]:
    """Cosines and sines of a multi-axis rotary embedding.

    positions [..., A] (integers, negative allowed; A = len(axes_dims)) -> two [..., sum(axes_dims) // 2] float32.
    Axis a owns `axes_dims[a] // 2` consecutive pairs with its own frequency ladder.
    """
    positions = positions.astype(jnp.float32)
    frequencies = np.concatenate([rotary_frequencies(dim, theta) for dim in axes_dims])
    owner = np.repeat(np.arange(len(axes_dims)), [dim // 2 for dim in axes_dims])
    angles = positions[..., owner] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """Rotate pairs of features; float32 inside, the dtype of x outside.

    x [B, S, H, D]; cos, sin [B or 1, S, D // 2]. Pairs are (2i, 2i+1) where `interleaved`, otherwise (i, i + D/2).
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    y = x.astype(jnp.float32)
    if interleaved:
        y = y.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
        real, imaginary = y[..., 0], y[..., 1]
        y = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1).reshape(x.shape)
    else:
        first, second = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return y.astype(x.dtype)
