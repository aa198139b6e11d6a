"""Refinement via Regeneration (arXiv 2604.25636): the picture is made anew from its prompt and what was seen of it.

p(I' | T_system, Z(I), T_prompt): the encoder's tokens of the misaligned picture I condition the generator, its latents
do not, and nothing of it is kept by force. Regeneration repeats: each round reads the picture of the one before.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from refine_jax import bagel, executables, flow, images, limits, loading, parallel, prompts, serving
from refine_jax.bagel import BagelModel
from refine_jax.errors import RefineError
from refine_jax.focus import bucket_size
from refine_jax.loading import LoraLike
from refine_jax.model import Size
from refine_jax.models.bagel import latent_position_ids
from refine_jax.progress import Progress
from refine_jax.refine import TEXT_BUCKETS
from refine_jax.regenerate_programs import (
    BagelSpec,
    MMDiTSpec,
    answer_program,
    bagel_program,
    fit_program,
    mmdit_program,
)
from refine_jax.serving import Bucket, canvas_side, power_of_two

Array = jax.Array | np.ndarray

# ------------------------------------------------------------------------------------------------------------- the door


@dataclasses.dataclass(frozen=True)
class _Request:
    """One request, decoded: its bucket, and its rows of the program's inputs."""

    bucket: Bucket
    picture: images.Picture | None
    ids: Any
    text_cfg: float
    image_cfg: float
    seed: int
    noise: Any


class Regenerator(serving.Door):
    """A loaded model that paints pictures anew (RvR) or from text. Make one with `Regenerator.load`.

    This class is BAGEL's, with trees under "bagel", "vae" (LoRA under "bagel"); `MMDiTRegenerator` is the same door to
    the Qwen-Image MMDiT.
    """

    def __init__(self, *args: Any, side_step: int | None = None, **settings: Any):
        """As `serving.Door`; side_step: as `load` takes it."""
        super().__init__(*args, **settings)
        own = self._own_step()
        self._side_step = limits.whole("side_step", own if side_step is None else side_step, (own, 4096))
        if self._side_step % own:
            raise RefineError(f"side_step {side_step}: give a multiple of {own}, this model's own")

    def _own_step(self) -> int:
        return self.model.stride

    @classmethod
    def load(
        cls,
        model: str | os.PathLike = "tiny",
        *,
        vae_sides: Size | None = None,
        vit_sides: Size | None = None,
        dtype: str | None = None,
        weights: str | None = None,
        lora: LoraLike | Sequence[LoraLike] = (),
        merge_lora: bool = False,
        quantize: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: parallel.Rules = parallel.DEFAULT_RULES,
        batch_size: int | None = None,
        side_step: int | None = None,
        store: executables.Store | None = None,
        later: bool = False,
        progress: bool = False,
    ) -> "Regenerator":
        """Load a model that regenerates: the bundled "tiny", a model folder, a BAGEL or RvR folder, or a hub's name.

        vae_sides, vit_sides: longest and shortest side of an image as it is painted and as the tower sees it (default:
        the model's; released 1024, 512 and 980, 224). weights: "rvr" or "ema", where a released folder
        holds both. dtype, lora, merge_lora, quantize, mesh, rules, batch_size, store, later: as `Refiner.load`.
        side_step: sides of what is painted from a picture are multiples of so many pixels, for which it is stretched a
        little: few programs serve pictures of all sizes (default: the model's own step, 16 for BAGEL).

        Raises `RefineError` for an unknown model, a damaged folder, a model that refines regions.
        """
        loaded = loading.load(
            "tiny-rvr" if model == "tiny" else model,
            dtype=dtype,
            vae_sides=vae_sides,
            vit_sides=vit_sides,
            weights=weights,
            adapters=lora,
            merge=merge_lora,
            mesh=mesh,
            rules=rules,
            progress=progress,
            quantize=quantize,
            later=later,
            wanted=("regenerating", "rvr", "rvr_vae"),
        )
        kind = Regenerator if isinstance(loaded.config, BagelModel) else MMDiTRegenerator
        settings = dict(mesh=mesh, rules=rules, batch_size=batch_size, store=store, side_step=side_step)
        return kind(loaded.config, loaded.variables, loaded.tokenizer, loaded.lora, **settings)

    def regenerate(
        self,
        image: images.ImageLike,
        prompt: str,
        rounds: int = 1,
        *,
        steps: int | None = None,
        text_cfg: float | None = None,
        image_cfg: float | None = None,
        renorm: str | None = None,
        renorm_min: float | None = None,
        interval: tuple[float, float] | None = None,
        shift: float | None = None,
        seed: int = 0,
        noise: Array | None = None,
        progress: bool = False,
    ) -> Image.Image:
        """Paint `image` anew so that it shows what `prompt` says; a PIL image of the size that `painted_size` and
        `side_step` give.

        image: PIL image, path or `[H, W, 3] uint8`, seen on white where it is transparent. rounds: the result is
        regenerated again, without leaving the device; 0 returns the picture as it is seen. steps: points of the time
        grid, steps - 1 updates. text_cfg, image_cfg: guidance by the context without the prompt and without the image;
        1 is off, and without the text's there is no image's. renorm, renorm_min: `flow.dual_cfg`; interval: the times
        lo < t <= hi at which guidance acts; shift: of the time grid. noise: packed latent noise `[h·w, p·p·C] float32`
        of the first round, in place of the seed's. Whatever is None is the model's own. progress: a bar on standard
        error.

        Raises `RefineError` for an unreadable picture, a prompt that is too long, settings out of range.
        """
        request = dict(
            image=image,
            prompt=prompt,
            rounds=rounds,
            steps=steps,
            text_cfg=text_cfg,
            image_cfg=image_cfg,
            renorm=renorm,
            renorm_min=renorm_min,
            interval=interval,
            shift=shift,
            seed=seed,
            noise=noise,
        )
        return self.regenerate_batch([request], progress=progress)[0]

    def generate(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        *,
        steps: int | None = None,
        text_cfg: float | None = None,
        renorm: str | None = None,
        renorm_min: float | None = None,
        interval: tuple[float, float] | None = None,
        shift: float | None = None,
        seed: int = 0,
        noise: Array | None = None,
        progress: bool = False,
    ) -> Image.Image:
        """Paint what `prompt` says, as the base model does: the prompt as it is, no system text, no picture.

        size: (width, height) in pixels, multiples of `model.stride` (default: a square of the longest side); the rest
        as in `regenerate`. As in the released program there is guidance by the picture too, though there is none: it
        leads away from the prompt's own velocity, text_cfg 4.0 and 1.5 together as 5.5 alone.
        """
        request = dict(
            prompt=prompt,
            size=size,
            steps=steps,
            text_cfg=text_cfg,
            renorm=renorm,
            renorm_min=renorm_min,
            interval=interval,
            shift=shift,
            seed=seed,
            noise=noise,
        )
        return self.generate_batch([request], progress=progress)[0]

    def answer(
        self,
        image: images.ImageLike | None,
        question: str,
        *,
        max_tokens: int = 500,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """What the model says of a picture: the text that follows [picture][question] (understanding).

        image: as in `regenerate`, None for a question alone. temperature: 0 takes the likeliest token each time,
        otherwise tokens are drawn, by the seed. Raises `RefineError` as `regenerate`, and for an MMDiT, which is mute.
        """
        picture = None if image is None else images.read_picture(image).on_white()
        max_tokens = limits.whole("max_tokens", max_tokens, (1, 16384))
        temperature = limits.number("temperature", temperature, (0.0, 100.0))
        seed = limits.whole("seed", seed, limits.SEED)
        ids = bagel.text_ids(self.tokenizer, _text(question))
        inputs = {
            "prompt": _padded([ids], prompts.bucket_length(len(ids), _LENGTHS)),
            "key": _key(seed, 0, 2),
        }
        seen = None
        if picture is not None:
            size = self.model.painted_size(picture.size[::-1])
            seen = self.model.seen_size(size)
            inputs["pictures"] = fit_program(*_canvases([picture], *_sides_of(picture)), size=size)
        marks = bagel.Marks.of(self.tokenizer)
        with self.placed():
            said = answer_program(
                self.variables,
                self.lora,
                inputs,
                model=self.model,
                marks=marks,
                seen=seen,
                length=power_of_two(max_tokens),
                temperature=temperature,
            )
            said = parallel.fetch(said)[0][:max_tokens].tolist()
        return self.tokenizer.decode(said[: said.index(marks.text_end)] if marks.text_end in said else said)

    def regenerate_batch(self, requests: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[Image.Image]:
        """Several requests, each a dict of `regenerate`'s arguments; results in the order of the requests.

        Requests of one size and the same settings run in batches of `most_rows`; a result does not depend on its
        neighbours. All are read and checked before anything is computed.
        """
        return self.run(serving.read_all(self.read, requests), progress)

    def generate_batch(self, requests: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[Image.Image]:
        """Several requests, each a dict of `generate`'s arguments; otherwise as `regenerate_batch`."""
        return self.run(serving.read_all(self.read_generation, requests), progress)

    # ------------------------------------------------------------------------------------------------- reading requests

    def read(self, image: images.ImageLike, prompt: str, rounds: int = 1, **settings: Any) -> serving.Job:
        """One request, `regenerate`'s arguments, decoded and checked; nothing is computed."""
        rounds = limits.whole("rounds", rounds, limits.ROUNDS)
        picture = images.read_picture(image).on_white()
        width, height = picture.size
        size = bagel.fitted_size((height, width), self.model.vae_sides, self._side_step)
        seen = self.model.seen_size(size)
        return self._request(picture, self.model.prompt.replace("{}", _text(prompt)), rounds, size, seen, settings)

    def read_generation(self, prompt: str, size: tuple[int, int] | None = None, **settings: Any) -> serving.Job:
        """One request, `generate`'s arguments, decoded and checked; nothing is computed."""
        model = self.model
        largest = model.vae_sides[0] // model.stride * model.stride
        width, height = _sides((largest, largest) if size is None else size, model.stride)
        if "image_cfg" in settings:
            raise RefineError("request: unknown field 'image_cfg'")
        settings = {name: value for name, value in settings.items() if value is not None}
        own = dict(renorm=model.generate_renorm, interval=model.generate_interval, image_cfg=model.generate_image_cfg)
        settings = {**own, **settings}
        return self._request(None, _text(prompt), 1, (height, width), None, settings)

    def _request(
        self,
        picture: images.Picture | None,
        text: str,
        rounds: int,
        size: Size,
        seen: Size | None,
        settings: Mapping[str, Any],
    ) -> serving.Job:
        model = self.model
        unknown = sorted(set(settings) - {*_NUMBERS, "steps", "renorm", "interval", "seed", "noise"})
        if unknown:
            raise RefineError(f"request: unknown field {unknown[0]!r}")
        given = {name: value for name, value in settings.items() if value is not None}
        grid = model.grid(size)
        latent_position_ids(grid, model.bagel)  # refuses what is too large
        steps = limits.whole("steps", given.get("steps", model.steps), (2, limits.STEPS[1]))
        value = {
            name: limits.number(name, given.get(name, getattr(model, name)), bounds)
            for name, bounds in _NUMBERS.items()
        }
        renorm = given.get("renorm", model.renorm)
        if renorm not in limits.RENORMS:
            raise RefineError(f"renorm {renorm!r}: give one of {', '.join(limits.RENORMS)}")
        interval = _interval(given.get("interval", model.interval))
        seed = limits.whole("seed", given.get("seed", 0), limits.SEED)
        shape = (grid[0] * grid[1], model.bagel.latent_dim)
        noise = serving.read_noise(given.get("noise"), shape, "h·w, p·p·C")
        ids = bagel.text_ids(self.tokenizer, text)
        text_guided = value["text_cfg"] > 1
        spec = BagelSpec(
            size=size,
            seen=seen,
            steps=steps,
            shift=value["shift"],
            renorm=renorm,
            renorm_min=value["renorm_min"],
            interval=interval,
            text_guided=text_guided,
            image_guided=text_guided and value["image_cfg"] > 1,
        )
        length = prompts.bucket_length(len(ids), _LENGTHS)
        bucket = Bucket((spec, rounds), (*_sides_of(picture), length))
        return _job(_Request(bucket, picture, ids, value["text_cfg"], value["image_cfg"], seed, noise), rounds)

    # ------------------------------------------------------------------------------------------------- running a bucket

    def launch(self, bucket: Bucket, rows: Sequence[_Request], progress: Progress | None = None) -> serving.Launched:
        """Start a batch; results: pictures `[R, h, w, 3] uint8`."""
        (spec, rounds), (height, width, length) = bucket
        padded = [*rows, *[rows[0]] * (self.rows_of(len(rows)) - len(rows))]
        inputs: dict[str, Any] = {
            "prompt": _padded([row.ids for row in padded], length),
            "text_cfg": np.array([row.text_cfg for row in padded], np.float32),
            "image_cfg": np.array([row.image_cfg for row in padded], np.float32),
        }
        grid = self.model.grid(spec.size)
        shape = (grid[0] * grid[1], self.model.bagel.latent_dim)
        with self.placed():
            pictures, finite, marks = None, np.ones(len(padded), bool), bagel.Marks.of(self.tokenizer)
            if spec.seen is not None:
                system = bagel.text_ids(self.tokenizer, self.model.system)
                inputs["system"] = _padded([system] * len(padded), len(system))
                canvases = _canvases([row.picture for row in padded], height, width)
                pictures = self.programs.call(fit_program, *canvases, size=spec.size)
            for number in range(rounds):
                if spec.seen is not None:
                    inputs["pictures"] = pictures
                    inputs["keys"] = jnp.stack([_key(row.seed, number, 1) for row in padded])
                inputs["noise"] = self._noise(padded, number, shape)
                with progress.show(spec.steps - 1) if progress else contextlib.nullcontext():
                    painted = self.sample(bagel_program, inputs, spec, progress, marks=marks)
                pictures, finite = painted.pictures, finite & painted.finite
        return serving.Launched(pictures, finite)

    @staticmethod
    def _noise(rows: Sequence[_Request], number: int, shape: tuple[int, ...]) -> jax.Array:
        """The noise of a round `[R, *shape]`: a request's own counts in the first."""
        given = [None if number else row.noise for row in rows]
        return serving.draw_noise([(row.seed, (number, 0), noise) for row, noise in zip(rows, given)], shape)


class MMDiTRegenerator(Regenerator):
    """RvR on the Qwen-Image MMDiT: a model of conditioning "rvr".

    Requests as `Regenerator`'s, but: text_cfg is the true CFG scale, away from the model's negative prompt; noise is
    unpacked, `[h, w, C]`; there is no image's guidance, renorm, interval, shift. From text alone it paints what it was
    trained to (`config.data.text_to_image`), with the prompt in the same template.
    """

    def _own_step(self) -> int:
        return self.model.multiple

    def read(self, image: images.ImageLike, prompt: str, rounds: int = 1, **settings: Any) -> serving.Job:
        rounds = limits.whole("rounds", rounds, limits.ROUNDS)
        picture = images.read_picture(image).on_white()
        size = bucket_size(self.model.vae_area, picture.size[0] / picture.size[1], self._side_step)
        return self._mmdit_request(picture, prompt, rounds, size, settings)

    def read_generation(self, prompt: str, size: tuple[int, int] | None = None, **settings: Any) -> serving.Job:
        model = self.model
        if size is None:
            found = model.vae_size(1.0)
        else:
            width, height = _sides(size, model.multiple)
            found = model.vae_size(width / height)
            if found != (height, width):
                raise RefineError(
                    f"size {width}x{height}: this model paints {found[1]}x{found[0]} at that aspect; give that"
                )
        return self._mmdit_request(None, prompt, 1, found, settings)

    def answer(self, *_: Any, **__: Any) -> str:
        raise RefineError("answer: this model, an MMDiT, paints and says nothing; use a BAGEL or RvR model")

    def _mmdit_request(
        self, picture: images.Picture | None, prompt: str, rounds: int, size: Size, settings: Mapping[str, Any]
    ) -> serving.Job:
        model = self.model
        given = {name: value for name, value in settings.items() if value is not None}
        if unknown := sorted(set(given) - {"steps", "text_cfg", "seed", "noise"}):
            raise RefineError(f"{unknown[0]}: this model, an MMDiT, has no such setting; leave it out")
        ratio = size[1] / size[0]
        scale = given.get("text_cfg", model.true_cfg_scale)
        scale = limits.number("text_cfg", scale, limits.TEXT_CFG)
        shape = (*model.latent_size(size), model.vae.z_dim)
        noise = serving.read_noise(given.get("noise"), shape, "h, w, C")
        encode = lambda text: prompts.encode_prompt(
            self.tokenizer,
            model.prompt,
            text,
            [model.vl_grid(ratio)],
            model.vl.vision.spatial_merge_size,
            [picture is not None],
        )
        ids = [encode(_text(prompt))] + ([encode(model.negative_prompt)] if scale > 1 else [])
        steps = limits.whole("steps", given.get("steps", model.steps), limits.STEPS)
        seed = limits.whole("seed", given.get("seed", 0), limits.SEED)
        length = prompts.bucket_length(max(map(len, ids)), TEXT_BUCKETS)
        blank = images.Picture(np.zeros((*size, 3), np.uint8), None, "")
        base = (MMDiTSpec(size, model.vl_sizes(ratio)), rounds, steps, len(ids))
        bucket = Bucket(base, (*_sides_of(picture or blank), length))
        return _job(_Request(bucket, picture, ids, scale, 1.0, seed, noise), rounds)

    def launch(self, bucket: Bucket, rows: Sequence[_Request], progress: Progress | None = None) -> serving.Launched:
        (spec, rounds, steps, texts), (height, width, length) = bucket
        padded = [*rows, *[rows[0]] * (self.rows_of(len(rows)) - len(rows))]
        batch = lambda k: vars(prompts.pad_prompts([row.ids[k] for row in padded], length))
        grid = self.model.latent_size(spec.size)
        inputs = {
            "prompt": batch(0),
            "sigmas": flow.schedule(self.model.scheduler, steps, grid[0] * grid[1] // self.model.mmdit.patch_size**2),
            "true_cfg_scale": np.array([row.text_cfg for row in padded], np.float32),
        }
        if texts > 1:
            inputs["negative"] = batch(1)
        blank = images.Picture(np.zeros((*spec.size, 3), np.uint8), None, "")
        inputs["pictures"], inputs["box"] = _canvases([row.picture or blank for row in padded], height, width)
        inputs["has_image"] = np.array([row.picture is not None for row in padded])
        shape = (*grid, self.model.vae.z_dim)
        with self.placed(), progress.show(steps) if progress else contextlib.nullcontext():
            inputs["noise"] = jnp.stack([self._noise(padded, number, shape) for number in range(rounds)])
            made = self.sample(mmdit_program, inputs, spec, progress)
        return serving.Launched(made.pictures, made.finite)


# -------------------------------------------------------------------------------------------------------------- helpers

# Lengths of prompts of compiled programs; at most a third of a prompt is padding.
_LENGTHS = (*TEXT_BUCKETS, 6144, 8192, 12288, 16384)
_NUMBERS = dict(text_cfg=limits.TEXT_CFG, image_cfg=limits.IMAGE_CFG, renorm_min=limits.RENORM_MIN, shift=limits.SHIFT)


def _key(seed: int, number: int, purpose: int) -> jax.Array:
    """The random key of a round: it depends on the request alone."""
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, number, purpose]
    return functools.reduce(
        lambda key, word: jax.random.fold_in(key, np.uint32(word)), words[1:], jax.random.key(words[0])
    )


def _padded(rows: Sequence[np.ndarray], length: int) -> bagel.Prompt:
    ids = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    return bagel.Prompt(ids, np.array([len(row) for row in rows], np.int32))


def _job(request: _Request, rounds: int) -> serving.Job:
    """Of no rounds the picture is the result."""
    pixels = 0 if request.picture is None else request.picture.rgb.size // 3
    if rounds == 0:
        return serving.Job((), lambda _: Image.fromarray(request.picture.rgb), pixels)
    return serving.Job((request,), lambda results: Image.fromarray(results[0]), pixels)


def _sides_of(picture: images.Picture | None) -> tuple[int, int]:
    """Height and width of the picture's canvas."""
    return (0, 0) if picture is None else tuple(canvas_side(side) for side in picture.rgb.shape[:2])


def _canvases(pictures: Sequence[images.Picture], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in the corners of canvases `[B, H, W, 3] uint8`, and where they lie there `[B, 4] int32`."""
    spare = lambda p: [(0, height - p.rgb.shape[0]), (0, width - p.rgb.shape[1]), (0, 0)]
    return np.stack([np.pad(p.rgb, spare(p)) for p in pictures]), np.array(
        [[0, 0, *p.size] for p in pictures], np.int32
    )


def _sides(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(width, height), checked."""
    try:
        width, height = (int(side) for side in size)
    except (TypeError, ValueError, OverflowError):
        raise RefineError(f"size {size!r}: give (width, height) in pixels") from None
    if any(side < stride or side % stride for side in (width, height)):
        raise RefineError(f"size {width}x{height}: give sides that are multiples of {stride}")
    return width, height


def _interval(given: Any) -> tuple[float, float]:
    try:
        low, high = given
    except (TypeError, ValueError):
        raise RefineError(f"interval {given!r}: give two times (lo, hi) within 0 and 1") from None
    return limits.interval("interval", *(limits.number("interval", time, limits.TIME) for time in (low, high)))


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise RefineError(f"prompt: cannot use a {type(prompt).__name__}; give a text")
    return prompt
