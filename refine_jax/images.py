"""Reading and writing picture files: what a user hands in becomes sRGB `[H, W, 3] uint8`, and comes back as it was.

Everything that depends on file formats lives here: EXIF rotation, embedded colour profiles, alpha, palettes, CMYK,
16-bit greys, decompression bombs, damaged files.
"""

import dataclasses
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from refine_jax.errors import RefineError

MAX_PIXELS = 100_000_000
MAX_SIDE = 16_384

ImageLike = Image.Image | np.ndarray | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded picture. rgb `[H, W, 3] uint8` in sRGB; alpha `[H, W] uint8` or None; name for messages."""

    rgb: np.ndarray
    alpha: np.ndarray | None
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def with_rgb(self, rgb: np.ndarray) -> Image.Image:
        """`rgb` ([H, W, 3] uint8) as a PIL image, with this picture's alpha carried over."""
        if self.alpha is None:
            return Image.fromarray(np.ascontiguousarray(rgb))
        return Image.fromarray(np.dstack([rgb, self.alpha]))


def _open(source: ImageLike, name: str) -> tuple[Image.Image, str]:
    """The decoded PIL image of a path, PIL image or array, and its name for messages."""
    if isinstance(source, Image.Image):
        return source, name
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise RefineError(
                f"{name}: array of shape {source.shape} and dtype {source.dtype}; give [H, W, 3], [H, W, 4] or [H, W] uint8"
            )
        if 0 in source.shape:
            raise RefineError(f"{name}: array of shape {source.shape} holds no pixel; give a picture of at least 1x1")
        return Image.fromarray(source), name
    if not isinstance(source, (str, os.PathLike)):
        raise RefineError(f"{name}: cannot read a {type(source).__name__}; give a path, a PIL image or a uint8 array")
    path = Path(source)
    name = f"{name} {os.fspath(source)!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(image, name)
                image.load()
                return image, name
    except RefineError:
        raise
    except FileNotFoundError:
        raise RefineError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise RefineError(f"{name}: is a folder; give a picture file") from None
    except PermissionError:
        raise RefineError(f"{name}: not readable; check its permissions") from None
    except UnidentifiedImageError:
        raise RefineError(f"{name}: not a picture that can be read; give PNG, JPEG, WebP, TIFF or similar") from None
    except Image.DecompressionBombError:
        raise RefineError(f"{name}: declares more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, OverflowError, IndexError, TypeError) as error:
        raise RefineError(f"{name}: damaged or truncated ({error}); export it again") from None


def _check_size(image: Image.Image, name: str) -> None:
    """Refuse, from the header alone, what would not fit in memory."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise RefineError(
            f"{name}: {width}x{height} pixels, more than {MAX_PIXELS:,} in all or {MAX_SIDE:,} a side; scale it down first"
        )
    if width < 1 or height < 1:
        raise RefineError(f"{name}: {width}x{height} holds no pixel")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit, 32-bit and float greys scaled to 8 bits; every other mode unchanged."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(values >> 8 if values.max(initial=0) > 255 else values, 0, 255).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8))
    return image


def _srgb(image: Image.Image) -> Image.Image:
    """Through the embedded profile to sRGB, as the released code does; a broken profile is ignored, as there."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L", "LAB"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")


def read_picture(source: ImageLike, name: str = "image") -> Picture:
    """A path, PIL image or uint8 array as sRGB pixels, upright.

    EXIF rotation is applied, an embedded ICC profile converted to sRGB, alpha kept aside; palettes, greys, 16 bits and
    CMYK become RGB. Raises `RefineError` for what cannot be read or is larger than `MAX_PIXELS`.
    """
    image, name = _open(source, name)
    _check_size(image, name)
    try:
        image = _eight_bits(ImageOps.exif_transpose(image))
        profile = image.info.get("icc_profile")
        alpha = None
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = np.asarray(image.getchannel("A"))
            image = image.convert("RGB")
            if profile:
                image.info["icc_profile"] = profile
        rgb = np.asarray(_srgb(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise RefineError(f"{name}: damaged or of an unknown kind ({error}); export it again") from None
    return Picture(rgb, alpha, name)


def read_mask(source: ImageLike, size: tuple[int, int], name: str = "mask") -> np.ndarray:
    """A mask as `[H, W] uint8`, 255 where the picture is to be refined; `size` is the picture's (width, height).

    Any non-zero grey counts, as in the released code; a mask with alpha and no other information counts by its alpha.
    A mask of another size is resized to the nearest pixel. Raises `RefineError` when nothing is marked.
    """
    image, name = _open(source, name)
    _check_size(image, name)
    image = _eight_bits(ImageOps.exif_transpose(image))
    if image.mode in ("LA", "RGBA", "PA"):
        rgba = image.convert("RGBA")
        grey, alpha = rgba.convert("L"), rgba.getchannel("A")
        if np.asarray(alpha).min() < 255:
            shown = np.where(np.asarray(alpha) > 0, np.asarray(grey), 0).astype(np.uint8)
            image = alpha if not shown.any() or np.unique(np.asarray(grey)).size == 1 else Image.fromarray(shown)
        else:
            image = grey
    else:
        image = image.convert("L")
    if image.size != size:
        image = image.resize(size, Image.Resampling.NEAREST)
    mask = np.where(np.asarray(image) > 0, 255, 0).astype(np.uint8)
    if not mask.any():
        raise RefineError(f"{name}: the mask is empty; paint the region to refine in white")
    return mask


def box_mask(box: Sequence[float], size: tuple[int, int], name: str = "box") -> np.ndarray:
    """The mask of a box (x1, y1, x2, y2), half-open, in a picture of `size` (width, height): `[H, W] uint8`."""
    width, height = size
    try:
        values = [float(v) for v in box]
    except (TypeError, ValueError):
        values = []
    if len(values) != 4 or any(v != int(v) if np.isfinite(v) else True for v in values):
        raise RefineError(f"{name} {box!r}: give four whole numbers x1,y1,x2,y2")
    x1, y1, x2, y2 = (int(v) for v in values)
    if x1 >= x2 or y1 >= y2:
        raise RefineError(f"{name} {x1},{y1},{x2},{y2}: is empty; give x1 < x2 and y1 < y2")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise RefineError(f"{name} {x1},{y1},{x2},{y2}: outside the picture of {width}x{height}; clip it to 0,0,{width},{height}")
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = 255
    return mask


def save_picture(image: Image.Image, path: str | os.PathLike) -> None:
    """Write `image` aside, then rename. The suffix chooses the format; PNG and WebP are lossless here.

    Raises `RefineError` for an unknown suffix, a missing folder or a picture with alpha in a format without it.
    """
    path = Path(path)
    kinds = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise RefineError(f"--output {str(path)!r}: unknown suffix; use one of {', '.join(kinds)} (PNG keeps every pixel)")
    if not path.absolute().parent.is_dir():
        raise RefineError(f"--output {str(path)!r}: its folder does not exist; create it first")
    if path.is_dir():
        raise RefineError(f"--output {str(path)!r}: is a folder; give a file name")
    if kind in ("JPEG", "BMP") and image.mode == "RGBA":
        raise RefineError(f"--output {str(path)!r}: {kind} cannot keep the picture's alpha; write PNG, WebP or TIFF")
    options = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(aside, format=kind, **options)
        os.replace(aside, path)
    except OSError as error:
        raise RefineError(f"--output {str(path)!r}: cannot be written ({error})") from None
    finally:
        aside.unlink(missing_ok=True)
