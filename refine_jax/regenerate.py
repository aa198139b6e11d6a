"""Refinement via Regeneration (arXiv 2604.25636): the picture is made anew from its prompt and what was seen of it.

p(I' | T_system, Z(I), T_prompt): the encoder's tokens of the misaligned picture I condition the generator, its latents
do not, and nothing of it is kept by force. Regeneration repeats: each round reads the picture of the one before.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refine_jax import conditioning
from refine_jax.model import ModelConfig, Size
from refine_jax.refine import generate

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
    `[N, B, h, w, 3] uint8`."""

    pictures: jax.Array
    rounds: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "spec"))
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
      (0, 0, width, height);
      prompt, negative: `prompts.PromptBatch` as dicts, `[B, L…]`; without "negative" there is no guidance;
      sigmas `[S + 1] float32`; true_cfg_scale `[B] float32`; noise `[N, B, h, w, C] float32`, N = 0 included.

    A picture is first resized to the size that is generated, then to the encoder's views, so that every round sees its
    picture in the same way, as in training. Raises `RefineError`, when it is traced, for a model that refines.
    """
    model.require("regenerating", "rvr", "rvr_vae")
    look = lambda pictures, sizes: jax.vmap(lambda picture: conditioning.view(picture, None, sizes))(pictures)
    first = jax.vmap(lambda picture, box: conditioning.view(picture, box, (spec.size,)))
    given = {name: value for name, value in inputs.items() if name not in ("pictures", "box", "noise")}

    def again(picture: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = [picture] * len(model.pictures.seen)
        read = [look(picture, spec.views)]
        arguments = {**given, "noise": noise}
        _, made = generate(model, variables, lora, arguments, seen, [None] * len(seen), read, spec.report)
        return made, made.astype(jnp.uint8)

    picture = first(inputs["pictures"], inputs["box"])
    picture, rounds = jax.lax.scan(again, picture, inputs["noise"])
    return Regenerated(picture.astype(jnp.uint8), rounds)
