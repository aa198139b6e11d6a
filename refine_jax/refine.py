"""RefineAnything, Focus-and-Refine: the door to the one jitted program from pixels in to pixels out.

`Refiner` reads pictures and prompts, sorts requests into buckets of static shapes, and calls
`refine_programs.refine_program`. The host adds only what decides a static shape: the boxes, in float64.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from refine_jax import executables, flow, focus, images, limits, loading, parallel, prompts, serving
from refine_jax.errors import RefineError
from refine_jax.loading import LoraLike
from refine_jax.model import ModelConfig, Size
from refine_jax.models.qwen_vl import merged_tokens, patch_grid
from refine_jax.progress import Progress
from refine_jax.refine_programs import Reference, Spec, paste_program, reference_program, refine_program
from refine_jax.serving import Bucket, canvas_side

Array = jax.Array | np.ndarray

# Prompt lengths of compiled programs; at most a third of a prompt is padding.
TEXT_BUCKETS = (48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)
WIDE_TEXT_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)

# Widths over heights of focus crops where few programs are to serve all: a factor of the square root of two apart.
ASPECTS = tuple(2 ** (k / 2) for k in range(-6, 7))
_KEPT = 64  # encoded references
_FINER = 8  # aspects a factor of two, where a crop cannot grow to one of a door's
_ASPECT = 16  # of a crop and of a reference, at most
_COVERED = 400_000_000  # pixels of a request's regions, each of which is kept until it is pasted


# ------------------------------------------------------------------------------------------------------------- the door


@dataclasses.dataclass(frozen=True)
class _Region:
    """One region of one request, decoded: its bucket, and its rows of the program's inputs.

    picture, mask: what lies within `window` (x1, y1, x2, y2); box: in the window's pixels. several: whether its picture
    has other regions too.
    """

    bucket: Bucket
    window: tuple[int, int, int, int]
    picture: np.ndarray
    mask: np.ndarray
    box: np.ndarray
    reference: "_Shown | None"
    prompt: prompts.TokenizedPrompt
    negative: prompts.TokenizedPrompt | None
    scale: float
    seed: int
    order: int
    noise: np.ndarray | jax.Array | None
    several: bool

    @property
    def reference_pixels(self) -> int:
        return self.reference.rgb.size // 3 if self.reference is not None else 0


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A reference: its pixels, their digest, the sizes at which it is seen, its (N, M) tokens."""

    rgb: np.ndarray
    digest: bytes
    size: Size
    views: tuple[Size, ...]
    tokens: tuple[int, int]


class _Base(NamedTuple):
    """What regions of one batch share."""

    crop: Size
    views: tuple[Size, ...]
    steps: int
    style: str
    guided: bool


class Refiner(serving.Door):
    """A loaded model that refines. Make one with `Refiner.load`; calls share compiled programs and are independent."""

    def __init__(
        self,
        model: ModelConfig,
        variables: Mapping[str, Any],
        tokenizer: Any,
        lora: Mapping[str, Any] | None = None,
        *,
        aspects: Sequence[float] | None = None,
        **settings: Any,
    ):
        """variables: trees under "mmdit", "vae", "vl"; lora: trees under the same names (may be empty). aspects: as
        `load` takes them; settings: of `serving.Door`. Raises `RefineError` for a model of another conditioning than
        "refine"."""
        model.require("refining", "refine")
        super().__init__(model, variables, tokenizer, lora, **settings)
        self.aspects = tuple(sorted(limits.number("aspects", a, limits.ASPECT) for a in aspects or ())) or None
        self._encoded: collections.OrderedDict[Any, Reference] = collections.OrderedDict()
        self._encoding = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike = "tiny",
        *,
        vae_area: int | None = None,
        condition_area: int | None = None,
        dtype: str | None = None,
        lora: LoraLike | Sequence[LoraLike] = (),
        merge_lora: bool = False,
        scheduler: str | None = None,
        quantize: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: parallel.Rules = parallel.DEFAULT_RULES,
        batch_size: int | None = None,
        aspects: Sequence[float] | None = None,
        store: executables.Store | None = None,
        later: bool = False,
        progress: bool = False,
    ) -> "Refiner":
        """Load the bundled "tiny" model, a model folder, a pipeline folder of diffusers, or a name of the model hub.

        vae_area, condition_area: pixels at which the VAE and the encoder look at an image (default: the model's own).
        dtype: "float32" or "bfloat16", of weights and computation; default: bfloat16 for weights that are stored so,
        else float32. lora: a file or folder of LoRA weights in any dialect of `convert.lora`, alone or with its weight,
        (file, 0.8), or a list of such; merge_lora: add them to the weights instead of applying them live. scheduler:
        "checkpoint", or "released", RefineAnything's (constant shift); default: released for a converted or foreign
        checkpoint, whose steps and guidance are then RefineAnything's too (28 steps, true CFG 4.0; with an adapter that
        its name or header calls Lightning, its number of steps and 1.0). mesh, rules: shard the weights over a mesh
        (`parallel.make_mesh`); of a converted folder each host reads its part. quantize: "int8" keeps the large
        matrices in 8 bits.

        batch_size: every program has so many rows, and a result has the same bits alone or in any batch
        (`serving`). aspects: widths over heights to which focus crops are grown, so that few programs serve all regions
        (`ASPECTS`); default: the released geometry, a program for each size of a crop. store: of compiled programs.
        later: read the weights in the background; the first call waits for them.

        Raises `RefineError` for an unknown model or one that regenerates, a damaged folder, adapters that do not fit,
        areas that are too small, or weights that the devices cannot hold.
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
            quantize=quantize,
            progress=progress,
            later=later,
            wanted=("refining", "refine"),
        )
        return cls(
            loaded.config,
            loaded.variables,
            loaded.tokenizer,
            loaded.lora,
            mesh=mesh,
            rules=rules,
            batch_size=batch_size,
            aspects=aspects,
            store=store,
        )

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

        Regions that share static shapes run in batches of `most_rows`, whatever their pictures; a result does not
        depend on its neighbours. All requests are read and checked before anything is computed.
        """
        return self.run(serving.read_all(self.read, requests), progress)

    def forget(self) -> None:
        """Drop the encoded references that are kept for requests to come; the next ones are encoded anew."""
        self._encoded.clear()

    # ------------------------------------------------------------------------------------------------- reading requests

    def read(
        self,
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
    ) -> serving.Job:
        """One request, `refine`'s arguments, decoded and checked; nothing is computed."""
        model = self.model
        picture = images.read_picture(image)
        count, masks = images.each_region(mask_or_box, picture.size)
        texts = _per_region(prompt, count, "prompt", str)
        shown = [
            None if r is None else self._shown(images.read_picture(r, "reference").on_white())
            for r in _per_region(reference, count, "reference", (str, os.PathLike, Image.Image, np.ndarray, type(None)))
        ]
        noises = _per_region(noise, count, "noise", (np.ndarray, jax.Array, type(None)))
        steps = model.steps if steps is None else steps
        scale = model.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        steps = limits.whole("steps", steps, limits.STEPS)
        scale = limits.number("true_cfg_scale", scale, limits.SCALE)
        seed = limits.whole("seed", seed, limits.SEED)
        margin = limits.number("margin", model.margin if margin is None else margin, limits.MARGIN)
        if feather not in limits.FEATHERS:
            raise RefineError(f"feather {feather!r}: give {' or '.join(map(repr, limits.FEATHERS))}")
        negative = (model.negative_prompt if negative_prompt is None else negative_prompt) if scale > 1 else None

        regions: list[_Region] = []
        covered = 0
        for order, (mask, text, reference) in enumerate(zip(masks, texts, shown)):
            box = self._focus(mask, picture.size, margin) if focus else np.array([0, 0, *picture.size], np.int32)
            ratio = int(box[2] - box[0]) / int(box[3] - box[1])
            if self.aspects is not None:
                box, ratio = fitted(box, self.aspects, picture.size)
            crop = model.vae_size(ratio)
            if max(crop) > _ASPECT * min(crop):
                whole = box.tolist() == [0, 0, *picture.size]
                remedy = "cut the picture up" if whole else "give a larger margin"
                raise RefineError(
                    f"{picture.name}: what is to be refined is {ratio:.3g} times as wide as high, more than {_ASPECT} "
                    f"to 1; {remedy}"
                )
            covered += int(box[2] - box[0]) * int(box[3] - box[1])
            if covered > max(_COVERED, picture.rgb.size // 3):
                raise RefineError(
                    f"{picture.name}: its regions, with margins, are more than {_COVERED // 10**6} megapixels together;"
                    " give fewer at once"
                )
            pictures = [model.vl_grid(ratio)] * 2
            if reference is not None:
                pictures.insert(1, patch_grid(*reference.views[-1], model.vl.vision))
            encode = functools.partial(self._encode, grids=pictures)
            prompt, refused = encode(text), None if negative is None else encode(negative)
            x1, y1, x2, y2 = window = tuple(box.tolist())
            lengths = TEXT_BUCKETS if self.aspects is None else WIDE_TEXT_BUCKETS
            length = prompts.bucket_length(max(len(p) for p in (prompt, refused) if p is not None), lengths)
            sides = self._canvas(crop, (y2 - y1, x2 - x1))
            base = _Base(crop, model.vl_sizes(ratio), steps, feather, negative is not None)
            regions.append(
                _Region(
                    bucket=Bucket(base, (*sides, length, *self._room(reference))),
                    window=window,
                    picture=picture.rgb[y1:y2, x1:x2],
                    mask=mask[y1:y2, x1:x2].copy(),  # not a view, which would keep the whole one
                    box=np.array([0, 0, x2 - x1, y2 - y1], np.int32),
                    reference=reference,
                    prompt=prompt,
                    negative=refused,
                    scale=scale,
                    seed=seed,
                    order=order,
                    noise=self._given_noise(crop, noises[order]),
                    several=count > 1,
                )
            )
        pixels = picture.rgb.size // 3 + sum(row.mask.size + row.reference_pixels for row in regions)
        return serving.Job(tuple(regions), functools.partial(self._finish, picture, regions), pixels)

    def _finish(self, picture: images.Picture, regions: Sequence[_Region], results: Sequence[Any]) -> Image.Image:
        """The picture with its regions: one, pasted by the program; or several, pasted in turn."""
        whole = picture.rgb.copy()
        for region, (pasted, crop) in zip(regions, results):
            x1, y1, x2, y2 = region.window
            if region.several:
                height, width = region.bucket.sizes[:2]
                under = _cut(whole[y1:y2, x1:x2], height, width)
                arguments = (under, crop, region.box, _cut(region.mask, height, width))
                pasted = np.asarray(self.programs.call(paste_program, *arguments, style=region.bucket.base.style))
            whole[y1:y2, x1:x2] = pasted[: y2 - y1, : x2 - x1]
        return picture.with_rgb(whole)

    def parts(self, row: _Region) -> tuple:
        shown = row.reference
        return () if shown is None else (shown.size, shown.views, *map(canvas_side, shown.rgb.shape[:2]))

    def _shown(self, picture: images.Picture) -> _Shown:
        ratio = picture.size[0] / picture.size[1]
        if not 1 / _ASPECT <= ratio <= _ASPECT:
            raise RefineError(
                f"{picture.name}: is {ratio:.3g} times as wide as high, more than {_ASPECT} to 1; cut out what matters"
            )
        size, views = self.model.vae_size(ratio), self.model.vl_sizes(ratio)
        tokens = math.prod(self.model.latent_size(size)) // self._patch_area
        digest = hashlib.blake2b(np.ascontiguousarray(picture.rgb).data, digest_size=16).digest()
        return _Shown(picture.rgb, digest + repr(picture.size).encode(), size, views, (tokens, self._merged(views)))

    def _canvas(self, crop: Size, window: Size) -> Size:
        """The canvas of a window of a picture, both (height, width): with `aspects` 1, 4, 16, … times the crop."""
        if self.aspects is None:
            return canvas_side(window[0]), canvas_side(window[1])
        scale = 1
        while any(scale * side < wanted for side, wanted in zip(crop, window)):
            scale *= 4
        return scale * crop[0], scale * crop[1]

    def _room(self, reference: _Shown | None) -> tuple[int, int]:
        """(N, M) tokens for a reference in a bucket: room for all up to four times as wide as high, or the other way,
        whose sizes differ little."""
        if reference is None:
            return 0, 0
        return tuple(map(max, self._usual_room, reference.tokens))

    @functools.cached_property
    def _usual_room(self) -> tuple[int, int]:
        return reference_room(self.model)

    def _merged(self, views: Sequence[Size]) -> int:
        """Tokens of a view in a prompt."""
        return view_tokens(self.model, views)

    def _focus(self, mask: np.ndarray, size: tuple[int, int], margin: float) -> np.ndarray:
        box, _ = focus.mask_box(mask)
        return focus.focus_box(box, *size, margin=margin)

    def _encode(self, text: str, grids: Sequence[Size]) -> prompts.TokenizedPrompt:
        """A prompt about pictures of these grids."""
        return prompts.encode_prompt(
            self.tokenizer, self.model.prompt, text, grids, self.model.vl.vision.spatial_merge_size
        )

    def _given_noise(self, crop: Size, given: Any) -> Any:
        return serving.read_noise(given, self._noise_shape(crop), "h, w, C of the crop")

    def _noise_shape(self, crop: Size) -> tuple[int, int, int]:
        return (*self.model.latent_size(crop), self.model.vae.z_dim)

    # ------------------------------------------------------------------------------------------------- running a bucket

    def launch(self, bucket: Bucket, rows: Sequence[_Region], progress: Progress | None = None) -> serving.Launched:
        """Start a batch; results: (pictures `[R, H, W, 3]`, crops `[R, h, w, 3]`, both uint8).

        Crops come only where a region's picture has several, otherwise none.
        """
        base: _Base = bucket.base
        height, width, length, *room = bucket.sizes
        spec = Spec(base.crop, base.views, base.style)
        size = self.rows_of(len(rows))
        padded = [*rows, *[rows[0]] * (size - len(rows))]
        real = np.arange(size) < len(rows)
        inputs = {
            "pictures": np.stack([_cut(row.picture, height, width) for row in padded]),
            "mask": np.stack([_cut(row.mask, height, width) * np.uint8(here) for row, here in zip(padded, real)]),
            "box": np.stack([row.box for row in padded]),
            "prompt": self._prompts([row.prompt for row in padded], padded, base, length, room[1]),
            "sigmas": flow.schedule(
                self.model.scheduler, base.steps, math.prod(self.model.latent_size(base.crop)) // self._patch_area
            ),
            "true_cfg_scale": np.array([row.scale for row in padded], np.float32),
        }
        if base.guided:
            inputs["negative"] = self._prompts([row.negative for row in padded], padded, base, length, room[1])
        with self.placed(), progress.show(base.steps) if progress else contextlib.nullcontext():
            inputs["noise"] = serving.draw_noise(
                [(row.seed, (row.order,), row.noise) for row in padded], self._noise_shape(base.crop)
            )
            if room[0]:
                inputs["reference"] = self._references(padded, tuple(room))
                inputs["has_reference"] = np.array([row.reference is not None for row in padded])
            refined = self.sample(refine_program, inputs, spec, progress)
        results = refined.pictures, refined.crops if any(row.several for row in rows) else None
        return serving.Launched(results, refined.finite)

    @property
    def _patch_area(self) -> int:
        return self.model.mmdit.patch_size**2

    def _references(self, rows: Sequence[_Region], room: tuple[int, int]) -> Reference:
        """The references of a batch, encoded now or kept from an earlier one."""
        with self._encoding:
            found = self._encode_references(rows, room)
        absent = jax.tree.map(jnp.zeros_like, next(iter(found.values())))
        given = [found[row.reference.digest] if row.reference is not None else absent for row in rows]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *given)

    def _encode_references(self, rows: Sequence[_Region], room: tuple[int, int]) -> dict[Any, Reference]:
        wanted = {row.reference.digest: row.reference for row in rows if row.reference is not None}
        missing: dict[Any, list[_Shown]] = {}
        for digest, shown in wanted.items():
            if (digest, room) in self._encoded:
                self._encoded.move_to_end((digest, room))
            else:
                sides = tuple(canvas_side(side) for side in shown.rgb.shape[:2])
                missing.setdefault((shown.size, shown.views, sides), []).append(shown)
        for (size, views, (height, width)), group in missing.items():
            padded = [*group, *[group[0]] * (self.rows_of(len(group)) - len(group))]
            inputs = {
                "pictures": np.stack([_cut(shown.rgb, height, width) for shown in padded]),
                "box": np.array([[0, 0, shown.rgb.shape[1], shown.rgb.shape[0]] for shown in padded], np.int32),
            }
            static = dict(model=self.model, size=size, views=views, room=room)
            encoded = self.programs.call(reference_program, self.weights, self.lora, inputs, **static)
            for index, shown in enumerate(group):
                self._encoded[shown.digest, room] = jax.tree.map(lambda x: x[index], encoded)  # noqa: B023
        found = {digest: self._encoded[digest, room] for digest in wanted}
        while len(self._encoded) > _KEPT:
            self._encoded.popitem(last=False)
        return found

    def _prompts(
        self,
        texts: Sequence[prompts.TokenizedPrompt],
        rows: Sequence[_Region],
        base: _Base,
        length: int,
        room: int,
    ) -> dict[str, np.ndarray]:
        """Padded prompts; behind the reference's room, used or not, the mask's rows move on."""
        batch = prompts.pad_prompts(texts, length)
        first = self._merged(base.views)
        used = np.array([row.reference.tokens[1] if row.reference else 0 for row in rows])[:, None]
        index = np.where(batch.image_index >= first + used, batch.image_index + room - used, batch.image_index)
        return dict(ids=batch.ids, mask=batch.mask, positions=batch.positions, image_index=index.astype(np.int32))


# -------------------------------------------------------------------------------------------------------------- helpers


def view_tokens(model: ModelConfig, views: Sequence[Size]) -> int:
    """Tokens in a prompt of a picture that the encoder sees at `views` (`ModelConfig.vl_sizes`)."""
    return merged_tokens(patch_grid(*views[-1], model.vl.vision), model.vl.vision.spatial_merge_size)


def reference_room(model: ModelConfig) -> tuple[int, int]:
    """(N, M) tokens that hold every reference up to four times as wide as high, or the other way (`Reference`)."""
    sizes = focus.aspect_buckets(model.vae_area, model.multiple)
    seen = max(math.prod(model.latent_size(size)) for size in sizes) // model.mmdit.patch_size**2
    looks = focus.aspect_buckets(model.condition_area, model.multiple)
    return seen, max(view_tokens(model, model.vl_sizes(width / height)) for height, width in looks)


def fitted(box: np.ndarray, aspects: Sequence[float], size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """The box `[4]` grown to the nearest of `aspects`, and the aspect (width / height) at which it is refined.

    Where the picture, (width, height), leaves too little room, that is the nearest of finer steps: nothing is stretched
    by more than a twentieth.
    """
    sides = lambda box: int(box[2] - box[0]) / int(box[3] - box[1])
    aspect = min(aspects, key=lambda a: abs(math.log(a / sides(box))))
    box = grown(box, aspect, size)
    if abs(math.log(aspect / sides(box))) > math.log(1.05):
        aspect = 2 ** (round(_FINER * math.log2(sides(box))) / _FINER)
    return box, aspect


def grown(box: np.ndarray, aspect: float, size: tuple[int, int]) -> np.ndarray:
    """The box `[4]`, grown about its centre to `aspect` = width / height as far as the picture, (width, height), goes.

    >>> grown(np.array([10, 10, 20, 20]), 2.0, (100, 100)).tolist()
    [5, 10, 25, 20]
    """
    low, sides = box[:2].astype(int), (box[2:] - box[:2]).astype(int)
    wanted = np.array([round(sides[1] * aspect), round(sides[0] / aspect)])
    sides = np.minimum(np.maximum(sides, wanted), size)
    low = low - (sides - (box[2:] - box[:2])) // 2
    low = np.clip(low, 0, np.array(size) - sides)
    return np.concatenate([low, low + sides]).astype(np.int32)


def _cut(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """In the top-left corner of a canvas."""
    return np.pad(array, [(0, height - len(array)), (0, width - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


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
