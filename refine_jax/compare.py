"""A before/after picture: the whole result with its regions marked, and each region enlarged before and after."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from refine_jax import focus, images

_GAP, _CAPTION = 16, 24
_WHOLE, _CELL = (560, 560), (440, 320)
_PAPER, _INK, _MARK = (255, 255, 255), (70, 70, 70), (230, 40, 60)


def _boxes(regions: Any, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The tight boxes of what `Refiner.refine` takes as regions: a mask, a box, or a list of them."""
    masks = images.region_masks(regions, size)
    return [tuple(focus.mask_box(mask)[0].tolist()) for mask in masks]


def _around(box: Sequence[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """`box` with a third of its shorter side around it, within a picture of `size` (width, height)."""
    x1, y1, x2, y2 = box
    edge = max(6, round(min(x2 - x1, y2 - y1) / 3))
    return max(0, x1 - edge), max(0, y1 - edge), min(size[0], x2 + edge), min(size[1], y2 + edge)


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` scaled to fit into `size` (width, height)."""
    scale = min(size[0] / image.width, size[1] / image.height)
    whole = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(whole, Image.Resampling.LANCZOS)


def _flat(image: Image.Image) -> Image.Image:
    """Without alpha, on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, (*_PAPER, 255))
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def _captioned(image: Image.Image, caption: str) -> Image.Image:
    """`image` with a line of text below it."""
    font = ImageFont.load_default(14)
    width = max(image.width, round(font.getlength(caption)) + 1)
    panel = Image.new("RGB", (width, image.height + _CAPTION), _PAPER)
    panel.paste(image, ((width - image.width) // 2, 0))
    ImageDraw.Draw(panel).text((width // 2, image.height + 5), caption, _INK, font, anchor="ma")
    return panel


def _joined(panels: Sequence[Image.Image], across: bool) -> Image.Image:
    """Panels side by side (`across`) or one above the other, centred, a gap between."""
    gaps = _GAP * (len(panels) - 1)
    widths, heights = [p.width for p in panels], [p.height for p in panels]
    size = (sum(widths) + gaps, max(heights)) if across else (max(widths), sum(heights) + gaps)
    sheet, place = Image.new("RGB", size, _PAPER), 0
    for panel in panels:
        spare = (size[1] - panel.height if across else size[0] - panel.width) // 2
        sheet.paste(panel, (place, spare) if across else (spare, place))
        place += (panel.width if across else panel.height) + _GAP
    return sheet


def before_after(picture: images.Picture, result: Image.Image, regions: Any, reference: Any = None) -> Image.Image:
    """The picture that `refine-jax refine --compare` writes, mode "RGB".

    picture: as it was read; result: of its size; regions, reference: as `Refiner.refine` takes them (reference: one for
    all regions, or a list with one for each). Left the whole result with the regions' boxes, right each region with
    some of its surroundings before and after, and its reference. Raises `RefineError` for unreadable regions.
    """
    before, after = _flat(picture.with_rgb(picture.rgb)), _flat(result)
    boxes = _boxes(regions, picture.size)
    whole = _fit(after, _WHOLE)
    scale = whole.width / after.width
    draw = ImageDraw.Draw(whole)
    for number, box in enumerate(boxes, 1):
        x1, y1, x2, y2 = (round(v * scale) for v in box)
        draw.rectangle((x1 - 3, y1 - 3, x2 + 2, y2 + 2), outline=_MARK, width=2)
        if len(boxes) > 1:
            draw.text((max(2, x1 - 3), max(14, y1 - 5)), str(number), _MARK, ImageFont.load_default(14), anchor="ls")
    references = list(reference) if isinstance(reference, (list, tuple)) else [reference] * len(boxes)
    rows = []
    for number, (box, shown) in enumerate(zip(boxes, references), 1):
        around = _around(box, picture.size)
        name = f" {number}" if len(boxes) > 1 else ""
        panels = [
            _captioned(_fit(image.crop(around), _CELL), f"{when}{name}")
            for image, when in ((before, "before"), (after, "after"))
        ]
        if shown is not None:
            read = Image.fromarray(images.read_picture(shown, "reference").on_white().rgb)
            panels.append(_captioned(_fit(read, (_CELL[0], _CELL[1] // 2)), f"reference{name}"))
        # One wide region: before above after, each as large as it can be.
        wide = around[2] - around[0] >= 1.5 * (around[3] - around[1])
        rows.append(_joined(panels, across=len(boxes) > 1 or not wide))
    sheet = _joined(
        [_captioned(whole, f"{picture.size[0]}x{picture.size[1]}"), _joined(rows, across=False)], across=True
    )
    framed = Image.new("RGB", (sheet.width + 2 * _GAP, sheet.height + 2 * _GAP), _PAPER)
    framed.paste(sheet, (_GAP, _GAP))
    return framed


def side_by_side(pictures: Sequence[tuple[Image.Image, str]], title: str = "") -> Image.Image:
    """Pictures enlarged to one height, each with its caption; `title` below all of them. Mode "RGB"."""
    panels = []
    for picture, caption in pictures:
        flat = _flat(picture)
        scale = max(1, _CELL[1] // flat.height)
        shown = flat.resize((flat.width * scale, flat.height * scale), Image.Resampling.NEAREST)
        panels.append(_captioned(shown if scale > 1 else _fit(flat, _CELL), caption))
    row = _joined(panels, across=True)
    return _captioned(row, title) if title else row
