"""The small world: scenes of shapes and letters on a background, their arrangement, and the renderer.

Lengths and positions in a scene are fractions of the picture's side, x to the right, y down.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from refine_jax.data.world_spec import LETTERS, SHAPES, Rng, pick
from refine_jax.errors import RefineError

# Hue in degrees, saturation, value of each of COLOURS as drawn.
TINTS = {
    "red": (357.0, 0.84, 0.87),
    "orange": (27.0, 0.89, 0.95),
    "yellow": (51.0, 0.84, 0.95),
    "green": (136.0, 0.70, 0.66),
    "blue": (220.0, 0.80, 0.88),
    "purple": (279.0, 0.65, 0.75),
}
# Smallest and largest radius of each of SIZES.
RADII = {"small": (0.072, 0.082), "large": (0.125, 0.145)}
# Block letters, each in one piece.
GLYPHS = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "E": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "H": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "U": ("#...#", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "X": ("#...#", "#...#", ".#.#.", "..#..", ".#.#.", "#...#", "#...#"),
    "Z": ("#####", "....#", "...#.", "..#..", ".#...", "#....", "#####"),
}


@dataclass(frozen=True)
class Item:
    """One shape: its centre (x, y) and radius in fractions of the side, its angle in radians, the group it is of."""

    shape: str
    colour: str
    size: str
    group: int = 0
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A whole picture. `text` "" for none; (text_x, text_y) its upper left corner, `cell` the side of a letter's dot.

    `seed` decides the background, the tints and the grain.
    """

    items: tuple[Item, ...]
    text: str = ""
    text_place: str = "top"
    text_x: float = 0.0
    text_y: float = 0.0
    cell: float = 0.0
    seed: int = 0


# ---------------------------------------------------------------------------------------------- where things are

# Shapes' centres and the letters' left edge lie on multiples of 1/16 of the side, so that a tiny network can learn to
# draw them: a shape then lies in few ways across the cells of the latents.
_LATTICE = 16
_CELL = 1 / 32  # side of a letter's dot
_EDGE = 1 / 16  # between letters and the border
_MARGIN = 0.025  # between a shape and the border
_GAP = 0.045  # between two shapes
_AROUND_TEXT = 0.02  # besides _MARGIN, between a shape and letters
_HALVES = {"left": (0, 0.0, 0.43), "right": (0, 0.57, 1.0), "top": (1, 0.0, 0.43), "bottom": (1, 0.57, 1.0)}


def _limits(place: str | None) -> list[list[float]]:
    """[[x low, x high], [y low, y high]] of the centres of shapes at a place."""
    if place == "centre":
        return [[0.43, 0.57], [0.43, 0.57]]
    limits = [[0.0, 1.0], [0.0, 1.0]]
    for word in (place or "").split():
        axis, low, high = _HALVES[word]
        limits[axis] = [low, high]
    return limits


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether two squares (x, y, half the side with _MARGIN) leave the gap of two shapes."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= a[2] + b[2] + _GAP - 2 * _MARGIN


def _on_lattice(rng: Rng, low: float, high: float) -> float | None:
    """A multiple of 1/_LATTICE from low to high; None where there is none."""
    first, last = math.ceil(low * _LATTICE - 1e-9), math.floor(high * _LATTICE + 1e-9)
    return (first + int(rng.random() * (last - first + 1))) / _LATTICE if first <= last else None


def arrange(
    rng: Rng,
    items: tuple[Item, ...],
    place: str | None = None,
    relation: str | None = None,
    text: str = "",
    text_place: str | None = None,
) -> Scene | None:
    """Items (their looks only) at random places of the lattice, none closer to another than a gap; None when they found
    no room."""
    low, high = 0.0, 1.0
    text_place = text_place or pick(rng, ("top", "bottom"))
    corner = (0.0, 0.0, 0.0)
    if text:
        width, height = (6 * len(text) - 1) * _CELL, 7 * _CELL
        x = _on_lattice(rng, _EDGE, 1.0 - _EDGE - width)
        corner = (x, _EDGE if text_place == "top" else 1.0 - _EDGE - height, _CELL)
        end = _EDGE + height + _AROUND_TEXT
        low, high = (end, 1.0) if text_place == "top" else (0.0, 1.0 - end)
    split = rng.uniform(0.35, 0.65)
    placed, boxes = [], []
    for item in items:
        radius, angle = rng.uniform(*RADII[item.size]), rng.uniform(-0.12, 0.12)
        reach = radius * _REACH[item.shape] + _MARGIN
        limits = _limits(place)
        if relation:
            axis = 0 if relation in ("left", "right") else 1
            first = (relation in ("left", "above")) == (item.group == 0)
            at = split if axis == 0 else low + split * (high - low)
            limits[axis] = [0.0, at] if first else [at, 1.0]
        (x1, x2), (y1, y2) = limits
        x1, x2, y1, y2 = max(x1, reach), min(x2, 1.0 - reach), max(y1, low + reach), min(y2, high - reach)
        for _ in range(24):
            x, y = _on_lattice(rng, x1, x2), _on_lattice(rng, y1, y2)
            if x is None or y is None:
                return None
            if all(_apart((x, y, reach), box) for box in boxes):
                break
        else:
            return None
        boxes.append((x, y, reach))
        placed.append(Item(item.shape, item.colour, item.size, item.group, x, y, radius, angle))
    return Scene(tuple(placed), text, text_place, *corner, seed=int(rng.integers(2**31)))


def fits(scene: Scene) -> bool:
    """Nothing touches another thing or the border: what `arrange` promises, for a scene changed since."""
    low, high = 0.0, 1.0
    if scene.text:
        end = scene.text_y + 7 * scene.cell + _AROUND_TEXT
        low, high = (end, 1.0) if scene.text_place == "top" else (0.0, scene.text_y - _AROUND_TEXT)
        if scene.text_x + (6 * len(scene.text) - 1) * scene.cell > 0.96:
            return False
    boxes = [(item.x, item.y, item.radius * _REACH[item.shape] + _MARGIN) for item in scene.items]
    inside = all(r <= x <= 1.0 - r and low + r <= y <= high - r for x, y, r in boxes)
    return inside and all(_apart(a, b) for a, b in itertools.combinations(boxes, 2))


# ---------------------------------------------------------------------------------------------- the renderer


def _circle(radius: float, sides: int = 40) -> np.ndarray:
    angles = np.arange(sides) * (2 * math.pi / sides)
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.arange(48) * (2 * math.pi / 48)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, y], 1) / 14.5


def _spikes(points: int, outer: float, inner: float) -> np.ndarray:
    angles = np.arange(2 * points) * (math.pi / points) - math.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, outer)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _centred(outline: np.ndarray) -> np.ndarray:
    """The outline moved so that its centre of area is the origin."""
    after = np.roll(outline, -1, 0)
    pieces = outline[:, 0] * after[:, 1] - after[:, 0] * outline[:, 1]
    return outline - (pieces @ (outline + after)) / (3.0 * pieces.sum())


_a, _w = 1.1, 0.36  # reach and half width of the cross's arms
# Outlines around the centre of area for radius 1, y down.
_DRAWN = {
    "circle": _circle(1.0),
    "square": 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float),
    "triangle": 1.25 * np.array([(0, -1.0), (math.sqrt(0.75), 0.5), (-math.sqrt(0.75), 0.5)]),
    "star": _spikes(5, 1.25, 0.5),
    "cross": np.array(
        [(-_w, -_a), (_w, -_a), (_w, -_w), (_a, -_w), (_a, _w), (_w, _w), (_w, _a), (-_w, _a), (-_w, _w), (-_a, _w)]
        + [(-_a, -_w), (-_w, -_w)]
    ),
    "ring": _circle(1.05),
    "heart": _heart(),
}
OUTLINES = {name: _centred(outline) for name, outline in _DRAWN.items()}
_HOLE = _circle(0.52)
_REACH = {name: 1.02 * float(np.abs(outline).max()) for name, outline in OUTLINES.items()}
_FINE = 6  # subdivisions of a pixel per axis


def cover(shape: str, x: float, y: float, radius: float, angle: float) -> tuple[np.ndarray, int, int]:
    """Coverage [h, w] float32 in 0..1 of a shape whose centre is (x, y) pixels, and the window's left and top pixel."""
    reach = 1.35 * radius + 1.0
    left, top = math.floor(x - reach), math.floor(y - reach)
    side = math.ceil(2 * reach) + 1
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    layer = Image.new("L", (side * _FINE, side * _FINE))
    draw = ImageDraw.Draw(layer)
    for outline, ink in ((OUTLINES[shape], 255), (_HOLE, 0)):
        if ink or shape == "ring":
            points = (outline @ turn * radius + (x - left, y - top)) * _FINE - 0.5
            draw.polygon(points.ravel().tolist(), fill=ink)
    return np.asarray(layer.reduce(_FINE), np.float32) / 255.0, left, top


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """[3] float32 in 0..255 of a hue in degrees, saturation and value in 0..1."""
    parts = (min(k, 4.0 - k) for k in ((shift + hue / 60.0) % 6.0 for shift in (5.0, 3.0, 1.0)))
    return np.array([255.0 * value * (1.0 - saturation * min(1.0, max(0.0, k))) for k in parts], np.float32)


def _background(rng: Rng, side: int) -> tuple[np.ndarray, bool]:
    """[side, side, 3] float32 in 0..255: pale or dark, nearly grey, with a gradient or a faint pattern; is it pale?"""
    pale = rng.random() < 0.7
    hue = rng.uniform(0.0, 360.0)
    if pale:
        base = _rgb(hue, rng.uniform(0.0, 0.11), rng.uniform(0.86, 1.0))
    else:
        base = _rgb(hue, rng.uniform(0.0, 0.35), rng.uniform(0.1, 0.2))
    kind, axis = int(rng.integers(6)), rng.uniform(0.0, math.pi)
    at = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    x, y = at[None, :], at[:, None]
    along = x * math.cos(axis) + y * math.sin(axis)
    strength = rng.uniform(8.0, 26.0) if kind in (1, 2) else rng.uniform(5.0, 11.0)
    waves = rng.uniform(18.0, 42.0)
    if kind == 0:
        pattern = np.zeros((side, side), np.float32)
    elif kind == 1:
        pattern = along
    elif kind == 2:  # a vignette, or a glow
        pattern = (0.5 - 2.0 * (x * x + y * y)) * (1.0 if pale else -1.0)
    elif kind == 3:
        pattern = 0.5 * np.clip(3.0 * np.sin(waves * along), -1.0, 1.0)
    elif kind == 4:
        pattern = 0.5 * np.clip(4.0 * np.sin(0.7 * waves * x) * np.sin(0.7 * waves * y), -1.0, 1.0)
    else:  # soft clouds
        coarse = Image.fromarray(rng.random((4, 4), np.float32) - np.float32(0.5))
        pattern = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) * 1.6
    tint = 1.0 + rng.uniform(-0.15, 0.15, 3).astype(np.float32)
    return base + (strength * pattern)[..., None] * tint, pale


def overlap(start: float, cell: float, cells: int, pixels: int) -> np.ndarray:
    """[pixels, cells] float64: the share of each pixel covered by each cell of a row that starts at `start` pixels."""
    low = start + cell * np.arange(cells)
    edge = np.arange(pixels)[:, None]
    return np.maximum(np.minimum(low + cell, edge + 1.0) - np.maximum(low, edge), 0.0)


@functools.lru_cache(maxsize=4096)
def bitmap(text: str) -> np.ndarray:
    """[7, 6 n - 1] float64, 0 or 1: the dots of n letters, one empty column between two. Shared: do not modify."""
    rows = (".".join(GLYPHS[letter][row] for letter in text) for row in range(7))
    return np.array([[dot == "#" for dot in row] for row in rows], np.float64)


LABELS = 1 + len(SHAPES) + len(LETTERS)  # background, SHAPES, LETTERS


def labels(scene: Scene, cells: int = 16) -> np.ndarray:
    """What share (of 255) of each cell of the picture is background, each shape, each letter.

    [cells, cells, LABELS] uint8. A letter counts with the whole box of its dots; the hole of a ring is background.
    """
    fine = 4  # subdivisions of a cell per axis
    side = fine * cells
    shares = np.zeros((cells, cells, LABELS), np.float32)
    for item in scene.items:
        alpha, left, top = cover(item.shape, item.x * side, item.y * side, item.radius * side, item.angle)
        plane = np.zeros((side, side), np.float32)
        x1, y1 = max(0, left), max(0, top)
        x2, y2 = min(side, left + alpha.shape[1]), min(side, top + alpha.shape[0])
        plane[y1:y2, x1:x2] = alpha[y1 - top : y2 - top, x1 - left : x2 - left]
        shares[..., 1 + SHAPES.index(item.shape)] += plane.reshape(cells, fine, cells, fine).mean((1, 3))
    dot = scene.cell * cells
    for number, letter in enumerate(scene.text):
        down = overlap(scene.text_y * cells, 7 * dot, 1, cells)
        across = overlap(scene.text_x * cells + 6 * dot * number, 5 * dot, 1, cells)
        shares[..., 1 + len(SHAPES) + LETTERS.index(letter)] += (down @ across.T).astype(np.float32)
    shares[..., 0] = np.maximum(0.0, 1.0 - shares.sum(-1))
    return (np.minimum(shares, 1.0) * 255.0 + 0.5).astype(np.uint8)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """[size, size, 3] uint8, antialiased. Deterministic: the same scene gives the same picture."""
    if size < 16:
        raise RefineError(f"size: got {size}, expected at least 16 pixels")
    rng = np.random.Generator(np.random.PCG64(scene.seed))
    picture, pale = _background(rng, size)
    for item in scene.items:
        hue, saturation, value = TINTS[item.colour]
        jitter = rng.uniform(-1.0, 1.0, 5).tolist()
        tint = _rgb(
            hue + 4.0 * jitter[0], min(1.0, saturation + 0.08 * jitter[1]), min(1.0, value * (1 + 0.07 * jitter[2]))
        )
        alpha, left, top = cover(item.shape, item.x * size, item.y * size, item.radius * size, item.angle)
        # A little light from one side.
        at = np.arange(len(alpha), dtype=np.float32) * (0.16 / len(alpha)) - 0.08
        light = 1.0 + (jitter[3] * at[None, :] + jitter[4] * at[:, None])[..., None]
        x1, y1 = max(0, left), max(0, top)
        x2, y2 = min(size, left + alpha.shape[1]), min(size, top + alpha.shape[0])
        window = np.s_[y1 - top : y2 - top, x1 - left : x2 - left]
        below = picture[y1:y2, x1:x2]
        below += alpha[window][..., None] * (tint * light[window] - below)
    if scene.text:
        dots, cell = bitmap(scene.text), scene.cell * size
        first, last = max(0, math.floor(scene.text_y * size)), math.ceil(scene.text_y * size + 7 * cell)
        ink = overlap(scene.text_y * size - first, cell, 7, min(last, size) - first) @ dots
        ink = (ink @ overlap(scene.text_x * size, cell, dots.shape[1], size).T).astype(np.float32)[..., None]
        tint = rng.uniform(15.0, 45.0) if pale else rng.uniform(225.0, 250.0)
        colour = (tint + rng.uniform(-6.0, 6.0, 3)).astype(np.float32)
        lines = picture[first:last]
        lines += ink * (colour - lines)
    grain = rng.uniform(0.0, 2.5)
    if grain > 0.8:
        picture += np.float32(grain) * rng.standard_normal(picture.shape, np.float32)
    picture += 0.5
    return np.clip(picture, 0.0, 255.5, out=picture).astype(np.uint8)
