"""Configuration and geometry of Qwen2.5-VL: all that is known before any array is.

A grid is `(rows, columns)` of patches, both multiples of the merge size. Patches travel in the order of
`Qwen2VLImageProcessor`: merge cells row by row, and the merge x merge patches of a cell together. Host side, numpy.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from refine_jax.errors import RefineError

Grid = tuple[int, int]

# The processor's normalisation (OpenAI CLIP's), for pixels in 0..1.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


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

    dtype: compute; param_dtype: storage ("float32" | "bfloat16" | "int8": the matrices of the blocks in 8 bits
    (`quantize`), the rest as `dtype`). remat: None, "full", or the name of a policy in
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


# ----------------------------------------------------------------------------------------------- geometry
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
