"""The jitted programs of refinement via regeneration: on the Qwen-Image MMDiT, on BAGEL, and BAGEL's answers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refine_jax import bagel, conditioning, parallel
from refine_jax.bagel import BagelModel
from refine_jax.model import ModelConfig, Size
from refine_jax.models.bagel import Bagel, generate_text
from refine_jax.refine_programs import finite, generate

# --------------------------------------------------------------------------------------- the Qwen-Image MMDiT's program


@dataclasses.dataclass(frozen=True)
class MMDiTSpec:
    """What is static in one compiled program, besides the shapes of its arguments.

    size: (height, width) that is generated; views: the sizes on the encoder's way (`ModelConfig.vl_sizes`), which
    decide the prompts' tokens. report: called with the number of finished steps of a round; None costs nothing.
    """

    size: Size
    views: tuple[Size, ...]
    report: Callable[[Any], None] | None = None


class Regenerated(NamedTuple):
    """Pictures `[B, h, w, 3] uint8` of the last round (of none: the input at the size), and of every round
    `[N, B, h, w, 3] uint8`; finite `[B] bool`: whether all were made of numbers."""

    pictures: jax.Array
    rounds: jax.Array
    finite: jax.Array


@parallel.program("model", "spec")
def mmdit_program(
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    model: ModelConfig,
    spec: MMDiTSpec,
) -> Regenerated:
    """Regenerate B pictures in N rounds, without leaving the device.

    inputs:
      pictures `[B, H, W, 3] uint8`: each in the top-left corner of its canvas; box `[B, 4] int32`: where it lies there,
      (0, 0, width, height); has_image `[B] bool`: without, its canvas stays blank and its prompts show none;
      prompt, negative: `prompts.PromptBatch` as dicts, `[B, L…]`; without "negative" there is no guidance;
      sigmas `[S + 1] float32`; true_cfg_scale `[B] float32`; noise `[N, B, h, w, C] float32`, N = 0 included.

    A picture is first resized to the size that is generated, then to the encoder's views, so that every round sees its
    picture in the same way, as in training. Raises `RefineError`, when it is traced, for a model that refines.
    """
    model.require("regenerating", "rvr", "rvr_vae")
    look = lambda pictures, sizes: jax.vmap(lambda picture: conditioning.view(picture, None, sizes))(pictures)
    first = jax.vmap(lambda picture, box: conditioning.view(picture, box, (spec.size,)))
    given = {name: value for name, value in inputs.items() if name not in ("pictures", "box", "has_image", "noise")}

    def again(picture: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = [picture] * len(model.pictures.seen)
        read = [look(picture, spec.views)]
        arguments = {**given, "noise": noise}
        present = [inputs["has_image"]] * len(seen)
        _, made = generate(model, variables, lora, arguments, seen, present, read, spec.report)
        return made, (made.astype(jnp.uint8), finite(made))

    picture = first(inputs["pictures"], inputs["box"])
    picture, (rounds, numbers) = jax.lax.scan(again, picture, inputs["noise"])
    return Regenerated(picture.astype(jnp.uint8), rounds, jnp.all(numbers, axis=0))


# --------------------------------------------------------------------------------------------------- BAGEL's program


@dataclasses.dataclass(frozen=True)
class BagelSpec:
    """What is static in one compiled program of BAGEL, besides the shapes of its arguments.

    size: (height, width) that is painted; seen: at which the tower sees the picture, None where there is none. The rest
    as in `Regenerator.regenerate`; text_guided, image_guided: which contexts the guidance needs.
    """

    size: Size
    seen: Size | None
    steps: int
    shift: float
    renorm: str
    renorm_min: float
    interval: tuple[float, float]
    text_guided: bool
    image_guided: bool
    report: Callable[[Any], None] | None = None


class Painted(NamedTuple):
    """Pictures `[B, h, w, 3] uint8` and the packed latents `[B, N, p·p·C] float32` that they were decoded from;
    finite `[B] bool`: whether they are made of numbers."""

    pictures: jax.Array
    latents: jax.Array
    finite: jax.Array


@parallel.program("model", "marks", "spec")
def bagel_program(
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    model: BagelModel,
    marks: bagel.Marks,
    spec: BagelSpec,
) -> Painted:
    """One round: read system, pictures and prompts once, paint, decode.

    inputs: prompt (`bagel.Prompt`, B rows), noise `[B, N, p·p·C] float32`, text_cfg, image_cfg `[B] float32`; where
    `spec.seen`, also pictures `[B, h, w, 3] uint8` of `spec.size`, system (`bagel.Prompt`), and for a model that is
    shown latents too, keys `[B]` of the VAE's sample.
    """
    system = pixels = latents = None
    if spec.seen is not None:
        system = inputs["system"]
        given = inputs["pictures"].astype(jnp.float32)
        pixels = jax.vmap(lambda picture: bagel.painted(picture, None, spec.seen))(given)
        if model.conditioning == "rvr_vae":
            encoded = bagel.encode_images(model, variables, given, inputs["keys"])
            latents = bagel.LatentImage(encoded, model.grid(spec.size))
    context = bagel.read_prefix(
        model,
        variables,
        lora,
        marks,
        system,
        pixels,
        inputs["prompt"],
        drop_text=spec.text_guided,
        drop_image=spec.image_guided and spec.seen is not None,
        latents=latents,
    )
    guidance = bagel.Guidance(
        bagel.time_grid(spec.steps, spec.shift),
        inputs["text_cfg"] if spec.text_guided else None,
        inputs["image_cfg"] if spec.image_guided else None,
        spec.renorm,
        spec.renorm_min,
        spec.interval,
    )
    x = bagel.paint(
        model, variables, lora, marks, context, inputs["noise"], model.grid(spec.size), guidance, spec.report
    )
    pictures = bagel.decode_latents(model, variables, x, spec.size)
    return Painted(pictures.astype(jnp.uint8), x, finite(pictures))


@parallel.program("model", "marks", "seen", "length", "temperature")
def answer_program(
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    model: BagelModel,
    marks: bagel.Marks,
    seen: Size | None,
    length: int,
    temperature: float,
) -> jax.Array:
    """What the model says after a picture and a question: ids `[B, length] int32`, filled with the end's behind it.

    inputs: prompt (`bagel.Prompt`, B rows), key; where `seen`, the size at which the tower looks, also pictures `[B, H,
    W, 3] uint8`, of the size of their painting.
    """
    pixels = None
    if seen is not None:
        pixels = jax.vmap(lambda p: bagel.painted(p, None, seen))(inputs["pictures"].astype(jnp.float32))
    prompt = inputs["prompt"]
    context = bagel.read_prefix(model, variables, lora, marks, None, pixels, prompt, drop_text=False, drop_image=False)
    return generate_text(
        Bagel(model.bagel),
        {"params": variables["bagel"], "lora": lora.get("bagel", {})},
        context.cache,
        marks.text_start,
        marks.text_end,
        segment_index=jnp.full(len(prompt.count), 1 if pixels is None else 2, jnp.int32),
        position=context.position,
        length=length,
        temperature=temperature,
        key=inputs["key"],
    )


@parallel.program("size")
def fit_program(pictures: jax.Array, boxes: jax.Array, *, size: Size) -> jax.Array:
    """Pictures in the corners of canvases `[B, H, W, 3] uint8`, boxes `[B, 4]`, as painted: `[B, h, w, 3] uint8`."""
    return jax.vmap(lambda p, b: bagel.painted(p, b, size))(pictures, boxes).astype(jnp.uint8)
