"""Focus-and-Refine (RefineAnything, section "Focus-and-Refine"): where to look, and how to paste the result back.

Box from mask, focus crop, resampling, feathered mask, paste-back, as functions of arrays. An image of any size lies in
the top-left corner of a canvas of static size; boxes `[4] int32 = (x1, y1, x2, y2)`, half-open, in canvas pixels, are
traced. Whatever lies outside the box never reaches a result, so the canvas may be of any size. Functions take one
image; `jax.vmap` takes a batch. The geometry that chooses static shapes (`focus_box`, `bucket_size`, `aspect_buckets`)
runs on the host, in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from refine_jax.errors import RefineError

Array = jax.Array | np.ndarray
Method = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]
Style = Literal["released", "paper"]

FOCUS_AREA = 1024 * 1024  # pixels; the scale at which the focus margin is measured
FOCUS_MARGIN = 64  # pixels at that scale

# --------------------------------------------------------------------------------------------------------- geometry


def mask_box(mask: Array) -> tuple[Array, Array]:
    """The tight box B = BBox(M) of the non-zero pixels.

    `mask [..., H, W]` of any dtype, zero in the canvas padding -> (`box [..., 4] int32`, `found [...] bool`). An empty
    mask gives the box (0, 0, 0, 0) and `found` False; the caller raises. NumPy in, NumPy out: the host uses the same
    function to choose a bucket.
    """
    xp = np if isinstance(mask, np.ndarray) else jnp
    marked = xp.asarray(mask) != 0

    def extent(line):  # [..., N] bool -> first and one past the last True
        first = xp.argmax(line, axis=-1)
        last = line.shape[-1] - xp.argmax(line[..., ::-1], axis=-1)
        return first, xp.where(line.any(axis=-1), last, 0)

    (x1, x2), (y1, y2) = extent(marked.any(axis=-2)), extent(marked.any(axis=-1))
    return xp.stack([x1, y1, x2, y2], axis=-1).astype(np.int32), marked.any(axis=(-2, -1))


def focus_box(
    box: Array, width: Array | int, height: Array | int, margin: float = FOCUS_MARGIN, area: int = FOCUS_AREA
) -> np.ndarray:
    """The focus crop C = Expand(B, m), its margin measured at the scale where the image has `area` pixels.

    With s = sqrt(area / (W·H)): x1' = floor(max(0, x1·s - m) / s), x2' = ceil(min(W·s, x2·s + m) / s), the same for y,
    clipped to the image. `box [..., 4]`, `width [...]`, `height [...]` in pixels -> `[..., 4] int32`. On the host only,
    in float64 and in the released code's order of operations: when m/s is an integer, floor and ceil sit on the last
    bit, which float32 does not have. Raises RefineError for a negative margin and for a box empty or outside the image.
    """
    if margin < 0:
        raise RefineError(f"margin is {margin}: give 0 or more pixels")
    box = np.asarray(box)
    width, height = np.asarray(width, np.int64), np.asarray(height, np.int64)
    size = np.stack([width, height], axis=-1)
    low, high = box[..., :2].astype(np.int64), box[..., 2:].astype(np.int64)
    if np.any(low < 0) or np.any(high > size) or np.any(low >= high):
        shown = ", ".join(str(int(v)) for v in box.reshape(-1, 4)[0])
        raise RefineError(
            f"box ({shown}) is empty or outside the image: give 0 <= x1 < x2 <= width, 0 <= y1 < y2 <= height"
        )
    s = np.sqrt(float(area) / (width * height).astype(np.float64))[..., None]
    low = np.maximum(0, np.floor(np.maximum(0.0, low * s - margin) / s).astype(np.int64))
    high = np.minimum(size, np.ceil(np.minimum(size * s, high * s + margin) / s).astype(np.int64))
    return np.concatenate([low, high], axis=-1).astype(np.int32)


def bucket_size(area: float, ratio: float, multiple: int = 32) -> tuple[int, int]:
    """(height, width) of about `area` pixels and aspect `ratio` = width / height, each side a multiple of `multiple`.

    The rule of diffusers' `QwenImageEditPlusPipeline` (`calculate_dimensions`): sides are rounded to the nearest
    multiple, ties to the even one. Never less than one multiple.
    """
    if not ratio > 0 or not math.isfinite(ratio):
        raise RefineError(f"aspect ratio is {ratio}: give a positive width / height")
    width = math.sqrt(area * ratio)
    height = width / ratio
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (height, width))


def aspect_buckets(area: float, multiple: int = 32, max_ratio: float = 4.0) -> list[tuple[int, int]]:
    """Every (height, width) that `bucket_size` reaches for ratios in [1 / max_ratio, max_ratio], from tall to wide."""
    if max_ratio < 1:
        raise RefineError(f"max_ratio is {max_ratio}: give 1 or more")
    top = round(math.sqrt(area * max_ratio) / multiple) + 1
    # A side changes where it is an odd number of half multiples; between two changes the size is constant.
    squares = [((k + 0.5) * multiple) ** 2 / area for k in range(top + 1)]
    turns = {1.0 / max_ratio, max_ratio}
    turns.update(r for q in squares for r in (q, 1.0 / q) if 1.0 / max_ratio < r < max_ratio)
    turns = sorted(turns)
    ratios = turns + [math.sqrt(a * b) for a, b in zip(turns, turns[1:])]
    return sorted({bucket_size(area, r, multiple) for r in ratios}, key=lambda size: (size[1] / size[0], size))


# ------------------------------------------------------------------------------------------------------- resampling


def _cubic(x: jax.Array) -> jax.Array:
    """Cubic convolution with a = -1/2 (Keys 1981)."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


# Interpolation kernels over the distance in (scaled) source pixels.
_KERNELS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "box": lambda x: jnp.where((x > -0.5) & (x <= 0.5), 1.0, 0.0),
    "bilinear": lambda x: jnp.maximum(0.0, 1.0 - jnp.abs(x)),
    "bicubic": _cubic,
    "lanczos": lambda x: jnp.where(jnp.abs(x) < 3.0, jnp.sinc(x) * jnp.sinc(x / 3.0), 0.0),
}


def _axis_weights(in_size, out_size, source, target, within, method, antialias) -> jax.Array:
    """Weights `[out_size, in_size] float32` that map the source interval of one axis onto its target interval.

    Rows outside the target and columns outside `within` are 0; the other rows sum to 1.
    """
    (s0, s1), (t0, t1), (low, high) = source, target, within
    index = jnp.arange(out_size, dtype=jnp.int32)
    place, count, length = index - t0, jnp.maximum(t1 - t0, 1), s1 - s0
    # The centre of an output pixel in source pixels, (place + 1/2)·length/count, as an integer and a fraction: in one
    # float32 its error would grow with the coordinate and show in the weights.
    if jnp.issubdtype(jnp.result_type(length), jnp.integer):
        numerator = (2 * place + 1) * length
        whole = numerator // (2 * count)
        fraction = (numerator - whole * 2 * count).astype(jnp.float32) / (2 * count).astype(jnp.float32)
        whole = whole + s0
    else:
        centre = s0 + (place + 0.5) * (length / count)
        whole = jnp.floor(centre).astype(jnp.int32)
        fraction = centre - whole
    pixel = jnp.arange(in_size, dtype=jnp.int32)
    step = pixel[None, :] - whole[:, None]
    if method == "nearest":
        weights = jnp.where(step == 0, 1.0, 0.0)
    else:
        stretch = jnp.asarray(length, jnp.float32) / count.astype(jnp.float32) if antialias else jnp.float32(1)
        weights = _KERNELS[method]((step + 0.5 - fraction[:, None]) / jnp.maximum(stretch, 1.0))
    weights = jnp.where((pixel >= low) & (pixel < high), weights, 0.0)
    if method != "nearest":
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / jnp.where(total == 0.0, 1.0, total)
    return jnp.where(((index >= t0) & (index < t1))[:, None], weights, 0.0).astype(jnp.float32)


# Numbers of about 35 bits as pairs (value, rest) of float32. Every product whose rounding would matter is of two halves
# of the digits, so exact: a compiler may then fuse it into the addition that follows, or not.


def _sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b (Knuth's two-sum)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a·b."""
    (a1, a2), (b1, b2) = ((head, v - head) for v in (a, b) for head in [lax.reduce_precision(v, 8, 11)])
    return a1 * b1, a1 * b2 + a2 * b1 + a2 * b2


def _quotient(a: jax.Array, a_rest: jax.Array, b: jax.Array, b_rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a + a_rest) / (b + b_rest)."""
    quotient = a / b
    product, rest = _product(quotient, b)
    return quotient, (((a - product) - rest) + a_rest - quotient * b_rest) / b


def _polynomial(coefficients: np.ndarray, x: jax.Array, x_rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Horner's scheme at x + x_rest, where x is the rounded sum; `coefficients` in float64, the constant first."""
    high = coefficients.astype(np.float32)
    low = (coefficients - high).astype(np.float32)
    value, rest = jnp.full_like(x, high[-1]), jnp.full_like(x, low[-1])
    for c, c_rest in zip(high[-2::-1], low[-2::-1]):
        product, lost = _product(value, x)
        rest = rest * x + value * x_rest + (lost + c_rest)
        value, lost = _sum(product, jnp.full_like(x, c))
        rest = rest + lost
    return value, rest


@functools.cache
def _kernel_polynomials(method: str) -> tuple[np.ndarray, ...]:
    """A kernel over |x| as polynomials; for "lanczos" one, in x² - 4.5, off by 6e-12 at most."""
    if method == "bilinear":
        return (np.array([1.0, -1.0]),)
    if method == "bicubic":  # below 1, and from 1 to 2
        return np.array([1.0, 0.0, -2.5, 1.5]), np.array([2.0, -4.0, 2.5, -0.5])
    kernel = lambda t: np.sinc(np.sqrt(4.5 * (t + 1.0))) * np.sinc(np.sqrt(4.5 * (t + 1.0)) / 3.0)
    scaled = np.polynomial.chebyshev.cheb2poly(np.polynomial.chebyshev.chebinterpolate(kernel, 14))
    return (scaled / 4.5 ** np.arange(15),)


def _fixed_weights(in_size, out_size, source, target, within, method) -> jax.Array:
    """The weights of `_axis_weights` between integer edges, times 2^22 and rounded: whole numbers, in float32.

    Pillow rounds weights that it has in float64; to round as it does takes more digits than one float32 has.
    """
    (s0, s1), (t0, t1), (low, high) = source, target, within
    index, pixel = jnp.arange(out_size, dtype=jnp.int32), jnp.arange(in_size, dtype=jnp.int32)
    place, count, length = index - t0, jnp.maximum(t1 - t0, 1), s1 - s0
    # The distance in (scaled) source pixels is a fraction of integers.
    numerator = jnp.abs((2 * (pixel - s0) + 1)[None, :] * count - ((2 * place + 1) * length)[:, None])
    denominator = 2 * jnp.maximum(length, count)
    support = {"bilinear": 1, "bicubic": 2, "lanczos": 3}[method]
    inside = numerator < support * denominator
    zero = jnp.float32(0)
    x, x_rest = _quotient(
        jnp.where(inside, numerator, 0).astype(jnp.float32), zero, denominator.astype(jnp.float32), zero
    )
    near, *far = _kernel_polynomials(method)
    if method == "lanczos":
        square, lost = _product(x, x)
        shifted, shifted_lost = _sum(square, jnp.float32(-4.5))
        value, rest = _polynomial(near, *_sum(shifted, shifted_lost + (lost + 2.0 * x * x_rest)))
    else:
        value, rest = _polynomial(near, x, x_rest)
        for beyond in far:
            parts = zip((value, rest), _polynomial(beyond, x, x_rest))
            value, rest = (jnp.where(x < 1.0, a, b) for a, b in parts)
    inside &= (pixel >= low) & (pixel < high)
    value, rest = jnp.where(inside, value, 0.0), jnp.where(inside, rest, 0.0)
    # Heads of 11 binary places add up exactly in float32.
    head = jnp.round(value * 2.0**11) * 2.0**-11
    tails = jnp.sum((value - head) + rest, axis=1, keepdims=True)
    total, total_rest = _sum(jnp.sum(head, axis=1, keepdims=True), tails)
    value, rest = _quotient(value, rest, jnp.where(total == 0.0, 1.0, total), total_rest)
    value, rest = value * 2.0**22, rest * 2.0**22
    whole = jnp.round(value)
    fixed = whole + jnp.round((value - whole) + rest)
    return jnp.where(((index >= t0) & (index < t1))[:, None], fixed, 0.0)


def _contract(spec: str, weights: jax.Array, image: jax.Array) -> jax.Array:
    # A TPU would otherwise multiply in bfloat16.
    return jnp.einsum(spec, weights, image, precision=lax.Precision.HIGHEST)


def _contract_fixed(spec: str, fixed: jax.Array, image: jax.Array) -> jax.Array:
    """One pass in Pillow's fixed point: weights with 22 fractional bits, rounded to 8 bits at the end."""
    # Two halves of the weights, so that all sums are integers below 2^24 (up to 64 taps) and exact in float32: whatever
    # the order of summation, so whatever the size of the canvas.
    high = jnp.round(fixed * 2.0**-11)
    low = fixed - high * 2.0**11
    total = (_contract(spec, high, image).astype(jnp.int32) << 11) + _contract(spec, low, image).astype(jnp.int32)
    return jnp.clip((total + (1 << 21)) >> 22, 0, 255).astype(jnp.float32)


def _resample(image, size, source, target, within, method, antialias, quantize) -> jax.Array:
    if method not in ("nearest", *_KERNELS):
        raise RefineError(f"method is {method!r}: give one of nearest, {', '.join(_KERNELS)}")
    flat = image.ndim == 2
    image = jnp.asarray(image[..., None] if flat else image, jnp.float32)
    if quantize:
        image = jnp.clip(jnp.round(image), 0.0, 255.0)
    whole = all(jnp.issubdtype(jnp.result_type(edge), jnp.integer) for edge in (*source, *target))
    exact = quantize and antialias and whole and method in ("bilinear", "bicubic", "lanczos")
    for spec, axis, i in (("ow,hwc->hoc", 1, 0), ("oh,hwc->owc", 0, 1)):  # x, then y
        edges = [(part[i], part[i + 2]) for part in (source, target, within)]
        if exact:
            image = _contract_fixed(spec, _fixed_weights(image.shape[axis], size[axis], *edges, method), image)
            continue
        weights = _axis_weights(image.shape[axis], size[axis], *edges, method, antialias)
        if quantize:
            image = _contract_fixed(spec, jnp.round(weights * 2.0**22), image)
        else:
            image = _contract(spec, weights, image)
    return image[..., 0] if flat else image


def _edges(box: Array | None, height: int, width: int) -> list[jax.Array]:
    if box is None:
        box = np.array([0, 0, width, height], np.int32)
    box = jnp.asarray(box)
    return [box[i] for i in range(4)]


def resample(
    image: Array,
    box: Array | None,
    size: tuple[int, int],
    method: Method = "bicubic",
    *,
    antialias: bool = True,
    quantize: bool = False,
    within: Array | None = None,
) -> jax.Array:
    """The part of `image` in the traced `box`, resized to the static `size` = (h, w), as Pillow computes it.

    `image [H, W, C]` or `[H, W]` of any dtype -> `[h, w, C]` or `[h, w] float32`. Crop, then resize: samples beyond the
    box do not exist, as in `image.crop(box).resize(size, method)`. `within [4]` lets samples come from a larger
    rectangle, as `image.resize(size, method, box=box)` does with the whole image. Weights are separable, normalised and
    (`antialias`) as wide as the downscaling; bicubic has a = -1/2, lanczos three lobes. Integer boxes are exact; float
    boxes are accepted. "nearest" and "box", where a sample falls exactly between two pixels, take one side; there
    Pillow's accumulated rounding takes either. `quantize` computes with 8 bits as Pillow does with uint8: `image` is
    rounded to 0..255, and so is the result of the x pass and of the y pass (always x first; from version 13 on, Pillow
    begins with y where that is cheaper). `box` None is the whole array.
    """
    height, width = image.shape[:2]
    source = _edges(box, height, width)
    if within is None:
        low, high = [jnp.floor(v) for v in source[:2]], [jnp.ceil(v) for v in source[2:]]
        within = low + high
    return _resample(image, size, source, (0, 0, size[1], size[0]), within, method, antialias, quantize)


def place(
    crop: Array, box: Array, size: tuple[int, int], method: Method = "bicubic", *, quantize: bool = False
) -> jax.Array:
    """The inverse of `resample`: all of `crop`, resized to the traced integer `box` of a canvas of static size (H, W).

    `crop [h, w, C]` or `[h, w]` -> `[H, W, C]` or `[H, W] float32`, 0 outside the box.
    """
    source = _edges(None, *crop.shape[:2])
    return _resample(crop, size, source, _edges(box, *size), source, method, True, quantize)


# ------------------------------------------------------------------------------------------------ morphology and blur


def inside_box(box: Array | None, height: int, width: int) -> jax.Array:
    """`[..., height, width] bool`, True inside `box [..., 4]` (everywhere if None)."""
    if box is None:
        return jnp.ones((height, width), bool)
    x1, y1, x2, y2 = (jnp.asarray(box)[..., i, None] for i in range(4))
    x, y = jnp.arange(width), jnp.arange(height)
    return ((y >= y1) & (y < y2))[..., :, None] & ((x >= x1) & (x < x2))[..., None, :]


def _window_extreme(mask: jax.Array, radius: int, largest: bool) -> jax.Array:
    """Running maximum or minimum over 2·radius+1 pixels along both last axes; the border repeats outwards."""
    combine = jnp.maximum if largest else jnp.minimum
    for axis in (mask.ndim - 1, mask.ndim - 2):
        n = mask.shape[axis]
        pads = [(0, 0)] * mask.ndim
        pads[axis] = (radius, radius)
        mask, span, full = jnp.pad(mask, pads, mode="edge"), 1, 2 * radius + 1
        while span < full:  # windows of `span` pixels double until they cover the kernel: log2 steps, not 2·radius
            shift = min(span, full - span)
            keep = n + full - span - shift
            ahead = lax.slice_in_dim(mask, shift, shift + keep, axis=axis)
            mask, span = combine(lax.slice_in_dim(mask, 0, keep, axis=axis), ahead), span + shift
    return mask


def _morphology(mask: Array, radius: int, box: Array | None, largest: bool) -> jax.Array:
    if radius < 0:
        raise RefineError(f"radius is {radius}: give 0 or more pixels")
    mask = jnp.asarray(mask)
    if box is None:
        return _window_extreme(mask, radius, largest)
    inside = inside_box(box, *mask.shape[-2:])
    if mask.dtype == bool:
        neutral = not largest
    else:
        info = jnp.iinfo(mask.dtype) if jnp.issubdtype(mask.dtype, jnp.integer) else jnp.finfo(mask.dtype)
        neutral = info.min if largest else info.max
    found = _window_extreme(jnp.where(inside, mask, jnp.asarray(neutral, mask.dtype)), radius, largest)
    return jnp.where(inside, found, jnp.zeros((), mask.dtype))


def dilate(mask: Array, radius: int, box: Array | None = None) -> jax.Array:
    """Maximum over the square of 2·radius+1 pixels, as Pillow's `MaxFilter(2·radius+1)` of the cropped mask.

    `mask [..., H, W]` of any real dtype or bool -> the same; pixels outside `box [..., 4]` neither count nor remain.
    """
    return _morphology(mask, radius, box, largest=True)


def erode(mask: Array, radius: int, box: Array | None = None) -> jax.Array:
    """Minimum over the square of 2·radius+1 pixels, as Pillow's `MinFilter`; a border does not erode. See `dilate`."""
    return _morphology(mask, radius, box, largest=False)


def _extend(x: jax.Array, low, high, pad: int, axis: int) -> jax.Array:
    """`x` with `pad` more samples on either side of `axis`; samples outside [low, high) repeat the nearest inside."""
    # The two edge lines are broadcast and selected: a gather of the whole picture would be many times slower.
    first = lax.dynamic_slice_in_dim(x, low, 1, axis)
    last = lax.dynamic_slice_in_dim(x, high - 1, 1, axis)
    pads, shape = [(0, 0)] * x.ndim, [1] * x.ndim
    pads[axis], shape[axis] = (pad, pad), -1
    index = jnp.arange(-pad, x.shape[axis] + pad).reshape(shape)
    return jnp.where(index < low, first, jnp.where(index >= high, last, jnp.pad(x, pads)))


def gaussian_blur(x: Array, sigma: float, kernel_size: int | None = None, box: Array | None = None) -> jax.Array:
    """Convolution with a sampled, normalised Gaussian; the border of the box repeats outwards.

    `x [H, W]` -> `[H, W] float32`, 0 outside `box`. `sigma` in pixels; `kernel_size` odd, by default 2·ceil(3σ)+1.
    """
    kernel_size = kernel_size or 2 * math.ceil(3 * sigma) + 1
    if kernel_size % 2 == 0 or sigma <= 0:
        raise RefineError(f"kernel_size is {kernel_size}, sigma {sigma}: give an odd size and a positive sigma")
    half = kernel_size // 2
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    height, width = x.shape
    x1, y1, x2, y2 = _edges(box, height, width)
    x = jnp.asarray(x, jnp.float32)
    for axis, low, high in ((1, x1, x2), (0, y1, y2)):
        wide, n = _extend(x, low, high, half, axis), x.shape[axis]
        x = sum(float(w) * lax.slice_in_dim(wide, k, k + n, axis=axis) for k, w in enumerate(taps))
    return jnp.where(inside_box(box, height, width), x, 0.0)


def _extended_box_radius(sigma: float, passes: int) -> np.float32:
    """Radius l + a of the extended box filter whose `passes`-fold use has variance σ² (Gwosdek et al. 2011, eq. 7-14).

    In float32 like Pillow, so that the integer weights derived from it are the same.
    """
    f = np.float32
    variance = f(f(sigma) * f(sigma)) / f(passes)
    length = f(np.sqrt(12.0 * float(variance) + 1.0))
    whole = f(np.floor((float(length) - 1.0) / 2.0))
    part = (f(2) * whole + f(1)) * (whole * (whole + f(1)) - f(3) * variance)
    return whole + part / (f(6) * (variance - (whole + f(1)) * (whole + f(1))))


def pil_gaussian_blur(mask: Array, radius: float, box: Array | None = None, passes: int = 3) -> jax.Array:
    """What Pillow's `GaussianBlur(radius)` makes of an 8-bit image: extended box filters, rounded to 8 bits each.

    `mask [H, W] uint8` -> `[H, W] uint8`, 0 outside `box`; the border of the box repeats outwards. `radius` is the σ in
    pixels. Integer arithmetic throughout: the result is Pillow's own.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.uint8:
        raise RefineError(f"mask has dtype {mask.dtype}: give uint8")
    if radius <= 0:
        return jnp.where(inside_box(box, *mask.shape), mask, jnp.uint8(0))
    real = _extended_box_radius(radius, passes)
    r = int(real)
    # Fixed point with 24 fractional bits: 2r+1 equal weights, and the two ends share what is left of 1.
    equal = int(np.float32(1 << 24) / (real * np.float32(2) + np.float32(1)))
    end = ((1 << 24) - (2 * r + 1) * equal) // 2
    height, width = mask.shape
    x1, y1, x2, y2 = _edges(box, height, width)
    x = mask.astype(jnp.uint32)
    for axis, low, high in ((1, x1, x2), (0, y1, y2)):
        n = x.shape[axis]
        for _ in range(passes):
            wide = _extend(x, low, high, r + 1, axis)
            part = [lax.slice_in_dim(wide, k, k + n, axis=axis) for k in range(2 * r + 3)]
            x = (sum(part[1:-1]) * jnp.uint32(equal) + (part[0] + part[-1]) * jnp.uint32(end) + (1 << 23)) >> 24
    return jnp.where(inside_box(box, height, width), x, 0).astype(jnp.uint8)


# ---------------------------------------------------------------------------------------------------------- paste-back


def feather(
    mask: Array,
    box: Array | None = None,
    style: Style = "released",
    *,
    grow: int = 3,
    blur: float = 5.0,
    kernel_size: int = 11,
    sigma: float = 2.0,
) -> jax.Array:
    """The blending weight M̃ = Blur(Dilate(M_c; r), k) of the crop `box`, at the resolution of the image.

    `mask [H, W]` uint8 (0..255) or bool, `box [4]` -> `alpha [H, W] float32` in 0..1, 0 outside the box. Dilation is
    over 2·grow+1 = 7 pixels. "released": the released code's `GaussianBlur(blur)` on 8 bits, grey mask values kept.
    "paper": a Gaussian of `kernel_size` 11, not rounded; the paper gives no σ, so it is 2.0, what OpenCV and
    torchvision derive from that size (0.3·((k-1)/2 - 1) + 0.8). Both see the mask cropped to the box: its border
    repeats outwards, and a mask that touches it is not faded there.
    """
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        mask = jnp.where(mask, jnp.uint8(255), jnp.uint8(0))
    grown = dilate(mask, grow, box)
    if style == "released":
        return pil_gaussian_blur(grown, blur, box).astype(jnp.float32) / 255.0
    if style == "paper":
        return jnp.clip(gaussian_blur(grown.astype(jnp.float32) / 255.0, sigma, kernel_size, box), 0.0, 1.0)
    raise RefineError(f"style is {style!r}: give 'released' or 'paper'")


def blend(original: Array, refined: Array, alpha: Array) -> jax.Array:
    """floor(α·refined + (1-α)·original + 1/2), clipped to 0..255, and the original itself where α = 0.

    `original [H, W, C] uint8`, `refined [H, W, C]` in 0..255, `alpha [H, W]` in 0..1 -> `[H, W, C] uint8`. The
    background is selected, not computed: bit-identical on every device.
    """
    alpha = jnp.asarray(alpha)[..., None]
    mixed = jnp.asarray(refined, jnp.float32) * alpha + jnp.asarray(original, jnp.float32) * (1.0 - alpha)
    mixed = jnp.clip(jnp.floor(mixed + 0.5), 0.0, 255.0).astype(jnp.uint8)
    return jnp.where(alpha == 0.0, original, mixed)


def paste_back(
    original: Array, refined: Array, box: Array, mask: Array, style: Style = "released", **feather_options
) -> jax.Array:
    """out = M̃·refined + (1 - M̃)·original inside the crop `box`, the original elsewhere.

    `original [H, W, C] uint8` (canvas), `refined [h, w, C]` uint8 or float in 0..255 (rounded to 8 bits first),
    `box [4]`, `mask [H, W]` uint8 or bool -> `[H, W, C] uint8`. The refined crop is resized to the box with Pillow's
    bicubic. Every pixel whose weight is 0 and everything outside the box is bit-identical to `original`.
    """
    full = place(refined, box, original.shape[:2], "bicubic", quantize=True)
    return blend(original, full, feather(mask, box, style, **feather_options))
