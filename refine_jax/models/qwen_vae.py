"""The Qwen-Image VAE on still images, as 2-D convolutions in NHWC.

The released network is a causal video autoencoder (diffusers `AutoencoderKLQwenImage`). Its causal convolutions pad
time with zeros on the past side only, so on one frame all temporal slices of a kernel but the last meet zeros, and the
temporal resampling convolutions are never reached. What remains is this network, at a third of the multiplications.

Images [B, H, W, 3] in -1..1; latents [B, H / r, W / r, z_dim] with r = `VAEConfig.spatial_ratio`. Latents are "raw" as
they leave the encoder; `normalize` gives the standardised ones that the flow model is trained on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refine_jax.errors import RefineError
from refine_jax.models.attention import attention
from refine_jax.models.layers import Dense, constrain

Array = jax.Array

# Statistics of the released model's latents, a channel each (the defaults of the reference's configuration).
PUBLISHED_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
PUBLISHED_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

# Attention scores held at once, in elements; above this the queries are taken in chunks.
_MAX_SCORES = 2**25


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Hyper-parameters under the reference's names; the defaults are the published model.

    temperal_downsample: which of the len(dim_mult) - 1 downsamplers also halve time in the video model; a still image
    never reaches that part, the field is kept for the checkpoint's accounting. attn_scales: encoder resolutions (1,
    0.5, …) whose residual blocks are followed by attention. latents_mean, latents_std: one number a latent channel;
    None means the published ones where z_dim is 16, otherwise 0 and 1. dtype: of the computation; param_dtype: of the
    parameters ("float32" or "bfloat16").
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        published = self.z_dim == len(PUBLISHED_MEAN)
        defaults = {
            "latents_mean": PUBLISHED_MEAN if published else (0.0,) * self.z_dim,
            "latents_std": PUBLISHED_STD if published else (1.0,) * self.z_dim,
        }
        for name in ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std"):
            value = getattr(self, name)
            object.__setattr__(self, name, defaults[name] if value is None else tuple(value))
        for name in defaults:
            if len(getattr(self, name)) != self.z_dim:
                raise RefineError(
                    f"VAE configuration: {name} has {len(getattr(self, name))} numbers, z_dim is {self.z_dim}; "
                    "give one a latent channel"
                )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise RefineError(
                f"VAE configuration: temperal_downsample has {len(self.temperal_downsample)} entries and dim_mult "
                f"{len(self.dim_mult)}; give one fewer than dim_mult"
            )

    @property
    def spatial_ratio(self) -> int:
        """Image pixels along one side of a latent pixel."""
        return 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> "VAEConfig":
        """From the reference's config.json. Raises RefineError on a field that this network does not know."""
        # Dropout is a training-time choice of the reference and absent from the released weights' use.
        fields = {key: value for key, value in config.items() if not key.startswith("_") and key != "dropout"}
        if "input_channels" in fields:
            fields["in_channels"] = fields.pop("input_channels")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise RefineError(f"VAE configuration: unknown fields {', '.join(unknown)}; give an AutoencoderKLQwenImage")
        return cls(**{**fields, **overrides})


def normalize(z: Array, config: VAEConfig) -> Array:
    """Raw latents [..., z_dim] -> (z - mean) / std, as the flow model sees them."""
    return (z - jnp.asarray(config.latents_mean, z.dtype)) / jnp.asarray(config.latents_std, z.dtype)


def denormalize(z: Array, config: VAEConfig) -> Array:
    """The inverse of `normalize`: what `QwenVAE.decode` takes."""
    return z * jnp.asarray(config.latents_std, z.dtype) + jnp.asarray(config.latents_mean, z.dtype)


class Conv(nn.Module):
    """2-D convolution. Parameters: ``kernel [size, size, in, out]``, ``bias [out]``.

    padding: ((top, bottom), (left, right)) zeros; None keeps the size. upsample: first double both sides by nearest
    neighbour.
    """

    features: int
    config: VAEConfig
    size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    upsample: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, in] -> [B, H', W', features] in the configuration's dtype."""
        dtype, param_dtype = jnp.dtype(self.config.dtype), jnp.dtype(self.config.param_dtype)
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, "conv_in", "conv_out")),
            (self.size, self.size, x.shape[-1], self.features),
            param_dtype,
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",)),
            (self.features,),
            param_dtype,
        )
        x = x.astype(dtype)
        if self.size == 1:
            y = jnp.dot(x, kernel[0, 0].astype(dtype))
        elif self.upsample:
            y = _upsample_conv(x, kernel)
        else:
            y = _conv(x, kernel.astype(dtype), self.padding or "SAME", self.stride)
        return y + bias.astype(dtype)


def _conv(x: Array, kernel: Array, padding: Any, stride: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _upsample_conv(x: Array, kernel: Array) -> Array:
    """Nearest-neighbour doubling followed by a 3x3 convolution, without the doubled image.

    An output pixel sees two distinct input rows: an even one (i-1, i) with weights (k0, k1 + k2), an odd one (i, i+1)
    with (k0 + k1, k2); columns alike. Four 2x2 convolutions on the small image, 4/9 of the multiplications.
    """
    batch, height, width, _ = x.shape
    kernel = kernel.astype(jnp.float32)

    def fold(k: Array, axis: int, odd: int) -> Array:
        k0, k1, k2 = jnp.split(k, 3, axis)
        return jnp.concatenate([k0 + k1, k2] if odd else [k0, k1 + k2], axis)

    def phase(row: int, column: int) -> Array:
        folded = fold(fold(kernel, 0, row), 1, column).astype(x.dtype)
        return _conv(x, folded, ((1 - row, row), (1 - column, column)))

    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]  # each [B, H, W, 2, C]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


class ChannelNorm(nn.Module):
    """x / ‖x‖ over channels, times sqrt(C) and a learned ``gamma [C]``; float32 inside (reference: RMS_norm)."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., C] -> the same shape in the configuration's dtype."""
        channels = x.shape[-1]
        gamma = self.param(
            "gamma",
            nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
            (channels,),
            jnp.dtype(self.config.param_dtype),
        )
        x = x.astype(jnp.float32)
        # The reference divides by max(‖x‖, 1e-12). Clamping the square keeps the gradient of an all-zero pixel finite.
        squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24)) * (channels**0.5 * gamma.astype(jnp.float32))
        return x.astype(jnp.dtype(self.config.dtype))


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input (through a 1x1 convolution where the width changes)."""

    features: int
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] -> [B, H, W, features]."""
        h = nn.silu(ChannelNorm(self.config, name="norm1")(x))
        h = Conv(self.features, self.config, name="conv1")(h)
        h = nn.silu(ChannelNorm(self.config, name="norm2")(h))
        h = Conv(self.features, self.config, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, self.config, size=1, name="conv_shortcut")(x)
        return constrain_image(x + h)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, with a residual."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] -> the same shape."""
        batch, height, width, channels = x.shape
        kinds = dict(dtype=self.config.dtype, param_dtype=self.config.param_dtype)
        axes = ("conv_in", "conv_out")
        h = ChannelNorm(self.config, name="norm")(x).reshape(batch, height * width, 1, channels)
        q, k, v = jnp.split(Dense(3 * channels, axes, **kinds, name="to_qkv")(h), 3, axis=-1)
        h = _chunked_attention(q, k, v).reshape(x.shape)
        return x + Dense(channels, axes, **kinds, name="proj")(h)


def constrain_image(x: Array) -> Array:
    """Under a mesh no chip computes a whole batch; those that share an image take its rows, and swap edges."""
    return constrain(x, "batch", "rows", None, None)


def _chunked_attention(q: Array, k: Array, v: Array) -> Array:
    """`attention` on [B, S, 1, D] with bounded memory: 16 384 pixels (a 1024² image) would need 1 GiB of scores."""
    batch, length, heads, width = q.shape
    chunks = 1
    while length % chunks or batch * length * length // chunks > _MAX_SCORES and chunks < length:
        chunks += 1
    if chunks == 1:
        return attention(q, k, v)
    parts = jnp.moveaxis(q.reshape(batch, chunks, length // chunks, heads, width), 1, 0)
    parts = constrain(parts, None, "batch", "rows", None, None)  # not chunk by chunk: they take turns
    return jnp.moveaxis(jax.lax.map(lambda part: attention(part, k, v), parts), 0, 1).reshape(q.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at constant width."""

    features: int
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, features] -> the same shape."""
        x = ResBlock(self.features, self.config, name="resnets_0")(x)
        x = AttentionBlock(self.config, name="attentions_0")(x)
        return ResBlock(self.features, self.config, name="resnets_1")(x)


class Encoder(nn.Module):
    """Image -> 2·z_dim moments before `quant_conv`. Children are numbered as in the reference's flat list."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, in_channels] -> [B, H / r, W / r, 2·z_dim]."""
        config = self.config
        x = Conv(config.base_dim, config, name="conv_in")(constrain_image(x))
        count = 0

        def name() -> str:
            nonlocal count
            count += 1
            return f"down_blocks_{count - 1}"

        for level, mult in enumerate(config.dim_mult):
            features = config.base_dim * mult
            for _ in range(config.num_res_blocks):
                x = ResBlock(features, config, name=name())(x)
                if 0.5**level in config.attn_scales:
                    x = AttentionBlock(config, name=name())(x)
            if level < len(config.dim_mult) - 1:
                # Zeros at the far edges only, as in the reference.
                x = Conv(features, config, stride=2, padding=((0, 1), (0, 1)), name=name())(x)
        x = MidBlock(x.shape[-1], config, name="mid_block")(x)
        x = nn.silu(ChannelNorm(config, name="norm_out")(x))
        return constrain_image(Conv(2 * config.z_dim, config, name="conv_out")(x))


class Decoder(nn.Module):
    """Latents after `post_quant_conv` -> image, not clipped."""

    config: VAEConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, h, w, z_dim] -> [B, r·h, r·w, in_channels]."""
        config = self.config
        x = Conv(config.base_dim * config.dim_mult[-1], config, name="conv_in")(constrain_image(z))
        x = MidBlock(x.shape[-1], config, name="mid_block")(x)
        for level, mult in enumerate(reversed(config.dim_mult)):
            features = config.base_dim * mult
            for block in range(config.num_res_blocks + 1):
                x = ResBlock(features, config, name=f"up_blocks_{level}_resnets_{block}")(x)
            if level < len(config.dim_mult) - 1:
                x = Conv(features // 2, config, upsample=True, name=f"up_blocks_{level}_upsample")(x)
        x = nn.silu(ChannelNorm(config, name="norm_out")(x))
        return constrain_image(Conv(config.in_channels, config, name="conv_out")(x))


class QwenVAE(nn.Module):
    """The still-image autoencoder. Use as `apply({"params": tree}, x, method="encode" | "decode")`.

    `init(key, image)` makes the parameters; the image's size does not matter to them.
    """

    config: VAEConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config)
        self.quant_conv = Conv(2 * config.z_dim, config, size=1)
        self.post_quant_conv = Conv(config.z_dim, config, size=1)
        self.decoder = Decoder(config)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Image [B, H, W, in_channels] float in -1..1 -> mean, log-variance, both [B, H / r, W / r, z_dim] float32.

        Raw moments: the log-variance is not clamped (the reference clamps to -30..20 where it samples).
        Raises RefineError where a side is not a multiple of r.
        """
        _check_image(x.shape, self.config)
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)).astype(jnp.float32), 2, axis=-1)
        return mean, logvar

    def decode(self, z: Array, clip: bool = True) -> Array:
        """Raw latents [B, h, w, z_dim] -> image [B, r·h, r·w, in_channels] float32.

        clip: clip to -1..1 like the reference; False for a training loss, whose gradient must not vanish outside.
        """
        _check_latents(z.shape, self.config)
        x = self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
        return jnp.clip(x, -1.0, 1.0) if clip else x

    def __call__(self, x: Array) -> Array:
        """Image -> the reconstruction from the mean, not clipped."""
        return self.decode(self.encode(x)[0], clip=False)


def _check_image(shape: tuple[int, ...], config: VAEConfig) -> None:
    if len(shape) != 4 or shape[-1] != config.in_channels:
        raise RefineError(f"VAE: images of shape {list(shape)}; give [batch, height, width, {config.in_channels}]")
    ratio = config.spatial_ratio
    if min(shape) < 1 or shape[1] % ratio or shape[2] % ratio:
        raise RefineError(f"VAE: image of {shape[1]}x{shape[2]} pixels; make both sides multiples of {ratio}")


def _check_latents(shape: tuple[int, ...], config: VAEConfig) -> None:
    if len(shape) != 4 or shape[-1] != config.z_dim or min(shape) < 1:
        raise RefineError(f"VAE: latents of shape {list(shape)}; give [batch, height, width, {config.z_dim}]")


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tile and stride in image pixels, multiples of r, stride ≤ tile; the defaults are the reference's."""

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192


REFERENCE_TILING = Tiling()


def tiled_encode(
    vae: QwenVAE, variables: Mapping[str, Any], x: Array, tiling: Tiling = REFERENCE_TILING
) -> tuple[Array, Array]:
    """`QwenVAE.encode` by overlapping tiles, blended as the reference's `tiled_encode`; a small image goes whole.

    Each tile is encoded on its own (attention does not cross tiles), so the result differs from `encode`'s. Tiles of
    one shape share one traced network under `lax.map`: at most (1 + ⌈tile / stride⌉)² networks compile, whatever
    the image's size. Memory: the activations of one tile, plus every tile's moments.
    """
    _check_image(x.shape, vae.config)
    ratio = vae.config.spatial_ratio
    tiles = _tiling_axes(tiling, ratio)
    if x.shape[1] <= tiling.height and x.shape[2] <= tiling.width:
        return vae.apply(variables, x, method="encode")

    def run(tile: Array) -> Array:
        return jnp.concatenate(vae.apply(variables, tile, method="encode"), axis=-1)

    mean, logvar = jnp.split(_tiled(run, x, [(t * ratio, s * ratio) for t, s in tiles], tiles), 2, axis=-1)
    return mean, logvar


def tiled_decode(
    vae: QwenVAE, variables: Mapping[str, Any], z: Array, tiling: Tiling = REFERENCE_TILING, clip: bool = True
) -> Array:
    """`QwenVAE.decode` by overlapping tiles, blended as the reference's `tiled_decode`; memory as in `tiled_encode`.

    The reference clips whole images only, not tiled ones: `clip=False` gives its numbers.
    """
    _check_latents(z.shape, vae.config)
    ratio = vae.config.spatial_ratio
    tiles = _tiling_axes(tiling, ratio)
    if z.shape[1] <= tiles[0][0] and z.shape[2] <= tiles[1][0]:
        return vae.apply(variables, z, clip=clip, method="decode")

    def run(tile: Array) -> Array:
        return vae.apply(variables, tile, clip=False, method="decode")

    x = _tiled(run, z, tiles, [(t * ratio, s * ratio) for t, s in tiles])
    return jnp.clip(x, -1.0, 1.0) if clip else x


def _tiling_axes(tiling: Tiling, ratio: int) -> list[tuple[int, int]]:
    """(tile, stride) of rows and columns in latent pixels."""
    axes = [(tiling.height, tiling.stride_height), (tiling.width, tiling.stride_width)]
    for tile, stride in axes:
        if tile % ratio or stride % ratio or not 0 < stride <= tile:
            raise RefineError(
                f"VAE tiling: tile {tile}, stride {stride}; give multiples of {ratio} with 0 < stride <= tile"
            )
    return [(tile // ratio, stride // ratio) for tile, stride in axes]


def _tiled(run: Any, x: Array, source: list[tuple[int, int]], target: list[tuple[int, int]]) -> Array:
    """Apply `run` to tiles of x [B, H, W, C] and blend: (tile, stride) a side in x's pixels and in the result's."""
    counts = [-(-side // stride) for side, (_, stride) in zip(x.shape[1:3], source)]
    # Tiles that reach over the far edge are cut short there, which changes what the network computes near the edge:
    # each such length is a shape of its own.
    lengths = [
        [min(tile, side - k * stride) for k in range(count)]
        for side, count, (tile, stride) in zip(x.shape[1:3], counts, source)
    ]
    (sh, sw), scale = (source[0][1], source[1][1]), (target[0][0], source[0][0])

    def block(rows: list[int], columns: list[int]) -> Array:
        """Tiles of one shape: [len(rows), len(columns), B, tile, tile, C], zero-padded to a full tile."""
        size = (x.shape[0], lengths[0][rows[0]], lengths[1][columns[0]], x.shape[-1])
        starts = np.asarray([(i * sh, j * sw) for i in rows for j in columns], np.int32)
        out = jax.lax.map(lambda at: run(jax.lax.dynamic_slice(x, (0, at[0], at[1], 0), size)), jnp.asarray(starts))
        out = out.reshape(len(rows), len(columns), *out.shape[1:])
        pad = [(0, full - have) for (full, _), have in zip(target, out.shape[3:5])]
        return jnp.pad(out, ((0, 0), (0, 0), (0, 0), *pad, (0, 0)))

    row_groups, column_groups = (_runs(side) for side in lengths)
    tiles = jnp.concatenate(
        [jnp.concatenate([block(rows, columns) for columns in column_groups], axis=1) for rows in row_groups], axis=0
    )
    valid = [[length * scale[0] // scale[1] for length in side] for side in lengths]
    height, width = (side * scale[0] // scale[1] for side in x.shape[1:3])
    return _blend(tiles, valid, target)[:, :height, :width]


def _runs(lengths: list[int]) -> list[list[int]]:
    """Indices grouped into runs of equal length: [8, 8, 5, 1] -> [[0, 1], [2], [3]]."""
    groups: list[list[int]] = []
    for k, length in enumerate(lengths):
        if groups and lengths[groups[-1][0]] == length:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def _blend(tiles: Array, valid: list[list[int]], target: list[tuple[int, int]]) -> Array:
    """Tiles [I, J, B, th, tw, C] -> image [B, I·sh, J·sw, C] (garbage beyond the last tiles' valid lengths).

    As in the reference, a tile is first blended with the finished tile above it, then with the finished one on its
    left, by linear ramps over the overlap; then its first stride is kept.
    """
    (th, sh), (tw, sw) = target
    rows, columns, batch, _, _, channels = tiles.shape
    ramps = []
    for lengths, (tile, stride) in zip(valid, target):
        ramp = np.ones((len(lengths), tile - stride), np.float32)  # the first tile has no neighbour: weight 1 on itself
        for k, length in enumerate(lengths[1:], 1):
            extent = min(length, tile - stride)
            ramp[k, :extent] = np.arange(extent) / extent
        ramps.append(jnp.asarray(ramp))

    def mix(neighbour: Array, own: Array, ramp: Array) -> Array:
        return neighbour * (1 - ramp) + own * ramp

    def row(above: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        strip, ramp = inputs
        top = mix(above, strip[:, :, : th - sh], ramp[:, None, None])
        strip = jnp.concatenate([top, strip[:, :, th - sh :]], axis=2)

        def column(left: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            tile, ramp = inputs
            edge = mix(left, tile[:, :, : tw - sw], ramp[:, None])
            tile = jnp.concatenate([edge, tile[:, :, tw - sw :]], axis=2)
            return tile[:, :, sw:], tile

        _, strip = jax.lax.scan(column, jnp.zeros((batch, th, tw - sw, channels), tiles.dtype), (strip, ramps[1]))
        return strip[:, :, sh:], strip[:, :, :sh, :sw]

    start = jnp.zeros((columns, batch, th - sh, tw, channels), tiles.dtype)
    _, kept = jax.lax.scan(row, start, (tiles, ramps[0]))  # [I, J, B, sh, sw, C]
    return kept.transpose(2, 0, 3, 1, 4, 5).reshape(batch, rows * sh, columns * sw, channels)
