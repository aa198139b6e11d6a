"""Pictures of fixed samples of a cache, made with the present weights: from latents and conditioning tokens alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from refine_jax import flow, parallel
from refine_jax.model import ModelConfig
from refine_jax.refine_programs import decode_program, encoded_program

_ARRAYS = ("image", "mask", "reference", "has_reference", "text", "text_mask")  # of what is shown


def decoded(
    model: ModelConfig, vae: Mapping[str, Any], rows: Sequence[Mapping[str, np.ndarray]], mesh: jax.sharding.Mesh
) -> list[dict[str, Any]]:
    """Samples of rows (`cache.rows`): image and target as pictures, and under "encoded" the row without its target.

    vae: its weights, on the mesh, which is in force (`jax.set_mesh`).
    """
    shown = [row[name] for row in rows for name in ("image", "target")]
    pictures = _in_batches(mesh, shown, lambda batch: decode_program({"vae": vae}, batch, model=model))
    encoded = [{name: row[name] for name in _ARRAYS if name in row} for row in rows]
    return [
        {"image": image, "target": target, "encoded": row}
        for row, image, target in zip(encoded, pictures[::2], pictures[1::2])
    ]


def painted(
    model: ModelConfig,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
    seed: int,
) -> list[Image.Image]:
    """The results of samples that `decoded` made, each from a noise of its own, in the model's number of steps,
    without guidance. variables: MMDiT and VAE, on the mesh, which is in force."""

    def paint(inputs: dict[str, Any]) -> jax.Array:
        tokens = np.prod(inputs["noise"].shape[1:3]) // model.mmdit.patch_size**2
        inputs["sigmas"] = flow.schedule(model.scheduler, model.steps, int(tokens))
        return encoded_program(variables, lora, inputs, model=model)

    inputs = []
    for number, sample in enumerate(samples):
        draw = np.random.default_rng([seed, number])
        noise = draw.standard_normal(sample["encoded"]["image"].shape, dtype=np.float32)
        inputs.append({"encoded": sample["encoded"], "noise": noise})
    return _in_batches(mesh, inputs, paint)


def _in_batches(mesh: jax.sharding.Mesh, rows: Sequence[Any], make: Callable[[Any], jax.Array]) -> list[Image.Image]:
    """`make` of batches of rows of one shape, as many as the mesh divides a batch into, the last row repeated."""
    ways, made = parallel.batch_ways(mesh), {}
    shape = lambda row: str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), row))
    kinds: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault(shape(row), []).append(number)
    for members in kinds.values():
        for first in range(0, len(members), ways):
            some = members[first : first + ways]
            full = [*some, *[some[-1]] * (ways - len(some))]
            batch = jax.tree.map(lambda *parts: np.stack(parts), *[rows[number] for number in full])
            own = jax.tree.map(lambda x: x[parallel.process_rows(ways, mesh)], batch)
            pictures = parallel.fetch(make(parallel.shard_batch(own, mesh, ways)))
            made.update(zip(some, map(Image.fromarray, pictures)))
    return [made[number] for number in range(len(rows))]
