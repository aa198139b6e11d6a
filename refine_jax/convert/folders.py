"""Which layout a folder of PyTorch files has."""

from pathlib import Path

from refine_jax.convert import bagel_folder, diffusers_folder
from refine_jax.convert.source import Folder
from refine_jax.errors import RefineError


def is_foreign(path: str | Path) -> bool:
    """Whether `path` looks like a folder of PyTorch files (or like the weights in one of BAGEL)."""
    return (Path(path) / diffusers_folder.MODEL_INDEX).is_file() or bagel_folder.locate(path) is not None


def open_folder(path: str | Path, weights: str | None = None) -> Folder:
    """Open a pipeline folder of diffusers, or a BAGEL or RvR folder or one of its files of weights.

    weights: which weights of a BAGEL folder (`bagel_folder.read_bagel`). Raises `RefineError` for anything else, and
    for what is missing or damaged.
    """
    if found := bagel_folder.locate(path):
        folder, named = found
        return bagel_folder.read_bagel(folder, weights or named)
    if weights is not None:
        raise RefineError(f"{path}: has no choice of weights ({weights!r}); only BAGEL and RvR folders have")
    return diffusers_folder.read_pipeline(path)
