"""What needs no model: methods that every result is compared with. Only pixels inside the mask change."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from refine_jax.errors import RefineError


def bicubic(image: np.ndarray, mask: np.ndarray, box: Sequence[int], factor: int = 4) -> np.ndarray:
    """The focus crop `box` (x1, y1, x2, y2) reduced `factor` times and enlarged again, both bicubic (Pillow's, which is
    antialiased), inside the mask: a smoother. image `[H, W, 3] uint8`, mask `[H, W]` -> `[H, W, 3] uint8`."""
    x1, y1, x2, y2 = (int(v) for v in box)
    crop = Image.fromarray(np.ascontiguousarray(image[y1:y2, x1:x2]))
    small = tuple(max(1, round(side / factor)) for side in crop.size)
    smooth = crop.resize(small, Image.Resampling.BICUBIC).resize(crop.size, Image.Resampling.BICUBIC)
    out = image.copy()
    out[y1:y2, x1:x2] = np.where(mask[y1:y2, x1:x2, None] > 0, np.asarray(smooth), image[y1:y2, x1:x2])
    return out


def inpaint(image: np.ndarray, mask: np.ndarray, radius: float = 3.0) -> np.ndarray:
    """OpenCV's inpainting of the mask (Telea 2004), which sees nothing of what was there. Shapes as in `bicubic`.

    Raises `RefineError` naming the extra when OpenCV is missing.
    """
    try:
        import cv2
    except ImportError:
        raise RefineError('OpenCV is not installed: pip install "refine-jax[eval]"') from None
    marked = (np.asarray(mask) > 0).astype(np.uint8)
    return cv2.inpaint(np.ascontiguousarray(image), marked, radius, cv2.INPAINT_TELEA)
