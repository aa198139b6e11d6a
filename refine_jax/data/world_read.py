"""The small world's eyes: from any picture's pixels to what it shows, without a network.

Shapes are connected pieces of colourful pixels, letters connected pieces of grey ink; each is compared with drawn
templates. A thing that resembles nothing of this world is read as None (a letter as "?").
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from refine_jax.data import world_scene
from refine_jax.data.world_spec import LETTERS, SHAPES
from refine_jax.errors import RefineError


class Seen(NamedTuple):
    """A shape in a picture; the centre (x, y) in fractions of width and height. None: like nothing of this world."""

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Observation:
    """What a picture shows. `text`: its letters ("?" an unreadable one, lines apart by a newline), "" without any."""

    items: tuple[Seen, ...]
    text: str = ""
    text_y: float | None = None


# ---------------------------------------------------------------------------------------------- pieces of a picture

_SIDE = 64  # pictures are read at this scale
_PATCH = 18  # a piece is compared in this many pixels square


def _pieces(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """(labels [h, w] int32: 0 outside, 1..n, their number n) of the 8-connected pieces of a mask, by runs of rows."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    edges = np.diff(padded, axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above, first, last = range(0, 0), 0, -2
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist()))
    for i, (row, start, end) in enumerate(runs):
        if row != last:
            above = range(first, i) if row == last + 1 else range(i, i)
            first, last = i, row
        for j in above:
            if runs[j][1] <= end and start <= runs[j][2]:
                a, b = root(i), root(j)
                parent[max(a, b)] = min(a, b)
    labels = np.zeros(mask.shape, np.int32)
    numbers: dict[int, int] = {}
    for i, (row, start, end) in enumerate(runs):
        labels[row, start:end] = numbers.setdefault(root(i), len(numbers) + 1)
    return labels, len(numbers)


def _widen(mask: np.ndarray, by: int = 1) -> np.ndarray:
    """The mask and all pixels at most `by` rows and columns away."""
    for axis in (0, 1):
        grown = mask.copy()
        for step in range(1, by + 1):
            to, source = [slice(None)] * 2, [slice(None)] * 2
            to[axis], source[axis] = slice(step, None), slice(None, -step)
            grown[tuple(to)] |= mask[tuple(source)]
            grown[tuple(source)] |= mask[tuple(to)]
        mask = grown
    return mask


def _moments(alpha: np.ndarray) -> tuple[float, float, float, float]:
    """(area, centre x, centre y, root mean square distance from it) of a coverage [h, w], in pixels."""
    area = float(alpha.sum()) + 1e-9
    column, row = alpha.sum(0), alpha.sum(1)
    at_x, at_y = np.arange(len(column)) + 0.5, np.arange(len(row)) + 0.5
    x, y = float(column @ at_x) / area, float(row @ at_y) / area
    spread = float(column @ (at_x - x) ** 2 + row @ (at_y - y) ** 2) / area
    return area, x, y, math.sqrt(max(spread, 1e-6))


def _normal(alpha: np.ndarray, x: float, y: float, half_x: float, half_y: float, width: int, height: int) -> np.ndarray:
    """[height · width] float32: a window of a coverage around (x, y), resampled, of zero mean and unit length."""
    size = (alpha.shape[1] + 8, alpha.shape[0] + 8)
    canvas = np.zeros(size[::-1], np.float32)
    canvas[4:-4, 4:-4] = alpha
    box = (x - half_x + 4, y - half_y + 4, x + half_x + 4, y + half_y + 4)
    # transform samples outside the canvas as zeros, which is right: nothing of the piece is there.
    scale_x, scale_y = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    patch = Image.fromarray(canvas).transform(
        (width, height),
        Image.Transform.AFFINE,
        (scale_x, 0.0, box[0], 0.0, scale_y, box[1]),
        Image.Resampling.BILINEAR,
    )
    values = np.asarray(patch, np.float32).ravel()
    values = values - values.mean()
    return values / (math.sqrt(float(values @ values)) + 1e-6)


def _shape_patch(alpha: np.ndarray) -> np.ndarray:
    _, x, y, spread = _moments(alpha)
    half = 2.35 * spread
    return _normal(alpha, x, y, half, half, _PATCH, _PATCH)


@functools.cache
def _shape_templates() -> tuple[np.ndarray, tuple[str, ...]]:
    """Patches [n, _PATCH²] of every shape, small and large, turned, off the pixel grid and softened; their names."""
    patches, names = [], []
    for shape in SHAPES:
        for radius in (4.7, 5.2, 8.7, 15.0):
            for turn in (-0.1, 0.0, 0.1):
                for off in (0.0, 0.25, 0.5):
                    for soft in (False, True):
                        alpha = np.pad(world_scene.cover(shape, 20.0 + off, 20.0 + 0.7 * off, radius, turn)[0], 2)
                        patches.append(_shape_patch(_soften(alpha) if soft else alpha))
                        names.append(shape)
    return np.stack(patches), tuple(names)


def _soften(alpha: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        alpha = 0.25 * np.roll(alpha, 1, axis) + 0.5 * alpha + 0.25 * np.roll(alpha, -1, axis)
    return alpha


@functools.cache
def _unit_areas() -> dict[str, float]:
    """Area of each shape of radius 1."""
    return {shape: float(world_scene.cover(shape, 30.0, 30.0, 20.0, 0.0)[0].sum()) / 400.0 for shape in SHAPES}


# Hue in degrees from..to of each colour's name; what lies between is no colour of this world.
_HUES = {
    "red": (338.0, 373.0),
    "orange": (13.0, 39.5),
    "yellow": (39.5, 75.0),
    "green": (90.0, 170.0),
    "blue": (195.0, 249.0),
    "purple": (256.0, 315.0),
}
_BIG = math.sqrt(world_scene.RADII["small"][1] * world_scene.RADII["large"][0])


def _colour(rgb: np.ndarray) -> str | None:
    red, green, blue = (float(v) for v in rgb)
    high, low = max(rgb), min(rgb)
    if high - low < 0.25 * high:
        return None
    if high == red:
        sector = (green - blue) / (high - low) % 6.0
    else:
        sector = 2.0 + (blue - red) / (high - low) if high == green else 4.0 + (red - green) / (high - low)
    hue = 60.0 * float(sector)
    return next((name for name, (a, b) in _HUES.items() if a <= hue < b or a <= hue + 360.0 < b), None)


# ---------------------------------------------------------------------------------------------- reading


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """[..., 2]: red against green, yellow against blue; zero for every grey."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([red - green, 0.5 * (red + green) - blue], -1)


_COLOURFUL = 46.0  # chroma at which a pixel is no background; backgrounds stay below 30, full colours above 110
_LEAST = 12.0  # pixels of area: the smallest shape has 36


# Lightness, sharper in a compressed picture than colour, counts more in telling a shape from the background.
_LIGHT = np.array([0.299, 0.587, 0.114], np.float32)
_OPPONENT = np.stack([2.0 * _LIGHT, np.array([1.0, -1.0, 0.0]), np.array([0.5, 0.5, -1.0])], 1).astype(np.float32)


def _read_shapes(rgb: np.ndarray, chroma: np.ndarray, mask: np.ndarray) -> list[Seen]:
    height, width = mask.shape
    labels, number = _pieces(mask)
    found: list[tuple[np.ndarray, tuple[int, int], np.ndarray]] = []
    strength = np.hypot(chroma[..., 0], chroma[..., 1])
    for label in range(1, number + 1):
        inside = labels == label
        count = int(inside.sum())
        if count < _LEAST:
            continue
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        y1, y2 = max(0, rows[0] - 2), min(height, rows[-1] + 3)
        x1, x2 = max(0, columns[0] - 2), min(width, columns[-1] + 3)
        window = np.s_[y1:y2, x1:x2]
        inside, colours = inside[window], rgb[window]
        strengths = strength[window]
        # The full colour: the stronger half, edges being mixed with the background.
        core = inside & (strengths >= np.median(strengths[inside]))
        colour = np.median(colours[core], axis=0)
        outside = rgb[window][~_widen(inside)]
        ground = np.median(outside, axis=0) if len(outside) else 255.0 - colour
        full = (colour - ground) @ _OPPONENT
        alpha = np.clip((colours - ground) @ _OPPONENT @ full / (float(full @ full) + 1e-6), 0.0, 1.0)
        # Pixels of other pieces are not this one's edge.
        alpha[(labels[window] != label) & _widen((labels[window] > 0) & ~inside)] = 0.0
        alpha[~_widen(inside) | (alpha < 0.12)] = 0.0
        found.append((alpha.astype(np.float32), (x1, y1), colour))
    templates, names = _shape_templates()
    seen = []
    for alpha, (left, top), colour in found:
        area, x, y, _ = _moments(alpha)
        if area < _LEAST:
            continue
        likeness = templates @ _shape_patch(alpha)
        best = int(np.argmax(likeness))
        shape = names[best] if likeness[best] >= _LIKE_SHAPE else None
        radius = math.sqrt(area / _unit_areas()[names[best]] / (height * width))
        size = "large" if radius >= _BIG else "small"
        seen.append(Seen(shape, _colour(colour), size, float(left + x) / width, float(top + y) / height))
    return seen


# Drawn ones reach 0.96 even blurred or compressed, other shapes (a square on its corner, half a disc) 0.95 at most.
_LIKE_SHAPE = 0.95
# Drawn ones reach 0.92 even blurred or compressed, letters that are not of LETTERS 0.85 (D: 0.93).
_LIKE_LETTER = 0.88
_LETTER = (10, 14)  # columns, rows in which a letter is compared


@functools.cache
def _letter_templates() -> tuple[np.ndarray, str]:
    patches, names = [], []
    for letter in LETTERS:
        dots = world_scene.bitmap(letter)
        for cell in (2.0, 2.3):
            for off in (0.0, 0.5):
                side = 24
                ink = world_scene.overlap(4 + off, cell, 7, side) @ dots @ world_scene.overlap(4 + off, cell, 5, side).T
                for soft in (False, True):
                    patches.append(_letter_patch(_soften(ink) if soft else ink))
                    names.append(letter)
    return np.stack(patches), "".join(names)


def _span(profile: np.ndarray) -> tuple[float, float]:
    """From where to where a profile of ink goes, to a fraction of a pixel."""
    level = 0.5 * float(profile.max())
    over = np.flatnonzero(profile >= level)
    first, last = int(over[0]), int(over[-1])
    before = float(profile[first - 1]) if first else 0.0
    after = float(profile[last + 1]) if last + 1 < len(profile) else 0.0
    # Pixels with the whole ink begin at `first` + 1 at the latest; the part before is covered in proportion.
    return first - min(1.0, before / (2 * level)), last + 1 + min(1.0, after / (2 * level))


def _letter_patch(ink: np.ndarray) -> np.ndarray:
    (x1, x2), (y1, y2) = _span(ink.max(0)), _span(ink.max(1))
    return _normal(ink.astype(np.float32), (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2 + 1, (y2 - y1) / 2 + 1, *_LETTER)


def _read_text(light: np.ndarray, ground: float, neutral: np.ndarray) -> tuple[str, float | None]:
    """(text, its centre's y in fractions of the height, None without any) of ink against a lighter or darker ground."""
    height, _ = light.shape
    contrast = np.where(neutral, ground - light if ground > 128 else light - ground, 0.0)
    strongest = np.sort(contrast[contrast > 50.0])
    if len(strongest) < _LEAST:
        return "", None
    full = float(strongest[int(0.8 * len(strongest))])
    ink = np.clip(contrast / full, 0.0, 1.0)
    labels, number = _pieces(ink > 0.42)
    boxes = []
    for label in range(1, number + 1):
        ys, xs = np.nonzero(labels == label)
        if len(ys) >= 3:
            boxes.append([int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1, len(ys)])
    boxes = _joined(boxes)
    lines: list[list[list[int]]] = []
    for box in sorted(boxes, key=lambda b: b[1] - b[3]):  # the tallest first: it tells the line's extent
        middle = (box[1] + box[3]) / 2
        line = next((line for line in lines if line[0][1] - 1 <= middle <= line[0][3] + 1), None)
        if line is None:
            lines.append(line := [])
        line.append(box)
    words, centres = [], []
    for line in sorted(lines, key=lambda line: line[0][1]):
        y1, y2 = min(box[1] for box in line), max(box[3] for box in line)
        tall = y2 - y1
        if tall < 0.1 * height or sum(box[4] for box in line) < _LEAST:
            continue  # a speck
        words.append(_read_line(ink, labels, line, y1, y2))
        centres.append((y1 + y2) / 2 / height)
    return "\n".join(words), sum(centres) / len(centres) if centres else None


def _joined(boxes: list[list[int]]) -> list[list[int]]:
    """Boxes (x1, y1, x2, y2, ink) of which those that nearly touch one above the other are made one."""
    result: list[list[int]] = []
    for box in boxes:
        while True:
            near = next((b for b in result if _stacked(b, box)), None)
            if near is None:
                break
            result.remove(near)
            low, high = map(min, near[:2], box[:2]), map(max, near[2:4], box[2:4])
            box = [*low, *high, near[4] + box[4]]
        result.append(box)
    return result


def _stacked(a: list[int], b: list[int]) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) >= 0 and max(a[1], b[1]) - min(a[3], b[3]) <= 2


def _read_line(ink: np.ndarray, labels: np.ndarray, line: list, y1: int, y2: int) -> str:
    templates, names = _letter_templates()
    cell = (y2 - y1) / 7
    spans: list[list[int]] = []
    for x1, _, x2, _, _ in sorted(line):
        # Pieces of one letter lie over each other or within its 5 cells; with the next letter it would be 7 at least.
        if spans and (x1 < spans[-1][1] or x2 - spans[-1][0] <= 6.2 * cell):
            spans[-1][1] = max(x2, spans[-1][1])
        else:
            spans.append([x1, x2])
    text = ""
    for x1, x2 in spans:
        pieces = max(1, round((x2 - x1 + cell) / (6 * cell)))
        width = (x2 - x1 + cell) / pieces
        for k in range(pieces):
            left, right = x1 + k * width, x1 + (k + 1) * width - cell
            a, b = max(0, round(left) - 1), round(right) + 1
            window = ink[max(0, y1 - 1) : y2 + 1, a:b]
            if window.max() < 0.5:
                text += "?"
                continue
            likeness = templates @ _letter_patch(window)
            best = int(np.argmax(likeness))
            text += names[best] if likeness[best] >= _LIKE_LETTER else "?"
    return text


def read(image: np.ndarray) -> Observation:
    """What a picture [H, W, 3] uint8 shows; it need not be a clean one. Raises RefineError for another form."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise RefineError(f"image: got {image.shape} {image.dtype}, expected [height, width, 3] uint8")
    height, width = image.shape[:2]
    scale = _SIDE / math.sqrt(height * width)
    if not 0.95 < scale < 1.05:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    rgb = image.astype(np.float32)
    chroma = _chroma(rgb)
    edge = np.concatenate([chroma[:2].reshape(-1, 2), chroma[-2:].reshape(-1, 2), chroma[:, :2].reshape(-1, 2)])
    ground = np.median(np.concatenate([edge, chroma[:, -2:].reshape(-1, 2)]), axis=0)
    far = np.hypot(*np.moveaxis(chroma - ground, -1, 0)) > _COLOURFUL
    if not far.all():
        ground = np.median(chroma[~far], axis=0)
    # Not far from the background alone: grey ink on a tinted background is.
    away = _soften(chroma - ground)
    mask = (np.hypot(away[..., 0], away[..., 1]) > _COLOURFUL) & (
        np.hypot(*np.moveaxis(chroma, -1, 0)) > 0.8 * _COLOURFUL
    )
    items = _read_shapes(rgb, chroma, mask)
    neutral = ~_widen(mask, 2)
    light = rgb @ _LIGHT
    text, text_y = ("", None) if not neutral.any() else _read_text(light, float(np.median(light[neutral])), neutral)
    return Observation(tuple(items), text, text_y)
