"""The MMDiT's sampler, and the jitted programs of refinement around it.

`refine_program` goes from pixels in to pixels out: it crops, resizes, encodes, denoises, decodes, resizes back,
feathers and pastes, over regions that differ in picture, size, mask, prompt and presence of a reference. The programs
of regeneration (`regenerate_programs`) share `generate`; `encoded_program` starts from what is encoded already.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax import conditioning, flow, focus, parallel
from refine_jax.model import (
    ModelConfig,
    Size,
    decode_latents,
    encode_images,
    encode_prompts,
    encoded_context,
    look,
    velocity,
)

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static in one compiled program, besides the shapes of its arguments.

    crop: (height, width) at which the VAE sees the crop and its mask, so the size that is generated; crop_views: the
    sizes on the encoder's way (`ModelConfig.vl_sizes`). style: of the feathering. report: called with the number of
    finished steps; None costs nothing.
    """

    crop: Size
    crop_views: tuple[Size, ...]
    style: str = "released"
    report: Callable[[Any], None] | None = None


class Reference(NamedTuple):
    """References as the networks see them, of whatever sizes, with padding behind: packed latents `[R, N, 4C] float32`,
    their grids `[R, 2] int32` (rows, columns), the encoder's tokens `[R, M, D]`."""

    tokens: jax.Array
    grid: jax.Array
    seen: jax.Array


class Refined(NamedTuple):
    """What the program returns, of each region: its picture `[R, H, W, 3] uint8`, the crop `[R, h, w, 3] uint8` as it
    was generated, its normalised latents `[R, h', w', C] float32`, and whether it was made of numbers, `[R] bool`."""

    pictures: jax.Array
    crops: jax.Array
    latents: jax.Array
    finite: jax.Array


def finite(pictures: jax.Array) -> jax.Array:
    """Which of pictures `[B, H, W, 3] float32` are made of numbers, `[B] bool`; in 8 bits all look so."""
    return jnp.isfinite(pictures).all(axis=(1, 2, 3))


def generate(
    model: ModelConfig,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    inputs: Mapping[str, Any],
    seen: Sequence[jax.Array],
    present: Sequence[jax.Array | None],
    read: Sequence[jax.Array],
    report: Callable[[Any], None] | None = None,
    reference: Reference | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sampler: B pictures from noise, whatever the conditioning; traced into the programs.

    inputs: prompt, negative, sigmas, true_cfg_scale, noise as `refine_program` takes them. seen: the condition images
    `[B, H, W, 3]` of the VAE (maybe none), present: which rows have them (`conditioning.image_tokens`); read: the
    encoder's views. Both are in 0…255. reference: stands second among seen and read, so `present` counts it. report:
    called with the number of finished steps.

    Returns normalised latents `[B, h, w, C] float32` and the picture, whole numbers `[B, H, W, 3] float32`.
    """
    noise = inputs["noise"]
    latents: list[Any] = encode_images(model, variables, seen)
    if reference is not None:
        latents.insert(1, conditioning.Packed(reference.tokens, reference.grid))
        read = [read[0], reference.seen, *read[1:]]
    context = conditioning.image_tokens(noise.shape, latents, present, model.mmdit.patch_size)
    guided = "negative" in inputs
    wanted = [inputs["prompt"]] + ([inputs["negative"]] if guided else [])
    texts = encode_prompts(model, variables, lora, wanted, read)
    if guided:  # both halves of the guidance in one batch: one pass through the weights
        texts = [(jnp.concatenate([a, b]), jnp.concatenate([m, n])) for (a, m), (b, n) in [texts]]
        context = jax.tree.map(lambda x: jnp.concatenate([x, x]), context)
    [(text, text_mask)] = texts
    scale = inputs["true_cfg_scale"] if guided else None
    return denoise(model, variables, lora, noise, inputs["sigmas"], context, text, text_mask, scale, report)


def denoise(
    model: ModelConfig,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    noise: Array,
    sigmas: Array,
    context: conditioning.ImageTokens,
    text: jax.Array,
    text_mask: jax.Array,
    true_cfg_scale: Array | None = None,
    report: Callable[[Any], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loop of `generate`, on conditioning that is made: of B rows, or with true_cfg_scale `[B]` of 2B, the
    negative ones behind. noise `[B, h, w, C]`, sigmas `[N + 1]`. Returns what `generate` does."""
    sigmas = sigmas.astype(jnp.float32)
    guided = true_cfg_scale is not None

    def step(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        sigma, following = sigmas[index], sigmas[index + 1]
        both = jnp.concatenate([x, x]) if guided else x
        v = velocity(model, variables, lora, both, jnp.full(both.shape[0], sigma), context, text, text_mask)
        if guided:
            v = flow.true_cfg(*jnp.split(v, 2), true_cfg_scale)
        if report is not None:
            jax.debug.callback(report, index + 1)
        return flow.euler_step(x, v, sigma, following), None

    x = flow.pack_latents(noise, model.mmdit.patch_size)
    x, _ = jax.lax.scan(step, x, jnp.arange(len(sigmas) - 1))
    latents = flow.unpack_latents(x, noise.shape[1:3], model.mmdit.patch_size)
    return latents, decode_latents(model, variables, latents)


@parallel.program("model", "size", "views", "room")
def reference_program(
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    model: ModelConfig,
    size: Size,
    views: tuple[Size, ...],
    room: tuple[int, int],
) -> Reference:
    """Encode references, once for all regions that show them.

    inputs: pictures `[B, H, W, 3] uint8`, each in the top-left corner of its canvas; box `[B, 4] int32`: where it lies
    there, (0, 0, width, height). size: at which the VAE sees them; views: the encoder's (`ModelConfig.vl_sizes`). room:
    (N, M) tokens of the result, of which what is too much is padding.
    """
    view = lambda sizes: jax.vmap(lambda i, b: conditioning.view(i, b, sizes))(inputs["pictures"], inputs["box"])
    [latents] = encode_images(model, variables, [view((size,))])
    [seen] = look(model, variables, lora, [view(views)])
    patch = model.mmdit.patch_size
    tokens = flow.pack_latents(latents, patch)
    grid = jnp.array([side // patch for side in latents.shape[1:3]], jnp.int32)
    padded = lambda x, length: jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0)])
    return Reference(padded(tokens, room[0]), jnp.broadcast_to(grid, (len(tokens), 2)), padded(seen, room[1]))


@parallel.program("model", "spec")
def refine_program(
    variables: Mapping[str, Any], lora: Mapping[str, Any], inputs: Mapping[str, Any], *, model: ModelConfig, spec: Spec
) -> Refined:
    """Refine R regions, each of a picture of its own.

    inputs:
      pictures `[R, H, W, 3] uint8`: each in the top-left corner of its canvas;
      mask `[R, H, W] uint8`: non-zero is refined; an empty mask makes its region a no-op (padding of a batch);
      box `[R, 4] int32`: the focus crop in its picture (`focus.focus_box`);
      reference (`Reference`), has_reference `[R] bool`: only where some regions have one;
      prompt, negative: `prompts.PromptBatch` as dicts, `[R, L…]`; without "negative" there is no guidance;
      sigmas `[N + 1] float32`; true_cfg_scale `[R] float32`; noise `[R, h, w, C] float32`.

    Pixels of weight 0 keep their bits.
    """
    marked = jnp.where(inputs["mask"] > 0, jnp.uint8(255), jnp.uint8(0))
    # X = [focus crop, reference, mask crop], for the VAE and for the encoder. Crop and mask are resampled together.
    look = lambda image, box, sizes: jax.vmap(lambda i, b: conditioning.view(i, b, sizes))(image, box)
    split = lambda both: [both[..., :3], jnp.repeat(both[..., 3:], 3, axis=-1)]
    box = inputs["box"]
    both = jnp.concatenate([inputs["pictures"], marked[..., None]], axis=-1)
    seen, read = split(look(both, box, (spec.crop,))), split(look(both, box, spec.crop_views))
    present, reference = [None, None], inputs.get("reference")
    if reference is not None:
        present.insert(1, inputs["has_reference"])
    latents, refined = generate(model, variables, lora, inputs, seen, present, read, spec.report, reference)
    # The released code feathers the mask's grey values, not the binary mask that the model is shown.
    pictures = jax.lax.map(
        lambda region: focus.paste_back(*region, spec.style), (inputs["pictures"], refined, box, inputs["mask"])
    )
    return Refined(pictures, refined.astype(jnp.uint8), latents, finite(refined))


@parallel.program("style")
def paste_program(picture: Array, crop: Array, box: Array, mask: Array, *, style: str) -> jax.Array:
    """`focus.paste_back`, for the regions of a picture that has several: pasted in turn, each over those before it."""
    return focus.paste_back(picture, crop, box, mask, style)


@parallel.program("model")
def encoded_program(
    variables: Mapping[str, Any], lora: Mapping[str, Any], inputs: Mapping[str, Any], *, model: ModelConfig
) -> jax.Array:
    """Pictures `[B, H, W, 3] uint8` from conditioning that is encoded already, without guidance.

    inputs: encoded, what `objectives.encode` returns (`target` is not looked at); noise `[B, h, w, C] float32`, sigmas
    `[N + 1] float32`. Of the variables the MMDiT and the VAE are needed.
    """
    encoded, noise = inputs["encoded"], inputs["noise"]
    context = encoded_context(model, encoded, noise.shape)
    text = (encoded["text"], encoded["text_mask"])
    _, pictures = denoise(model, variables, lora, noise, inputs["sigmas"], context, *text)
    return pictures.astype(jnp.uint8)


@parallel.program("model")
def decode_program(variables: Mapping[str, Any], latents: jax.Array, *, model: ModelConfig) -> jax.Array:
    """`decode_latents`, as pictures `[B, H, W, 3] uint8`."""
    return decode_latents(model, variables, latents).astype(jnp.uint8)
