"""What numbers a request may hold, for every door to the models and for the manifest of a batch; no jax needed."""

import math
import numbers
from typing import Any

from refine_jax.errors import RefineError

SEED = (-(2**63), 2**63 - 1)
STEPS = (1, 1000)
ROUNDS = (0, 100)
SCALE = (0.0, 1e3)  # of true classifier-free guidance
MARGIN = (0.0, math.inf)  # pixels
TEXT_CFG = IMAGE_CFG = (0.0, 1e3)
RENORM_MIN = (0.0, 1.0)
SHIFT = (0.01, 1e3)
TIME = (0.0, 1.0)
ASPECT = (1 / 16, 16.0)  # width / height of a crop
RENORMS = ("text_channel", "channel", "global")
FEATHERS = ("released", "paper")
DTYPES = ("float32", "bfloat16")  # of weights and computation


def whole(name: str, value: Any, bounds: tuple[int, int]) -> int:
    """`value` as an int. Raises `RefineError` unless it is a whole number within the bounds."""
    low, high = bounds
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= value <= high:
        raise RefineError(f"{name} {value!r}: give a whole number from {low} to {high}")
    return int(value)


def interval(name: str, low: float, high: float) -> tuple[float, float]:
    """(low, high). Raises `RefineError` where they are the other way round, which would be no time at all."""
    if low > high:
        raise RefineError(f"{name} ({low:g}, {high:g}): give the lower time first")
    return low, high


def span(bounds: tuple[float, float]) -> str:
    """The bounds of a number, for a message."""
    low, high = bounds
    return f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a finite number of at least {low:g}"


def number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    """`value` as a float. Raises `RefineError` unless it is a finite number within the bounds."""
    try:
        found = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int that no float holds
        found = math.inf
    if not math.isfinite(found) or not bounds[0] <= found <= bounds[1]:
        raise RefineError(f"{name} {value!r}: give {span(bounds)}")
    return found
