"""What the backbone is shown: conditioning tokens of the vision-language encoder, and the latents of condition images.

"refine" (RefineAnything): the images X = [focus crop, reference, mask crop] go to the encoder and, through the VAE,
into the image stream after the noisy target: [z_t, z_I, z_ref, z_M]. A slot whose image is absent (no reference) is
masked out and leaves no trace: rotary frames and the text's start count only images that are present.

"rvr" (Refinement via Regeneration): the image to regenerate goes to the encoder alone; the image stream holds the
target and nothing else: [z_t]. What the encoder does not see cannot be kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax import flow
from refine_jax.focus import resample
from refine_jax.models.mmdit import image_positions, text_start

Array = jax.Array | np.ndarray


class Pictures(NamedTuple):
    """The pictures of one kind of conditioning, by their names in a batch and in the order of the prompt.

    read: by the encoder; seen: by the VAE, their latents follow the target in the image stream.
    """

    read: tuple[str, ...]
    seen: tuple[str, ...]


_REFINE = ("image", "reference", "mask")
CONDITIONINGS: dict[str, Pictures] = {
    "refine": Pictures(read=_REFINE, seen=_REFINE),
    "rvr": Pictures(read=("image",), seen=()),
    # The ablation of RvR's paper: the image's latents too.
    "rvr_vae": Pictures(read=("image",), seen=("image",)),
}


def view(image: Array, box: Array | None, sizes: Sequence[tuple[int, int]]) -> jax.Array:
    """The part of `image [H, W, 3] uint8` in `box [4]`, as a network looks at it: `[h, w, 3] float32` in 0…255, whole.

    Resized to each of `sizes` in turn with 8-bit rounding: the first time with Lanczos as diffusers'
    `VaeImageProcessor` does, then bicubic as transformers' `Qwen2VLImageProcessor` does.
    """
    for index, size in enumerate(sizes):
        if index and size == tuple(image.shape[:2]):
            continue
        image = resample(image, box, size, "bicubic" if index else "lanczos", quantize=True)
        box = None
    return image


def to_signed(pixels: Array) -> jax.Array:
    """0…255 -> −1…1 float32, what the VAE encodes."""
    return 2.0 * (jnp.asarray(pixels, jnp.float32) / 255.0) - 1.0


def to_pixels(signed: Array) -> jax.Array:
    """−1…1 -> whole numbers 0…255, float32; what lies outside is clipped."""
    return jnp.round(jnp.clip(signed / 2.0 + 0.5, 0.0, 1.0) * 255.0)


class ImageTokens(NamedTuple):
    """The condition images behind the target: tokens `[B, N_c, 4C]`, and for target and condition images together
    positions `[B, N, 3] int32` and mask `[B, N] bool`; text_start `[B] int32`."""

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array
    text_start: jax.Array


class Packed(NamedTuple):
    """Latents of images whose sizes differ from row to row: tokens `[B, N, 4C]` with padding behind, and grids
    `[B, 2] int32`, (rows, columns) in tokens."""

    tokens: Array
    grid: Array


def image_tokens(
    target: tuple[int, int, int, int],
    latents: Sequence[Array | Packed],
    present: Sequence[Array | None],
    patch: int = 2,
) -> ImageTokens:
    """Packs the latents of the condition images, none or several, and places them for the rotary embedding.

    target: the shape (B, h, w, C) of the target's latents; latents[k] `[B, h_k, w_k, C]`, or packed; present[k] `[B]
    bool`, None = always. Image k stands in frame 1 + the number of present images before it, its rows and columns
    centred on 0 (`scale_rope`); the text starts at the largest half-side, in tokens, of what is present
    (`QwenEmbedRope`).
    """
    batch, height, width, channels = target
    grid = (height // patch, width // patch)
    tokens = [jnp.zeros((batch, 0, channels * patch**2), jnp.float32)]
    masks = [jnp.ones((batch, grid[0] * grid[1]), bool)]
    frame = jnp.zeros(batch, jnp.int32)
    positions = [_placed(grid, frame)]
    frame, start = frame + 1, jnp.full(batch, text_start([grid]), jnp.int32)
    for image, here in zip(latents, present, strict=True):
        here = jnp.ones(batch, bool) if here is None else jnp.asarray(here, bool)
        if isinstance(image, Packed):
            rows, columns = jnp.moveaxis(jnp.asarray(image.grid, jnp.int32), -1, 0)
            index = jnp.arange(image.tokens.shape[1], dtype=jnp.int32)
            tokens.append(jnp.asarray(image.tokens))
            positions.append(_spread(index, rows[:, None], columns[:, None], frame[:, None]))
            masks.append(here[:, None] & (index < (rows * columns)[:, None]))
            half = jnp.maximum(rows // 2, columns // 2)
        else:
            grid = (image.shape[1] // patch, image.shape[2] // patch)
            tokens.append(flow.pack_latents(image, patch))
            positions.append(_placed(grid, frame))
            masks.append(jnp.broadcast_to(here[:, None], (batch, grid[0] * grid[1])))
            half = text_start([grid])
        frame = frame + here
        start = jnp.where(here, jnp.maximum(start, half), start)
    return ImageTokens(
        jnp.concatenate(tokens, axis=1), jnp.concatenate(positions, axis=1), jnp.concatenate(masks, axis=1), start
    )


def _placed(grid: tuple[int, int], frame: jax.Array) -> jax.Array:
    """Positions of a grid of tokens in the frames `[B]`: `[B, rows·columns, 3] int32`."""
    offset = jnp.stack([frame, jnp.zeros_like(frame), jnp.zeros_like(frame)], axis=-1)
    return jnp.asarray(image_positions([grid])) + offset[:, None]


def _spread(index: jax.Array, rows: jax.Array, columns: jax.Array, frame: jax.Array) -> jax.Array:
    """`_placed` for grids that are not static: token `index` of grids `[B, 1]`, `[B, N, 3] int32`."""
    columns = jnp.maximum(columns, 1)
    row = index // columns - (rows - rows // 2)
    column = index % columns - (columns - columns // 2)
    return jnp.stack([jnp.broadcast_to(frame, row.shape), row, column], axis=-1)


def text_positions(start: jax.Array, length: int) -> jax.Array:
    """Rotary positions of the text, `[B] int32` -> `[B, length] int32`: counting on from `start`."""
    return start[:, None] + jnp.arange(length, dtype=jnp.int32)
