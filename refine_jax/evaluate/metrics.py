"""What is measured on a refined picture: error and similarity inside the mask, edits of a word, intervals over samples.

Pictures are `[H, W, 3]` in 0…255, masks `[H, W]`, non-zero inside; NumPy only. Judges with networks are in `judges`.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


def region_mse(picture: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Mean squared difference (0…255 squared) over the pixels inside `mask` and the three channels."""
    error = np.asarray(picture, np.float64) - np.asarray(target, np.float64)
    return float(np.square(error)[np.asarray(mask) > 0].mean())


def ssim_map(picture: np.ndarray, target: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) at every pixel and channel: `[H, W, 3] float64`.

    Gaussian window of 11 pixels, σ = 1.5, K = (0.01, 0.03), range 255, population variances: what scikit-image computes
    with `gaussian_weights=True, use_sample_covariance=False`.
    """
    x, y = np.asarray(picture, np.float64), np.asarray(target, np.float64)
    blur = lambda v: ndimage.gaussian_filter(v, (sigma, sigma, 0.0), truncate=3.5)
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def region_ssim(picture: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Mean of `ssim_map` over the pixels inside `mask`; only the mask's box and a window around it are computed."""
    ys, xs = np.nonzero(np.asarray(mask))
    part = slice(max(0, ys.min() - 8), ys.max() + 9), slice(max(0, xs.min() - 8), xs.max() + 9)
    return float(ssim_map(picture[part], target[part])[np.asarray(mask)[part] > 0].mean())


def background_error(picture: np.ndarray, original: np.ndarray, alpha: np.ndarray) -> int:
    """The number of pixels that differ from `original` where the paste-back's weight `alpha [H, W]` is 0."""
    changed = (np.asarray(picture) != np.asarray(original)).any(-1)
    return int(np.count_nonzero(changed & (np.asarray(alpha) == 0)))


def seam_error(picture: np.ndarray, target: np.ndarray, alpha: np.ndarray) -> float:
    """Mean |∇picture − ∇target| (0…255) where the paste-back's weight `alpha [H, W]` is neither 0 nor 1.

    ∇: differences of neighbours along both axes; a pair counts where either pixel is in the band. NaN without a band.
    """
    error = np.asarray(picture, np.float64) - np.asarray(target, np.float64)
    band = (np.asarray(alpha) > 0) & (np.asarray(alpha) < 1)
    found = []
    for axis in (0, 1):
        first, second = (np.moveaxis(band, axis, 0)[part] for part in (slice(None, -1), slice(1, None)))
        found.append(np.abs(np.moveaxis(np.diff(error, axis=axis), axis, 0))[first | second])
    found = np.concatenate(found)
    return float(found.mean()) if len(found) else float("nan")


def plain(text: str) -> str:
    """What of a text counts when readings are compared: no case, no white space (neither is certain in a crop)."""
    return "".join(text.split()).casefold()


def edits(read: str, truth: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(truth) + 1))
    for i, a in enumerate(read, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(truth, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(estimate, low, high): Σ values / Σ weights and its 95 % percentile interval over resampled samples.

    Without weights the mean. With an error under another method as weights, the paired ratio of the two mean errors;
    with the lengths of words, the character error rate of all characters together. NaN where there is no sample.
    """
    top = np.asarray(values, np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, np.float64)
    if not len(top) or not bottom.sum():
        return (float("nan"),) * 3
    pick = np.random.default_rng(seed).integers(0, len(top), (resamples, len(top)))
    sums = bottom[pick].sum(1)
    drawn = top[pick].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(top.sum() / bottom.sum()), float(low), float(high)
