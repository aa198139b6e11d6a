"""Qwen2.5-VL as a conditioning encoder: vision tower, language model, last hidden state after the final norm.

Equal to transformers' `Qwen2_5_VLForConditionalGeneration` up to (not including) the language-model head, for still
images. Geometry is static (see `qwen_vl_config`). Patches keep the processor's order throughout: windowed attention
only groups queries, keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refine_jax.models.attention import attention
from refine_jax.models.layers import (
    Dense,
    RMSNorm,
    apply_rotary,
    constrain,
    rotary_angles,
    rotary_frequencies,
)
from refine_jax.models.quantize import floating
from refine_jax.models.qwen_vl_config import (
    Grid,
    QwenVLConfig,
    TextConfig,
    VisionConfig,
    image_index,
    merged_tokens,
    mrope_positions,
    patch_grid,
    patch_positions,
    vl_image_size,
)

__all__ = [
    "Grid",
    "QwenVL",
    "QwenVLConfig",
    "TextConfig",
    "VisionConfig",
    "image_index",
    "merged_tokens",
    "mrope_positions",
    "patch_grid",
    "pixels_to_patches",
    "vl_image_size",
]

Array = jax.Array
_VISION_EPS = 1e-6


# ---------------------------------------------------------------------------------------------------- pixels -> patches
def pixels_to_patches(image: Array, config: VisionConfig) -> Array:
    """Pixels in 0..255 [B, H, W, 3] -> normalised patches [B, P, patch_dim] float32.

    H and W are multiples of `config.factor`. A patch is flattened as (channel, frame, row, column); a still image is
    repeated over the frames of a patch. Equals `Qwen2VLImageProcessor` without its resizing.
    """
    batch, height, width, channels = image.shape
    rows, columns = patch_grid(height, width, config)
    merge, patch, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    mean, std = np.asarray(config.image_mean, np.float32), np.asarray(config.image_std, np.float32)
    x = (image.astype(jnp.float32) / 255.0 - mean) / std
    x = x.reshape(batch, rows // merge, merge, patch, columns // merge, merge, patch, channels)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    x = jnp.broadcast_to(x[..., None, :, :], (*x.shape[:-2], frames, patch, patch))
    return x.reshape(batch, rows * columns, config.patch_dim)


# ----------------------------------------------------------------------------------------------------------- the blocks
class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): `Qwen2_5_VLMLP` (with biases), `Qwen2MLP` (without)."""

    hidden_size: int
    intermediate_size: int
    use_bias: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kinds = dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        gate = Dense(self.intermediate_size, ("embed", "mlp"), name="gate_proj", **kinds)(x)
        up = Dense(self.intermediate_size, ("embed", "mlp"), name="up_proj", **kinds)(x)
        return Dense(self.hidden_size, ("mlp", "embed"), name="down_proj", **kinds)(nn.silu(gate) * up)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Windows:
    """How the merge cells of one grid fall into square windows. A static (leafless) pytree: it can pass scans."""

    rows: int  # merge cells
    columns: int
    side: int  # cells along a whole window
    cell: int  # patches in a merge cell

    @property
    def counts(self) -> tuple[int, int]:
        """Windows down and across; those at the far edges may be cut off."""
        return -(-self.rows // self.side), -(-self.columns // self.side)

    def group(self, x: Array) -> Array:
        """[B, P, H, D] -> [B x windows, side² x cell, H, D], zeros where a window overhangs."""
        (down, across), side = self.counts, self.side
        x = x.reshape(x.shape[0], self.rows, self.columns, self.cell, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, down * side - self.rows), (0, across * side - self.columns)] + [(0, 0)] * 3)
        x = x.reshape(x.shape[0], down, side, across, side, *x.shape[3:]).swapaxes(2, 3)
        return x.reshape(-1, side * side * self.cell, *x.shape[-2:])

    def ungroup(self, x: Array) -> Array:
        """The inverse of `group`."""
        (down, across), side = self.counts, self.side
        x = x.reshape(-1, down, across, side, side, self.cell, *x.shape[2:]).swapaxes(2, 3)
        x = x.reshape(x.shape[0], down * side, across * side, self.cell, *x.shape[-2:])
        return x[:, : self.rows, : self.columns].reshape(x.shape[0], -1, *x.shape[-2:])

    def mask(self, batch: int) -> Array | None:
        """Keys that exist, [B x windows, 1, 1, side² x cell] bool; None where every window is whole."""
        if self.rows % self.side == 0 and self.columns % self.side == 0:
            return None
        (down, across), side = self.counts, self.side
        rows = (np.arange(down * side) < self.rows).reshape(down, 1, side, 1)
        columns = (np.arange(across * side) < self.columns).reshape(1, across, 1, side)
        valid = np.repeat((rows & columns).reshape(down * across, side * side), self.cell, axis=1)
        return jnp.tile(valid[:, None, None, :], (batch, 1, 1, 1))


class VisionAttention(nn.Module):
    """`Qwen2_5_VLVisionAttention`: over the whole image, or within windows."""

    config: VisionConfig
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array, full: Array, cos: Array, sin: Array, windows: Windows) -> Array:
        cfg, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        batch, length, width = x.shape
        qkv = Dense(3 * width, ("embed", "heads"), name="qkv", **kinds)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, cfg.num_heads, -1), 2, 0)
        q, k = (apply_rotary(y, cos, sin, interleaved=False) for y in (q, k))

        def whole(q, k, v):
            return attention(q, k, v)

        def windowed(q, k, v):
            return windows.ungroup(attention(*map(windows.group, (q, k, v)), mask=windows.mask(batch)))

        # The blocks are scanned, so which kind this one is comes as a traced flag: only the branch taken is computed.
        out = whole(q, k, v) if windows.counts == (1, 1) else jax.lax.cond(full, whole, windowed, q, k, v)
        return Dense(width, ("heads", "embed"), name="proj", **kinds)(out.reshape(batch, length, width))


class VisionBlock(nn.Module):
    """`Qwen2_5_VLVisionBlock`. full: scalar bool, attend over the whole image rather than within windows."""

    config: VisionConfig
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array, full: Array, cos: Array, sin: Array, windows: Windows) -> tuple[Array, None]:
        cfg, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(dtype=self.dtype, param_dtype=floating(self.param_dtype, self.dtype))
        y = RMSNorm(_VISION_EPS, name="norm1", **norm)(x)
        x = x + VisionAttention(cfg, name="attn", **kinds)(y, full, cos, sin, windows)
        y = RMSNorm(_VISION_EPS, name="norm2", **norm)(x)
        x = x + GatedMLP(cfg.hidden_size, cfg.intermediate_size, True, name="mlp", **kinds)(y)
        return constrain(x, "batch", "length", "act_embed"), None


class PatchMerger(nn.Module):
    """`Qwen2_5_VLPatchMerger`: [B, P, hidden] -> [B, P / merge², out_hidden]."""

    config: VisionConfig
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = cfg.hidden_size * cfg.spatial_merge_size**2
        x = RMSNorm(_VISION_EPS, name="ln_q", **kinds)(x).reshape(x.shape[0], -1, width)
        x = nn.gelu(Dense(width, ("embed", "mlp"), name="fc1", **kinds)(x), approximate=False)
        return Dense(cfg.out_hidden_size, ("mlp", "embed"), name="fc2", **kinds)(x)


class TextAttention(nn.Module):
    """`Qwen2_5_VLAttention`: grouped heads, biases on q, k and v only."""

    config: TextConfig
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, cos: Array, sin: Array) -> Array:
        cfg, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def heads(name: str, count: int) -> Array:
            y = Dense(count * cfg.head_dim, ("embed", "heads"), name=name, **kinds)(x)
            return y.reshape(*x.shape[:2], count, cfg.head_dim)

        q, k = heads("q_proj", cfg.num_attention_heads), heads("k_proj", cfg.num_key_value_heads)
        v = heads("v_proj", cfg.num_key_value_heads)
        q, k = (apply_rotary(y, cos, sin, interleaved=False) for y in (q, k))
        out = attention(q, k, v, mask=mask).reshape(x.shape)
        return Dense(cfg.hidden_size, ("heads", "embed"), use_bias=False, name="o_proj", **kinds)(out)


class TextLayer(nn.Module):
    """`Qwen2_5_VLDecoderLayer`."""

    config: TextConfig
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, cos: Array, sin: Array) -> tuple[Array, None]:
        cfg, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(dtype=self.dtype, param_dtype=floating(self.param_dtype, self.dtype))
        y = RMSNorm(cfg.rms_norm_eps, name="input_layernorm", **norm)(x)
        x = x + TextAttention(cfg, name="self_attn", **kinds)(y, mask, cos, sin)
        y = RMSNorm(cfg.rms_norm_eps, name="post_attention_layernorm", **norm)(x)
        x = x + GatedMLP(cfg.hidden_size, cfg.intermediate_size, False, name="mlp", **kinds)(y)
        return constrain(x, "batch", "length", "act_embed"), None


def mrope_angles(positions: Array, config: TextConfig) -> tuple[Array, Array]:
    """Cosines and sines of the multimodal rotary embedding: [B, L, 3] -> two [B, L, head_dim / 2] float32.

    One frequency ladder over the head; section i of it turns with position axis i mod 3.
    """
    owner = np.repeat(np.arange(len(config.mrope_section)) % 3, config.mrope_section)
    angles = positions.astype(jnp.float32)[..., owner] * rotary_frequencies(config.head_dim, config.rope_theta)
    return jnp.cos(angles), jnp.sin(angles)


def _stack(block: type[nn.Module], length: int, remat: str | None, in_axes: Any) -> type[nn.Module]:
    """`block` scanned over a leading parameter axis "layers", rematerialised by the named policy."""
    if remat is not None:
        policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


# --------------------------------------------------------------------------------------------------------- the networks
class VisionTower(nn.Module):
    """`Qwen2_5_VisionTransformerPretrainedModel` on images of one grid."""

    config: VisionConfig
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str | None = None

    @nn.compact
    def __call__(self, patches: Array, grid: Grid) -> Array:
        """Patches [B, P, patch_dim] -> merged tokens [B, P / merge², out_hidden]."""
        cfg, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        edges = dict(dtype=self.dtype, param_dtype=floating(self.param_dtype, self.dtype))
        merge = cfg.spatial_merge_size
        if patches.shape[1:] != (grid[0] * grid[1], cfg.patch_dim) or grid[0] % merge or grid[1] % merge:
            raise ValueError(
                f"patches {patches.shape} do not fit grid {grid} at patch_dim {cfg.patch_dim}, merge {merge}"
            )
        windows = Windows(grid[0] // merge, grid[1] // merge, cfg.window_cells, merge**2)
        half = cfg.hidden_size // cfg.num_heads // 2
        cos, sin = rotary_angles(patch_positions(grid, merge)[None], (half, half), cfg.rope_theta)
        full = np.isin(np.arange(cfg.depth), cfg.fullatt_block_indexes)

        # The reference's Conv3d has stride = kernel, so it is one matrix product per patch.
        x = Dense(cfg.hidden_size, ("in_channels", "embed"), use_bias=False, name="patch_embed", **edges)(patches)
        blocks = _stack(VisionBlock, cfg.depth, self.remat, (0, nn.broadcast, nn.broadcast, nn.broadcast))
        x, _ = blocks(cfg, name="blocks", **kinds)(x, jnp.asarray(full), cos, sin, windows)
        return PatchMerger(cfg, name="merger", **edges)(x)


class LanguageModel(nn.Module):
    """`Qwen2_5_VLTextModel`, with image features set in the place of their tokens."""

    config: TextConfig
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str | None = None

    @nn.compact
    def __call__(
        self,
        ids: Array,
        mask: Array,
        positions: Array,
        image_tokens: Array | None = None,
        image_index: Array | None = None,
    ) -> Array:
        cfg, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        edges = dict(dtype=self.dtype, param_dtype=floating(self.param_dtype, self.dtype))
        table = self.param(
            "embed_tokens",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
            (cfg.vocab_size, cfg.hidden_size),
            jnp.dtype(edges["param_dtype"]),
        )
        x = jnp.take(table, ids, axis=0).astype(self.dtype)
        if image_tokens is not None:
            rows = jnp.maximum(image_index, 0)[..., None]
            features = jnp.take_along_axis(image_tokens.astype(self.dtype), rows, axis=1)
            x = jnp.where(image_index[..., None] >= 0, features, x)
        x = constrain(x, "batch", "length", "act_embed")
        cos, sin = mrope_angles(positions, cfg)
        order = jnp.arange(ids.shape[1])
        visible = (order[:, None] >= order) & mask[:, None, None, :].astype(bool)
        layers = _stack(TextLayer, cfg.num_hidden_layers, self.remat, nn.broadcast)
        x, _ = layers(cfg, name="layers", **kinds)(x, visible, cos, sin)
        return RMSNorm(cfg.rms_norm_eps, name="norm", **edges)(x)


class QwenVL(nn.Module):
    """The encoder: prompts with pictures in, last hidden states out."""

    config: QwenVLConfig

    def setup(self):
        cfg = self.config
        kinds = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, remat=cfg.remat)
        self.visual = VisionTower(cfg.vision, **kinds)
        self.language_model = LanguageModel(cfg.text, **kinds)

    def __call__(
        self,
        ids: Array,
        mask: Array,
        positions: Array,
        images: Sequence[Array] = (),
        image_index: Array | None = None,
        *,
        grids: Sequence[Grid] = (),
    ) -> Array:
        """Last hidden state after the final norm: [B, L, hidden] in the compute dtype.

        ids [B, L] int32; mask [B, L] bool, False on padding (at the right); positions [B, L, 3] int32
        (`mrope_positions`); images: patches [B, P_k, patch_dim] of image slot k, whose static grid is grids[k];
        image_index [B, L] int32: the row of a token's feature in the slots' merged tokens, concatenated, -1 for text
        (`image_index`). A slot that no token of a prompt points at has no influence on that prompt.
        """
        features = self.image_tokens(images, grids) if len(grids) else None
        return self.text(ids, mask, positions, features, image_index)

    def vision(self, patches: Array, grid: Grid) -> Array:
        """Patches [B, P, patch_dim] of one grid -> merged image tokens [B, P / merge², hidden]."""
        return self.visual(patches, tuple(grid))

    def image_tokens(self, images: Sequence[Array], grids: Sequence[Grid]) -> Array:
        """Every slot's merged tokens, concatenated: [B, sum of merged tokens, hidden]."""
        if len(images) != len(grids):
            raise ValueError(f"{len(images)} image slots but {len(grids)} grids")
        grids = [tuple(grid) for grid in grids]
        found: dict[int, Array] = {}
        # Slots of one grid (a crop and its mask) run as one batch: half the program, and larger matrix products.
        for grid in dict.fromkeys(grids):
            slots = [k for k, other in enumerate(grids) if other == grid]
            stacked = jnp.stack([images[k] for k in slots], axis=1)
            tokens = self.visual(stacked.reshape(-1, *stacked.shape[2:]), grid)
            tokens = tokens.reshape(-1, len(slots), *tokens.shape[1:])
            found.update({k: tokens[:, i] for i, k in enumerate(slots)})
        return jnp.concatenate([found[k] for k in range(len(grids))], axis=1)

    def text(
        self,
        ids: Array,
        mask: Array,
        positions: Array,
        image_tokens: Array | None = None,
        image_index: Array | None = None,
    ) -> Array:
        """The language model alone, on `image_tokens` computed before: prompts about the same images share them."""
        if (image_tokens is None) != (image_index is None):
            raise ValueError("image_tokens and image_index come together")
        return self.language_model(ids, mask, positions, image_tokens, image_index)
