"""What the trainer drives: an objective, as `refine_jax.objectives` makes them."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from PIL import Image

LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained.

    init(key) -> trained variables in their logical boxes, at random; initial(shardings) -> the values that they start
    from instead, where they are read from a model. frozen: what the loss only reads, an abstract tree in logical boxes;
    load(shardings) -> its arrays. loss(params, frozen, batch, key) -> (scalar float32, dict of scalars float32).
    share(batch, parts) -> the batch with what its parts must know of the whole, where it is taken apart by rows.
    batches() -> an iterator, with get_state, set_state and close, of dicts of numpy arrays whose leading axis is this
    host's part of the batch; held_out() -> one of samples that are not trained on, with nothing left out at random.
    batch_shapes() -> the global batch as `jax.ShapeDtypeStruct`s, one tree a bucket.
    export(params, frozen, folder) writes the result; where `adapts`, that is a LoRA's file, and made at every save.
    sampler(params, frozen, mesh, rules) -> what makes pictures of requests with the present weights, a list of each,
    where there is such a thing; samples(count) -> requests for it, each with its target under "target"; the mesh and
    the rules are in force for both, and every process calls them. model: its `ModelConfig` or `BagelModel`, None for a
    VAE alone.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, dict, jax.Array], tuple[jax.Array, dict]]
    batches: Callable[[], Iterator]
    export: Callable[[Any, Any, Path], None]
    frozen: Any = dataclasses.field(default_factory=dict)
    load: Callable[[Any], Any] = lambda shardings: {}
    adapts: bool = False
    initial: Callable[[Any], Any] | None = None
    held_out: Callable[[], Iterator] | None = None
    share: Callable[[dict, int], dict] = lambda batch, parts: batch
    batch_shapes: Callable[[], list[dict[str, Any]]] | None = None
    sampler: Callable[..., Callable[[list[dict[str, Any]]], list[Image.Image]]] | None = None
    samples: Callable[[int], list[dict[str, Any]]] | None = None
    model: Any = None
