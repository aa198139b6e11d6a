"""How it is set: where the ink goes in a focus crop, colours, the photograph around it, the scribble, the reference.

Lengths are in pixels of the native crop, colours in 0..255; pictures are Pillow images, mode "RGB", masks and
coverages mode "L". Functions that draw take the random generator first and do not modify their arguments.
"""

import functools
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from refine_jax.data import assets
from refine_jax.data.content import Content

Rng = np.random.Generator
Size = tuple[int, int]  # (height, width)
Colour = tuple[int, int, int]

BICUBIC = Image.Resampling.BICUBIC


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


# ---------------------------------------------------------------------------------------------- layers of ink


@functools.lru_cache(maxsize=4096)
def _line_box(face: assets.Face, size: int, line: str) -> tuple[int, int, int, int]:
    return tuple(int(v) for v in assets.font(face, size).getbbox(line))


def _line_boxes(content: Content, size: int) -> list[tuple[int, int, int, int]]:
    return [_line_box(content.face, size, line) for line in content.lines]


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


def letter_boxes(content: Content) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(letter, (x1, y1, x2, y2)) of every letter of some text, in fractions of the ink's box; none for a logo."""
    if content.logo:
        return []
    font, boxes = assets.font(content.face, 64), _line_boxes(content, 64)
    line = max(1, max(box[3] - box[1] for box in boxes))
    width = max(1, max(box[2] - box[0] for box in boxes))
    pitch = (1 + _LEADING) * line
    height = line + (len(boxes) - 1) * pitch
    found = []
    for k, (text, box) in enumerate(zip(content.lines, boxes)):
        left = (width - (box[2] - box[0])) // 2
        edges = [left + min(max(font.getlength(text[:n]) - box[0], 0), box[2] - box[0]) for n in range(len(text) + 1)]
        top, bottom = k * pitch / height, (k * pitch + line) / height
        found += [(letter, (a / width, top, b / width, bottom)) for letter, a, b in zip(text, edges, edges[1:])]
    return found


_PAD = 2  # empty pixels around a layer, so that its edges stay antialiased when it is transformed


def _layer(content: Content, height: float, stroke: float = 0.0) -> Image.Image:
    """The ink as coverage, mode "L", about `height` pixels high, with _PAD empty pixels around the ink's box.

    With `stroke` (pixels) the glyphs are fattened by that much; the layer's box stays that of the plain ink.
    """
    if content.logo:
        alpha = assets.logo_alpha(content.logo.slug)
        scale = min(1.0, height / alpha.height)
        if scale < 1.0:
            alpha = alpha.resize((max(1, round(alpha.width * scale)), max(1, round(height))), BICUBIC)
        layer = Image.new("L", (alpha.width + 2 * _PAD, alpha.height + 2 * _PAD))
        layer.paste(alpha, (_PAD, _PAD))
        if stroke >= 0.5:
            layer = layer.filter(ImageFilter.MaxFilter(2 * min(2, round(stroke)) + 1))
        return layer
    _, unit_height, unit_letter = _ink_size(content)
    letter = height * unit_letter / unit_height
    # Sizes a few per cent apart: few enough fonts to keep open, and the projection makes up the difference.
    size = round(1.06 ** round(math.log(min(160.0, max(6.0, 64 * letter / unit_letter)), 1.06)))
    font = assets.font(content.face, size)
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
    return layer.transform(size[::-1], Image.Transform.PERSPECTIVE, coefficients, BICUBIC)


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


def place(rng: Rng, content: Content, area: float, aspects: tuple[float, float]) -> Layout | None:
    """Fits the content into a focus crop of `area` pixels; its aspect (width / height) lies between the two `aspects`.

    None if the content would have to be stretched too much.
    """
    low, high = aspects
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
    native_height = math.sqrt(area / wanted)
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


# ---------------------------------------------------------------------------------------------- how it looks


def _luma(colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _contrasting(rng: Rng, base, least: float = 95.0) -> Colour:
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


def choose_style(rng: Rng, content: Content, around: Image.Image) -> Style:
    """A look that can be read on `around`, the background under the ink (mode "RGB")."""
    pixels = np.asarray(around.resize((16, 8), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    mean = pixels.mean(0)
    busy = float(pixels.std(0).mean()) > 38.0
    plate = None
    if rng.random() < (0.6 if busy else 0.22):
        plate = tuple(int(v) for v in rng.integers(0, 256, 3))
    base = plate or mean
    fill = _contrasting(rng, base)
    if content.logo and rng.random() < 0.5 and abs(_luma(content.logo.colour) - _luma(base)) >= 70:
        fill = content.logo.colour
    fill_end = fill
    if rng.random() < 0.12:
        mixed = tuple(int(0.55 * a + 0.45 * int(b)) for a, b in zip(fill, rng.integers(0, 256, 3)))
        fill_end = mixed if abs(_luma(mixed) - _luma(base)) >= 70 else fill
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


def render(background: Image.Image, content: Content, layout: Layout, style: Style) -> tuple[Image.Image, Image.Image]:
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


def photo_window(rng: Rng, split: str, size: Size, zoom: tuple[float, float]) -> Image.Image:
    """A random window of a random photograph, `zoom` photograph pixels a pixel, of `size`, mode "RGB"."""
    files = assets.photo_files(split)
    photo = assets.photo(files[rng.integers(len(files))])
    height, width = size
    most = min(photo.width / width, photo.height / height)
    step = min(math.exp(rng.uniform(math.log(zoom[0]), math.log(zoom[1]))), most)
    x = rng.random() * max(0.0, photo.width - width * step)
    y = rng.random() * max(0.0, photo.height - height * step)
    box = (x, y, min(photo.width, x + width * step), min(photo.height, y + height * step))
    # Bilinear in Pillow widens with the reduction: antialiased.
    patch = photo.resize((width, height), Image.Resampling.BILINEAR, box=box)
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


def camera(rng: Rng, image: Image.Image) -> Image.Image:
    """What a camera adds to everything: a little blur, noise, JPEG."""
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6)))
    if rng.random() < 0.5:
        tile = assets.noise_tile()
        dy, dx = rng.integers(0, 256, 2)
        rows = (np.arange(image.height) + dy) % 256
        columns = (np.arange(image.width) + dx) % 256
        noise = tile[np.ix_(rows, columns)] * np.float32(rng.uniform(1.0, 5.0))
        image = Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(60, 96)))
        buffer.seek(0)
        with Image.open(buffer) as decoded:
            image = decoded.convert("RGB")
    return image


def scribble(rng: Rng, layout: Layout, ink: Image.Image) -> Image.Image:
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


def clean_reference(
    rng: Rng, content: Content, layout: Layout, style: Style, around: Colour, size: Size
) -> Image.Image:
    """A clean picture of the same word in the same face, or of the logo, alone on a plain or graded background."""
    if rng.random() < 0.7:
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


def mean_colour(image: Image.Image) -> Colour:
    return image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
