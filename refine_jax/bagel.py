"""A whole BAGEL or RvR model: its two networks with all that a checkpoint decides, and how they compose.

What the sampler (`regenerate`) and the trainer (`objectives`) both do to arrays stands here, once. `model` is the same
for the Qwen-Image family.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from refine_jax import conditioning, flow, prompts
from refine_jax.errors import RefineError
from refine_jax.focus import resample
from refine_jax.models import bagel, siglip
from refine_jax.models.bagel import Bagel, BagelConfig, Cache, Segments
from refine_jax.models.flux_vae import FluxVAE, FluxVAEConfig, denormalize, normalize
from refine_jax.models.layers import each_row, param_shapes

Array = jax.Array | np.ndarray
Size = tuple[int, int]

# The task, as the released training data states it, and what the released sampler adds behind it.
TASK = (
    "Analyze the potential misalignment between the generated image and the user's prompt. Then, re-generate the image "
    "to precisely align with the user's prompt.\n"
)
SYSTEM_TRAINING = TASK
SYSTEM_SAMPLING = TASK + "\nHere is the generated image:\n"
PROMPT = "Here is the user's prompt: {}. "
NETWORKS = ("bagel", "vae")
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_MAX_PIXELS = 14 * 14 * 9 * 1024  # of either view of an image (`ImageTransform`)


@dataclasses.dataclass(frozen=True)
class BagelModel:
    """Everything about a checkpoint but its weights; hashable, a static argument of compiled programs.

    vae_sides, vit_sides: longest and shortest side of an image as it is painted and as the tower sees it. system:
    the text before the image (released: `SYSTEM_SAMPLING`; the training data has `SYSTEM_TRAINING`); prompt: the text
    after it, with one {} for the user's. The rest are the sampler's defaults: steps counts points of the time grid, so
    steps - 1 updates; interval: the times at which guidance acts, lo < t <= hi; generate_image_cfg, generate_renorm,
    generate_interval: of text-to-image, where the context without the picture is the whole one. conditioning: what is
    shown of an image, "rvr" (the tower's tokens alone) or "rvr_vae" (its latents before them, as in the ablation of the
    paper and in editing).
    """

    bagel: BagelConfig = BagelConfig()
    vae: FluxVAEConfig = FluxVAEConfig()
    vae_sides: Size = (1024, 512)
    vit_sides: Size = (980, 224)
    system: str = SYSTEM_SAMPLING
    prompt: str = PROMPT
    steps: int = 50
    shift: float = 3.0
    text_cfg: float = 4.0
    image_cfg: float = 2.0
    renorm: str = "text_channel"
    renorm_min: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    generate_image_cfg: float = 1.5
    generate_renorm: str = "global"
    generate_interval: tuple[float, float] = (0.4, 1.0)
    conditioning: str = "rvr"

    def __post_init__(self) -> None:
        if self.conditioning not in ("rvr", "rvr_vae"):
            raise RefineError(f"conditioning {self.conditioning!r}: choose one of rvr, rvr_vae")
        if self.bagel.latent_channels != self.vae.z_channels:
            raise RefineError(
                f"model: bagel.latent_channels {self.bagel.latent_channels} is not vae.z_channels {self.vae.z_channels}"
            )
        if self.prompt.count("{}") != 1:
            raise RefineError(f"model: prompt {self.prompt[:60]!r} must hold exactly one {{}}")
        for name, stride in (("vae_sides", self.stride), ("vit_sides", self.bagel.vit.patch_size)):
            sides = getattr(self, name)
            pair = isinstance(sides, (tuple, list)) and len(sides) == 2 and all(isinstance(x, int) for x in sides)
            if not pair or not stride <= sides[1] <= sides[0]:
                raise RefineError(f"{name} {sides!r}: give longest and shortest side, at least {stride}")

    @property
    def stride(self) -> int:
        """Image pixels along one side of a latent token."""
        return self.vae.downsample * self.bagel.latent_patch_size

    # --------------------------------------------------------------------------------------------------- the manifest

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], **overrides: Any) -> "BagelModel":
        """From the JSON of a model folder. Raises `RefineError` for a missing network or an unknown field."""
        own = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in manifest.items():
            if name in ("format", "about", "source"):
                continue
            if name not in own:
                raise RefineError(f"model manifest: unknown field {name!r}; written by a newer version?")
            try:
                if name == "bagel":
                    vit = siglip.SiglipConfig(**value["vit"])
                    values[name] = BagelConfig(**{k: _frozen(v) for k, v in value.items() if k != "vit"}, vit=vit)
                elif name == "vae":
                    values[name] = FluxVAEConfig(**{k: _frozen(v) for k, v in value.items()})
                else:
                    values[name] = _frozen(value)
            except (AttributeError, KeyError, TypeError) as error:
                raise RefineError(f"model manifest: {name}: {error}") from None
        missing = [name for name in NETWORKS if name not in values]
        if missing:
            raise RefineError(f"model manifest: holds no {', '.join(missing)}; train or convert the whole model")
        return cls(**{**values, **{k: v for k, v in overrides.items() if v is not None}})

    def to_manifest(self) -> dict[str, Any]:
        """The inverse of `from_manifest`: plain JSON values."""
        return dataclasses.asdict(self)

    # --------------------------------------------------------------------------------------------------------- sizes

    def painted_size(self, size: Size) -> Size:
        """(height, width) at which an image of (height, width) `size` is painted again (its VAE transform)."""
        return fitted_size(size, self.vae_sides, self.stride)

    def seen_size(self, size: Size) -> Size:
        """(height, width) at which the tower sees a picture of `size` that has the size of its painting.

        Raises `RefineError` where that is more than it can see.
        """
        seen, most = fitted_size(size, self.vit_sides, self.bagel.vit.patch_size), self.bagel.vit.image_size
        if max(seen) > most:
            raise RefineError(
                f"vit_sides {self.vit_sides!r}: a picture of {size[1]}x{size[0]} is seen at {seen[1]}x{seen[0]}, "
                f"the tower sees sides of up to {most}; give smaller ones"
            )
        return seen

    def grid(self, size: Size) -> Size:
        """(rows, columns) of latent tokens of a painting."""
        return size[0] // self.stride, size[1] // self.stride

    # ---------------------------------------------------------------------------------------------------- parameters

    def init(self, key: jax.Array, names: Sequence[str] = NETWORKS) -> dict[str, Any]:
        """Random parameters of the named networks, in their logical boxes."""
        cfg = self.bagel
        text = bagel.segment(2, count=2, segment=0, position=0, causal=True)
        image = bagel.segment(1, count=1, segment=1, position=2)
        target = bagel.segment(1, count=1, segment=2, position=3, noisy=True)
        zero = jnp.zeros((1, 1), jnp.int32)
        patches = jnp.zeros((1, 1, 1, cfg.vit.patch_dim))
        makers = {
            "bagel": lambda k: Bagel(cfg).init(
                k,
                jnp.zeros((1, 2), jnp.int32),
                text,
                patches,
                zero[None],
                image,
                jnp.zeros((1, 1, cfg.latent_dim)),
                jnp.zeros(1),
                zero,
                target,
            ),
            "vae": lambda k: FluxVAE(self.vae).init(k, jnp.zeros((1, self.stride, self.stride, 3))),
        }
        return {name: makers[name](k)["params"] for name, k in zip(names, jax.random.split(key, len(names)))}

    def abstract(self, names: Sequence[str] = NETWORKS) -> dict[str, Any]:
        """Shapes and dtypes of the parameters, plain trees of `jax.ShapeDtypeStruct`."""
        return meta.unbox(self.boxed(names))

    def boxed(self, names: Sequence[str] = NETWORKS) -> dict[str, Any]:
        """`abstract` with each parameter in its logical box, as `parallel.param_shardings` takes it."""
        return param_shapes(self, NETWORKS, names)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def fitted_size(size: Size, sides: Size, stride: int) -> Size:
    """(height, width), multiples of `stride`, with longest and shortest side within `sides` where both can be.

    As `MaxLongEdgeMinShortEdgeResize`: never enlarged but to reach the shortest side; the longest side wins.
    """
    longest, shortest = sides

    def scaled(size: Size, scale: float) -> Size:
        return tuple(max(stride, round(round(side * scale) / stride) * stride) for side in size)

    scale = max(min(longest / max(size), 1.0), shortest / min(size))
    fitted = scaled(size, scale)
    if math.prod(fitted) > _MAX_PIXELS:
        fitted = scaled(fitted, _MAX_PIXELS / math.prod(fitted))
    if max(fitted) > longest:
        fitted = scaled(fitted, longest / max(fitted))
    return fitted


# ------------------------------------------------------------------------------------------------------------ the texts


class Marks(NamedTuple):
    """Token ids around a text and around an image."""

    text_start: int
    text_end: int
    image_start: int
    image_end: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Marks":
        """From a tokenizer (`prompts.load_tokenizer`). Raises `RefineError` for one that lacks them."""
        # The whole vocabulary takes a fifth of a second to hand over.
        known = tokenizer.token_to_id if hasattr(tokenizer, "token_to_id") else tokenizer.get_vocab().get
        ids = {name: known(name) for name in MARKS}
        absent = [name for name, found in ids.items() if found is None]
        if absent:
            raise RefineError(f"tokenizer: has no {', '.join(absent)}; use the one of the model's folder")
        return cls(*ids.values())


def text_ids(tokenizer: Any, text: str) -> np.ndarray:
    """`<|im_start|>` text `<|im_end|>` as ids `[L] int32`. Raises `RefineError` where the text spells a mark itself."""
    spelled = [mark for mark in MARKS if mark in text]
    if spelled:
        raise RefineError(f"prompt: {spelled[0]} is reserved; take it out of the text")
    marks = Marks.of(tokenizer)
    return np.array([marks.text_start, *prompts.encode_text(tokenizer, text), marks.text_end], np.int32)


# ------------------------------------------------------------------------------------------------------------ the image


def painted(picture: Array, box: Array | None, size: Size) -> jax.Array:
    """The part of a picture `[H, W, 3] uint8` in `box [4]`, at `size`: `[h, w, 3] float32` in 0…255, whole numbers."""
    if box is None and tuple(picture.shape[:2]) == tuple(size):
        return jnp.asarray(picture, jnp.float32)
    return resample(picture, box, size, "bicubic", quantize=True)


def encode_images(model: BagelModel, variables: Mapping[str, Any], pixels: Array, key: jax.Array) -> jax.Array:
    """Latent tokens `[B, N, p·p·C] float32` of pictures `[B, h, w, 3]` in 0…255: a sample, as the authors take.

    key: one, or one a picture `[B]`.
    """
    vae = lambda x: FluxVAE(model.vae).apply({"params": variables["vae"]}, x, method="encode")
    mean, log_variance = (x.astype(jnp.float32) for x in each_row(vae, conditioning.to_signed(pixels)))
    draw = lambda key, like: jax.random.normal(key, like.shape, jnp.float32)
    noise = jax.vmap(draw)(key, mean) if key.ndim else draw(key, mean)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    return bagel.patchify(normalize(z, model.vae), model.bagel)


def decode_latents(model: BagelModel, variables: Mapping[str, Any], tokens: Array, size: Size) -> jax.Array:
    """Latent tokens `[B, N, p·p·C]` -> whole pixels 0…255 `[B, h, w, 3] float32`; fractions are cut off, as the
    authors' conversion does."""
    z = denormalize(bagel.unpatchify(tokens, model.grid(size), model.bagel), model.vae)
    vae = lambda z: FluxVAE(model.vae).apply({"params": variables["vae"]}, z, method="decode")
    image = each_row(vae, z).astype(jnp.float32)
    return jnp.floor(jnp.clip(image * 0.5 + 0.5, 0.0, 1.0) * 255.0)


# ----------------------------------------------------------------------------------------------------------- the prefix


class Context(NamedTuple):
    """What the denoising sees: R = contexts x B rows, context by context; position `[R] int32` of the target."""

    cache: Cache | None
    position: jax.Array


class LatentImage(NamedTuple):
    """Clean latent tokens `[B, N, p·p·C]` of an image of grid (rows, columns)."""

    tokens: Array
    grid: Size


class Prompt(NamedTuple):
    """Texts padded at the right: ids `[B, L] int32`, count `[B] int32`."""

    ids: Array
    count: Array


def read_prefix(
    model: BagelModel,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    marks: Marks,
    system: Prompt | None,
    pixels: Array | None,
    prompt: Prompt,
    *,
    drop_text: bool,
    drop_image: bool,
    latents: LatentImage | None = None,
) -> Context:
    """Reads [system][image][prompt] once and gives the contexts of the guidance: whole, without the prompt, without
    the image (`inferencer.interleave_inference`).

    system: None where there is no image; pixels: `[B, h, w, 3]` in 0…255 as the tower sees them, None where there is
    none; latents: of the same image, read before the tower's view where the model is conditioned on them too (as the
    editing models, and the paper's ablation). drop_text, drop_image: which of the two further contexts are wanted.
    """
    cfg = model.bagel
    network, collections = Bagel(cfg), {"params": variables["bagel"], "lora": lora.get("bagel", {})}
    rows = prompt.ids.shape[0]

    def read(module: Bagel) -> list[tuple[Cache | None, jax.Array]]:
        cache, position, order = None, jnp.zeros(rows, jnp.int32), 0

        def text(words: Prompt, cache: Cache | None, position: jax.Array, order: int) -> Cache:
            where = bagel.segment(words.ids.shape[1], count=words.count, segment=order, position=position, causal=True)
            return module.decode(module.text_embeddings(words.ids), where, cache=cache, keep=True)[2]

        def image(seen: Any, latent: Any, cache: Cache | None, position: jax.Array, order: int) -> Cache:
            und, und_where, gen_where = _between_marks(module, marks, seen, latent, position, order)
            return module.decode(und, und_where, latent, gen_where, cache=cache, keep=True, uniform=True)[2]

        if system is not None:
            cache = text(system, cache, position, order)
            position, order = position + system.count, order + 1
        without_image, image_free = cache, position
        if latents is not None:
            ids = jnp.broadcast_to(bagel.latent_position_ids(latents.grid, cfg), latents.tokens.shape[:2])
            clean = module.latent_tokens(latents.tokens, jnp.zeros(rows), ids)
            cache = image(None, clean, cache, position, order)
            position, order = position + 1, order + 1
        if pixels is not None:
            patches = siglip.pixels_to_patches(pixels, cfg.vit)
            side = cfg.vit.patch_size
            ids = siglip.position_ids(pixels.shape[1] // side, pixels.shape[2] // side, cfg.vit)
            features = module.vit_tokens(
                patches, jnp.broadcast_to(ids, patches.shape[:2]), jnp.ones(patches.shape[:2], bool)
            )
            cache = image(features, None, cache, position, order)
            position, order = position + 1, order + 1
        before, before_position = cache, position
        whole = text(prompt, cache, position, order)
        parts = [(whole, position + prompt.count)]
        if drop_text:
            parts.append((before, before_position))
        if drop_image:
            parts.append((text(prompt, without_image, image_free, order), image_free + prompt.count))
        return parts

    parts = network.apply(collections, method=read)
    return Context(_stack([cache for cache, _ in parts]), jnp.concatenate([position for _, position in parts]))


def _between_marks(
    module: Bagel, marks: Marks, seen: Any, latent: Any, position: jax.Array, order: int, noisy: bool = False
) -> tuple[jax.Array, Segments, Segments | None]:
    """The segment of an image: its two marks, which are text, with its features `seen` or its `latent` tokens between.

    Returns the "und" tokens, and what the tokens of both streams are.
    """
    rows = position.shape[0]
    part = lambda size: bagel.segment(size, count=size, segment=order, position=position, noisy=noisy)
    und = module.text_embeddings(
        jnp.broadcast_to(jnp.array([marks.image_start, marks.image_end], jnp.int32), (rows, 2))
    )
    if seen is not None:  # no order within an image: the marks may stand side by side
        und = jnp.concatenate([und, seen.astype(und.dtype)], axis=1)
    return und, part(und.shape[1]), None if latent is None else part(latent.shape[1])


def _stack(caches: Sequence[Cache | None]) -> Cache | None:
    """Caches of several contexts as rows of one; shorter ones are padded with tokens that nobody sees."""
    held = [cache for cache in caches if cache is not None]
    if not held:
        return None
    longest = max(cache.key.shape[2] for cache in held)
    empty = jax.tree.map(lambda x: x[:, :0] if x.ndim == 2 else x[:, :, :0], held[0])
    padded = [bagel.reserve(c, longest - c.key.shape[2]) for c in (empty if c is None else c for c in caches)]
    return Cache(
        jnp.concatenate([c.key for c in padded], axis=1),
        jnp.concatenate([c.value for c in padded], axis=1),
        jax.tree.map(lambda *x: jnp.concatenate(x), *(c.segments for c in padded)),
    )


# -------------------------------------------------------------------------------------------------------- the denoising


def time_grid(steps: int, shift: float) -> np.ndarray:
    """`[steps] float32`: linspace(1, 0) shifted; steps - 1 updates lead through it. Raises `RefineError` below 2."""
    if steps < 2:
        raise RefineError(f"steps {steps}: give 2 or more; they are the points of the time grid")
    return flow.shift_sigma(np.linspace(1.0, 0.0, steps), shift).astype(np.float32)


def velocities(
    model: BagelModel,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    marks: Marks,
    context: Context,
    tokens: Array,
    t: Array,
    grid: Size,
    order: int = 8,
) -> jax.Array:
    """The velocity of noisy latent tokens `[B, N, p·p·C]` at time t (scalar) in each context: `[R, N, p·p·C] float32`.

    order: of the target's segment; after everything that was read.
    """
    cfg = model.bagel
    repeat = context.position.shape[0] // tokens.shape[0]

    def predict(module: Bagel) -> jax.Array:
        ids = jnp.broadcast_to(bagel.latent_position_ids(grid, cfg), tokens.shape[:2])
        latent = module.latent_tokens(tokens, jnp.full(tokens.shape[0], t), ids)
        latent = jnp.tile(latent, (repeat, 1, 1))  # the same picture in every context
        und, und_where, gen_where = _between_marks(module, marks, None, latent, context.position, order, noisy=True)
        _, hidden, _ = module.decode(und, und_where, latent, gen_where, cache=context.cache, uniform=True)
        return module.velocity(hidden)

    return Bagel(cfg).apply({"params": variables["bagel"], "lora": lora.get("bagel", {})}, method=predict)


def guided_spans(times: np.ndarray, interval: tuple[float, float]) -> list[tuple[bool, int, int]]:
    """Runs of updates [first, last) that are (not) guided: an update is where lo < t <= hi at its beginning."""
    lo, hi = interval
    inside = (times[:-1] > lo) & (times[:-1] <= hi)
    borders = [0, *(np.flatnonzero(np.diff(inside.astype(int))) + 1).tolist(), len(inside)]
    return [(bool(inside[a]), a, b) for a, b in zip(borders, borders[1:])]


def first_rows(context: Context, rows: int) -> Context:
    """The first context alone."""
    cache = context.cache
    if cache is not None:
        segments = jax.tree.map(lambda x: x[:rows], cache.segments)
        cache = Cache(cache.key[:, :rows], cache.value[:, :rows], segments)
    return Context(cache, context.position[:rows])


class Guidance(NamedTuple):
    """How the denoising is led: times `[steps] float32` (`time_grid`) and interval are static; text_cfg, image_cfg
    `[B]` or None, where the context is not there; renorm and renorm_min as in `flow.dual_cfg`."""

    times: np.ndarray
    text_cfg: Array | None
    image_cfg: Array | None
    renorm: str
    renorm_min: float
    interval: tuple[float, float]


def paint(
    model: BagelModel,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    marks: Marks,
    context: Context,
    noise: Array,
    grid: Size,
    guidance: Guidance,
    report: Callable[[Any], None] | None = None,
) -> jax.Array:
    """Euler's steps from latent noise `[B, N, p·p·C]` (t = 1) to latent tokens (t = 0), float32.

    context: of `read_prefix`, with the contexts that `guidance` has scales for. report: called with the number of
    finished updates; None costs nothing.
    """
    rows = noise.shape[0]
    times = jnp.asarray(guidance.times)
    x = jnp.asarray(noise, jnp.float32)
    for guided, first, last in guided_spans(guidance.times, guidance.interval):
        if guidance.text_cfg is None:
            guided = False
        seen = context if guided else first_rows(context, rows)

        def update(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            t, following = times[index], times[index + 1]
            v = velocities(model, variables, lora, marks, seen, x, t, grid)  # noqa: B023
            if guided:  # noqa: B023
                v, *dropped = jnp.split(v, v.shape[0] // rows)
                # Where there is no image, nothing changes without it.
                unseen = None if guidance.image_cfg is None else (*dropped, v)[1]
                v = flow.dual_cfg(
                    v, dropped[0], unseen, guidance.text_cfg, guidance.image_cfg, guidance.renorm, guidance.renorm_min
                )
            if report is not None:
                jax.debug.callback(report, index + 1)
            return flow.euler_step(x, v, t, following), None

        x, _ = jax.lax.scan(update, x, jnp.arange(first, last))
    return x
