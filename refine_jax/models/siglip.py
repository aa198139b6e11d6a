"""SigLIP as BAGEL's eye: the vision transformer of so400m/14 on flattened patches of images of any size (NaViT style).

The reference is `SiglipVisionModel` of BAGEL's `siglip_navit.py` without its optional rotary embedding, which no
release uses; on a square image that fills the position table it is transformers' `SiglipVisionModel` without the
pooling head. The reference packs images into one sequence; here an image is a row of a batch, padded to the largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refine_jax.errors import RefineError
from refine_jax.models.attention import attention
from refine_jax.models.layers import Dense, LayerNorm, constrain, remat_policy, take_rows

Array = jax.Array

# Fields of a `vit_config.json` that cannot change what the network computes. `rope` is among them because the authors'
# loader overrides it; a network trained with it has no position table, which conversion reports.
_INERT = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "attention_dropout", "rope"),
    *("initializer_range", "initializer_factor", "return_dict", "vision_use_head", "id2label", "label2id"),
}
# Ours -> the file's, where they differ.
_FILE_NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "patch_size", "num_channels", "image_size")


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower (the defaults are BAGEL's), then how to compute.

    image_size: side in pixels of the largest square image; the position table has `side`² entries. dtype: compute,
    param_dtype: storage ("float32" | "bfloat16"). remat: what a block keeps for its gradient (`layers.remat_policy`).
    scan: blocks in one `nn.scan` over stacked parameters (`blocks`), otherwise one module a block (`blocks_0`, …);
    `mmdit.stack_blocks` and `unstack_blocks` convert trees.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    num_heads: int = 16
    patch_size: int = 14
    num_channels: int = 3
    image_size: int = 980
    layer_norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str | None = None
    scan: bool = True
    attention_impl: str = "auto"

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RefineError(f"SigLIP configuration: {_FILE_NAMES.get(name, name)} {value!r}; give a whole number")
        if self.hidden_size % self.num_heads:
            raise RefineError(
                f"SigLIP configuration: hidden_size {self.hidden_size}; make it a multiple of num_attention_heads"
                f" {self.num_heads}"
            )
        if self.image_size < self.patch_size:
            raise RefineError(
                f"SigLIP configuration: image_size {self.image_size}; it must hold one patch of {self.patch_size}"
            )
        if self.remat is not None:
            remat_policy(self.remat)

    @property
    def side(self) -> int:
        """Rows, and columns, of the position table."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch."""
        return self.num_channels * self.patch_size**2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], select_layer: int = -2, **overrides: Any) -> "SiglipConfig":
        """From a `vit_config.json`; `overrides` set what the file does not know (dtype, remat, …).

        select_layer: whose layer's output is used, counted from the end: the file counts the layers of the published
        SigLIP (27), and BAGEL's loader builds all but the last (-2); -1 keeps them all. Raises RefineError for a
        missing size, and for a setting that this network does not have.
        """
        act = config.get("hidden_act", "gelu_pytorch_tanh")
        if act != "gelu_pytorch_tanh":
            raise RefineError(f"vit_config.json: hidden_act {act!r} not supported; use a SigLIP with gelu_pytorch_tanh")
        known = {_FILE_NAMES.get(name, name): name for name in (*_SIZES, "layer_norm_eps")}
        foreign = sorted(
            key
            for key, value in config.items()
            if value and key not in known.keys() | _INERT | {"hidden_act"} and not key.startswith("_")
        )
        if foreign:
            raise RefineError(f"vit_config.json: {', '.join(foreign)} not supported; use a SigLIP vision model")
        sizes = {name: config[key] for key, name in known.items() if key in config}
        # The reference's class fills what a file leaves out with the sizes of another, smaller model.
        missing = sorted(known.keys() - {"num_channels", "layer_norm_eps"} - config.keys())
        if missing:
            raise RefineError(f"vit_config.json: lacks {', '.join(missing)}; is this a SigLIP vision model?")
        if not isinstance(sizes["num_layers"], int):
            raise RefineError(f"vit_config.json: num_hidden_layers {sizes['num_layers']!r}; give a whole number")
        sizes["num_layers"] += 1 + select_layer
        if sizes["num_layers"] < 1:
            raise RefineError(
                f"vit_config.json: num_hidden_layers {config['num_hidden_layers']} leaves {sizes['num_layers']} at"
                f" select_layer {select_layer}; give at least {-select_layer}"
            )
        return cls(**{**sizes, **overrides})


def position_ids(grid_h: int, grid_w: int, config: SiglipConfig) -> np.ndarray:
    """Rows of the position table for an image of grid_h x grid_w patches: [grid_h · grid_w] int32, row · side + column.

    "Extrapolated" in the reference's words: patch (0, 0) is the table's first entry whatever the image's size. Raises
    RefineError where the table has fewer rows or columns.
    """
    side = config.side
    if not (0 < grid_h <= side and 0 < grid_w <= side):
        raise RefineError(f"SigLIP: image of {grid_h}x{grid_w} patches; give 1 to {side} on both sides")
    return (np.arange(grid_h)[:, None] * side + np.arange(grid_w)).reshape(-1).astype(np.int32)


def pixels_to_patches(image: Array, config: SiglipConfig) -> Array:
    """Pixels in 0..255 [B, H, W, num_channels] -> patches in -1..1 [B, P, patch_dim] float32, row by row.

    A patch is flattened as (row, column, channel). Raises RefineError where a side is no multiple of the patch size.
    """
    patch = config.patch_size
    if image.ndim != 4 or image.shape[-1] != config.num_channels:
        raise RefineError(
            f"SigLIP: images of shape {list(image.shape)}; give [batch, height, width, {config.num_channels}]"
        )
    batch, height, width, channels = image.shape
    if not height or not width or height % patch or width % patch:
        raise RefineError(f"SigLIP: image of {height}x{width} pixels; make both sides multiples of {patch}")
    x = (jnp.asarray(image, jnp.float32) / 255.0 - 0.5) / 0.5
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels).swapaxes(2, 3)
    return x.reshape(batch, -1, config.patch_dim)


class Attention(nn.Module):
    """`SiglipFlashAttention2`: every patch of an image sees every other."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        """x [B, P, hidden], mask [B, 1, 1, P] bool -> [B, P, hidden]."""
        config, kinds = self.config, dict(dtype=self.config.dtype, param_dtype=self.config.param_dtype)

        def project(name: str) -> Array:
            y = Dense(config.hidden_size, ("embed", "heads"), name=name, **kinds)(x)
            return constrain(y.reshape(*x.shape[:2], config.num_heads, -1), "batch", "length", "act_heads", None)

        out = attention(project("q_proj"), project("k_proj"), project("v_proj"), mask=mask, impl=config.attention_impl)
        out = constrain(out.reshape(x.shape), "batch", "length", "act_heads")
        return Dense(config.hidden_size, ("heads", "embed"), name="out_proj", **kinds)(out)


class MLP(nn.Module):
    """`SiglipMLP`, with tanh-GELU: [B, P, hidden] -> the same."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, kinds = self.config, dict(dtype=self.config.dtype, param_dtype=self.config.param_dtype)
        x = Dense(config.intermediate_size, ("embed", "mlp"), name="fc1", **kinds)(x)
        x = constrain(nn.gelu(x, approximate=True), "batch", "length", "act_mlp")
        return Dense(config.hidden_size, ("mlp", "embed"), name="fc2", **kinds)(x)


class Block(nn.Module):
    """`SiglipEncoderLayer`, shaped as the body of a scan: carry -> (carry, None)."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, None]:
        """x [B, P, hidden], mask [B, 1, 1, P] bool."""
        config = self.config
        kinds = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        y = LayerNorm(config.layer_norm_eps, name="layer_norm1", **kinds)(x)
        x = x + Attention(config, name="self_attn")(y, mask)
        y = LayerNorm(config.layer_norm_eps, name="layer_norm2", **kinds)(x)
        x = x + MLP(config, name="mlp")(y)
        return constrain(x, "batch", "length", "act_embed"), None


class Siglip(nn.Module):
    """Patches in, features after the last layer norm out."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, patches: Array, position_ids: Array, mask: Array | None = None) -> Array:
        """-> [B, P, hidden] in the compute dtype.

        patches [B, P, patch_dim] (`pixels_to_patches`); position_ids [B, P] int32 (`position_ids`); mask [B, P] bool,
        False = padding (any pattern), None = no padding. What stands at padded places must be finite and does not
        change the result elsewhere; the result there means nothing. Raises RefineError for shapes that do not fit.
        """
        config, kinds = self.config, dict(dtype=self.config.dtype, param_dtype=self.config.param_dtype)
        if patches.ndim != 3 or patches.shape[-1] != config.patch_dim:
            raise RefineError(
                f"SigLIP: patches of shape {list(patches.shape)}; give [batch, patches, {config.patch_dim}]"
            )
        for name, given in (("position_ids", position_ids), ("mask", mask)):
            if given is not None and given.shape != patches.shape[:2]:
                raise RefineError(f"SigLIP: {name} of shape {list(given.shape)}; give {list(patches.shape[:2])}")

        # The reference's convolution has stride = kernel; BAGEL itself turns it into this product.
        x = Dense(config.hidden_size, ("in_channels", "embed"), name="patch_embedding", **kinds)(patches)
        table = self.param(
            "position_embedding",
            nn.with_logical_partitioning(nn.initializers.normal(config.hidden_size**-0.5), (None, "embed")),
            (config.side**2, config.hidden_size),
            jnp.dtype(config.param_dtype),
        )
        # Clipped, because a padded place may hold any number.
        x = x + take_rows(table, position_ids, x.dtype, (None, "embed"))
        x = constrain(x, "batch", "length", "act_embed")
        by_key = None if mask is None else mask.astype(bool)[:, None, None, :]

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
            x, _ = scanned(config, name="blocks")(x, by_key)
        else:
            for index in range(config.num_layers):
                x, _ = block(config, name=f"blocks_{index}")(x, by_key)
        return LayerNorm(config.layer_norm_eps, name="post_layernorm", **kinds)(x)
