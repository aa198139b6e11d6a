"""Reading and writing picture files: what a user hands in becomes sRGB `[H, W, 3] uint8`, and comes back as it was.

Everything that depends on file formats lives here: EXIF rotation, embedded colour profiles, alpha, palettes, CMYK,
16-bit greys, animations (the first frame counts), decompression bombs, damaged files.
"""

import dataclasses
import io
import numbers
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from refine_jax.errors import RefineError

MAX_PIXELS = 100_000_000
MAX_SIDE = 16_383  # of a WebP file

# What cameras, browsers and paint programs write. Pillow knows more, and some of those start other programs (EPS) or
# take nearly any bytes for a picture (TGA).
READABLE = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "AVIF", "PPM", "ICO", "QOI", "PSD")
WRITABLE = {
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
}

ImageLike = Image.Image | np.ndarray | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded picture.

    rgb `[H, W, 3] uint8` in sRGB; alpha `[H, W] uint8` or None; name for messages; grey: it came without colour (then
    the three channels of rgb are equal).
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    name: str
    grey: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def on_white(self) -> "Picture":
        """The picture without alpha: on white where it is transparent, rounded to the nearest."""
        if self.alpha is None:
            return self
        alpha = self.alpha[..., None].astype(np.uint16)
        rgb = ((self.rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return dataclasses.replace(self, rgb=rgb, alpha=None)

    def with_rgb(self, rgb: np.ndarray) -> Image.Image:
        """`rgb` ([H, W, 3] uint8) as a PIL image of this picture's kind: "RGB", "RGBA", "L" or "LA".

        Alpha is carried over bit for bit. Of a grey picture the luma (ITU-R 601) is kept, which of three equal channels
        is their value, so that unchanged pixels stay as they were. What had a palette or CMYK comes back as RGB.
        """
        image = Image.fromarray(np.ascontiguousarray(rgb))
        if self.grey:
            image = image.convert("L")
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        return image


# ------------------------------------------------------------------------------------------------------------- reading


def _decoded(make: Callable[[], Any], name: str) -> Any:
    """The result of `make`, with whatever a decoder may raise as one line that names the picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about doubtful metadata: the picture is there or it is not
            return make()
    except RefineError:
        raise
    except FileNotFoundError:
        raise RefineError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise RefineError(f"{name}: is a folder; give a picture file") from None
    except PermissionError:
        raise RefineError(f"{name}: not readable; check its permissions") from None
    except UnidentifiedImageError:
        raise RefineError(f"{name}: not a picture that can be read; give PNG, JPEG, WebP, TIFF or similar") from None
    except Image.DecompressionBombError:
        raise RefineError(f"{name}: declares more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:  # decoders of damaged files raise nearly anything: struct.error, zlib.error, KeyError, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefineError(f"{name}: damaged or truncated ({reason}); export it again") from None


def _open(source: ImageLike, name: str) -> tuple[Image.Image, str]:
    """The decoded upright PIL image of a path, PIL image or array, and its name for messages."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise RefineError(
                f"{name}: array of shape {source.shape} and dtype {source.dtype}; "
                "give [H, W, 3], [H, W, 4] or [H, W] uint8"
            )
        if 0 in source.shape:
            raise RefineError(f"{name}: array of shape {source.shape} holds no pixel; give a picture of at least 1x1")
        image = Image.fromarray(np.ascontiguousarray(source))
        _check_size(image, name)
        return image, name
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise RefineError(f"{name}: cannot read a {type(source).__name__}; give a path, a PIL image or a uint8 array")

    def load() -> Image.Image:
        if isinstance(source, Image.Image):
            _check_size(source, name)
            source.load()
            return _upright(source)
        Image.init()
        with Image.open(source, formats=[kind for kind in READABLE if kind in Image.OPEN]) as image:
            _check_size(image, name)
            image.load()
            return _upright(image)

    if not isinstance(source, Image.Image):
        name = f"{name} {os.fspath(source)!r}"
    return _decoded(load, name), name


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; damaged EXIF data says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF reader raises nearly anything too
        return image.copy()


def _turned(image: Image.Image) -> bool:
    """Whether EXIF data exchange width and height; of a PNG without such data Pillow would decode all to find some."""
    if "exif" not in image.info and image.format == "PNG":
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # as in `_upright`
        return False


def _check_size(image: Image.Image, name: str) -> None:
    """Refuse, from the header alone, what would not fit in memory."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise RefineError(
            f"{name}: {width}x{height} pixels, more than {MAX_PIXELS:,} in all or {MAX_SIDE:,} a side; "
            "scale it down first"
        )
    if width < 1 or height < 1:
        raise RefineError(f"{name}: {width}x{height} holds no pixel; give a picture of at least 1x1")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit, 32-bit and float greys as 8 bits ("L"); every other mode unchanged.

    Of integers the high bits are kept, by what the greatest value needs; floats are 0…1 or 0…255, also by the greatest.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        most = values.max(initial=0)
        shift = 8 if image.mode.startswith("I;16") or 255 < most < 65_536 else 0 if most < 256 else 23
        values = np.clip(values >> shift, 0, 255)
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        values = np.clip(values * (255.0 if values.max(initial=0.0) <= 1.0 else 1.0) + 0.5, 0, 255)
    else:
        return image
    grey = Image.fromarray(values.astype(np.uint8))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An "RGB", "L", "CMYK" or "LAB" image through its profile to sRGB; a broken or foreign profile is ignored."""
    if profile is None and image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted.convert("L") if image.mode == "L" else converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image if image.mode == "L" else image.convert("RGB")


def read_picture(source: ImageLike, name: str = "image") -> Picture:
    """A path, PIL image or uint8 array as sRGB pixels, upright.

    EXIF rotation is applied, an embedded ICC profile converted to sRGB, alpha (also a palette's, or a transparent
    colour) kept aside; palettes and CMYK become RGB, 16-bit greys 8 bits; an animation gives its first frame. Raises
    `RefineError` for what cannot be read or is larger than `MAX_PIXELS` or `MAX_SIDE`.
    """
    image, name = _open(source, name)

    def convert() -> Picture:
        picture = _eight_bits(image)
        profile = picture.info.get("icc_profile")
        grey = picture.mode in ("1", "L", "LA", "La")
        alpha = None
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            alpha = np.asarray(picture.getchannel("A"))
            picture = picture.convert("RGB")
        if grey:
            picture = picture.convert("L")
        elif picture.mode not in ("CMYK", "LAB"):
            picture = picture.convert("RGB")
        return Picture(np.asarray(_srgb(picture, profile).convert("RGB")), alpha, name, grey)

    return _decoded(convert, name)


def picture_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) of a picture file, upright, from its header alone. Raises `RefineError` as `read_picture`."""
    name = f"image {os.fspath(path)!r}"

    def read() -> tuple[int, int]:
        Image.init()
        with Image.open(path, formats=[kind for kind in READABLE if kind in Image.OPEN]) as image:
            _check_size(image, name)
            return image.size[::-1] if _turned(image) else image.size

    return _decoded(read, name)


def read_mask(source: ImageLike, size: tuple[int, int], name: str = "mask") -> np.ndarray:
    """A mask as `[H, W] uint8`, non-zero where the picture is to be refined; `size` is the picture's (width, height).

    Any non-zero grey counts, as in the released code, and softens the blending there; a mask whose greatest value is
    less than 255 (0 and 1, a dark colour) is scaled up to it. Alpha counts as opacity: what is painted on a transparent
    sheet is the region, in whatever colour. Of arrays `[H, W]` every dtype counts, zero or not.

    A mask lies on the upright picture: one of another size is resized to the nearest pixel, and only its own EXIF
    rotation is applied to it. Raises `RefineError` when nothing is marked, and for a mask of another shape
    (`check_mask_size`).
    """
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype != np.uint8:
        if source.dtype.kind not in "biuf" or not np.isfinite(source).all():
            raise RefineError(
                f"{name}: array of {source.dtype} with values that are no numbers; give [H, W] uint8 or bool"
            )
        source = np.where(source != 0, np.uint8(255), np.uint8(0))
    image, name = _open(source, name)
    mask = _decoded(lambda: _painted(_scaled_grey(image)), name)
    if not mask.any():
        raise RefineError(f"{name}: the mask is empty; paint the region to refine in white")
    if image.size != size:
        check_mask_size(image.size, size, name)
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        if not mask.any():
            raise RefineError(
                f"{name}: the mask of {image.width}x{image.height} is empty at the picture's {size[0]}x{size[1]}; "
                "paint more"
            )
    most = int(mask.max())
    return mask if most == 255 else ((mask.astype(np.uint16) * 255 + most - 1) // most).astype(np.uint8)


def check_mask_size(mask: tuple[int, int], picture: tuple[int, int], name: str = "mask") -> None:
    """Raise `RefineError` where a mask of size (width, height) is not the upright picture's, enlarged or reduced:
    stretched, by more than a fiftieth and a pixel, it would mark another place."""
    (width, height), (wanted_width, wanted_height) = mask, picture
    across, down = width / wanted_width, height / wanted_height
    pixel = abs(width - wanted_width * down) <= 1 or abs(height - wanted_height * across) <= 1
    if pixel or abs(across - down) <= 0.02 * max(across, down):
        return
    remedy = "paint it on the picture as it is shown"
    if mask == picture[::-1]:
        remedy = "it lies on the picture before its EXIF rotation, turn it as that says"
    raise RefineError(f"{name}: {width}x{height} pixels, the picture has {wanted_width}x{wanted_height}; {remedy}")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Integers and floats of a mask as 8 bits, the greatest 255, what is not zero rounded up; other modes unchanged."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.clip(np.nan_to_num(np.asarray(image, np.float64), posinf=0.0), 0.0, None)
    return Image.fromarray(np.ceil(values * (255.0 / (values.max(initial=0.0) or 1.0))).clip(0, 255).astype(np.uint8))


def _painted(image: Image.Image) -> np.ndarray:
    """Grey times opacity `[H, W] uint8`, rounded up; of a transparent sheet painted in colours, or in black alone, the
    opacity itself. It is one where more is transparent than black."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB" if image.mode in ("P", "CMYK") else "L").convert("L"))
    image = image.convert("RGBA")
    grey, alpha = np.asarray(image.convert("L"), np.uint16), np.asarray(image.getchannel("A"))
    shown = (grey * alpha + 254) // 255
    if alpha.min() == 255:
        return shown.astype(np.uint8)
    colours = np.asarray(image)[alpha > 0][:, :3]
    sheet = np.count_nonzero(alpha == 0) > np.count_nonzero(~colours.any(axis=1))
    drawn = not shown.any() or (sheet and (colours.min(axis=1) != colours.max(axis=1)).any())
    return (alpha if drawn else shown).astype(np.uint8)


def box_mask(box: Sequence[float], size: tuple[int, int], name: str = "box") -> np.ndarray:
    """The mask of a box (x1, y1, x2, y2), half-open, in a picture of `size` (width, height): `[H, W] uint8`, 0 or 255.

    Raises `RefineError` for anything but four whole numbers, for an empty box and for one that leaves the picture.
    """
    width, height = size
    try:
        values = [float(v) for v in box]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != 4 or not all(v.is_integer() for v in values):
        raise RefineError(f"{name} {box!r}: give four whole numbers x1,y1,x2,y2")
    x1, y1, x2, y2 = (int(v) for v in values)
    if x1 >= x2 or y1 >= y2:
        raise RefineError(f"{name} {x1},{y1},{x2},{y2}: is empty; give x1 < x2 and y1 < y2")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise RefineError(
            f"{name} {x1},{y1},{x2},{y2}: outside the picture of {width}x{height}; clip it to 0,0,{width},{height}"
        )
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = 255
    return mask


# ------------------------------------------------------------------------------------------------------------- writing


def _is_box(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape == (4,)
    return isinstance(value, (tuple, list)) and len(value) == 4 and all(isinstance(v, numbers.Real) for v in value)


def region_masks(regions: Any, size: tuple[int, int]) -> list[np.ndarray]:
    """The masks of `each_region`, all at once."""
    return list(each_region(regions, size)[1])


def each_region(regions: Any, size: tuple[int, int]) -> tuple[int, Iterator[np.ndarray]]:
    """How many regions `Refiner.refine` was given, in a picture of `size` (width, height), and their masks `[H, W]
    uint8`, one by one: each is as large as the picture.

    A mask (`read_mask`), a box (`box_mask`), or a list of them; boxes also as an array `[N, 4]`, unless it is uint8 or
    a mask of the picture's size. Raises `RefineError` for an empty list; the iterator does, as those.
    """
    if isinstance(regions, np.ndarray) and regions.shape[1:] == (4,) and regions.shape != size[::-1]:
        if regions.dtype.kind in "iuf" and regions.dtype != np.uint8:
            regions = list(regions)
    if _is_box(regions) or not isinstance(regions, (tuple, list)):
        regions = [regions]
    if not regions:
        raise RefineError("mask_or_box: the list is empty; give at least one mask or box")
    named = ["" if len(regions) == 1 else f" {k + 1}" for k in range(len(regions))]
    return len(regions), (
        box_mask(region, size, f"box{name}") if _is_box(region) else read_mask(region, size, f"mask{name}")
        for region, name in zip(regions, named)
    )


def check_output(path: str | os.PathLike, alpha: bool = False, name: str = "output") -> None:
    """Raise `RefineError`, before any work is done, where `save_picture` would not be able to write `path`.

    That is: an unknown suffix, a folder that is missing or read-only, a folder of that name, a protected file, a format
    that cannot keep the picture's `alpha`.
    """
    path, label = Path(path), f"{name} {os.fspath(path)!r}"
    kind = WRITABLE.get(path.suffix.lower())
    if kind is None:
        raise RefineError(f"{label}: unknown suffix; use one of {', '.join(WRITABLE)} (.png keeps every pixel)")
    if os.path.isdir(path):
        raise RefineError(f"{label}: is a folder; give a file name")
    if not os.path.isdir(path.absolute().parent):
        raise RefineError(f"{label}: its folder does not exist; create it first")
    if alpha and kind in ("JPEG", "BMP"):
        raise RefineError(f"{label}: {kind} cannot keep the picture's alpha; write .png, .webp or .tif")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise RefineError(f"{label}: is write-protected; give another name")
    try:  # rights alone do not tell: a disk may be read-only, a name too long
        aside = _aside(path)
        aside.touch()
        aside.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefineError(f"{label}: cannot be written ({reason}); give another place") from None


def save_picture(image: Image.Image, path: str | os.PathLike, name: str = "output", *, fast: bool = False) -> None:
    """Write `image` aside, then rename: nobody sees half a file. The suffix chooses the format; only JPEG loses detail.

    fast: a PNG in a third of the time, a little larger. Raises `RefineError` as `check_output` does, and when the disk
    is full.
    """
    check_output(path, image.has_transparency_data, name)
    path = Path(path)
    options = {"WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    if fast:
        options["PNG"] = {"compress_level": 1}
    kind, aside = WRITABLE[path.suffix.lower()], _aside(path)
    try:
        image.save(aside, format=kind, **options.get(kind, {}))
        os.replace(aside, os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise RefineError(f"{name} {os.fspath(path)!r}: cannot be written ({error}); give another place") from None
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """A hidden name beside the file that `path` leads to, so that renaming stays on one disk."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
