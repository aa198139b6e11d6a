"""The FLUX autoencoder, which BAGEL and RvR use: images at an eighth of their sides in 16 channels, in NHWC.

The reference is Black Forest Labs' `AutoEncoder` (the layout of `ae.safetensors`), which diffusers has as
`AutoencoderKL`. Latents are "raw" as they leave the encoder; `normalize` gives those that the flow model is trained on.
Large images go by overlapping tiles through `tiled_encode` and `tiled_decode`, shared with the Qwen-Image VAE; with
`FLUX_TILING` they give diffusers' tiled numbers (`clip=False` for decoding).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refine_jax.errors import RefineError
from refine_jax.models.attention import attention
from refine_jax.models.layers import Dense
from refine_jax.models.qwen_vae import Conv, Tiling, constrain_image, tiled_decode, tiled_encode

__all__ = ["FLUX_TILING", "FluxVAE", "FluxVAEConfig", "denormalize", "normalize", "tiled_decode", "tiled_encode"]

Array = jax.Array

_EPS = 1e-6
# Attention scores held at once, in elements; above this the queries are taken row by row of the image.
_MAX_SCORES = 2**25

FLUX_TILING = Tiling(1024, 1024, 768, 768)


@dataclass(frozen=True)
class FluxVAEConfig:
    """Hyper-parameters under the reference's names (`AutoEncoderParams`); the defaults are the released model.

    num_groups: of the group norms; every width, ch times an entry of ch_mult, is a multiple. dtype: of the computation;
    param_dtype: of the parameters ("float32" or "bfloat16").
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    num_groups: int = 32
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        for name in ("ch", "num_res_blocks", "z_channels", "in_channels", "num_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RefineError(f"FLUX VAE configuration: {name} {value!r}; give a whole number of at least 1")
        if not self.ch_mult or any(not isinstance(mult, int) or mult < 1 for mult in self.ch_mult):
            raise RefineError(f"FLUX VAE configuration: ch_mult {self.ch_mult}; give whole numbers of at least 1")
        if self.ch % self.num_groups:
            raise RefineError(
                f"FLUX VAE configuration: ch {self.ch}; make it a multiple of num_groups {self.num_groups}"
            )
        if not self.scale_factor:
            raise RefineError("FLUX VAE configuration: scale_factor 0; latents are multiplied by it and must survive")

    @property
    def downsample(self) -> int:
        """Image pixels along one side of a latent pixel."""
        return 2 ** (len(self.ch_mult) - 1)

    # The names under which the tiling shared with the Qwen-Image VAE asks.
    @property
    def spatial_ratio(self) -> int:
        """`downsample`."""
        return self.downsample

    @property
    def z_dim(self) -> int:
        """`z_channels`."""
        return self.z_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> "FluxVAEConfig":
        """From fields of ours or of `AutoEncoderParams`, for example the `vae_config` in a BAGEL config.json.

        Raises RefineError for an unknown field, or a `downsample` or `out_ch` that the rest contradicts.
        """
        values = {key: value for key, value in config.items() if key != "resolution"}
        implied = {name: values.pop(name) for name in ("downsample", "out_ch") if name in values}
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise RefineError(f"FLUX VAE configuration: unknown fields {', '.join(unknown)}; give AutoEncoderParams")
        made = cls(**{**values, **overrides})
        for name, have in (("downsample", made.downsample), ("out_ch", made.in_channels)):
            if implied.get(name, have) != have:
                raise RefineError(f"FLUX VAE configuration: {name} {implied[name]}; the other fields make it {have}")
        return made


def normalize(z: Array, config: FluxVAEConfig) -> Array:
    """Raw latents [..., z_channels] -> (z - shift_factor) · scale_factor, as the flow model sees them."""
    return (z - np.asarray(config.shift_factor, z.dtype)) * np.asarray(config.scale_factor, z.dtype)


def denormalize(z: Array, config: FluxVAEConfig) -> Array:
    """The inverse of `normalize`: what `FluxVAE.decode` takes."""
    return z / np.asarray(config.scale_factor, z.dtype) + np.asarray(config.shift_factor, z.dtype)


class GroupNorm(nn.Module):
    """Group norm over pixels and the channels of a group, float32 inside. Parameters: ``scale``, ``bias [C]``."""

    config: FluxVAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] -> the same shape in the configuration's dtype."""
        batch, _, _, channels = x.shape
        groups, kind = self.config.num_groups, jnp.dtype(self.config.param_dtype)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", nn.with_logical_partitioning(ones, ("norm",)), (channels,), kind)
        bias = self.param("bias", nn.with_logical_partitioning(zeros, ("norm",)), (channels,), kind)

        def over_groups(per_pixel: Array) -> Array:
            """Means [B, 1, 1, C] over a group. Channels are never split up in the large array, whose layout has them
            innermost."""
            means = jnp.mean(per_pixel, axis=(1, 2)).reshape(batch, groups, -1)
            means = jnp.broadcast_to(jnp.mean(means, axis=-1, keepdims=True), means.shape)
            return means.reshape(batch, 1, 1, channels)

        x = x.astype(jnp.float32)
        x = x - over_groups(x)
        x = x * (jax.lax.rsqrt(over_groups(jnp.square(x)) + _EPS) * scale.astype(jnp.float32))
        return (x + bias.astype(jnp.float32)).astype(jnp.dtype(self.config.dtype))


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input (through a 1x1 convolution where the width changes)."""

    features: int
    config: FluxVAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] -> [B, H, W, features]."""
        h = nn.silu(GroupNorm(self.config, name="norm1")(x))
        h = Conv(self.features, self.config, name="conv1")(h)
        h = nn.silu(GroupNorm(self.config, name="norm2")(h))
        h = Conv(self.features, self.config, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, self.config, size=1, name="nin_shortcut")(x)
        return constrain_image(x + h)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, with a residual."""

    config: FluxVAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] -> the same shape."""
        kinds = dict(dtype=self.config.dtype, param_dtype=self.config.param_dtype)
        h = GroupNorm(self.config, name="norm")(x)
        q, k, v = (Dense(x.shape[-1], ("conv_in", "conv_out"), name=name, **kinds)(h) for name in "qkv")
        return x + Dense(x.shape[-1], ("conv_in", "conv_out"), name="proj_out", **kinds)(_over_pixels(q, k, v))


def _over_pixels(q: Array, k: Array, v: Array) -> Array:
    """Attention among pixels [B, H, W, D] in bounded memory: 16 384 of them (a 1024² image) would need 1 GiB of scores.

    The kernels that need no scores take narrower heads than this one.
    """
    batch, height, width, features = q.shape
    k, v = (x.reshape(batch, height * width, 1, features) for x in (k, v))
    if batch * (height * width) ** 2 <= _MAX_SCORES:
        return attention(q.reshape(k.shape), k, v).reshape(q.shape)
    rows = jnp.moveaxis(q, 1, 0)[:, :, :, None]
    return jnp.moveaxis(jax.lax.map(lambda row: attention(row, k, v), rows)[:, :, :, 0], 0, 1)


class Encoder(nn.Module):
    """Image -> moments."""

    config: FluxVAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, in_channels] -> [B, H / r, W / r, 2·z_channels]."""
        config = self.config
        x = Conv(config.ch, config, name="conv_in")(constrain_image(x))
        for level, mult in enumerate(config.ch_mult):
            for block in range(config.num_res_blocks):
                x = ResBlock(config.ch * mult, config, name=f"down_{level}_block_{block}")(x)
            if level < len(config.ch_mult) - 1:
                # Zeros at the far edges only, as in the reference.
                padding, name = ((0, 1), (0, 1)), f"down_{level}_downsample"
                x = Conv(config.ch * mult, config, stride=2, padding=padding, name=name)(x)
        x = _middle(x, config)
        x = nn.silu(GroupNorm(config, name="norm_out")(x))
        return constrain_image(Conv(2 * config.z_channels, config, name="conv_out")(x))


class Decoder(nn.Module):
    """Raw latents -> image, not clipped. Levels are numbered as in the reference: the last is the first to run."""

    config: FluxVAEConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, h, w, z_channels] -> [B, r·h, r·w, in_channels]."""
        config = self.config
        x = Conv(config.ch * config.ch_mult[-1], config, name="conv_in")(constrain_image(z))
        x = _middle(x, config)
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            for block in range(config.num_res_blocks + 1):
                x = ResBlock(config.ch * mult, config, name=f"up_{level}_block_{block}")(x)
            if level > 0:
                x = Conv(config.ch * mult, config, upsample=True, name=f"up_{level}_upsample")(x)
        x = nn.silu(GroupNorm(config, name="norm_out")(x))
        return constrain_image(Conv(config.in_channels, config, name="conv_out")(x))


def _middle(x: Array, config: FluxVAEConfig) -> Array:
    """Residual block, attention, residual block at constant width, as children of the module that calls."""
    x = ResBlock(x.shape[-1], config, name="mid_block_1")(x)
    x = AttentionBlock(config, name="mid_attn_1")(x)
    return ResBlock(x.shape[-1], config, name="mid_block_2")(x)


class FluxVAE(nn.Module):
    """The autoencoder. Use as `apply({"params": tree}, x, method="encode" | "decode")`.

    `init(key, image)` makes the parameters; the image's size does not matter to them.
    """

    config: FluxVAEConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Image [B, H, W, in_channels] in -1..1 -> mean, log-variance, both [B, H / r, W / r, z_channels] float32.

        Raw moments. The authors sample, mean + exp(log-variance / 2) · noise; diffusers first clamps the log-variance
        to -30..20. Raises RefineError where a side is not a multiple of r = `config.downsample`.
        """
        channels, ratio = self.config.in_channels, self.config.downsample
        if x.ndim != 4 or x.shape[-1] != channels:
            raise RefineError(f"FLUX VAE: images of shape {list(x.shape)}; give [batch, height, width, {channels}]")
        if min(x.shape) < 1 or x.shape[1] % ratio or x.shape[2] % ratio:
            raise RefineError(f"FLUX VAE: image of {x.shape[1]}x{x.shape[2]} pixels; make both multiples of {ratio}")
        mean, logvar = jnp.split(self.encoder(x).astype(jnp.float32), 2, axis=-1)
        return mean, logvar

    def decode(self, z: Array, clip: bool = False) -> Array:
        """Raw latents [B, h, w, z_channels] -> image [B, r·h, r·w, in_channels] float32.

        clip: clip to -1..1, which the reference leaves to its caller. Raises RefineError for another shape.
        """
        channels = self.config.z_channels
        if z.ndim != 4 or z.shape[-1] != channels or min(z.shape) < 1:
            raise RefineError(f"FLUX VAE: latents of shape {list(z.shape)}; give [batch, height, width, {channels}]")
        x = self.decoder(z).astype(jnp.float32)
        return jnp.clip(x, -1.0, 1.0) if clip else x

    def __call__(self, x: Array) -> Array:
        """Image -> the reconstruction from the mean."""
        return self.decode(self.encode(x)[0])
