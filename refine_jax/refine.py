"""RefineAnything, Focus-and-Refine: the one jitted program from pixels in to pixels out, and the door to it.

`refine_program` crops, resizes, encodes, denoises, decodes, resizes back, feathers and pastes, over regions that differ
in picture, size, mask, prompt and presence of a reference. `Refiner` reads pictures and prompts, sorts requests into
buckets of static shapes, and calls it. The host adds only what decides a static shape: the boxes, in float64.
"""

import contextlib
import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from refine_jax import conditioning, flow, focus, images, loading, parallel, prompts
from refine_jax.errors import RefineError
from refine_jax.loading import LoraLike
from refine_jax.model import ModelConfig, Size, decode_latents, encode_images, encode_prompts, velocity
from refine_jax.progress import Progress

Array = jax.Array | np.ndarray

# Prompt lengths of compiled programs; at most a third of a prompt is padding.
TEXT_BUCKETS = (48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)


# ---------------------------------------------------------------------------------------------------------- the program


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static in one compiled program, besides the shapes of its arguments.

    crop: (height, width) at which the VAE sees the crop and its mask, so the size that is generated; crop_views: the
    sizes on the encoder's way (`ModelConfig.vl_sizes`); reference, reference_views: the same for the reference, None
    where no region has one. style: of the feathering. report: called with the number of finished steps; None costs
    nothing.
    """

    crop: Size
    crop_views: tuple[Size, ...]
    reference: Size | None
    reference_views: tuple[Size, ...] | None
    style: str = "released"
    report: Callable[[Any], None] | None = None


class Refined(NamedTuple):
    """What the program returns: pictures `[I, H, W, 3] uint8`; of each region the crop `[R, h, w, 3] uint8` as it was
    generated, and its normalised latents `[R, h', w', C] float32`."""

    pictures: jax.Array
    crops: jax.Array
    latents: jax.Array


def generate(
    model: ModelConfig,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    inputs: Mapping[str, Any],
    seen: Sequence[jax.Array],
    present: Sequence[jax.Array | None],
    read: Sequence[jax.Array],
    report: Callable[[Any], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sampler: B pictures from noise, whatever the conditioning; traced into the programs.

    inputs: prompt, negative, sigmas, true_cfg_scale, noise as `refine_program` takes them. seen: the condition images
    `[B, H, W, 3]` of the VAE (maybe none), present: which rows have them (`conditioning.image_tokens`); read: the
    encoder's views. Both are in 0…255. report: called with the number of finished steps.

    Returns normalised latents `[B, h, w, C] float32` and the picture, whole numbers `[B, H, W, 3] float32`.
    """
    noise = inputs["noise"]
    latents = encode_images(model, variables, seen)
    context = conditioning.image_tokens(noise.shape, latents, present, model.mmdit.patch_size)
    guided = "negative" in inputs
    wanted = [inputs["prompt"]] + ([inputs["negative"]] if guided else [])
    texts = encode_prompts(model, variables, lora, wanted, read)
    if guided:  # both halves of the guidance in one batch: one pass through the weights
        texts = [(jnp.concatenate([a, b]), jnp.concatenate([m, n])) for (a, m), (b, n) in [texts]]
        context = jax.tree.map(lambda x: jnp.concatenate([x, x]), context)
    [(text, text_mask)] = texts

    sigmas = inputs["sigmas"].astype(jnp.float32)

    def step(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        sigma, following = sigmas[index], sigmas[index + 1]
        both = jnp.concatenate([x, x]) if guided else x
        v = velocity(model, variables, lora, both, jnp.full(both.shape[0], sigma), context, text, text_mask)
        if guided:
            v = flow.true_cfg(*jnp.split(v, 2), inputs["true_cfg_scale"])
        if report is not None:
            jax.debug.callback(report, index + 1)
        return flow.euler_step(x, v, sigma, following), None

    x = flow.pack_latents(noise, model.mmdit.patch_size)
    x, _ = jax.lax.scan(step, x, jnp.arange(len(sigmas) - 1))
    latents = flow.unpack_latents(x, noise.shape[1:3], model.mmdit.patch_size)
    return latents, decode_latents(model, variables, latents)


@parallel.program("model", "spec")
def refine_program(
    variables: Mapping[str, Any], lora: Mapping[str, Any], inputs: Mapping[str, Any], *, model: ModelConfig, spec: Spec
) -> Refined:
    """Refine R regions in I pictures.

    inputs:
      pictures `[I, H, W, 3] uint8`: each in the top-left corner of its canvas;
      owner `[R] int32`: the picture of a region;
      mask `[R, H, W] uint8`: non-zero is refined; an empty mask makes its region a no-op (padding of a batch);
      box `[R, 4] int32`: the focus crop in its picture (`focus.focus_box`);
      reference `[R, H', W', 3] uint8`, reference_box `[R, 4] int32` (the whole picture in its canvas),
      has_reference `[R] bool`: only where `spec.reference`;
      prompt, negative: `prompts.PromptBatch` as dicts, `[R, L…]`; without "negative" there is no guidance;
      sigmas `[N + 1] float32`; true_cfg_scale `[R] float32`; noise `[R, h, w, C] float32`.

    Regions of one picture are denoised from the picture as given and pasted in order; pixels of weight 0 keep their
    bits.
    """
    picture = inputs["pictures"][inputs["owner"]]
    marked = jnp.where(inputs["mask"] > 0, jnp.uint8(255), jnp.uint8(0))
    # X = [focus crop, reference, mask crop], for the VAE and for the encoder. Crop and mask are resampled together.
    look = lambda image, box, sizes: jax.vmap(lambda i, b: conditioning.view(i, b, sizes))(image, box)
    split = lambda both: [both[..., :3], jnp.repeat(both[..., 3:], 3, axis=-1)]
    box = inputs["box"]
    both = jnp.concatenate([picture, marked[..., None]], axis=-1)
    seen, read = split(look(both, box, (spec.crop,))), split(look(both, box, spec.crop_views))
    present = [None, None]
    if spec.reference is not None:
        reference, reference_box = inputs["reference"], inputs["reference_box"]
        seen.insert(1, look(reference, reference_box, (spec.reference,)))
        read.insert(1, look(reference, reference_box, spec.reference_views))
        present.insert(1, inputs["has_reference"])

    latents, refined = generate(model, variables, lora, inputs, seen, present, read, spec.report)

    def paste(pictures: jax.Array, region: tuple) -> tuple[jax.Array, None]:
        owner, crop, box, mask = region
        return pictures.at[owner].set(focus.paste_back(pictures[owner], crop, box, mask, spec.style)), None

    # The released code feathers the mask's grey values, not the binary mask that the model is shown.
    pictures, _ = jax.lax.scan(paste, inputs["pictures"], (inputs["owner"], refined, box, inputs["mask"]))
    return Refined(pictures, refined.astype(jnp.uint8), latents)


# ------------------------------------------------------------------------------------------------------------- the door


@dataclasses.dataclass(frozen=True)
class _Region:
    """One region of one request, decoded: what decides its bucket, and its rows of the program's inputs."""

    request: int
    order: int
    mask: np.ndarray
    box: np.ndarray
    crop: Size
    reference: images.Picture | None
    prompt: prompts.TokenizedPrompt
    negative: prompts.TokenizedPrompt | None
    scale: float
    steps: int
    style: str
    noise: np.ndarray | jax.Array


class Refiner:
    """A loaded model that refines. Make one with `Refiner.load`; calls share compiled programs and are independent."""

    def __init__(
        self,
        model: ModelConfig,
        variables: Mapping[str, Any],
        tokenizer: Any,
        lora: Mapping[str, Any] | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        rules: parallel.Rules = parallel.DEFAULT_RULES,
    ):
        """variables: trees under "mmdit", "vae", "vl"; lora: trees under the same names (may be empty). With a mesh,
        both are already placed on it. Raises `RefineError` for a model of another conditioning than "refine"."""
        model.require("refining", "refine")
        self.model = model
        self.variables = jax.device_put(dict(variables))
        self.lora = jax.device_put(dict(lora or {}))
        self._mesh, self._rules = mesh, rules
        self.tokenizer = tokenizer
        self._progress = Progress()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike = "tiny",
        *,
        vae_area: int | None = None,
        condition_area: int | None = None,
        dtype: str = "float32",
        lora: LoraLike | Sequence[LoraLike] = (),
        merge_lora: bool = False,
        scheduler: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: parallel.Rules = parallel.DEFAULT_RULES,
        progress: bool = False,
    ) -> "Refiner":
        """Load the bundled "tiny" model, a model folder, a pipeline folder of diffusers, or a name of the model hub.

        vae_area, condition_area: pixels at which the VAE and the encoder look at an image (default: the model's own).
        dtype: "float32" or "bfloat16", of weights and computation. lora: a file or folder of LoRA weights in any
        dialect of `convert.lora`, alone or with its weight, (file, 0.8), or a list of such; merge_lora: add them to the
        weights instead of applying them live. scheduler: "checkpoint", or "released", RefineAnything's (constant
        shift); default: released for a converted or foreign checkpoint, whose steps and guidance are then
        RefineAnything's too (28 steps, true CFG 4.0; with an adapter that is named Lightning, the number of steps in
        its name and 1.0). mesh, rules: shard the weights over a mesh (`parallel.make_mesh`); of a converted
        folder each host reads its part.

        Raises `RefineError` for an unknown model or one that regenerates, a damaged folder, adapters that do not fit,
        or areas that are too small.
        """
        loaded = loading.load(
            model,
            dtype=dtype,
            vae_area=vae_area,
            condition_area=condition_area,
            scheduler=scheduler,
            adapters=lora,
            merge=merge_lora,
            mesh=mesh,
            rules=rules,
            progress=progress,
            wanted=("refining", "refine"),
        )
        return cls(loaded.config, loaded.variables, loaded.tokenizer, loaded.lora, mesh=mesh, rules=rules)

    def refine(
        self,
        image: images.ImageLike,
        mask_or_box: Any,
        prompt: str | Sequence[str],
        reference: images.ImageLike | Sequence[images.ImageLike | None] | None = None,
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        true_cfg_scale: float | None = None,
        seed: int = 0,
        noise: Array | Sequence[Array] | None = None,
        focus: bool = True,
        margin: float | None = None,
        feather: str = "released",
        progress: bool = False,
    ) -> Image.Image:
        """Refine one picture in one or several regions; returns a PIL image of its size, alpha carried over.

        image, reference: PIL image, path or `[H, W, 3] uint8`. mask_or_box: a mask (PIL image, path or `[H, W]` array,
        non-zero is refined), a box (x1, y1, x2, y2) half-open in pixels, or a list of masks and boxes: several regions,
        denoised together and pasted in order, with one prompt and reference for all or a list with one for each.
        negative_prompt: with true_cfg_scale above 1, what guidance moves away from (default: the model's). noise:
        unpacked latent noise `[h, w, C] float32` in place of the seed's (a list where there are several regions).
        focus: refine a crop around the region; False: the whole picture at the model's resolution. margin: around the
        region, in pixels of a picture scaled to 1024². feather: "released" or "paper". progress: bars on standard
        error.

        Raises `RefineError` for unreadable pictures, an empty mask, a box outside the picture, a prompt that is too
        long.
        """
        request = dict(
            image=image,
            mask_or_box=mask_or_box,
            prompt=prompt,
            reference=reference,
            negative_prompt=negative_prompt,
            steps=steps,
            true_cfg_scale=true_cfg_scale,
            seed=seed,
            noise=noise,
            focus=focus,
            margin=margin,
            feather=feather,
        )
        return self.refine_batch([request], progress=progress)[0]

    def refine_batch(self, requests: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[Image.Image]:
        """Refine several requests, each a dict of `refine`'s arguments; results in the order of the requests.

        Regions that share static shapes run as one batch, padded to a power of two; a result does not depend on its
        neighbours. All requests are read and checked before anything is computed.
        """
        pictures, regions = [], []
        for number, request in enumerate(requests):
            picture, found = self._read(number, **request)
            pictures.append(picture)
            regions += found
        groups: dict[Any, list[_Region]] = {}
        for region in regions:
            groups.setdefault(self._bucket(region, regions), []).append(region)
        canvases = [picture.rgb for picture in pictures]
        for bucket, members in groups.items():
            self._run(bucket, members, canvases, progress)
        return [picture.with_rgb(canvas) for picture, canvas in zip(pictures, canvases)]

    # ------------------------------------------------------------------------------------------------- reading requests

    def _read(
        self,
        number: int,
        image: images.ImageLike,
        mask_or_box: Any,
        prompt: str | Sequence[str],
        reference: Any = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        true_cfg_scale: float | None = None,
        seed: int = 0,
        noise: Any = None,
        focus: bool = True,
        margin: float | None = None,
        feather: str = "released",
    ) -> tuple[images.Picture, list[_Region]]:
        """One request, decoded and checked."""
        model = self.model
        picture = images.read_picture(image)
        masks = images.region_masks(mask_or_box, picture.size)
        count = len(masks)
        texts = _per_region(prompt, count, "prompt", str)
        references = [
            None if r is None else images.read_picture(r, "reference")
            for r in _per_region(reference, count, "reference", (str, os.PathLike, Image.Image, np.ndarray, type(None)))
        ]
        noises = _per_region(noise, count, "noise", (np.ndarray, jax.Array, type(None)))
        steps = model.steps if steps is None else steps
        scale = model.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        if not isinstance(steps, numbers.Integral) or not 1 <= steps <= 1000:
            raise RefineError(f"steps {steps!r}: give a whole number from 1 to 1000")
        if not isinstance(scale, numbers.Real) or not math.isfinite(scale) or scale < 0:
            raise RefineError(f"true_cfg_scale {scale!r}: give a finite number of at least 0; 1 is off")
        if not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**63:
            raise RefineError(f"seed {seed!r}: give a whole number of at most 64 bits")
        margin = model.margin if margin is None else margin
        if not isinstance(margin, numbers.Real) or not math.isfinite(margin) or margin < 0:
            raise RefineError(f"margin {margin!r}: give a finite number of pixels of at least 0")
        if feather not in ("released", "paper"):
            raise RefineError(f"feather {feather!r}: give 'released' or 'paper'")
        negative = (model.negative_prompt if negative_prompt is None else negative_prompt) if scale > 1 else None

        regions = []
        for order, (mask, text, reference) in enumerate(zip(masks, texts, references)):
            box = self._focus(mask, picture.size, margin) if focus else np.array([0, 0, *picture.size], np.int32)
            ratio = int(box[2] - box[0]) / int(box[3] - box[1])
            crop = model.vae_size(ratio)
            if max(crop) > 16 * min(crop):
                raise RefineError(
                    f"{picture.name}: the region to refine is {ratio:.3g} times as wide as high; give a larger margin"
                )
            shown = [ratio, reference.size[0] / reference.size[1] if reference else 1.0, ratio]
            present = [True, reference is not None, True]
            encode = functools.partial(self._encode, ratios=shown, present=present)
            regions.append(
                _Region(
                    request=number,
                    order=order,
                    mask=mask,
                    box=box,
                    crop=crop,
                    reference=reference,
                    prompt=encode(text),
                    negative=None if negative is None else encode(negative),
                    scale=float(scale),
                    steps=int(steps),
                    style=feather,
                    noise=self._noise(crop, seed, order, noises[order]),
                )
            )
        return picture, regions

    def _focus(self, mask: np.ndarray, size: tuple[int, int], margin: float) -> np.ndarray:
        box, _ = focus.mask_box(mask)
        return focus.focus_box(box, *size, margin=margin)

    def _encode(self, text: str, ratios: Sequence[float], present: Sequence[bool]) -> prompts.TokenizedPrompt:
        """A prompt about the pictures present; rows of absent slots are counted when the bucket is known."""
        grids = [self.model.vl_grid(ratio) for ratio, here in zip(ratios, present) if here]
        return prompts.encode_prompt(
            self.tokenizer, self.model.prompt, text, grids, self.model.vl.vision.spatial_merge_size
        )

    def _noise(self, crop: Size, seed: int, order: int, given: Any) -> Any:
        """The latent noise `[h, w, C]` of region `order`: `given`, or drawn from the seed."""
        shape = (*self.model.latent_size(crop), self.model.vae.z_dim)
        if given is not None:
            if tuple(given.shape) != shape:
                raise RefineError(f"noise of shape {tuple(given.shape)}: the crop's latents are {shape} (h, w, C)")
            return jnp.asarray(given, jnp.float32)
        words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, order]
        key = jax.random.key(words[0])
        for word in words[1:]:
            key = jax.random.fold_in(key, np.uint32(word))
        return jax.random.normal(key, shape, jnp.float32)

    # ------------------------------------------------------------------------------------------------- running a bucket

    def _bucket(self, region: _Region, others: Sequence[_Region]) -> Any:
        """What regions must share to run in one batch; one without a reference joins others that have one."""
        base = (region.crop, self._views(region), region.steps, region.style, region.negative is not None)
        if region.reference is None:
            for other in others:
                if other.reference is not None and base == self._bucket(other, ())[0]:
                    return self._bucket(other, ())
            return base, None
        ratio = region.reference.size[0] / region.reference.size[1]
        return base, (self.model.vae_size(ratio), self.model.vl_sizes(ratio))

    def _views(self, region: _Region) -> tuple[Size, Size]:
        x1, y1, x2, y2 = region.box.tolist()
        return self.model.vl_sizes((x2 - x1) / (y2 - y1))

    def _run(self, bucket: Any, members: list[_Region], canvases: list[np.ndarray], progress: bool) -> None:
        """Refine the regions of one bucket and write them into `canvases` (a new array where one changes)."""
        (crop, views, steps, style, guided), reference = bucket
        spec = Spec(crop, views, *(reference or (None, None)), style, self._progress.step if progress else None)
        size = power_of_two(len(members))
        padded = members + [members[0]] * (size - len(members))
        real = np.arange(size) < len(members)

        # Each picture is cut to what its regions need: the rest of a large photograph never leaves the host.
        owners = list(dict.fromkeys(m.request for m in members))
        windows = {}
        for request in owners:
            boxes = np.stack([m.box for m in members if m.request == request])
            windows[request] = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)]).tolist()
        height, width = (canvas_side(max(w[axis + 2] - w[axis] for w in windows.values())) for axis in (1, 0))

        def cut(array: np.ndarray, window: Sequence[int]) -> np.ndarray:
            x1, y1, x2, y2 = window
            part = array[y1:y2, x1:x2]
            spare = [(0, height - part.shape[0]), (0, width - part.shape[1])] + [(0, 0)] * (array.ndim - 2)
            return np.pad(part, spare)

        pictures = [cut(canvases[request], windows[request]) for request in owners]
        pictures += [np.zeros_like(pictures[0])] * (power_of_two(len(owners)) - len(owners))
        masks = [cut(m.mask, windows[m.request]) * np.uint8(here) for m, here in zip(padded, real)]
        length = prompts.bucket_length(
            max(len(p) for m in members for p in (m.prompt, m.negative) if p is not None), TEXT_BUCKETS
        )
        inputs = {
            "pictures": np.stack(pictures),
            "owner": np.array([owners.index(m.request) for m in padded], np.int32),
            "mask": np.stack(masks),
            "box": np.stack([m.box - np.array(windows[m.request][:2] * 2, np.int32) for m in padded]),
            "prompt": self._prompts([m.prompt for m in padded], padded, spec, length),
            "sigmas": flow.schedule(
                self.model.scheduler, steps, math.prod(self.model.latent_size(crop)) // self._patch_area
            ),
            "true_cfg_scale": np.array([m.scale for m in padded], np.float32),
            "noise": jnp.stack([m.noise for m in padded]),
        }
        if guided:
            inputs["negative"] = self._prompts([m.negative for m in padded], padded, spec, length)
        if reference is not None:
            given = [m.reference.rgb if m.reference else np.zeros((1, 1, 3), np.uint8) for m in padded]
            side = [canvas_side(max(r.shape[axis] for r in given)) for axis in (0, 1)]
            inputs["reference"] = np.stack(
                [np.pad(r, [(0, side[0] - r.shape[0]), (0, side[1] - r.shape[1]), (0, 0)]) for r in given]
            )
            inputs["reference_box"] = np.array([[0, 0, r.shape[1], r.shape[0]] for r in given], np.int32)
            inputs["has_reference"] = np.array([m.reference is not None for m in padded])
        with contextlib.ExitStack() as stack:
            if progress:
                stack.enter_context(self._progress.show(steps))
            if self._mesh is not None:
                stack.enter_context(jax.set_mesh(self._mesh))
                stack.enter_context(nn.logical_axis_rules(self._rules))
            refined = refine_program(self.variables, self.lora, inputs, model=self.model, spec=spec)
            results = parallel.fetch(refined.pictures)
        for index, request in enumerate(owners):
            x1, y1, x2, y2 = windows[request]
            canvas = canvases[request].copy()
            canvas[y1:y2, x1:x2] = results[index, : y2 - y1, : x2 - x1]
            canvases[request] = canvas

    @property
    def _patch_area(self) -> int:
        return self.model.mmdit.patch_size**2

    def _prompts(
        self, rows: Sequence[prompts.TokenizedPrompt], members: Sequence[_Region], spec: Spec, length: int
    ) -> dict[str, np.ndarray]:
        """Padded prompts; where a region leaves the program's reference slot empty, its mask's rows move on."""
        batch = prompts.pad_prompts(rows, length)
        index = batch.image_index
        if spec.reference is not None:
            vision = self.model.vl.vision
            tokens = lambda views: math.prod(side // vision.factor for side in views[-1])
            first, hole = tokens(spec.crop_views), tokens(spec.reference_views)
            absent = np.array([m.reference is None for m in members])[:, None]
            index = np.where(absent & (index >= first), index + hole, index)
        return dict(ids=batch.ids, mask=batch.mask, positions=batch.positions, image_index=index.astype(np.int32))


# -------------------------------------------------------------------------------------------------------------- helpers


def power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def canvas_side(side: int) -> int:
    """The canvas bucket of a side: at most a quarter more than asked, so that few programs serve all sizes."""
    step = max(64, power_of_two(side) // 8)
    return -(-side // step) * step


def _per_region(value: Any, count: int, name: str, kinds: Any) -> list[Any]:
    """One value for all regions, or a list with one for each."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise RefineError(f"{name}: {len(value)} given for {count} regions; give one, or one for each")
        values = list(value)
    else:
        values = [value] * count
    for item in values:
        if not isinstance(item, kinds):
            raise RefineError(f"{name}: cannot use a {type(item).__name__} here")
    return values
