"""Qwen2.5-VL as a conditioning encoder: vision tower, language model, last hidden state after the final norm.

Equal to transformers' `Qwen2_5_VLForConditionalGeneration` up to (not including) the language-model head, for still
images. Geometry is static: a grid is `(rows, columns)` of patches, both multiples of the merge size. Patches travel in
the order of `Qwen2VLImageProcessor`: merge cells row by row, and the merge x merge patches of a cell together. Windowed
attention does not reorder them for good, it only groups queries, keys and values.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refine_jax.errors import RefineError
from refine_jax.models.layers import (
    Dense,
    RMSNorm,
    apply_rotary,
    attention,
    constrain,
    rotary_angles,
    rotary_frequencies,
)

Array = jax.Array
Grid = tuple[int, int]

# The processor's normalisation (OpenAI CLIP's), for pixels in 0..1.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_VISION_EPS = 1e-6


# -------------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; names of transformers' `Qwen2_5_VLVisionConfig`, values of the 7B release."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise RefineError(
                f"vision_config.hidden_size={self.hidden_size}: must be a multiple of 4 x num_heads ({self.num_heads})"
            )
        if self.window_size < self.factor:
            raise RefineError(
                f"vision_config.window_size={self.window_size}: must be at least patch_size x spatial_merge_size"
            )

    @property
    def factor(self) -> int:
        """Side in pixels of one merged token; image sides are multiples of it."""
        return self.patch_size * self.spatial_merge_size

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_cells(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """The language model; names of transformers' `Qwen2_5_VLTextConfig`, values of the 7B release."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise RefineError(
                f"text_config: hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}: each must divide the one before it"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise RefineError(
                f"text_config.mrope_section={self.mrope_section}: must sum to half the head size ({self.head_dim} / 2)"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class QwenVLConfig:
    """Both halves, the ids of the tokens that stand for images, and how to compute.

    dtype: compute; param_dtype: storage ("float32" | "bfloat16"). remat: None, "full", or the name of a policy in
    `jax.checkpoint_policies`.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 151655
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str | None = None

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise RefineError(
                f"vision_config.out_hidden_size={self.vision.out_hidden_size} differs from the language model's "
                f"hidden_size={self.text.hidden_size}"
            )
        if self.remat not in (None, "full") and not hasattr(jax.checkpoint_policies, self.remat):
            raise RefineError(f"remat={self.remat!r}: use None, 'full' or a name in jax.checkpoint_policies")

    @staticmethod
    def from_dict(config: Mapping[str, Any], **overrides: Any) -> "QwenVLConfig":
        """From a checkpoint's config.json, with the text fields nested in `text_config` or (older files) flat.

        Fields that cannot change a still image's hidden states are ignored; a setting that this network does not have
        (another activation, another rotary scaling, sliding windows) raises RefineError.
        """
        text, vision = dict(config.get("text_config") or config), dict(config.get("vision_config") or {})
        rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        _require(kind in ("default", "mrope"), "rope_parameters.rope_type", kind)
        _require(not text.get("use_sliding_window"), "use_sliding_window", True)
        for name, part in (("text_config", text), ("vision_config", vision)):
            act = part.get("hidden_act", "silu")
            _require(act == "silu", f"{name}.hidden_act", act)
        vision_rope = dict(vision.get("rope_parameters") or {})
        _require(vision_rope.get("rope_type", "axial") == "axial", "vision_config.rope_parameters", vision_rope)

        text["rope_theta"] = float(rope.get("rope_theta", text.get("rope_theta", 1000000.0)))
        text["mrope_section"] = tuple(rope.get("mrope_section", (16, 24, 24)))
        vision["rope_theta"] = float(vision_rope.get("rope_theta", 10000.0))
        vision.setdefault("in_channels", vision.get("in_chans", 3))
        return QwenVLConfig(
            vision=_pick(VisionConfig, vision, "vision_config", optional=("image_mean", "image_std")),
            text=_pick(TextConfig, text, "text_config"),
            **{"image_token_id": config.get("image_token_id", 151655), **overrides},
        )

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads: config.json of `Qwen2_5_VLForConditionalGeneration`, without the compute settings."""
        parts = []
        for part in (self.vision, self.text):
            values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(part).items()}
            parts.append({**values, "hidden_act": "silu"})
        vision, text = parts
        for name, default in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            # They are the image processor's; a file says them here only where they are not the released ones.
            if vision[name] == list(default):
                del vision[name]
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.pop("rope_theta")}
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": text.pop("rope_theta"),
            "mrope_section": text.pop("mrope_section"),
        }
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "image_token_id": self.image_token_id,
            "text_config": {"model_type": "qwen2_5_vl_text", **text},
            "vision_config": {"model_type": "qwen2_5_vl_vision", **vision},
        }


def _require(condition: bool, name: str, value: Any) -> None:
    if not condition:
        raise RefineError(f"config.json: {name}={value!r} is not supported; use a released Qwen2.5-VL encoder")


def _pick(cls: type, values: Mapping[str, Any], where: str, optional: Sequence[str] = ()) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    missing = [n for n in names if n not in values and n not in optional]
    if missing:
        raise RefineError(f"config.json: {where} lacks {', '.join(missing)}; is this a Qwen2.5-VL encoder?")
    picked = {n: values[n] for n in names if n in values}
    return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in picked.items()})


# ----------------------------------------------------------------------------------------------- geometry (host, numpy)
def vl_image_size(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """The size (height, width) at which the encoder looks at an image: transformers' `smart_resize`.

    Sides are multiples of `factor` (patch x merge), the area lies in [min_pixels, max_pixels], the aspect stays as near
    as that allows. RefineError where one side exceeds 200 times the other.
    """
    if min(height, width) <= 0 or max(height, width) > 200 * min(height, width):
        raise RefineError(f"image of {width}x{height} pixels: the longer side may be at most 200 times the shorter")
    # Python's round (halves to even), as in the reference.
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def patch_grid(height: int, width: int, config: VisionConfig) -> Grid:
    """Rows and columns of patches of an image of this size in pixels."""
    if height % config.factor or width % config.factor:
        raise ValueError(f"image of {height}x{width}: sides must be multiples of {config.factor} (see vl_image_size)")
    return height // config.patch_size, width // config.patch_size


def merged_tokens(grid: Grid, merge: int) -> int:
    """Tokens that an image of `grid` patches takes in the language model."""
    return (grid[0] // merge) * (grid[1] // merge)


def patch_positions(grid: Grid, merge: int) -> np.ndarray:
    """Row and column of every patch, in the processor's order: [P, 2] int32."""
    rows, columns = np.indices(grid, dtype=np.int32)
    both = np.stack([rows, columns], axis=-1)
    both = both.reshape(grid[0] // merge, merge, grid[1] // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(both.reshape(-1, 2))


def mrope_positions(ids: np.ndarray, grids: Sequence[Grid], image_token_id: int, merge: int = 2) -> np.ndarray:
    """Positions (time, row, column) of one unpadded prompt: ids [L] -> [L, 3] int32.

    `grids` are those of the images that occur, in order. Text counts on by one on all three axes; an image keeps one
    time, spans its rows and columns, and moves the counter on by its longer side. Equals
    `Qwen2_5_VLModel.get_rope_index`.
    """
    ids = np.asarray(ids)
    positions = np.zeros((len(ids), 3), np.int32)
    start, count, remaining = 0, 0, list(grids)
    while start < len(ids):
        if ids[start] != image_token_id:
            positions[start] = count
            start, count = start + 1, count + 1
            continue
        if not remaining:
            raise ValueError(f"ids hold more image tokens than {len(grids)} grid(s) account for")
        rows, columns = (side // merge for side in remaining.pop(0))
        span = slice(start, start + rows * columns)
        if not np.all(ids[span] == image_token_id) or span.stop > len(ids):
            raise ValueError(f"ids at {start}: expected {rows * columns} image tokens in a row")
        cells = np.indices((rows, columns)).reshape(2, -1).T
        positions[span] = count + np.concatenate([np.zeros_like(cells[:, :1]), cells], axis=1)
        start, count = span.stop, count + max(rows, columns)
    if remaining:
        raise ValueError(f"{len(remaining)} grid(s) have no image tokens in ids")
    return positions


def image_index(
    ids: np.ndarray, grids: Sequence[Grid], image_token_id: int, merge: int = 2, present: Sequence[bool] | None = None
) -> np.ndarray:
    """For every token the row of its image feature, -1 for text: ids [L] -> [L] int32.

    Rows count through the merged tokens of *all* `grids` concatenated; images that are not `present` keep their rows,
    and no token points at them.
    """
    counts = [merged_tokens(g, merge) for g in grids]
    present = [True] * len(counts) if present is None else list(present)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = [np.arange(starts[k], starts[k + 1], dtype=np.int32) for k in range(len(counts)) if present[k]]
    rows = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    where = np.asarray(ids) == image_token_id
    if int(where.sum()) != len(rows):
        raise ValueError(f"ids hold {int(where.sum())} image tokens, the images present have {len(rows)}")
    index = np.full(len(where), -1, np.int32)
    index[where] = rows
    return index


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
        y = RMSNorm(_VISION_EPS, name="norm1", **kinds)(x)
        x = x + VisionAttention(cfg, name="attn", **kinds)(y, full, cos, sin, windows)
        y = RMSNorm(_VISION_EPS, name="norm2", **kinds)(x)
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
        y = RMSNorm(cfg.rms_norm_eps, name="input_layernorm", **kinds)(x)
        x = x + TextAttention(cfg, name="self_attn", **kinds)(y, mask, cos, sin)
        y = RMSNorm(cfg.rms_norm_eps, name="post_attention_layernorm", **kinds)(x)
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
        x = Dense(cfg.hidden_size, ("in_channels", "embed"), use_bias=False, name="patch_embed", **kinds)(patches)
        blocks = _stack(VisionBlock, cfg.depth, self.remat, (0, nn.broadcast, nn.broadcast, nn.broadcast))
        x, _ = blocks(cfg, name="blocks", **kinds)(x, jnp.asarray(full), cos, sin, windows)
        return PatchMerger(cfg, name="merger", **kinds)(x)


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
        table = self.param(
            "embed_tokens",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
            (cfg.vocab_size, cfg.hidden_size),
            jnp.dtype(self.param_dtype),
        )
        x = jnp.take(table, ids, axis=0).astype(self.dtype)
        if image_tokens is not None:
            rows = jnp.maximum(image_index, 0)[..., None]
            features = jnp.take_along_axis(image_tokens.astype(self.dtype), rows, axis=1)
            x = jnp.where(image_index[..., None] >= 0, features, x)
        x = constrain(x, "batch", "length", "act_embed")
        cos, sin = mrope_angles(positions, cfg)
        causal = np.tril(np.ones((ids.shape[1],) * 2, bool))
        visible = causal & mask[:, None, None, :].astype(bool)
        layers = _stack(TextLayer, cfg.num_hidden_layers, self.remat, nn.broadcast)
        x, _ = layers(cfg, name="layers", **kinds)(x, visible, cos, sin)
        return RMSNorm(cfg.rms_norm_eps, name="norm", **kinds)(x)


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
