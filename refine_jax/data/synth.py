"""Procedural pairs: a word or a logo set into a photograph, and the same picture damaged inside a scribble.

`sample` is one training pair, made directly as the focus crop (box of the mask plus a margin, RefineAnything's
Focus-and-Refine, stage 1) and resized to a bucket. `scene` is a whole photograph with several damaged regions, for
evaluating the path that locates, crops and pastes back. `patch` is one picture for the VAE. All are pure functions of
their arguments: bit-identical wherever the same versions of Pillow, numpy and the asset packages are installed.
"""

import math
import string

import numpy as np
from PIL import Image, ImageDraw

from refine_jax.data import assets, picture
from refine_jax.data import content as contents
from refine_jax.data.degrade import DEGRADATIONS, degrade
from refine_jax.errors import RefineError

Rng = np.random.Generator
Size = tuple[int, int]  # (height, width)

# Bucket (height, width) -> the aspects (width / height) of focus crops that round to it at an area of 64².
BUCKETS: dict[Size, tuple[float, float]] = {(32, 96): (1.78, 3.06), (32, 128): (3.06, 5.06), (64, 64): (0.64, 1.56)}
# Share of each bucket among pairs: words are the task; the square one holds the logos, about a fifth of all pairs.
WEIGHTS: dict[Size, float] = {(32, 96): 0.38, (32, 128): 0.28, (64, 64): 0.34}

# What a cell of a label map may be: background (which is first), a logo, a letter, any other sign.
_LETTERS = string.ascii_letters + string.digits
LABELS = 3 + len(_LETTERS)

_SALT = {"train": 0, "eval": 1}


def _generator(seed: int, index: int, split: str, *salt: int) -> Rng:
    assets.check_split(split)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, _SALT[split], *salt))))


def _plan(rng: Rng, split: str, bucket: Size, scale: float) -> tuple[contents.Content, picture.Layout]:
    """Content and layout of a focus crop that belongs to `bucket`, `scale` times its size."""
    aspects = BUCKETS.get(bucket, (0.8 * bucket[1] / bucket[0], 1.2 * bucket[1] / bucket[0]))
    for _ in range(200):
        content = contents.choose(rng, split, bucket)
        layout = picture.place(rng, content, scale**2 * bucket[0] * bucket[1], aspects)
        if layout is not None:
            return content, layout
    raise RefineError(f"bucket: no word fits {bucket}; use one of {', '.join(map(str, BUCKETS))}")


def sample(
    seed: int,
    index: int,
    bucket: Size,
    split: str = "train",
    *,
    degradations: tuple[str, ...] = tuple(DEGRADATIONS),
    reference_share: float | None = None,
    cell: int = 0,
) -> dict:
    """One pair, as the focus crop in a bucket (height, width) = (h, w).

    Args:
      degradations: names to draw from (`degrade.DEGRADATIONS`).
      reference_share: how often there is a reference; default: two thirds, as in the paper's Refine-30K. With 0 and 1
        the pair is otherwise the same, which tells what a reference adds.
      cell: pixels a side of the cells of a label map; 0: none is made.

    Returns {image, target, reference: [h, w, 3] uint8, mask: [h, w] uint8 (0 or 255), has_reference: bool (else the
    reference is zeros), instruction, word, font ("" for a logo), kind ("text" | "logo"), degradation: str}, and where
    there is a `cell`, labels [h / cell, w / cell, LABELS] uint8 (`labels`).
    Raises RefineError for an unknown split or when the asset packages are missing.
    """
    rng = _generator(seed, index, split, *bucket)
    height, width = bucket
    content, layout = _plan(rng, split, bucket, math.exp(rng.uniform(0.0, math.log(2.5))))
    background = picture.photo_window(rng, split, layout.size, (0.7, 3.0))
    around = background.crop(layout.box)
    style = picture.choose_style(rng, content, around)
    target, ink = picture.render(background, content, layout, style)
    target = picture.camera(rng, target)
    mask = picture.scribble(rng, layout, ink)

    def wrong() -> Image.Image:
        return picture.render(background, contents.other(rng, split, content), layout, style)[0]

    image, degradation = degrade(rng, target, mask, layout.letter, wrong, degradations)
    instruction = contents.instruction(rng, content)
    if reference_share is None:
        reference_share = 2 / 3
    has_reference = bool(rng.random() < reference_share)
    reference = np.zeros((height, width, 3), np.uint8)
    if has_reference:
        mean = picture.mean_colour(around)
        reference = np.asarray(picture.clean_reference(rng, content, layout, style, mean, bucket))
    told = {"labels": labels(content, layout, bucket, cell)} if cell else {}
    return told | {
        "image": np.asarray(image.resize((width, height), picture.BICUBIC)),
        "target": np.asarray(target.resize((width, height), picture.BICUBIC)),
        "mask": np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)),
        "reference": reference,
        "has_reference": has_reference,
        "instruction": instruction,
        "word": content.word,
        "font": content.face.name if content.face else "",
        "kind": "logo" if content.logo else "text",
        "degradation": degradation,
    }


def labels(content: contents.Content, layout: picture.Layout, bucket: Size, cell: int) -> np.ndarray:
    """What share (of 255) of each cell of a pair is background, a logo, each letter, another sign.

    [h / cell, w / cell, LABELS] uint8; they sum to 255. A letter counts with its whole box, a logo with its own.
    """
    height, width = bucket
    number = lambda letter: 2 + _LETTERS.index(letter) if letter in _LETTERS else LABELS - 1
    boxes = [(number(letter), box) for letter, box in picture.letter_boxes(content)] or [(1, (0.0, 0.0, 1.0, 1.0))]
    corners = layout.quad / layout.size[::-1] * (width, height)
    plane = Image.new("L", (width, height))
    draw = ImageDraw.Draw(plane)
    for label, (x1, y1, x2, y2) in boxes:
        place = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        share = np.array([((1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v) for u, v in place])
        draw.polygon([tuple(point) for point in (share @ corners).tolist()], fill=label)
    cells = np.asarray(plane).reshape(height // cell, cell, width // cell, cell).swapaxes(1, 2)
    shares = (cells.reshape(height // cell, width // cell, -1, 1) == np.arange(LABELS)).mean(2)
    counts = (shares * 255.0).astype(np.uint8)
    counts[..., 0] = 255 - counts[..., 1:].sum(-1)
    return counts


def scene(
    seed: int,
    index: int,
    split: str = "eval",
    size: tuple[int, int] = (256, 512),
    regions: tuple[int, int] = (1, 3),
) -> dict:
    """A whole photograph with damaged words and logos in it; its sides lie between the two of `size` (multiples of 16).

    The number R of regions lies in `regions` (fewer where no more fit, at least one); they do not overlap.
    Returns {image, target: [H, W, 3] uint8, masks: [R, H, W] uint8 (0 or 255), boxes: [R, 4] int32 (x1, y1, x2, y2 of
    the mask, half-open), crops: [R, 4] int32 (the box and its margin, in which the region was composed), and lists of
    R: references ([h, w, 3] uint8, of the crop's size), instructions, words, fonts, kinds, degradations}.
    Outside the union of the masks image and target are equal. Raises RefineError as `sample` does.
    """
    rng = _generator(seed, index, split, 2)
    height, width = (int(rng.integers(size[0] // 16, size[1] // 16 + 1)) * 16 for _ in range(2))
    target = picture.photo_window(rng, split, (height, width), (0.7, 1.5))
    shares = np.array(list(WEIGHTS.values()))
    parts, wanted = [], int(rng.integers(regions[0], regions[1] + 1))
    for attempt in range(40):
        if len(parts) == wanted:
            break
        bucket = tuple(WEIGHTS)[rng.choice(len(shares), p=shares / shares.sum())]
        # Ever smaller: the first region always finds its place.
        scale = max(1.0, rng.uniform(1.2, 2.4) * 0.93**attempt)
        content, layout = _plan(rng, split, bucket, scale)
        h, w = layout.size
        if h > height or w > width:
            continue
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        crop = (x, y, x + w, y + h)
        if any(x < c[2] and c[0] < x + w and y < c[3] and c[1] < y + h for c, *_ in parts):
            continue
        background = target.crop(crop)
        around = background.crop(layout.box)
        style = picture.choose_style(rng, content, around)
        drawn, ink = picture.render(background, content, layout, style)
        target.paste(drawn, crop[:2])
        reference = picture.clean_reference(rng, content, layout, style, picture.mean_colour(around), layout.size)
        parts.append((crop, content, layout, style, background, ink, reference))
    if not parts:
        raise RefineError(f"size: no region fits a scene of {width}x{height}; use sides of at least 256")
    target = picture.camera(rng, target)
    image = target.copy()
    masks, boxes, names = np.zeros((len(parts), height, width), np.uint8), [], []
    for k, (crop, content, layout, style, background, ink, _) in enumerate(parts):
        mask = picture.scribble(rng, layout, ink)

        def wrong(content=content, layout=layout, style=style, background=background) -> Image.Image:
            return picture.render(background, contents.other(rng, split, content), layout, style)[0]

        damaged, name = degrade(rng, target.crop(crop), mask, layout.letter, wrong)
        image.paste(damaged, crop[:2])
        masks[k, crop[1] : crop[3], crop[0] : crop[2]] = np.asarray(mask)
        boxes.append(
            [layout.box[0] + crop[0], layout.box[1] + crop[1], layout.box[2] + crop[0], layout.box[3] + crop[1]]
        )
        names.append(name)
    chosen = [part[1] for part in parts]
    return {
        "image": np.asarray(image),
        "target": np.asarray(target),
        "masks": masks,
        "boxes": np.array(boxes, np.int32),
        "crops": np.array([part[0] for part in parts], np.int32),
        "references": [np.asarray(part[6]) for part in parts],
        "instructions": [contents.instruction(rng, content) for content in chosen],
        "words": [content.word for content in chosen],
        "fonts": [content.face.name if content.face else "" for content in chosen],
        "kinds": ["logo" if content.logo else "text" for content in chosen],
        "degradations": names,
    }


def patch(seed: int, index: int, size: int = 64, split: str = "train") -> np.ndarray:
    """One picture for the VAE, [size, size, 3] uint8: what refinement encodes, at the scale at which it does.

    Targets, degraded inputs and references of pairs (a square crop, or two windows of word crops, half as high, one
    above the other), about a tenth masks as black and white pictures, about an eighth plain photographs.
    """
    rng = _generator(seed, index, split, size, 1)
    if rng.random() < 0.12:
        return np.asarray(picture.photo_window(rng, split, (size, size), (0.7, 4.0)))
    names, shares = ("target", "image", "reference", "mask"), (0.5, 0.22, 0.18, 0.1)
    square = rng.random() < 0.35
    bucket = (size, size) if square else (size // 2, size // 2 * int(rng.integers(3, 5)))
    chosen = [names[k] for k in rng.choice(4, 1 if square else 2, p=shares)]
    wants_reference = "reference" in chosen
    pair = sample(int(rng.integers(2**62)), index, bucket, split, reference_share=float(wants_reference))
    windows = []
    for name in chosen:
        whole = np.repeat(pair["mask"][..., None], 3, 2) if name == "mask" else pair[name]
        x = int(rng.integers(bucket[1] - size + 1))
        windows.append(whole[:, x : x + size])
    return np.concatenate(windows)
