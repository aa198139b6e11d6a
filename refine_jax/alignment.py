"""Representation alignment with the labels of pictures that are made here: which shape or letter is where.

One linear layer reads the label map (`data.world.labels`, `data.synth.labels`) from what a block of the MMDiT makes of
the noisy picture;
its cross entropy is added to the flow's error (REPA, arXiv:2410.06940, with labels in the place of a pretrained
encoder's features). The layer is no part of the model: it lies beside it, and a training that goes on from the model
takes it up.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refine_jax import checkpoint, losses
from refine_jax.data import loader
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig
from refine_jax.models.layers import layer_norm

# The layer's name among what is trained.
NAME = "alignment"
# Its file in the folder of the model that it was trained with.
HEAD = "alignment.safetensors"


def check(settings: Mapping[str, Any], source: str, model: ModelConfig, adapter: bool) -> None:
    """Raises `RefineError` where `config.alignment` (block, weight) does not go with the data, the model, or a LoRA."""
    mmdit, side = model.mmdit, _token_side(model)
    if source not in loader.LABELS or adapter:
        raise RefineError(
            f"alignment: only pairs of {' and '.join(loader.LABELS)} have labels, and a LoRA needs none; "
            "leave alignment out"
        )
    if mmdit.scan or not 0 <= settings["block"] < mmdit.num_layers:
        raise RefineError(
            f"alignment.block {settings['block']}: give one of 0 to {mmdit.num_layers - 1}, and scan=False"
        )
    if side % loader.LABEL_CELL:
        raise RefineError(f"alignment: tokens of {side} pixels are not made of cells of {loader.LABEL_CELL}")


def _token_side(model: ModelConfig) -> int:
    return model.vae.spatial_ratio * model.mmdit.patch_size


def new_head(model: ModelConfig, source: str) -> dict[str, jax.Array]:
    """A layer that knows nothing of the labels of `source`: kernel [width, cells a token · labels], bias, zeros."""
    width = (_token_side(model) // loader.LABEL_CELL) ** 2 * loader.LABELS[source]
    return {"kernel": jnp.zeros((model.mmdit.width, width)), "bias": jnp.zeros(width)}


def read_head(folder: str | Path, model: ModelConfig, source: str) -> dict[str, jax.Array]:
    """The layer that lies beside the model in `folder`, a new one where there is none.

    Raises `RefineError` for a file that cannot be read, or is that of another network.
    """
    path, new = Path(folder) / HEAD, new_head(model, source)
    if not path.is_file():
        return new
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RefineError(f"{path}: cannot be read ({error}); remove it to start the layer anew") from None
    shapes = lambda tree: {name: leaf.shape for name, leaf in sorted(tree.items())}
    if shapes(found) != shapes(new):
        raise RefineError(f"{path}: has {shapes(found)}, expected {shapes(new)}; remove it to start the layer anew")
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in found.items()}


def write_head(folder: str | Path, head: Mapping[str, np.ndarray]) -> None:
    """Put the layer beside the model in `folder`."""
    checkpoint.write_tensors(Path(folder) / HEAD, dict(head))


def label_error(features: jax.Array, head: Mapping[str, jax.Array], labels: jax.Array, rows: int) -> jax.Array:
    """Of tokens `features [B, N, D]` in `rows` rows, each of which is square cells of the label map: a scalar."""
    logits = layer_norm(features, 1e-6) @ head["kernel"] + head["bias"]
    count, high, wide, kinds = labels.shape
    per = high // rows
    cells = labels.reshape(count, rows, per, wide // per, per, kinds).swapaxes(2, 3).reshape(count, -1, kinds)
    return losses.label_loss(logits.reshape(count, -1, kinds), cells)
