"""Qwen-Image MMDiT: a double-stream diffusion transformer over text and latent tokens (arXiv 2508.02324, section 2).

The reference is diffusers' `QwenImageTransformer2DModel`; names of layers follow it. Text comes first in the joint
sequence. Norms, rotary embedding, timestep embedding and softmax are float32 inside whatever the compute dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refine_jax.errors import RefineError
from refine_jax.models import quantize
from refine_jax.models.attention import attention
from refine_jax.models.layers import (
    Dense,
    RMSNorm,
    apply_rotary,
    constrain,
    layer_norm,
    remat_policy,
    rotary_angles,
    timestep_embedding,
)

Array = jax.Array

TIME_CHANNELS = 256
TIME_SCALE = 1000.0
MLP_RATIO = 4
EPS = 1e-6


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes as in the `config.json` of a diffusers transformer folder, then how to compute.

    zero_cond_t: condition-image tokens are modulated with t = 0 (Edit-2511). param_dtype: "float32", "bfloat16", or
    "int8": the matrices of the blocks in 8 bits (`quantize`), the rest as `dtype`. remat: what a block keeps for its
    gradient (`layers.remat_policy`). scan: blocks in one `nn.scan` over stacked parameters (`blocks`), otherwise one
    module a block (`blocks_0`, …); `stack_blocks` and `unstack_blocks` convert trees.
    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str | None = None
    scan: bool = True
    attention_impl: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(dim % 2 for dim in self.axes_dims_rope):
            raise RefineError(
                f"axes_dims_rope {self.axes_dims_rope}: give even numbers that sum to attention_head_dim"
                f" {self.attention_head_dim}"
            )
        if self.remat is not None:
            remat_policy(self.remat)

    @property
    def width(self) -> int:
        """Features of both residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def floating(self) -> str:
        """The dtype of the parameters that are never quantised."""
        return quantize.floating(self.param_dtype, self.dtype)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> "MMDiTConfig":
        """From a diffusers `config.json`; `overrides` set what the file does not know (dtype, remat, …).

        Raises RefineError for a field that is switched on there and that this network does not have.
        """
        known = {field.name for field in fields(cls)}
        # Stands in the first published files, but no parameter ever depended on it.
        inert = {"pooled_projection_dim"}
        sizes = {key: value for key, value in config.items() if key in known}
        foreign = sorted(
            key for key, value in config.items() if value and key not in known | inert and not key.startswith("_")
        )
        if foreign:
            raise RefineError(f"transformer config: {', '.join(foreign)} not supported; use a Qwen-Image(-Edit) model")
        if sizes.get("out_channels", 16) is None:
            sizes["out_channels"] = sizes.get("in_channels", cls.in_channels)
        return cls(**{**sizes, **overrides})


VARIANTS: dict[str, MMDiTConfig] = {
    "qwen-image": MMDiTConfig(),
    "qwen-image-edit": MMDiTConfig(),
    "qwen-image-edit-2509": MMDiTConfig(),
    "qwen-image-edit-2511": MMDiTConfig(zero_cond_t=True),
}


def image_positions(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Rotary positions (frame, h, w) of packed latent tokens: `grids` (h, w) in tokens, target first -> [N, 3] int32.

    Image k has frame index k; h and w are centred on 0 (`scale_rope`), the odd one out on the negative side.
    """
    parts = []
    for frame, (height, width) in enumerate(grids):
        h = np.arange(height) - (height - height // 2)
        w = np.arange(width) - (width - width // 2)
        parts.append(np.stack([np.full((height, width), frame), *np.meshgrid(h, w, indexing="ij")], axis=-1))
    return np.concatenate([part.reshape(-1, 3) for part in parts]).astype(np.int32)


def text_start(grids: Sequence[tuple[int, int]]) -> int:
    """The first text token's rotary position: the largest half-side. Token i of the *padded* text is at start + i."""
    return max(max(height // 2, width // 2) for height, width in grids)


_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros_init()


def _dense(config: MMDiTConfig, features: int, axes: tuple[str, str], name: str, kernel_init: Any = _xavier) -> Dense:
    return Dense(features, axes, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=kernel_init, name=name)


def _edge(config: MMDiTConfig, features: int, axes: tuple[str, str], name: str, kernel_init: Any = _xavier) -> Dense:
    """Of the first and last layers, which are never quantised."""
    kinds = dict(dtype=config.dtype, param_dtype=config.floating)
    return Dense(features, axes, **kinds, kernel_init=kernel_init, name=name)


class TimeEmbedding(nn.Module):
    """sigma [B] in [0, 1] -> [B, width] float32 (`QwenTimestepProjEmbeddings`)."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, sigma: Array) -> Array:
        width, kind = self.config.width, self.config.floating
        init = nn.initializers.normal(0.02)
        x = timestep_embedding(sigma, TIME_CHANNELS, scale=TIME_SCALE)
        x = Dense(width, ("in_channels", "embed"), param_dtype=kind, kernel_init=init, name="linear_1")(x)
        return Dense(width, ("embed", "time"), param_dtype=kind, kernel_init=init, name="linear_2")(nn.silu(x))


class MLP(nn.Module):
    """Feed-forward with tanh-GELU: [B, S, width] -> the same."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.config.width
        x = _dense(self.config, MLP_RATIO * width, ("embed", "mlp"), "up")(x)
        x = constrain(nn.gelu(x, approximate=True), "batch", None, "act_mlp")
        return _dense(self.config, width, ("mlp", "embed"), "down")(x)


class JointAttention(nn.Module):
    """One attention over [text, image] with separate projections and per-head RMSNorm on queries and keys."""

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self, text: Array, image: Array, rotary: tuple[Array, Array], mask: Array | None
    ) -> tuple[Array, Array]:
        """text [B, T, width], image [B, N, width], rotary 2 x [B, T+N, D/2], mask [B, 1, 1, T+N] bool -> both."""
        config = self.config
        heads = (config.num_attention_heads, config.attention_head_dim)

        def project(x: Array, length: str, turns: tuple[Array, Array], name: str, norm: str | None) -> Array:
            x = _dense(config, config.width, ("embed", "heads"), name)(x).reshape(*x.shape[:2], *heads)
            if norm is not None:
                x = RMSNorm(eps=EPS, dtype=config.dtype, param_dtype=config.floating, name=norm)(x)
                x = apply_rotary(x, *turns, interleaved=True)
            return constrain(x, "batch", length, "act_heads", None)

        # The streams meet in the kernel: joined here, a length that the mesh splits would have to be dealt out anew.
        of_text = partial(project, text, "text_length", tuple(x[:, : text.shape[1]] for x in rotary))
        of_image = partial(project, image, "length", tuple(x[:, text.shape[1] :] for x in rotary))
        q = of_text("add_q_proj", "norm_added_q"), of_image("to_q", "norm_q")
        k = of_text("add_k_proj", "norm_added_k"), of_image("to_k", "norm_k")
        v = of_text("add_v_proj", None), of_image("to_v", None)
        text, image = attention(q, k, v, mask=mask, impl=config.attention_impl)
        text = constrain(text.reshape(*text.shape[:2], config.width), "batch", "text_length", "act_heads")
        image = constrain(image.reshape(*image.shape[:2], config.width), "batch", "length", "act_heads")
        text = _dense(config, config.width, ("heads", "embed"), "to_add_out")(text)
        image = _dense(config, config.width, ("heads", "embed"), "to_out")(image)
        return text, image


class Block(nn.Module):
    """A double-stream block (`QwenImageTransformerBlock`), shaped as the body of a scan: carry -> (carry, None)."""

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self,
        streams: tuple[Array, Array],
        time: Array,
        rotary: tuple[Array, Array],
        mask: Array | None,
        is_target: Array | None,
    ) -> tuple[tuple[Array, Array], None]:
        """streams: text [B, T, width], image [B, N, width]. time: silu of the embedding, [B, width], or [B+1, width]
        whose last row is t = 0 and serves the image tokens that `is_target` [N] bool excludes."""
        config = self.config
        text, image = streams
        batch = text.shape[0]

        def modulation(name: str, time: Array) -> list[Array]:
            # A third of the parameters act on these few vectors alone. Split like the kernel's rows, they go to where
            # the weights are and partial sums come back; the weights are not gathered.
            time = constrain(time, "time_rows", "embed")
            x = _dense(config, 6 * config.width, ("embed", "time"), name, _zeros)(time)
            return jnp.split(constrain(x, "time_rows", "act_time"), 6, axis=-1)

        def spread(x: Array) -> Array:  # [B(+1), width] -> broadcastable to [B, N, width]
            if is_target is None:
                return x[:, None]
            return jnp.where(is_target[:, None], x[:batch, None], x[batch:, None])

        # shift, scale, gate of the attention, then of the feed-forward
        of_image = [spread(x) for x in modulation("img_mod", time)]
        of_text = [x[:, None] for x in modulation("txt_mod", time[:batch])]

        def modulate(x: Array, shift: Array, scale: Array) -> Array:
            return (layer_norm(x, EPS) * (1.0 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)

        text_out, image_out = JointAttention(config, name="attn")(
            modulate(text, *of_text[:2]), modulate(image, *of_image[:2]), rotary, mask
        )
        text = text + of_text[2] * text_out
        image = image + of_image[2] * image_out
        text = text + of_text[5] * MLP(config, name="txt_mlp")(modulate(text, *of_text[3:5]))
        image = image + of_image[5] * MLP(config, name="img_mlp")(modulate(image, *of_image[3:5]))
        text = constrain(text, "batch", "text_length", "act_embed")
        image = constrain(image, "batch", "length", "act_embed")
        return (text, image), None


class MMDiT(nn.Module):
    """Velocity of the rectified flow at noise level sigma, conditioned on text tokens and in-context images.

    A fresh initialisation predicts exactly zero (adaLN-zero: modulations and the last projection start at 0).
    """

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self,
        latents: Array,
        text: Array,
        sigma: Array,
        image_positions: Array,
        text_positions: Array,
        *,
        target_length: int,
        image_mask: Array | None = None,
        text_mask: Array | None = None,
    ) -> Array:
        """-> velocity [B, target_length, patch_size²·out_channels] float32.

        latents [B, N, in_channels]: packed tokens of [noisy target, image 1, image 2, …]; text [B, T,
        joint_attention_dim]; sigma [B] float32 in [0, 1] (multiplied by 1000 inside); image_positions [B, N, 3] int32;
        text_positions [B, T] int32; image_mask [B, N], text_mask [B, T] bool, False = padding (any pattern), None = no
        padding. What stands at padded positions must be finite and does not change the result elsewhere.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        batch, n_text, n_image = text.shape[0], text.shape[1], latents.shape[1]

        image = _edge(config, config.width, ("in_channels", "embed"), "img_in")(latents)
        text = RMSNorm(eps=EPS, dtype=config.dtype, param_dtype=config.floating, name="txt_norm")(text)
        text = _edge(config, config.width, ("in_channels", "embed"), "txt_in")(text)
        text = constrain(text, "batch", "text_length", "act_embed")
        image = constrain(image, "batch", "length", "act_embed")

        sigma = sigma.astype(jnp.float32)
        is_target = None
        if config.zero_cond_t:
            is_target = jnp.arange(n_image) < target_length
            sigma = jnp.concatenate([sigma, jnp.zeros((1,), jnp.float32)])
        time = nn.silu(TimeEmbedding(config, name="time_text_embed")(sigma)).astype(dtype)

        # A text token has the same position on the three axes.
        positions = jnp.concatenate(
            [jnp.broadcast_to(text_positions[..., None], (*text_positions.shape, 3)), image_positions], axis=1
        )
        rotary = rotary_angles(positions, config.axes_dims_rope)
        mask = None
        if text_mask is not None or image_mask is not None:
            seen = [
                jnp.ones((batch, length), bool) if given is None else given.astype(bool)
                for given, length in ((text_mask, n_text), (image_mask, n_image))
            ]
            mask = jnp.concatenate(seen, axis=1)[:, None, None, :]

        block = Block
        if config.remat is not None:
            block = nn.remat(Block, policy=remat_policy(config.remat), prevent_cse=not config.scan)
        if config.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            (text, image), _ = scanned(config, name="blocks")((text, image), time, rotary, mask, is_target)
        else:
            for index in range(config.num_layers):
                (text, image), _ = block(config, name=f"blocks_{index}")((text, image), time, rotary, mask, is_target)

        # Only the target's tokens leave, and they are always modulated with t itself.
        scale, shift = jnp.split(
            _edge(config, 2 * config.width, ("embed", "time"), "norm_out", _zeros)(time[:batch]), 2, axis=-1
        )
        image = layer_norm(image[:, :target_length], EPS)
        image = image * (1.0 + scale.astype(jnp.float32))[:, None] + shift.astype(jnp.float32)[:, None]
        features = config.patch_size**2 * config.out_channels
        return _edge(config, features, ("embed", "out_channels"), "proj_out", _zeros)(image).astype(jnp.float32)


def stack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"blocks_0": …, "blocks_1": …, …}` -> `{"blocks": leaves stacked on axis 0, …}`, for params and lora trees."""
    count = sum(name.startswith("blocks_") for name in tree)
    rest = {name: value for name, value in tree.items() if not name.startswith("blocks_")}
    blocks = [tree[f"blocks_{index}"] for index in range(count)]
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_blocks`, so that the same numbers run with `scan=False`."""
    out = {name: value for name, value in tree.items() if name != "blocks"}
    leaves, structure = jax.tree.flatten(tree["blocks"])
    for index in range(leaves[0].shape[0]):
        out[f"blocks_{index}"] = jax.tree.unflatten(structure, [leaf[index] for leaf in leaves])
    return out
