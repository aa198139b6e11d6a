"""Weights in 8 bits: a matrix `[.., in, out]` as int8 and one float32 scale a column (an output channel).

Symmetric, without calibration: `kernel ≈ values · scale`, `scale = max |column| / 127`. A `layers.Dense` whose
`param_dtype` is "int8" keeps ``kernel`` so, beside it ``kernel_scale [out]``; the networks ask for it in their blocks
alone, and keep what is small or delicate (norms, biases, embeddings, first and last projections) in `floating`.

Our own ten lines and not qwix, because its parameters are objects (`WithAux` of a `QArray`) that a wrapped model finds
by replacing jnp's functions, process-wide, while it is traced: what `Dense` does to its kernel before the product (a
cast, a sharding) they do not survive, and whatever walks a tree (accounting, shardings, LoRA, streaming from files)
would have to know them. Its product also scales the matrix and not the result, in the compute dtype.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.errors import RefineError

Array = jax.Array | np.ndarray

KINDS = ("int8",)
SCALE = "kernel_scale"  # beside "kernel"
_LEVELS = 127
_COLUMNS = 128  # that the processor takes at a time, so that what it makes on the way stays in its caches
_LEAST = np.float32(2.0**-100)  # of a scale: columns below are zero, and neither it nor its inverse is subnormal


def check_kind(kind: str | None) -> None:
    """Raises `RefineError` unless `kind` is None or one of `KINDS`."""
    if kind is not None and kind not in KINDS:
        raise RefineError(f"quantize {kind!r}: give {' or '.join(map(repr, KINDS))}, or leave it out")


def floating(param_dtype: str, dtype: str) -> str:
    """The dtype of the parameters that are never quantised, of a network with these two."""
    return dtype if param_dtype in KINDS else param_dtype


def quantize(kernel: Array) -> tuple[Array, Array]:
    """kernel [.., in, out] floating -> values [.., in, out] int8 in -127…127, scale [.., out] float32.

    `|kernel - values · scale| <= scale / 2` but for float32's rounding. numpy stays numpy, and gives the bits that jax
    gives on a CPU. A column that holds what is not finite has no finite scale (`check_finite`).
    """
    # A product with the inverse, as compilers make of a division when they like.
    if isinstance(kernel, jax.Array):
        kernel = kernel.astype(jnp.float32)
        scale = _scale(jnp, kernel)
        return jnp.rint(kernel * (1 / scale)[..., None, :]).astype(jnp.int8), scale
    values = np.empty_like(kernel, np.int8, order="K")
    scale = np.empty((*kernel.shape[:-2], kernel.shape[-1]), np.float32)
    for stack in np.ndindex(kernel.shape[:-2]):
        buffer = np.empty_like(kernel[stack][:, :_COLUMNS], np.float32, order="K")
        for start in range(0, kernel.shape[-1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            source, target = kernel[stack][:, columns], values[stack][:, columns]
            block = buffer[:, : source.shape[1]]
            np.copyto(block, source, casting="unsafe")
            scale[stack][columns] = _scale(np, block)
            with np.errstate(invalid="ignore"):  # of what is not finite
                np.multiply(block, 1 / scale[stack][columns], out=block)
                np.copyto(target, np.rint(block, out=block), casting="unsafe")
    return values, scale


def _scale(xp: Any, kernel: Array) -> Array:
    largest = xp.maximum(xp.max(kernel, axis=-2), -xp.min(kernel, axis=-2))
    return xp.maximum(largest * np.float32(1 / _LEVELS), _LEAST)


def dequantize(values: Array, scale: Array) -> Array:
    """The inverse of `quantize` up to rounding: [.., in, out] float32."""
    return values.astype(np.float32) * scale[..., None, :]


def check_finite(scale: Array, name: str) -> None:
    """Raises `RefineError` where a scale is not finite. name: of the matrix."""
    finite = (jnp if isinstance(scale, jax.Array) else np).isfinite(scale).all()
    if not finite:
        raise RefineError(f"{name}: holds numbers that are not finite, which have no 8 bits; load it without quantize")


def quantized_paths(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Of a flat tree ("/"-joined path -> anything with a dtype): path of each int8 matrix -> path of its scale."""
    found = (path.rpartition("/") for path in leaves if leaves[path].dtype == np.int8)
    return {f"{layer}/{name}": f"{layer}/{SCALE}" for layer, _, name in found}
