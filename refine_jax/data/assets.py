"""Fonts, logos, photographs and words for the procedural pairs, each divided once into "train" and "eval".

The division is by font family, by logo, by photograph and by word, never by crop: nothing that an evaluation
shows was seen in training. Everything comes from installed packages (extra `data` for training, `eval` for the
held-out part) or from this package; nothing is downloaded and nothing rendered is written to disk.
Only material whose licence allows a trained model to be shipped is used for training (OFL and Apache-2.0 fonts, CC0
logos, CC0 and CC-BY-4.0 photographs); `assets/photos/ATTRIBUTION.md` names the photographs' authors.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from refine_jax.errors import RefineError

SPLITS = ("train", "eval")

# Distribution -> split. The licence was read in each package (OFL-1.1; Roboto and Caladea: Apache-2.0).
FONT_PACKAGES = {
    "deckr-fonts": "train",
    "font-amatic-sc": "train",
    "font-fredoka-one": "train",
    "font-lato": "train",
    "font-manrope": "train",
    "font-roboto": "train",
    "font-source-sans-pro": "train",
    "font-source-serif-pro": "train",
    "font-caladea": "eval",
    "font-fjallaone": "eval",
    "font-hanken-grotesk": "eval",
    "font-intuitive": "eval",
    "font-rhd": "eval",
}
# Strokes of these faces vanish when a word is 20 pixels high; a variable file repeats the static faces.
_UNREADABLE = ("thin", "light", "hairline", "variablefont", "amaticsc-regular")
# Variable files of a package, and the instances (values of their axes, in the file's order) taken from each; other
# files of that package are left out.
_INSTANCES = {
    "deckr-fonts": {
        "Audiowide-Regular": ((),),
        "DMSans[opsz,wght]": ((14, 400), (14, 700), (14, 950)),
        "DMSans-Italic[opsz,wght]": ((14, 600),),
        "Inter[opsz,wght]": ((14, 400), (14, 600), (14, 850)),
        "Inter-Italic[opsz,wght]": ((14, 500),),
        "Roboto[wdth,wght]": ((500, 75), (800, 75)),  # condensed
        "RobotoMono[wght]": ((400,), (700,)),
    }
}

# Sample photographs inside the wheels of scikit-image and scikit-learn: CC0 or public domain, except the two of
# scikit-learn, CC-BY-2.0 (evaluation pictures only, never vendored).
_EVAL_PHOTOS = (
    ("skimage", "data/astronaut.png", "scikit-image"),
    ("skimage", "data/chelsea.png", "scikit-image"),
    ("skimage", "data/coffee.png", "scikit-image"),
    ("skimage", "data/hubble_deep_field.jpg", "scikit-image"),
    ("skimage", "data/rocket.jpg", "scikit-image"),
    ("sklearn", "datasets/images/china.jpg", "scikit-learn"),
    ("sklearn", "datasets/images/flower.jpg", "scikit-learn"),
)
# Licences of single icons, as simple-icons records them, that add no duty to the set's CC0 (None: no remark).
_FREE_ICON = (None, "CC0-1.0", "MIT", "Apache-2.0", "BSD-3-Clause")
_EVAL_LOGOS = 0.1
_EVAL_WORDS = 0.1
_LOGO_SIDE = 128  # pixels of the cached alpha; a training crop shows a logo at 130 pixels at most


@dataclass(frozen=True)
class Face:
    """One font file or an instance of a variable one: `name` "Lato-Bold" or "Inter-14-600", `family` "Lato"."""

    name: str
    family: str
    path: str
    axes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Logo:
    """One icon: `title` as people write it, `colour` its brand colour (red, green, blue in 0..255)."""

    slug: str
    title: str
    colour: tuple[int, int, int]


def check_split(split: str) -> None:
    """Raises RefineError unless `split` is "train" or "eval"."""
    if split not in SPLITS:
        raise RefineError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")


def _missing(package: str, split: str) -> RefineError:
    extra = "data" if split == "train" else "eval"
    return RefineError(f'the package {package} is not installed: pip install "refine-jax[{extra}]"')


def _module(name: str, package: str, split: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _missing(package, split) from None


def _held_out(name: str, share: float) -> bool:
    # A hash of the name alone: adding or removing other names never moves one across the division.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


@functools.cache
def faces(split: str) -> tuple[Face, ...]:
    """The split's font faces, sorted by family and name. Raises RefineError when a font package is missing."""
    check_split(split)
    found = []
    for package, where in sorted(FONT_PACKAGES.items()):
        if where != split:
            continue
        try:
            files = importlib.metadata.files(package) or ()
        except importlib.metadata.PackageNotFoundError:
            raise _missing(package, split) from None
        by_stem = {}
        for entry in files:
            # The same face in both formats counts once, as TrueType.
            if entry.suffix == ".ttf" or (entry.suffix == ".otf" and entry.stem not in by_stem):
                by_stem[entry.stem] = str(entry.locate())
        instances = _INSTANCES.get(package)
        if instances is None:
            kept = (stem for stem in by_stem if not any(word in stem.lower() for word in _UNREADABLE))
            instances = {stem: ((),) for stem in kept}
        if not instances or not instances.keys() <= by_stem.keys():
            raise _missing(package, split)
        for stem in sorted(instances):
            plain = stem.split("[")[0]
            for axes in instances[stem]:
                name = "-".join([plain, *map(str, axes)])
                found.append(Face(name, plain.split("-")[0], by_stem[stem], axes))
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    """An opened font, `size` pixels an em. The basic layout engine: glyph positions do not depend on raqm."""
    opened = ImageFont.truetype(face.path, size, layout_engine=ImageFont.Layout.BASIC)
    if face.axes:
        opened.set_variation_by_axes(list(face.axes))
    return opened


@functools.cache
def _icons() -> dict:
    pack = _module("simple_icons_pack", "simple-icons-pack", "train")
    icons = (getattr(pack, name) for name in dir(pack) if name.startswith("SI_"))
    return {icon.slug: icon for icon in icons if icon.license in _FREE_ICON}


@functools.cache
def logos(split: str) -> tuple[Logo, ...]:
    """The split's logos, sorted by slug; about a tenth are held out. Raises RefineError without simple-icons-pack."""
    check_split(split)
    _module("resvg_py", "resvg-py", "train")
    return tuple(
        Logo(slug, icon.title, tuple(bytes.fromhex(icon.hex)))
        for slug, icon in sorted(_icons().items())
        if _held_out(slug, _EVAL_LOGOS) == (split == "eval")
    )


@functools.lru_cache(maxsize=4096)
def logo_alpha(slug: str) -> Image.Image:
    """The coverage of a logo cropped to its ink, mode "L", the longer side 128 pixels at most. Do not modify."""
    resvg = _module("resvg_py", "resvg-py", "train")
    png = resvg.svg_to_bytes(svg_string=_icons()[slug].svg, width=_LOGO_SIDE, skip_system_fonts=True)
    alpha = Image.open(io.BytesIO(bytes(png))).getchannel("A")
    box = alpha.getbbox()
    return alpha.crop(box) if box else alpha


@functools.cache
def photo_files(split: str) -> tuple[str, ...]:
    """Paths of the split's photographs. Raises RefineError when a package that ships them is missing."""
    check_split(split)
    if split == "train":
        folder = Path(str(importlib.resources.files("refine_jax") / "assets" / "photos"))
        found = sorted(str(path) for path in folder.glob("*.jpg"))
        if not found:
            raise RefineError(f"{folder}: no photograph; reinstall refine-jax, its package data is missing")
        return tuple(found)
    found = []
    for module, name, package in _EVAL_PHOTOS:
        spec = importlib.util.find_spec(module)
        path = Path(spec.origin).parent / name if spec and spec.origin else None
        if path is None or not path.is_file():
            raise _missing(package, split)
        found.append(str(path))
    return tuple(found)


@functools.cache
def photo(path: str) -> Image.Image:
    """A decoded photograph, mode "RGB". Shared: do not modify."""
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.cache
def words(split: str) -> tuple[str, ...]:
    """Lower-case words of 2..9 letters, sorted. Those of "eval" are never trained on."""
    check_split(split)
    text = (importlib.resources.files("refine_jax") / "data" / "words.txt").read_text(encoding="ascii")
    return tuple(word for word in text.split() if _held_out(word, _EVAL_WORDS) == (split == "eval"))


@functools.cache
def noise_tile() -> np.ndarray:
    """[256, 256, 3] float32: one tile of unit normal noise, of which samples take shifted windows."""
    return np.random.Generator(np.random.PCG64(0)).standard_normal((256, 256, 3)).astype(np.float32)
