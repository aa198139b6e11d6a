"""The pictures of a record in a crop, at the size of a bucket, on the host: what a device would see, bit for bit.

Resizing equals `focus.resample(..., "lanczos", quantize=True)`, so a model is trained on what it is shown by `refine`.
"""

import math

import numpy as np
from PIL import Image

from refine_jax.data.records import Record, open_picture
from refine_jax.errors import RefineError

Size = tuple[int, int]  # (height, width)
Box = tuple[int, int, int, int]

_LANCZOS = Image.Resampling.LANCZOS
_WINDOW = 0.7  # of the area: from there on the whole is resized as fast


def resize(image: Image.Image, size: Size) -> Image.Image:
    """`image` at `size` by Lanczos, columns first: left alone, Pillow begins with whichever pass is cheaper."""
    height, width = size
    return image.resize((width, image.height), _LANCZOS).resize((width, height), _LANCZOS)


def array(image: Image.Image) -> np.ndarray:
    """[h, w, 3] uint8 of an RGB or grey picture."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def image_and_target(record: Record, crop: Box, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """([h, w, 3] uint8, the same): image and target in `crop` (x1, y1, x2, y2), resized to `size`.

    Where the record holds only the part of the image that differs from the target, only that is resized again.
    """
    target = open_picture(record.target, record.size, "target").crop(crop)
    resized = resize(target, size)
    if record.image_box is None:
        image = open_picture(record.image, record.size, "image").crop(crop)
        return array(resize(image, size)), array(resized)
    x1, y1, x2, y2 = record.image_box
    patch = open_picture(record.image, (x2 - x1, y2 - y1), "image")
    if patch.mode != target.mode:
        target, resized, patch = (picture.convert("RGB") for picture in (target, resized, patch))
    whole = array(resized)
    columns = _span(x1 - crop[0], x2 - crop[0], target.width, size[1])
    rows = _span(y1 - crop[1], y2 - crop[1], target.height, size[0])
    target.paste(patch, (x1 - crop[0], y1 - crop[1]))
    if columns is None or rows is None:  # it differs outside the crop only
        return whole, whole
    (u1, u2), (v1, v2) = columns, rows
    if (u2 - u1) * (v2 - v1) > _WINDOW * size[0] * size[1]:
        return array(resize(target, size)), whole
    image = whole.copy()
    image[v1:v2, u1:u2] = array(_resized_window(target, size, columns, rows))
    return image, whole


def _span(low: int, high: int, length: int, count: int) -> tuple[int, int] | None:
    """The samples, of `count` from `length` pixels, that see any of the pixels low … high - 1; None where none does.

    Both ends lie where the position in pixels is a multiple of 1/32: Pillow takes it as a float32.
    """
    low, high = max(low, 0), min(high, length)
    if low >= high:
        return None
    step, unit = length / count, count // math.gcd(count, 32)
    reach = 3.0 * max(step, 1.0)
    first = math.floor((low - reach) / step - 0.5) // unit * unit
    last = -(-math.ceil((high + reach) / step + 0.5) // unit) * unit
    return max(0, first), min(count, last)


def _resized_window(image: Image.Image, size: Size, columns: tuple[int, int], rows: tuple[int, int]) -> Image.Image:
    """Rows and columns of `resize(image, size)`, to the bit, without the rest of it."""
    (x, wide, left, right), (y, high, top, bottom) = (
        _source(*span, length, count) for span, length, count in zip((columns, rows), image.size, size[::-1])
    )
    part = image.crop((left, top, right, bottom))
    part = part.resize((columns[1] - columns[0], part.height), _LANCZOS, box=(x, 0, x + wide, part.height))
    return part.resize((part.width, rows[1] - rows[0]), _LANCZOS, box=(0, y, part.width, y + high))


def _source(first: int, last: int, length: int, count: int) -> tuple[float, float, int, int]:
    """(start, extent, low, high) of samples first … last - 1: they see pixels low … high - 1; start counts from low."""
    step = length / count
    reach = math.ceil(3.0 * max(step, 1.0)) + 2
    low, high = max(0, math.floor(first * step) - reach), min(length, math.ceil(last * step) + reach)
    return first * length / count - low, (last - first) * length / count, low, high


def region(record: Record, crop: Box, size: Size) -> np.ndarray:
    """[h, w] uint8, 0 or 255: the region in `crop` at `size`, to the nearest pixel, never empty."""
    x1, y1, x2, y2 = record.box
    marked = open_picture(record.mask, (x2 - x1, y2 - y1), "mask")
    canvas = Image.new("L", (crop[2] - crop[0], crop[3] - crop[1]))
    canvas.paste(marked, (x1 - crop[0], y1 - crop[1]))
    mask = np.asarray(canvas.resize(size[::-1], Image.Resampling.NEAREST))
    if mask.any():
        return mask
    # A line thinner than the distance of two samples: every pixel that it crosses.
    rows, columns = np.nonzero(np.asarray(canvas))
    if not len(rows):
        raise RefineError("mask: nothing is marked")
    mask = np.zeros(size, np.uint8)
    mask[rows * size[0] // canvas.height, columns * size[1] // canvas.width] = 255
    return mask
