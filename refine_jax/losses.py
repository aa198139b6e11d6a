"""Boundary Consistency Loss (RefineAnything): the velocity error, weighted up in a band around the mask's border."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.errors import RefineError
from refine_jax.flow import pack_latents
from refine_jax.focus import dilate, erode

Array = jax.Array | np.ndarray


def boundary_band(mask: Array, r_out: int = 16, r_in: int = 16, box: Array | None = None) -> jax.Array:
    """B_c = Dilate(M_c; r_out) - Erode(M_c; r_in), as 0 and 1.

    `mask [..., H, W]` (non-zero = region) -> `[..., H, W] float32`. The mask is that of the focus crop, at the model's
    resolution; radii are half-widths of the square kernels, in its pixels (16 at 1024²: scale them with the side for
    smaller crops). The border of the crop is no border of the mask: a region that touches it is not eroded there.
    `box [..., 4]` restricts the crop to a part of the canvas.
    """
    region = jnp.asarray(mask) != 0
    return (dilate(region, r_out, box) & ~erode(region, r_in, box)).astype(jnp.float32)


def to_latent_grid(x: Array, grid: tuple[int, int], method: Literal["area", "nearest", "max"] = "area") -> jax.Array:
    """A pixel map on the latent grid: `x [..., H, W]` -> `[..., h, w] float32`. H, W are multiples of h, w.

    "area" (default): a latent location gets the fraction of its pixels that lie in the band, so the band keeps its
    total weight, whatever its alignment with the grid. "max": 1 as soon as one pixel does. "nearest": the pixel at the
    centre of the location, rounded down (as torch's "nearest-exact" at even factors).
    """
    height, width = x.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise RefineError(f"map size {height}x{width} is not a multiple of the latent grid {grid[0]}x{grid[1]}")
    fy, fx = height // grid[0], width // grid[1]
    cells = jnp.asarray(x, jnp.float32).reshape(*x.shape[:-2], grid[0], fy, grid[1], fx)
    if method == "area":
        return cells.mean(axis=(-3, -1))
    if method == "max":
        return cells.max(axis=(-3, -1))
    if method == "nearest":
        return cells[..., :, fy // 2, :, fx // 2]
    raise RefineError(f"method is {method!r}: give 'area', 'nearest' or 'max'")


def label_loss(logits: Array, labels: Array, background: float = 0.1) -> jax.Array:
    """Cross entropy of a label map whose first label is background: a scalar, float32.

    `logits [B, N, K]`, `labels [B, N, K]`, non-negative, its sum over K is a cell's whole. A cell weighs as much as it
    is not background, and `background` besides.
    """
    shares = jnp.asarray(labels, jnp.float32)
    shares = shares / jnp.maximum(shares.sum(-1, keepdims=True), 1e-6)
    entropy = -(shares * jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))).sum(-1)
    weight = background + 1.0 - shares[..., 0]
    return (weight * entropy).sum() / weight.sum()


def boundary_weight(band: Array, alpha: float = 9.0) -> jax.Array:
    """1 + α·B, elementwise."""
    return 1.0 + alpha * jnp.asarray(band, jnp.float32)


def boundary_weighted_loss(
    velocity_pred: Array,
    velocity: Array,
    band: Array,
    region: Array | None = None,
    *,
    alpha: float = 9.0,
    patch: int = 2,
    sample_weight: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = E ‖ℓ_base ⊙ (1 + α·B_c)‖₁, ℓ_base = squared velocity error summed over channels, per latent location.

    `velocity_pred`, `velocity`: packed tokens `[B, N, patch²·C]` (in `flow.pack_latents` order) or latents
    `[B, h, w, C]`. `band`, `region [B, h, w]` in 0..1 on the latent grid (region: the mask, for the parts only).
    `sample_weight [B]`: 0 leaves an item out of every mean.

    Normalisation: *summed* over channels, *averaged* over locations and batch, where the paper's norm is a sum over
    locations: the scale does not change with the resolution. Divide by C for a mean squared error.

    Returns the float32 scalar and the parts, unweighted means of ℓ_base in the same units: "base" (everywhere), "band"
    (weighted by B), and with `region` "inside" and "outside". A part without any location is 0.
    """
    error = jnp.square(velocity_pred.astype(jnp.float32) - velocity.astype(jnp.float32))
    band = jnp.asarray(band, jnp.float32)
    count = jnp.asarray(band.shape[1] * band.shape[2], jnp.float32)
    if velocity.ndim == 3:  # tokens: features are (channel, row, column), so the error is laid out like a packed map
        b, n, features = error.shape
        error = error.reshape(b, n, features // patch**2, patch**2).sum(axis=2)
        on_grid = lambda x: pack_latents(jnp.asarray(x, jnp.float32)[..., None], patch)
    else:
        error = error.sum(axis=-1)
        on_grid = lambda x: jnp.asarray(x, jnp.float32)
    band = on_grid(band)
    if band.shape != error.shape:
        raise RefineError(f"band gives locations {band.shape}, velocity {error.shape}: put the band on the latent grid")
    item = jnp.ones(error.shape[0]) if sample_weight is None else jnp.asarray(sample_weight, jnp.float32)
    item = item.reshape(-1, *[1] * (error.ndim - 1))

    def mean(value, weight):
        total = jnp.sum(weight)
        return jnp.sum(value * weight) / jnp.where(total == 0.0, 1.0, total)

    items = jnp.sum(item)
    loss = jnp.sum(error * boundary_weight(band, alpha) * item) / (count * jnp.where(items == 0.0, 1.0, items))
    parts = {"base": mean(error, jnp.broadcast_to(item, error.shape)), "band": mean(error, band * item)}
    if region is not None:
        region = on_grid(region)
        parts |= {"inside": mean(error, region * item), "outside": mean(error, (1.0 - region) * item)}
    return loss, parts
