"""Local degradations of a rendered word or logo: the defects that the model learns to repair.

Every function takes a random generator and a Pillow image, mode "RGB", at its native scale, and `letter`, the
height of one line of letters in pixels: a defect is measured in letters, so that small and large words become
equally hard to read. `degrade` applies them inside a mask only; elsewhere its result is the input, bit for bit.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageFilter

Rng = np.random.Generator

_UP = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
_DOWN = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)


def resample(rng: Rng, image: Image.Image, letter: float, left: tuple[float, float] = (3.8, 5.6)) -> Image.Image:
    """Downsample until a letter is `left` pixels high (÷6 to ÷8 for letters of 24..48 pixels), then enlarge again."""
    factor = min(max(letter / rng.uniform(*left), 1.5), 12.0)
    small = (max(2, round(image.width / factor)), max(2, round(image.height / factor)))
    up = _UP[rng.choice(3, p=(0.45, 0.35, 0.2))]
    return image.resize(small, _DOWN[rng.integers(3)]).resize(image.size, up)


def blur(rng: Rng, image: Image.Image, letter: float, sigma: tuple[float, float] = (0.1, 0.17)) -> Image.Image:
    """Gaussian blur, `sigma` in letters."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*sigma) * letter))


def warp(rng: Rng, image: Image.Image, letter: float, amplitude: tuple[float, float] = (0.14, 0.26)) -> Image.Image:
    """Smooth random displacement: the vertices of a grid of about half a letter move, `amplitude` in letters."""
    width, height = image.size
    cell = letter * rng.uniform(0.4, 0.7)
    columns, rows = (min(16, max(2, round(side / cell))) for side in (width, height))
    xs = np.rint(np.linspace(0, width, columns + 1)).astype(int)
    ys = np.rint(np.linspace(0, height, rows + 1)).astype(int)
    moved = rng.normal(0.0, rng.uniform(*amplitude) * letter, (rows + 1, columns + 1, 2))
    moved[..., 0] = np.clip(moved[..., 0] + xs[None, :], 0, width)
    moved[..., 1] = np.clip(moved[..., 1] + ys[:, None], 0, height)
    corners = moved.tolist()
    mesh = [
        (
            (int(xs[c]), int(ys[r]), int(xs[c + 1]), int(ys[r + 1])),
            # north-west, south-west, south-east, north-east
            (*corners[r][c], *corners[r + 1][c], *corners[r + 1][c + 1], *corners[r][c + 1]),
        )
        for r in range(rows)
        for c in range(columns)
    ]
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def smear(rng: Rng, image: Image.Image, letter: float, length: tuple[float, float] = (0.45, 0.8)) -> Image.Image:
    """Average along a line in a random direction, `length` in letters; at times only towards one side."""
    reach = rng.uniform(*length) * letter
    angle = rng.uniform(0.0, np.pi)
    first = 0.0 if rng.random() < 0.3 else -0.5
    steps = int(min(12, max(4, round(reach))))
    mean = image
    for k in range(steps):
        t = (first + (k + 1) / steps) * reach
        shifted = ImageChops.offset(image, round(t * np.cos(angle)), round(t * np.sin(angle)))
        mean = Image.blend(mean, shifted, 1.0 / (k + 2))
    return mean


def slices(rng: Rng, image: Image.Image, letter: float) -> Image.Image:
    """Vertical slices of a fraction of a letter, shuffled among near neighbours and shifted up or down."""
    width, height = image.size
    count = int(max(3, round(width / (letter * rng.uniform(0.2, 0.45)))))
    edges = np.rint(np.linspace(0, width, count + 1)).astype(int)
    order = np.argsort(np.arange(count) + rng.normal(0.0, 0.8, count))
    shifts = np.rint(rng.normal(0.0, 0.1 * letter, count)).astype(int)
    out = image.copy()
    for k, source in enumerate(order):
        left, right = int(edges[source]), int(edges[source + 1])
        piece = image.crop((left, 0, right, height)).resize((int(edges[k + 1] - edges[k]), height))
        out.paste(ImageChops.offset(piece, 0, int(shifts[k])), (int(edges[k]), 0))
    return out


def _mild(rng: Rng, image: Image.Image, letter: float) -> Image.Image:
    kind = rng.integers(3)
    if kind == 0:
        return resample(rng, image, letter, (6.5, 9.0))
    if kind == 1:
        return blur(rng, image, letter, (0.03, 0.07))
    return warp(rng, image, letter, (0.04, 0.09))


def _softened(*first: Callable) -> Callable:
    def apply(rng, image, letter):
        for step in first:
            image = step(rng, image, letter)
        return _mild(rng, image, letter)

    return apply


# name -> (share, function). "wrong" begins with a picture of other letters, which the caller draws. Most are garbled
# strokes, as generated pictures have them (the paper degrades with an inpainter), fewer are lost ones.
DEGRADATIONS: dict[str, tuple[float, Callable]] = {
    "resample": (0.08, resample),
    "blur": (0.04, blur),
    "warp": (0.22, _softened(warp)),
    "smear": (0.06, smear),
    "slices": (0.10, _softened(slices)),
    "wrong": (0.26, _mild),
    "wrong+warp": (0.14, warp),
    "warp+resample": (0.10, lambda rng, image, letter: resample(rng, warp(rng, image, letter), letter, (4.5, 6.5))),
}


def feather(mask: Image.Image) -> Image.Image:
    """Alpha of a mask (mode "L", 0 or 255): softened over less than a pixel, and 0 wherever the mask is 0."""
    return ImageChops.darker(mask.filter(ImageFilter.GaussianBlur(0.7)), mask)


def degrade(
    rng: Rng,
    target: Image.Image,
    mask: Image.Image,
    letter: float,
    wrong: Callable[[], Image.Image],
    names: Sequence[str] = tuple(DEGRADATIONS),
) -> tuple[Image.Image, str]:
    """Draws one of `names` (by share) and applies it to `target` inside `mask`.

    Args: target, mode "RGB"; mask, mode "L", of the same size, 0 or 255; `wrong()` draws the same picture with other
    letters. Returns the degraded picture, equal to `target` wherever `mask` is 0, and the degradation's name.
    """
    shares = np.array([DEGRADATIONS[name][0] for name in names])
    name = names[rng.choice(len(names), p=shares / shares.sum())]
    start = wrong() if name.startswith("wrong") else target
    damaged = DEGRADATIONS[name][1](rng, start, letter)
    out = target.copy()
    out.paste(damaged, (0, 0), feather(mask))
    return out, name
