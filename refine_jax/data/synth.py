"""Procedural pairs: a word or a logo set into a photograph, and the same picture damaged inside a scribble.

`sample` is one training pair, made directly as the focus crop (box of the mask plus a margin, RefineAnything's
Focus-and-Refine, stage 1) and resized to a bucket. `scene` is a whole photograph with several damaged regions, for
evaluating the path that locates, crops and pastes back. Both are pure functions of their arguments: bit-identical
wherever the same versions of Pillow, numpy and the asset packages are installed.
"""

import functools
import io
import math
import string
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from refine_jax.data import assets
from refine_jax.data.degrade import DEGRADATIONS, degrade
from refine_jax.errors import RefineError

Rng = np.random.Generator
Size = tuple[int, int]  # (height, width)
Colour = tuple[int, int, int]

# Bucket (height, width) -> the aspects (width / height) of focus crops that round to it at an area of 64².
BUCKETS: dict[Size, tuple[float, float]] = {(32, 96): (1.78, 3.06), (32, 128): (3.06, 5.06), (64, 64): (0.64, 1.56)}
_LETTERS = {(32, 96): (3, 6), (32, 128): (5, 9), (64, 64): (2, 3)}
_LOGO_SHARE = {(32, 96): 0.05, (32, 128): 0.0, (64, 64): 0.55}
_SALT = {"train": 0, "eval": 1}
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Content:
    """What is drawn: lines of text in a face, or a logo (`logo` set, `lines` its title)."""

    lines: tuple[str, ...]
    face: assets.Face | None = None
    logo: assets.Logo | None = None

    @property
    def word(self) -> str:
        return " ".join(self.lines)


@dataclass(frozen=True)
class Layout:
    """Where it is drawn in a native crop: all lengths in pixels of that crop."""

    size: Size  # native (height, width) of the focus crop
    quad: np.ndarray  # [4, 2] float64: where the ink's corners go, clockwise from the top left
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 of the mask, half-open
    letter: float  # height of one line of letters


@dataclass(frozen=True)
class Style:
    """How it is drawn: colours in 0..255, lengths in letters."""

    fill: Colour
    fill_end: Colour  # differs from `fill` for a gradient
    opacity: int
    outline: Colour | None
    outline_width: float
    shadow: tuple[float, float, float] | None  # dx, dy, blur
    plate: Colour | None
    plate_grow: float
    plate_opacity: int


# ---------------------------------------------------------------------------------------------- what to draw


@functools.cache
def _by_length(split: str) -> dict[int, tuple[str, ...]]:
    words = assets.words(split)
    return {n: tuple(word for word in words if len(word) == n) for n in range(2, 10)}


def _letters(rng: Rng, alphabet: str, count: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), count))


def _number(rng: Rng, count: int) -> str:
    kind = rng.integers(5)
    digits = _letters(rng, string.digits, count)
    if kind == 0 and count >= 4:
        return f"${digits[:-3]}.{digits[-2:]}"
    if kind == 1 and count >= 3:
        return f"{digits[:-1]}%"
    if kind == 2 and count >= 4:
        return f"{rng.integers(24)}:{rng.integers(60):02d}"
    if kind == 3:
        half = max(1, count // 2)
        return _letters(rng, string.ascii_uppercase, half) + digits[half:]
    return digits


def _syllables(rng: Rng, count: int) -> str:
    vowels, consonants = "aeiou", "bcdfghjklmnprstvwz"
    first = rng.integers(2)
    return "".join(_letters(rng, vowels if (i + first) % 2 else consonants, 1) for i in range(count))


def _word(rng: Rng, split: str, shortest: int, longest: int) -> str:
    count = int(rng.integers(shortest, longest + 1))
    kind = rng.random()
    if kind < 0.62:
        words = _by_length(split)[count]
        return words[rng.integers(len(words))]
    if kind < 0.77:
        return _syllables(rng, count)
    if kind < 0.87:
        return _letters(rng, string.ascii_lowercase, count)
    return _number(rng, count)


@functools.cache
def _families(split: str) -> tuple[tuple[tuple[assets.Face, ...], ...], np.ndarray]:
    families: dict[str, list[assets.Face]] = {}
    for face in assets.faces(split):
        families.setdefault(face.family, []).append(face)
    # Between uniform over families (too much of the single-face ones) and uniform over faces.
    share = np.sqrt([len(faces) for faces in families.values()])
    return tuple(map(tuple, families.values())), share / share.sum()


def _text(rng: Rng, split: str, bucket: Size) -> Content:
    families, share = _families(split)
    family = families[rng.choice(len(families), p=share)]
    face = family[rng.integers(len(family))]
    shortest, longest = _LETTERS.get(bucket, (3, 6))
    if bucket[0] == bucket[1] and rng.random() < 0.6:
        lines = tuple(_word(rng, split, 3, 6) for _ in range(rng.integers(2, 4)))
    else:
        lines = (_word(rng, split, shortest, longest),)
    case = rng.random()
    if case < 0.5 or face.family == "font-amatic-sc":  # its lower case is drawn as capitals
        lines = tuple(line.upper() for line in lines)
    elif case < 0.8:
        lines = tuple(line.capitalize() for line in lines)
    return Content(lines, face=face)


def _content(rng: Rng, split: str, bucket: Size) -> Content:
    if rng.random() >= _LOGO_SHARE.get(bucket, 0.2):
        return _text(rng, split, bucket)
    logos = assets.logos(split)
    logo = logos[rng.integers(len(logos))]
    return Content((logo.title,), logo=logo)


def _other(rng: Rng, split: str, content: Content) -> Content:
    """The same thing with wrong glyphs: letters replaced or shuffled, or another logo."""
    if content.logo:
        logos = assets.logos(split)
        return replace(content, logo=logos[rng.integers(len(logos))])

    def garble(line: str) -> str:
        letters = list(line)
        if len(letters) > 3 and rng.random() < 0.25:
            letters = [letters[i] for i in rng.permutation(len(letters))]
        keep = rng.uniform(0.0, 0.6)
        for i, letter in enumerate(letters):
            if rng.random() >= keep:
                alphabet = next(
                    (a for a in (string.ascii_uppercase, string.ascii_lowercase, string.digits) if letter in a), "#-+=:"
                )
                letters[i] = _letters(rng, alphabet, 1)
        changed = "".join(letters)
        return changed if changed != line else line[1:] + ("X" if line[0].isupper() else "x")

    return replace(content, lines=tuple(garble(line) for line in content.lines))


# ---------------------------------------------------------------------------------------------- layers of ink


def _line_boxes(content: Content, size: int) -> list[tuple[int, int, int, int]]:
    font = assets.font(content.face.path, size)
    return [font.getbbox(line) for line in content.lines]


_LEADING = 0.28  # gap between stacked lines, in letters


def _ink_size(content: Content) -> tuple[float, float, float]:
    """Width, height and letter height of the ink, in arbitrary but common units."""
    if content.logo:
        width, height = assets.logo_alpha(content.logo.slug).size
        return width, height, 0.5 * max(width, height)  # a logo's details are about half of it
    boxes = _line_boxes(content, 64)
    letter = max(1, max(box[3] - box[1] for box in boxes))
    width = max(1, max(box[2] - box[0] for box in boxes))
    return width, letter * (len(boxes) + _LEADING * (len(boxes) - 1)), letter


_PAD = 2  # empty pixels around a layer, so that its edges stay antialiased when it is transformed


def _layer(content: Content, height: float, stroke: float = 0.0) -> Image.Image:
    """The ink as coverage, mode "L", about `height` pixels high, with _PAD empty pixels around the ink's box.

    With `stroke` (pixels) the glyphs are fattened by that much; the layer's box stays that of the plain ink.
    """
    if content.logo:
        alpha = assets.logo_alpha(content.logo.slug)
        scale = min(1.0, height / alpha.height)
        if scale < 1.0:
            alpha = alpha.resize((max(1, round(alpha.width * scale)), max(1, round(height))), _BICUBIC)
        layer = Image.new("L", (alpha.width + 2 * _PAD, alpha.height + 2 * _PAD))
        layer.paste(alpha, (_PAD, _PAD))
        if stroke >= 0.5:
            layer = layer.filter(ImageFilter.MaxFilter(2 * min(2, round(stroke)) + 1))
        return layer
    _, unit_height, unit_letter = _ink_size(content)
    letter = height * unit_letter / unit_height
    size = int(min(160, max(6, round(64 * letter / unit_letter))))
    font = assets.font(content.face.path, size)
    boxes = _line_boxes(content, size)
    line = max(1, max(box[3] - box[1] for box in boxes))
    width = max(1, max(box[2] - box[0] for box in boxes))
    gap = round(_LEADING * line)
    layer = Image.new("L", (width + 2 * _PAD, len(boxes) * line + (len(boxes) - 1) * gap + 2 * _PAD))
    draw = ImageDraw.Draw(layer)
    for k, (text, box) in enumerate(zip(content.lines, boxes)):
        x = _PAD - box[0] + (width - (box[2] - box[0])) // 2
        y = _PAD - box[1] + k * (line + gap) + (line - (box[3] - box[1])) // 2
        draw.text((x, y), text, fill=255, font=font, stroke_width=stroke)
    return layer


def _project(layer: Image.Image, quad: np.ndarray, size: Size) -> Image.Image:
    """The layer's ink box moved on to `quad` in a canvas of `size`, mode "L"."""
    left = top = float(_PAD)
    right, bottom = layer.width - left, layer.height - top
    rows, values = [], []
    for (x, y), (u, v) in zip(quad, ((left, top), (right, top), (right, bottom), (left, bottom))):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    coefficients = np.linalg.solve(np.array(rows), np.array(values)).tolist()
    return layer.transform(size[::-1], Image.Transform.PERSPECTIVE, coefficients, _BICUBIC)


# ---------------------------------------------------------------------------------------------- where to draw


def _quad(rng: Rng, aspect: float) -> np.ndarray:
    """Corners of the ink (height 1) after a slight rotation, shear and perspective: [4, 2], its box from (0, 0)."""
    corners = np.array([(0.0, 0.0), (aspect, 0.0), (aspect, 1.0), (0.0, 1.0)])
    if rng.random() < 0.5:
        # A long word is turned less: its crop would be mostly background.
        angle = math.radians(rng.uniform(-6.0, 6.0)) / max(1.0, aspect / 2.5)
        shear = rng.uniform(-0.15, 0.15)
        near, far = rng.uniform(0.0, 0.12), rng.uniform(0.0, 0.05)
        side = slice(0, None, 3) if rng.random() < 0.5 else slice(1, 3)
        corners[side, 1] = 0.5 + (corners[side, 1] - 0.5) * (1.0 - near)
        corners[:2, 0] = aspect / 2 + (corners[:2, 0] - aspect / 2) * (1.0 - far)
        x, y = corners[:, 0] + shear * (0.5 - corners[:, 1]), corners[:, 1]
        cos, sin = math.cos(angle), math.sin(angle)
        corners = np.stack([cos * x - sin * y, sin * x + cos * y], 1)
    return corners - corners.min(0)


def _layout(rng: Rng, content: Content, bucket: Size, scale: float) -> Layout | None:
    """Fits the content into a focus crop whose aspect belongs to the bucket; None if it would be stretched too much."""
    low, high = BUCKETS.get(bucket, (0.8 * bucket[1] / bucket[0], 1.2 * bucket[1] / bucket[0]))
    width, height, letter = _ink_size(content)
    quad = _quad(rng, width / height * math.exp(rng.uniform(-0.1, 0.1)))
    ink_aspect = quad[:, 0].max() / quad[:, 1].max()
    quad /= quad[:, 1].max()  # the ink's box: ink_aspect x 1
    slack = rng.uniform(0.02, 0.1, 4)  # of the mask around the ink: left, top, right, bottom
    inner = 1.0 + slack[1] + slack[3]
    # The margin is the same number of pixels on all sides, 8..15 % of the shorter one.
    share = rng.uniform(0.08, 0.15)
    long = ink_aspect + slack[0] + slack[2]
    margin = share * (inner if long >= inner else long) / (1.0 - 2.0 * share)
    crop_height = inner + 2.0 * margin
    aspect = (long + 2.0 * margin) / crop_height
    wanted = min(max(aspect, low * 1.01), high * 0.99)
    stretched = wanted * crop_height - slack[0] - slack[2] - 2.0 * margin
    if not 0.72 <= stretched / ink_aspect <= 1.4:
        return None
    quad[:, 0] *= stretched / ink_aspect
    native_height = scale * math.sqrt(bucket[0] * bucket[1] / wanted)
    size = round(native_height), round(native_height * wanted)
    unit = size[0] / crop_height
    x, y = (slack[0] + margin) * unit, (slack[1] + margin) * unit
    edge = max(1, round(margin * unit))
    return Layout(
        size=size,
        quad=quad * unit + (x, y),
        box=(edge, edge, size[1] - edge, size[0] - edge),
        letter=float(unit * letter / height),
    )


def _plan(rng: Rng, split: str, bucket: Size, scale: float) -> tuple[Content, Layout]:
    for _ in range(200):
        content = _content(rng, split, bucket)
        layout = _layout(rng, content, bucket, scale)
        if layout is not None:
            return content, layout
    raise RefineError(f"bucket: no word fits {bucket}; use one of {', '.join(map(str, BUCKETS))}")


# ---------------------------------------------------------------------------------------------- how it looks


def _luma(colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _contrasting(rng: Rng, base, least: float = 80.0) -> Colour:
    """A colour whose luma differs from that of `base` by `least` (of 255): near white, near black, or any hue."""
    kind = rng.random()
    for _ in range(6):
        if kind < 0.3:
            colour = tuple(int(v) for v in (rng.integers(225, 256, 3) if _luma(base) < 128 else rng.integers(0, 36, 3)))
        else:
            colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        if abs(_luma(colour) - _luma(base)) >= least:
            return colour
    return (250, 250, 250) if _luma(base) < 128 else (10, 10, 10)


def _style(rng: Rng, content: Content, around: Image.Image) -> Style:
    """A look that can be read on `around`, the background under the ink (mode "RGB")."""
    pixels = np.asarray(around.resize((16, 8), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    mean = pixels.mean(0)
    busy = float(pixels.std(0).mean()) > 38.0
    plate = None
    if rng.random() < (0.6 if busy else 0.22):
        plate = tuple(int(v) for v in rng.integers(0, 256, 3))
    base = plate or mean
    fill = _contrasting(rng, base)
    if content.logo and rng.random() < 0.5 and abs(_luma(content.logo.colour) - _luma(base)) >= 60:
        fill = content.logo.colour
    fill_end = fill
    if rng.random() < 0.12:
        mixed = tuple(int(0.55 * a + 0.45 * int(b)) for a, b in zip(fill, rng.integers(0, 256, 3)))
        fill_end = mixed if abs(_luma(mixed) - _luma(base)) >= 60 else fill
    outlined = rng.random() < (0.5 if busy and plate is None else 0.12)
    shadowed = rng.random() < 0.2
    return Style(
        fill=fill,
        fill_end=fill_end,
        opacity=int(rng.integers(225, 256)),
        outline=_contrasting(rng, fill, 110.0) if outlined else None,
        outline_width=float(rng.uniform(0.04, 0.09)),
        shadow=(rng.uniform(-0.08, 0.08), rng.uniform(0.03, 0.09), rng.uniform(0.02, 0.06)) if shadowed else None,
        plate=plate,
        plate_grow=float(rng.uniform(0.15, 0.7)),
        plate_opacity=int(rng.integers(190, 256)),
    )


def _scaled(mask: Image.Image, opacity: int) -> Image.Image:
    return mask if opacity >= 255 else mask.point([v * opacity // 255 for v in range(256)])


def _draw(background: Image.Image, content: Content, layout: Layout, style: Style) -> tuple[Image.Image, Image.Image]:
    """The content drawn on `background` (mode "RGB", not modified), and the ink's coverage (mode "L")."""
    out = background.copy()
    height = max(1.0, float(layout.quad[:, 1].max() - layout.quad[:, 1].min()))
    ink = _project(_layer(content, height), layout.quad, layout.size)
    if style.plate:
        centre = layout.quad.mean(0)
        half = np.sign(layout.quad - centre) * style.plate_grow * layout.letter
        plate = Image.new("L", out.size)
        ImageDraw.Draw(plate).polygon([tuple(p) for p in (layout.quad + half).tolist()], fill=style.plate_opacity)
        out.paste(style.plate, (0, 0, *out.size), plate)
    if style.shadow:
        dx, dy, soft = (v * layout.letter for v in style.shadow)
        shadow = ImageChops.offset(ink, round(dx), max(1, round(dy))).filter(ImageFilter.GaussianBlur(soft))
        out.paste((0, 0, 0), (0, 0, *out.size), _scaled(shadow, 150))
    if style.outline:
        stroke = style.outline_width * layout.letter
        fat = _project(_layer(content, height, stroke), layout.quad, layout.size)
        out.paste(style.outline, (0, 0, *out.size), fat)
        ink_or_outline = ImageChops.lighter(fat, ink)
    else:
        ink_or_outline = ink
    alpha = _scaled(ink, style.opacity)
    if style.fill_end == style.fill:
        out.paste(style.fill, (0, 0, *out.size), alpha)
    else:
        ramp = Image.linear_gradient("L").resize(out.size)
        first, last = (Image.new("RGB", out.size, colour) for colour in (style.fill, style.fill_end))
        paint = Image.composite(last, first, ramp)
        out.paste(paint, (0, 0), alpha)
    return out, ink_or_outline


def _photo(rng: Rng, split: str, size: Size, zoom: tuple[float, float]) -> Image.Image:
    """A random window of a random photograph, `zoom` photograph pixels a pixel, of `size`, mode "RGB"."""
    files = assets.photo_files(split)
    photo = assets.photo(files[rng.integers(len(files))])
    height, width = size
    most = min(photo.width / width, photo.height / height)
    step = min(math.exp(rng.uniform(math.log(zoom[0]), math.log(zoom[1]))), most)
    x = rng.uniform(0.0, photo.width - width * step)
    y = rng.uniform(0.0, photo.height - height * step)
    # Bilinear in Pillow widens with the reduction: antialiased.
    patch = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + width * step, y + height * step))
    if split == "train":  # few photographs: mirrored, tinted, channels exchanged
        if rng.random() < 0.5:
            patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        gain, bias = rng.uniform(0.7, 1.15, 3), rng.uniform(-15.0, 25.0)
        table = np.clip(np.arange(256)[None] * gain[:, None] + bias, 0, 255).astype(int).ravel().tolist()
        patch = patch.point(table)
        if rng.random() < 0.15:
            bands = patch.split()
            patch = Image.merge("RGB", [bands[i] for i in rng.permutation(3)])
    return patch


def _camera(rng: Rng, image: Image.Image) -> Image.Image:
    """What a camera adds to everything: a little blur, noise, JPEG."""
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6)))
    if rng.random() < 0.5:
        tile = assets.noise_tile()
        dy, dx = rng.integers(0, 256, 2)
        rows = (np.arange(image.height) + dy) % 256
        columns = (np.arange(image.width) + dx) % 256
        noise = tile[rows][:, columns] * np.float32(rng.uniform(1.0, 5.0))
        image = Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(60, 96)))
        buffer.seek(0)
        with Image.open(buffer) as decoded:
            image = decoded.convert("RGB")
    return image


def _scribble(rng: Rng, layout: Layout, ink: Image.Image) -> Image.Image:
    """A mask (mode "L", 0 or 255) of the crop's size whose tight box is `layout.box`: strokes over the ink.

    Mostly a few thick strokes or a zigzag with a thinner pen; at times the whole box, which is what a user who gives
    a box paints.
    """
    left, top, right, bottom = layout.box
    width, height = right - left, bottom - top
    mask = Image.new("L", layout.size[::-1])
    if rng.random() < 0.2:
        mask.paste(255, layout.box)
        return mask
    pen = height * (rng.uniform(0.4, 0.75) if rng.random() < 0.6 else rng.uniform(0.25, 0.4))
    strokes = Image.new("L", (width + round(2 * pen), height + round(2 * pen)))
    draw = ImageDraw.Draw(strokes)

    def stroke(points: np.ndarray) -> None:
        path = [tuple(p) for p in (points + pen).tolist()]
        draw.line(path, fill=255, width=max(2, round(pen)), joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)

    turns = int(max(3, round(width / pen * rng.uniform(1.0, 1.8))))
    for _ in range(rng.integers(1, 4)):
        x = np.linspace(0.0, width, turns) + rng.normal(0.0, 0.04 * width, turns)
        sides = np.where(np.arange(turns) % 2 == rng.integers(2), 0.22, 0.78)
        y = height * (sides + rng.normal(0.0, 0.1, turns))
        stroke(np.stack([x, y], 1))
    shape = np.asarray(strokes.crop(strokes.getbbox()).resize((width, height), Image.Resampling.NEAREST))
    inked = np.asarray(ink.crop(layout.box)) > 64
    if (shape[inked] > 0).mean() < 0.85:
        # Too much left out: go over the rest as a person would, with a broad pen along the ink.
        grown = Image.fromarray((inked & (shape == 0)).astype(np.uint8) * 255)
        grown = grown.filter(ImageFilter.GaussianBlur(0.12 * layout.letter)).point(lambda v: 255 * (v > 24))
        shape = np.maximum(shape, np.asarray(grown))
    mask.paste(Image.fromarray(shape), (left, top))
    return mask


def _reference(rng: Rng, content: Content, layout: Layout, style: Style, around: Colour, size: Size) -> Image.Image:
    """A clean picture of the same word in the same face, or of the logo, alone on a plain or graded background."""
    if rng.random() < 0.5:
        base, fill = style.plate or around, style.fill
    elif content.logo and rng.random() < 0.5:
        fill, base = content.logo.colour, (255, 255, 255) if _luma(content.logo.colour) < 200 else (20, 20, 20)
    else:
        base = tuple(int(v) for v in rng.integers(0, 256, 3))
        fill = _contrasting(rng, base, 100.0)
    height, width = size
    image = Image.new("RGB", (width, height), base)
    if rng.random() < 0.4:
        end = tuple(int(0.75 * a + 0.25 * int(b)) for a, b in zip(base, rng.integers(0, 256, 3)))
        ramp = Image.linear_gradient("L")
        ramp = (ramp if rng.random() < 0.5 else ramp.transpose(Image.Transpose.ROTATE_90)).resize((width, height))
        image = Image.composite(Image.new("RGB", image.size, end), image, ramp)
    # Framed like the crop: the box of the ink in the crop, in the reference's pixels, slightly moved.
    low = layout.quad.min(0) / layout.size[::-1] * (width, height)
    high = layout.quad.max(0) / layout.size[::-1] * (width, height)
    grow = rng.uniform(0.9, 1.06)
    centre, half = (low + high) / 2 + rng.uniform(-1.0, 1.0, 2), (high - low) / 2 * grow
    half = np.minimum(half, np.minimum(centre, (width, height) - centre))
    (x1, y1), (x2, y2) = centre - half, centre + half
    quad = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    image.paste(fill, (0, 0, width, height), _project(_layer(content, y2 - y1), quad, size))
    return image


_TEXT_PROMPTS = ("Fix the word '{}'", "Repair the text '{}'", "Restore the word '{}'", "Make the text '{}' readable")
_LOGO_PROMPTS = ("Fix the logo '{}'", "Repair the logo '{}'", "Restore the '{}' logo")


def _instruction(rng: Rng, content: Content) -> str:
    usual, others = ("Refine the logo '{}'", _LOGO_PROMPTS) if content.logo else ("Refine the text '{}'", _TEXT_PROMPTS)
    template = usual if rng.random() < 0.82 else others[rng.integers(len(others))]
    return template.format(content.word)


def _mean_colour(image: Image.Image) -> Colour:
    return image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))


# ---------------------------------------------------------------------------------------------- the doors


def _generator(seed: int, index: int, split: str, *salt: int) -> Rng:
    assets.check_split(split)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, _SALT[split], *salt))))


def sample(
    seed: int,
    index: int,
    bucket: Size,
    split: str = "train",
    *,
    degradations: tuple[str, ...] = tuple(DEGRADATIONS),
) -> dict:
    """One pair, as the focus crop in a bucket (height, width) = (h, w).

    Returns {image, target, reference: [h, w, 3] uint8, mask: [h, w] uint8 (0 or 255), has_reference: bool (else the
    reference is zeros), instruction, word, font ("" for a logo), kind ("text" | "logo"), degradation: str}.
    Raises RefineError for an unknown split or when the asset packages are missing.
    """
    rng = _generator(seed, index, split, *bucket)
    height, width = bucket
    scale = math.exp(rng.uniform(0.0, math.log(2.5)))
    content, layout = _plan(rng, split, bucket, scale)
    background = _photo(rng, split, layout.size, (0.7, 3.0))
    around = background.crop(layout.box)
    style = _style(rng, content, around)
    target, ink = _draw(background, content, layout, style)
    target = _camera(rng, target)
    mask = _scribble(rng, layout, ink)

    def wrong() -> Image.Image:
        return _draw(background, _other(rng, split, content), layout, style)[0]

    image, degradation = degrade(rng, target, mask, layout.letter, wrong, degradations)
    has_reference = bool(rng.random() < (0.75 if content.logo else 0.45))
    reference = np.zeros((height, width, 3), np.uint8)
    if has_reference:
        reference = np.asarray(_reference(rng, content, layout, style, _mean_colour(around), bucket))
    return {
        "image": np.asarray(image.resize((width, height), _BICUBIC)),
        "target": np.asarray(target.resize((width, height), _BICUBIC)),
        "mask": np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)),
        "reference": reference,
        "has_reference": has_reference,
        "instruction": _instruction(rng, content),
        "word": content.word,
        "font": content.face.name if content.face else "",
        "kind": "logo" if content.logo else "text",
        "degradation": degradation,
    }


def patch(seed: int, index: int, size: int = 64, split: str = "train") -> np.ndarray:
    """One picture for the VAE, [size, size, 3] uint8: what refinement encodes, at the scale at which it does.

    Targets, degraded inputs and references of pairs (a square crop, or two windows of word crops, half as high, one
    above the other), about a tenth masks as black and white pictures, about an eighth plain photographs.
    """
    rng = _generator(seed, index, split, size, 1)
    kind = rng.random()
    if kind < 0.12:
        return np.asarray(_photo(rng, split, (size, size), (0.7, 4.0)))

    def picture(pair: dict, name: str) -> np.ndarray:
        if name == "mask" or (name == "reference" and not pair["has_reference"]):
            return np.repeat(pair["mask"][..., None], 3, 2) if name == "mask" else pair["target"]
        return pair[name]

    names = ("target", "image", "reference", "mask")
    number = int(rng.integers(2**62))
    if rng.random() < 0.35:
        pair = sample(number, index, (size, size), split)
        return picture(pair, names[rng.choice(4, p=(0.5, 0.22, 0.18, 0.1))])
    bucket = (size // 2, size // 2 * 3) if rng.random() < 0.5 else (size // 2, size // 2 * 4)
    pair = sample(number, index, bucket, split)
    halves = []
    for name in rng.choice(4, 2, p=(0.5, 0.22, 0.18, 0.1)):
        x = int(rng.integers(bucket[1] - size + 1))
        halves.append(picture(pair, names[name])[:, x : x + size])
    return np.concatenate(halves)
