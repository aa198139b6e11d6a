"""Refinement via Regeneration (arXiv 2604.25636): the picture is made anew from its prompt and what was seen of it.

p(I' | T_system, Z(I), T_prompt): the encoder's tokens of the misaligned picture I condition the generator, its latents
do not, and nothing of it is kept by force. Regeneration repeats: each round reads the picture of the one before.
"""

import contextlib
import dataclasses
import functools
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from refine_jax import bagel, conditioning, flow, images, loading, parallel, prompts
from refine_jax.bagel import BagelModel
from refine_jax.errors import RefineError
from refine_jax.loading import LoraLike
from refine_jax.model import ModelConfig, Size
from refine_jax.models.bagel import Bagel, generate_text, latent_position_ids
from refine_jax.progress import Progress
from refine_jax.refine import TEXT_BUCKETS, canvas_side, generate, power_of_two

Array = jax.Array | np.ndarray

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
        return made, made.astype(jnp.uint8)

    picture = first(inputs["pictures"], inputs["box"])
    picture, rounds = jax.lax.scan(again, picture, inputs["noise"])
    return Regenerated(picture.astype(jnp.uint8), rounds)


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
    """Pictures `[B, h, w, 3] uint8` and the packed latents `[B, N, p·p·C] float32` that they were decoded from."""

    pictures: jax.Array
    latents: jax.Array


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
            encode = jax.vmap(lambda x, key: bagel.encode_images(model, variables, x[None], key)[0])
            latents = bagel.LatentImage(encode(given, inputs["keys"]), model.grid(spec.size))
    context = bagel.read_prefix(
        model,
        variables,
        lora,
        marks,
        system,
        pixels,
        inputs["prompt"],
        drop_text=spec.text_guided,
        drop_image=spec.image_guided,
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
    return Painted(bagel.decode_latents(model, variables, x, spec.size), x)


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


@functools.partial(jax.jit, static_argnames=("size",))
def _fit(pictures: jax.Array, boxes: jax.Array, size: Size) -> jax.Array:
    """Pictures in the corners of canvases `[B, H, W, 3] uint8`, boxes `[B, 4]` -> `[B, h, w, 3] uint8`."""
    return jax.vmap(lambda p, b: bagel.painted(p, b, size))(pictures, boxes).astype(jnp.uint8)


# ------------------------------------------------------------------------------------------------------------- the door


@dataclasses.dataclass(frozen=True)
class _Request:
    """One request, decoded: `bucket` is what requests of a batch share."""

    picture: images.Picture | None
    ids: Any
    rounds: int
    text_cfg: float
    image_cfg: float
    seed: int
    noise: Any
    spec: Any
    length: int

    @property
    def bucket(self) -> Any:
        return self.spec, self.rounds, self.length


class Regenerator:
    """A loaded model that paints pictures anew (RvR) or from text. Make one with `Regenerator.load`.

    This class is BAGEL's; `MMDiTRegenerator` is the same door to the Qwen-Image MMDiT.
    """

    def __init__(
        self,
        model: BagelModel,
        variables: Mapping[str, Any],
        tokenizer: Any,
        lora: Mapping[str, Any] | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        rules: parallel.Rules = parallel.DEFAULT_RULES,
    ):
        """variables: trees under "bagel", "vae"; lora: a tree under "bagel" (may be empty). With a mesh, both are
        already placed on it."""
        self.model = model
        self.variables = jax.device_put(dict(variables))
        self.lora = jax.device_put(dict(lora or {}))
        self.tokenizer = tokenizer
        self._mesh, self._rules = mesh, rules
        self._progress = Progress()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike = "tiny",
        *,
        vae_sides: Size | None = None,
        vit_sides: Size | None = None,
        dtype: str = "float32",
        weights: str | None = None,
        lora: LoraLike | Sequence[LoraLike] = (),
        merge_lora: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        rules: parallel.Rules = parallel.DEFAULT_RULES,
        progress: bool = False,
    ) -> "Regenerator":
        """Load a model that regenerates: the bundled "tiny", a model folder, a BAGEL or RvR folder, or a hub's name.

        vae_sides, vit_sides: longest and shortest side of an image as it is painted and as the tower sees it (default:
        the model's; released 1024, 512 and 980, 224). dtype: "float32" or "bfloat16", of weights and computation.
        weights: "rvr" or "ema", where a released folder holds both. lora, merge_lora, mesh, rules: as `Refiner.load`.

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
            wanted=("regenerating", "rvr", "rvr_vae"),
        )
        kind = Regenerator if isinstance(loaded.config, BagelModel) else MMDiTRegenerator
        return kind(loaded.config, loaded.variables, loaded.tokenizer, loaded.lora, mesh=mesh, rules=rules)

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
        """Paint `image` anew so that it shows what `prompt` says; a PIL image of the size that `painted_size` gives.

        image: PIL image, path or `[H, W, 3] uint8`. rounds: the result is regenerated again, without leaving the
        device; 0 returns the picture as it is. steps: points of the time grid, steps - 1 updates. text_cfg, image_cfg:
        guidance by the context without the prompt and without the image; 1 is off, and without the text's there is no
        image's. renorm, renorm_min: `flow.dual_cfg`; interval: the times lo < t <= hi at which guidance acts; shift: of
        the time grid. noise: packed latent noise `[h·w, p·p·C] float32` of the first round, in place of the seed's.
        Whatever is None is the model's own. progress: a bar on standard error.

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
        as in `regenerate`.
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
        picture = None if image is None else images.read_picture(image)
        max_tokens = _whole("max_tokens", max_tokens, 1, 16384)
        if not isinstance(temperature, numbers.Real) or not 0 <= temperature <= 100:
            raise RefineError(f"temperature {temperature!r}: give a number from 0 to 100")
        seed = _whole("seed", seed, -(2**63), 2**63 - 1)
        ids = bagel.text_ids(self.tokenizer, _text(question))
        inputs = {
            "prompt": _padded([ids], prompts.bucket_length(len(ids), _LENGTHS)),
            "key": _key(seed, 0, 2),
        }
        seen = None
        if picture is not None:
            size = self.model.painted_size(picture.size[::-1])
            seen = self.model.seen_size(size)
            inputs["pictures"] = _fit(*_canvases([picture]), size)
        marks = bagel.Marks.of(self.tokenizer)
        with self._placed():
            said = answer_program(
                self.variables,
                self.lora,
                inputs,
                model=self.model,
                marks=marks,
                seen=seen,
                length=power_of_two(max_tokens),
                temperature=float(temperature),
            )
            said = parallel.fetch(said)[0][:max_tokens].tolist()
        return self.tokenizer.decode(said[: said.index(marks.text_end)] if marks.text_end in said else said)

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """The mesh and its rules in force, where there is one."""
        with contextlib.ExitStack() as stack:
            if self._mesh is not None:
                stack.enter_context(jax.set_mesh(self._mesh))
                stack.enter_context(nn.logical_axis_rules(self._rules))
            yield

    def regenerate_batch(self, requests: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[Image.Image]:
        """Several requests, each a dict of `regenerate`'s arguments; results in the order of the requests.

        Requests of one size and the same settings run as one batch, padded to a power of two; a result does not depend
        on its neighbours. All are read and checked before anything is computed.
        """
        return self._run_all([self._read(**request) for request in requests], progress)

    def generate_batch(self, requests: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[Image.Image]:
        """Several requests, each a dict of `generate`'s arguments; otherwise as `regenerate_batch`."""
        return self._run_all([self._read_generation(**request) for request in requests], progress)

    # ------------------------------------------------------------------------------------------------- reading requests

    def _read(self, image: images.ImageLike, prompt: str, rounds: int = 1, **settings: Any) -> _Request:
        rounds = _whole("rounds", rounds, 0, 100)
        picture = images.read_picture(image)
        width, height = picture.size
        size = self.model.painted_size((height, width))
        seen = self.model.seen_size(size)
        return self._request(picture, self.model.prompt.replace("{}", _text(prompt)), rounds, size, seen, settings)

    def _read_generation(self, prompt: str, size: tuple[int, int] | None = None, **settings: Any) -> _Request:
        model = self.model
        width, height = _sides((model.vae_sides[0],) * 2 if size is None else size, model.stride)
        settings = {
            **settings,
            "renorm": settings.get("renorm") or model.generate_renorm,
            "interval": settings.get("interval") or model.generate_interval,
            "image_cfg": 1.0,
        }
        return self._request(None, _text(prompt), 1, (height, width), None, settings)

    def _request(
        self,
        picture: images.Picture | None,
        text: str,
        rounds: int,
        size: Size,
        seen: Size | None,
        settings: Mapping[str, Any],
    ) -> _Request:
        model = self.model
        unknown = sorted(set(settings) - {*_NUMBERS, "steps", "renorm", "interval", "seed", "noise"})
        if unknown:
            raise RefineError(f"request: unknown field {unknown[0]!r}")
        given = {name: value for name, value in settings.items() if value is not None}
        grid = model.grid(size)
        latent_position_ids(grid, model.bagel)  # refuses what is too large
        steps = _whole("steps", given.get("steps", model.steps), 2, 1000)
        value = {}
        for name, (low, high) in _NUMBERS.items():
            number = given.get(name, getattr(model, name))
            if not isinstance(number, numbers.Real) or not low <= number <= high:
                raise RefineError(f"{name} {number!r}: give a number from {low:g} to {high:g}")
            value[name] = float(number)
        renorm = given.get("renorm", model.renorm)
        if renorm not in flow.RENORMS:
            raise RefineError(f"renorm {renorm!r}: give one of {', '.join(flow.RENORMS)}")
        interval = tuple(given.get("interval", model.interval))
        if len(interval) != 2 or not all(isinstance(t, numbers.Real) and 0 <= t <= 1 for t in interval):
            raise RefineError(f"interval {interval!r}: give two times (lo, hi) within 0 and 1")
        seed = _whole("seed", given.get("seed", 0), -(2**63), 2**63 - 1)
        noise = given.get("noise")
        shape = (grid[0] * grid[1], model.bagel.latent_dim)
        if noise is not None and tuple(noise.shape) != shape:
            raise RefineError(f"noise of shape {tuple(noise.shape)}: the packed latents are {shape}")
        ids = bagel.text_ids(self.tokenizer, text)
        text_guided = value["text_cfg"] > 1
        spec = BagelSpec(
            size=size,
            seen=seen,
            steps=steps,
            shift=value["shift"],
            renorm=renorm,
            renorm_min=value["renorm_min"],
            interval=tuple(map(float, interval)),
            text_guided=text_guided,
            image_guided=text_guided and value["image_cfg"] > 1,
        )
        length = prompts.bucket_length(len(ids), _LENGTHS)
        return _Request(picture, ids, rounds, value["text_cfg"], value["image_cfg"], seed, noise, spec, length)

    # ------------------------------------------------------------------------------------------------- running a bucket

    def _run_all(self, requests: list[_Request], progress: bool) -> list[Image.Image]:
        results: list[Image.Image | None] = [None] * len(requests)
        groups: dict[Any, list[int]] = {}
        for number, request in enumerate(requests):
            if request.rounds == 0:
                results[number] = Image.fromarray(request.picture.rgb)
            else:
                groups.setdefault(request.bucket, []).append(number)
        for (spec, rounds, length), members in groups.items():
            pictures = self._run(spec, rounds, length, [requests[k] for k in members], progress)
            for number, picture in zip(members, pictures):
                results[number] = Image.fromarray(picture)
        return results

    def _run(
        self, spec: BagelSpec, rounds: int, length: int, members: list[_Request], progress: bool
    ) -> list[np.ndarray]:
        """Requests of one bucket: their pictures `[h, w, 3] uint8`."""
        padded = members + [members[0]] * (power_of_two(len(members)) - len(members))
        inputs: dict[str, Any] = {
            "prompt": _padded([m.ids for m in padded], length),
            "text_cfg": np.array([m.text_cfg for m in padded], np.float32),
            "image_cfg": np.array([m.image_cfg for m in padded], np.float32),
        }
        with contextlib.ExitStack() as stack:
            if progress:
                spec = dataclasses.replace(spec, report=self._progress.step)
            stack.enter_context(self._placed())
            pictures, marks = None, bagel.Marks.of(self.tokenizer)
            if spec.seen is not None:
                system = bagel.text_ids(self.tokenizer, self.model.system)
                inputs["system"] = _padded([system] * len(padded), len(system))
                pictures = _fit(*_canvases([m.picture for m in padded]), spec.size)
            for number in range(rounds):
                if spec.seen is not None:
                    inputs["pictures"] = pictures
                    inputs["keys"] = jnp.stack([_key(m.seed, number, 1) for m in padded])
                inputs["noise"] = jnp.stack([self._noise(m, number) for m in padded])
                with self._progress.show(spec.steps - 1) if progress else contextlib.nullcontext():
                    pictures = bagel_program(
                        self.variables,
                        self.lora,
                        inputs,
                        model=self.model,
                        marks=marks,
                        spec=spec,
                    ).pictures
                    if progress:
                        pictures.block_until_ready()
            return list(parallel.fetch(pictures)[: len(members)])

    def _noise(self, request: _Request, number: int) -> jax.Array:
        grid = self.model.grid(request.spec.size)
        if request.noise is not None and number == 0:
            return jnp.asarray(request.noise, jnp.float32)
        key = _key(request.seed, number, 0)
        return jax.random.normal(key, (grid[0] * grid[1], self.model.bagel.latent_dim), jnp.float32)


class MMDiTRegenerator(Regenerator):
    """RvR on the Qwen-Image MMDiT: a model of conditioning "rvr".

    Requests as `Regenerator`'s, but: text_cfg is the true CFG scale, away from the model's negative prompt; noise is
    unpacked, `[h, w, C]`; there is no image's guidance, renorm, interval, shift. From text alone it paints what it was
    trained to (`config.data.text_to_image`), with the prompt in the same template.
    """

    def _read(self, image: images.ImageLike, prompt: str, rounds: int = 1, **settings: Any) -> _Request:
        rounds = _whole("rounds", rounds, 0, 100)
        picture = images.read_picture(image)
        size = self.model.vae_size(picture.size[0] / picture.size[1])
        return self._mmdit_request(picture, prompt, rounds, size, settings)

    def _read_generation(self, prompt: str, size: tuple[int, int] | None = None, **settings: Any) -> _Request:
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
    ) -> _Request:
        model = self.model
        given = {name: value for name, value in settings.items() if value is not None}
        if unknown := sorted(set(given) - {"steps", "text_cfg", "seed", "noise"}):
            raise RefineError(f"{unknown[0]}: this model, an MMDiT, has no such setting; leave it out")
        ratio = size[1] / size[0]
        scale = given.get("text_cfg", model.true_cfg_scale)
        if not isinstance(scale, numbers.Real) or not 0 <= scale <= 1e3:
            raise RefineError(f"text_cfg {scale!r}: give a number from 0 to 1000")
        shape, noise = (*model.latent_size(size), model.vae.z_dim), given.get("noise")
        if noise is not None and tuple(noise.shape) != shape:
            raise RefineError(f"noise of shape {tuple(noise.shape)}: the latents are {shape} (h, w, C)")
        encode = lambda text: prompts.encode_prompt(
            self.tokenizer,
            model.prompt,
            text,
            [model.vl_grid(ratio)],
            model.vl.vision.spatial_merge_size,
            [picture is not None],
        )
        ids = [encode(_text(prompt))] + ([encode(model.negative_prompt)] if scale > 1 else [])
        steps = _whole("steps", given.get("steps", model.steps), 1, 1000)
        spec = (MMDiTSpec(size, model.vl_sizes(ratio)), steps, len(ids))
        seed = _whole("seed", given.get("seed", 0), -(2**63), 2**63 - 1)
        length = prompts.bucket_length(max(map(len, ids)), TEXT_BUCKETS)
        return _Request(picture, ids, rounds, float(scale), 1.0, seed, noise, spec, length)

    def _run(self, spec: Any, rounds: int, length: int, members: list[_Request], progress: bool) -> list[np.ndarray]:
        spec, steps, texts = spec
        padded = members + [members[0]] * (power_of_two(len(members)) - len(members))
        batch = lambda k: vars(prompts.pad_prompts([m.ids[k] for m in padded], length))
        grid = self.model.latent_size(spec.size)
        inputs = {
            "prompt": batch(0),
            "sigmas": flow.schedule(self.model.scheduler, steps, grid[0] * grid[1] // self.model.mmdit.patch_size**2),
            "true_cfg_scale": np.array([m.text_cfg for m in padded], np.float32),
            "noise": jnp.stack([jnp.stack([self._noise(m, number) for m in padded]) for number in range(rounds)]),
        }
        if texts > 1:
            inputs["negative"] = batch(1)
        blank = images.Picture(np.zeros((*spec.size, 3), np.uint8), None, "")
        inputs["pictures"], inputs["box"] = _canvases([m.picture or blank for m in padded])
        inputs["has_image"] = np.array([m.picture is not None for m in padded])
        with contextlib.ExitStack() as stack:
            if progress:
                spec = dataclasses.replace(spec, report=self._progress.step)
                stack.enter_context(self._progress.show(steps))
            stack.enter_context(self._placed())
            made = mmdit_program(self.variables, self.lora, inputs, model=self.model, spec=spec)
            return list(parallel.fetch(made.pictures)[: len(members)])

    def _noise(self, request: _Request, number: int) -> jax.Array:
        if request.noise is not None and number == 0:
            return jnp.asarray(request.noise, jnp.float32)
        shape = (*self.model.latent_size(request.spec[0].size), self.model.vae.z_dim)
        return jax.random.normal(_key(request.seed, number, 0), shape, jnp.float32)


# -------------------------------------------------------------------------------------------------------------- helpers

# Lengths of prompts of compiled programs; at most a third of a prompt is padding.
_LENGTHS = (*TEXT_BUCKETS, 6144, 8192, 12288, 16384)
_NUMBERS = {"text_cfg": (0.0, 1e3), "image_cfg": (0.0, 1e3), "renorm_min": (0.0, 1.0), "shift": (0.01, 1e3)}


def _key(seed: int, number: int, purpose: int) -> jax.Array:
    """The random key of a round: it depends on the request alone."""
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, number, purpose]
    return functools.reduce(
        lambda key, word: jax.random.fold_in(key, np.uint32(word)), words[1:], jax.random.key(words[0])
    )


def _padded(rows: Sequence[np.ndarray], length: int) -> bagel.Prompt:
    ids = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    return bagel.Prompt(ids, np.array([len(row) for row in rows], np.int32))


def _canvases(pictures: Sequence[images.Picture]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in the corners of canvases of one size `[B, H, W, 3] uint8`, and where they lie there `[B, 4] int32`."""
    side = [canvas_side(max(p.rgb.shape[axis] for p in pictures)) for axis in (0, 1)]
    spare = lambda p: [(0, side[0] - p.rgb.shape[0]), (0, side[1] - p.rgb.shape[1]), (0, 0)]
    return np.stack([np.pad(p.rgb, spare(p)) for p in pictures]), np.array(
        [[0, 0, *p.size] for p in pictures], np.int32
    )


def _sides(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(width, height), checked."""
    try:
        width, height = (int(side) for side in size)
    except (TypeError, ValueError):
        raise RefineError(f"size {size!r}: give (width, height) in pixels") from None
    if any(side < stride or side % stride for side in (width, height)):
        raise RefineError(f"size {width}x{height}: give sides that are multiples of {stride}")
    return width, height


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= value <= high:
        raise RefineError(f"{name} {value!r}: give a whole number from {low} to {high}")
    return int(value)


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise RefineError(f"prompt: cannot use a {type(prompt).__name__}; give a text")
    return prompt
