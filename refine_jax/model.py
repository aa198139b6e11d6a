"""A whole model: the configurations of its three networks with all that a checkpoint decides, and how they compose.

What the sampler (`refine_programs`) and the trainer (`objectives`) both do to arrays stands here, once.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from refine_jax import conditioning, prompts
from refine_jax.bagel import BagelModel
from refine_jax.conditioning import CONDITIONINGS, Pictures
from refine_jax.errors import RefineError
from refine_jax.flow import SchedulerConfig
from refine_jax.focus import FOCUS_MARGIN, bucket_size
from refine_jax.models.layers import each_row, param_shapes
from refine_jax.models.mmdit import MMDiT, MMDiTConfig
from refine_jax.models.qwen_vae import QwenVAE, VAEConfig, denormalize, normalize
from refine_jax.models.qwen_vl import (
    QwenVL,
    QwenVLConfig,
    TextConfig,
    VisionConfig,
    merged_tokens,
    patch_grid,
    pixels_to_patches,
    vl_image_size,
)
from refine_jax.prompts import EDIT_PLUS, PromptTemplate

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything about a checkpoint but its weights; hashable, so that it is a static argument of compiled programs.

    vae_area, condition_area: pixels at which the VAE and the encoder look at an image; multiple: what the sides of
    those sizes are multiples of. margin: of the focus crop, in pixels of a picture scaled to `focus.FOCUS_AREA`. steps,
    true_cfg_scale, negative_prompt: the sampler's defaults. conditioning: what the backbone is shown, a name of
    `conditioning.CONDITIONINGS`: "refine" (a region of a picture) or "rvr" (a picture, regenerated whole).
    """

    mmdit: MMDiTConfig = MMDiTConfig(zero_cond_t=True)
    vae: VAEConfig = VAEConfig()
    vl: QwenVLConfig = QwenVLConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    prompt: PromptTemplate = EDIT_PLUS
    vae_area: int = 1024 * 1024
    condition_area: int = 384 * 384
    multiple: int = 32
    margin: float = FOCUS_MARGIN
    steps: int = 40
    true_cfg_scale: float = 4.0
    negative_prompt: str = " "
    conditioning: str = "refine"

    def __post_init__(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            raise RefineError(f"conditioning {self.conditioning!r}: choose one of {', '.join(CONDITIONINGS)}")
        if self.mmdit.in_channels != self.vae.z_dim * self.mmdit.patch_size**2:
            raise RefineError(
                f"model: mmdit.in_channels {self.mmdit.in_channels} is not vae.z_dim {self.vae.z_dim} x patch_size²"
            )
        if self.mmdit.joint_attention_dim != self.vl.text.hidden_size:
            raise RefineError(
                f"model: mmdit.joint_attention_dim {self.mmdit.joint_attention_dim} is not the encoder's hidden_size"
                f" {self.vl.text.hidden_size}"
            )
        if self.multiple % (self.vae.spatial_ratio * self.mmdit.patch_size):
            raise RefineError(f"model: multiple {self.multiple} does not fit the VAE's ratio and the patch size")
        for name in ("vae_area", "condition_area"):
            if getattr(self, name) < self.multiple**2:
                raise RefineError(f"{name} {getattr(self, name)}: give at least {self.multiple**2} pixels")

    # --------------------------------------------------------------------------------------------------- the manifest

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], **overrides: Any) -> "ModelConfig":
        """From the JSON of a model folder. Raises `RefineError` for a missing network or an unknown field."""
        kinds = {"mmdit": MMDiTConfig, "vae": VAEConfig, "scheduler": SchedulerConfig, "prompt": PromptTemplate}
        own = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for name, value in manifest.items():
            if name in ("format", "about", "source"):
                continue
            if name not in own:
                raise RefineError(f"model manifest: unknown field {name!r}; written by a newer version?")
            try:
                if name in kinds:
                    values[name] = kinds[name](**{k: _frozen(v) for k, v in value.items()})
                elif name == "vl":
                    halves = {"vision": VisionConfig, "text": TextConfig}
                    values[name] = QwenVLConfig(
                        **{
                            k: halves[k](**{a: _frozen(b) for a, b in v.items()}) if k in halves else v
                            for k, v in value.items()
                        }
                    )
                else:
                    values[name] = value
            except (AttributeError, TypeError) as error:
                raise RefineError(f"model manifest: {name}: {error}") from None
        missing = [name for name in ("mmdit", "vae", "vl") if name not in values]
        if missing:
            raise RefineError(f"model manifest: holds no {', '.join(missing)}; train or convert the whole model")
        return cls(**{**values, **{k: v for k, v in overrides.items() if v is not None}})

    def to_manifest(self) -> dict[str, Any]:
        """The inverse of `from_manifest`: plain JSON values."""
        return dataclasses.asdict(self)

    # -------------------------------------------------------------------------------------------------- conditioning

    @property
    def pictures(self) -> Pictures:
        """Which pictures the encoder reads, and which the VAE sees."""
        return CONDITIONINGS[self.conditioning]

    def require(self, purpose: str, *kinds: str) -> None:
        """Raises `RefineError` unless `conditioning` is one of `kinds`. purpose: who asks, for the message."""
        if self.conditioning not in kinds:
            other = "regenerate pictures" if self.conditioning != "refine" else "refine regions"
            raise RefineError(
                f"{purpose}: this model has conditioning {self.conditioning!r} (it was made to {other}), "
                f"{' or '.join(map(repr, kinds))} is wanted; load another model"
            )

    # --------------------------------------------------------------------------------------------------------- sizes

    def vae_size(self, ratio: float) -> Size:
        """(height, width) at which the VAE sees an image of aspect `ratio` = width / height."""
        return bucket_size(self.vae_area, ratio, self.multiple)

    def vl_sizes(self, ratio: float) -> tuple[Size, Size]:
        """(height, width) of the two resizings on the way into the encoder: the pipeline's, then the processor's."""
        first = bucket_size(self.condition_area, ratio, self.multiple)
        return first, vl_image_size(*first, factor=self.vl.vision.factor)

    def vl_grid(self, ratio: float) -> Size:
        """(rows, columns) of the encoder's patches for an image of aspect `ratio`."""
        return patch_grid(*self.vl_sizes(ratio)[1], self.vl.vision)

    def latent_size(self, size: Size) -> Size:
        """Latent (height, width) of an image of `size`."""
        return size[0] // self.vae.spatial_ratio, size[1] // self.vae.spatial_ratio

    # ---------------------------------------------------------------------------------------------------- parameters

    def init(self, key: jax.Array, names: Sequence[str] = ("mmdit", "vae", "vl")) -> dict[str, Any]:
        """Random parameters of the named networks, in their logical boxes."""
        side, vision = self.multiple, self.vl.vision
        image = jnp.zeros((1, side, side, 3), jnp.float32)
        n = (side // self.vae.spatial_ratio // self.mmdit.patch_size) ** 2
        ids = jnp.full((1, 2), self.vl.image_token_id, jnp.int32)
        positions = jnp.zeros((1, 2, 3), jnp.int32)
        grid = (vision.spatial_merge_size,) * 2
        patches = [jnp.zeros((1, grid[0] * grid[1], vision.patch_dim), jnp.float32)]
        index = jnp.zeros((1, 2), jnp.int32)
        makers = {
            "vae": lambda k: QwenVAE(self.vae).init(k, image),
            "mmdit": lambda k: MMDiT(self.mmdit).init(
                k,
                jnp.zeros((1, n, self.mmdit.in_channels)),
                jnp.zeros((1, 2, self.mmdit.joint_attention_dim)),
                jnp.ones(1),
                jnp.zeros((1, n, 3), jnp.int32),
                jnp.zeros((1, 2), jnp.int32),
                target_length=n,
            ),
            "vl": lambda k: QwenVL(self.vl).init(k, ids, ids > 0, positions, patches, index, grids=[grid]),
        }
        return {name: makers[name](k)["params"] for name, k in zip(names, jax.random.split(key, len(names)))}

    def abstract(self, names: Sequence[str] = ("mmdit", "vae", "vl")) -> dict[str, Any]:
        """Shapes and dtypes of the parameters, plain trees of `jax.ShapeDtypeStruct`."""
        return meta.unbox(self.boxed(names))

    def boxed(self, names: Sequence[str] = ("mmdit", "vae", "vl")) -> dict[str, Any]:
        """`abstract` with each parameter in its logical box, as `parallel.param_shardings` takes it."""
        return param_shapes(self, ("mmdit", "vae", "vl", "multiple"), names)

    def fit_prompt(
        self,
        tokenizer: Any,
        text: str,
        grids: Sequence[Size],
        present: Sequence[bool],
        length: int,
        cut: Callable[[int, int], Any] = lambda tokens, most: None,
    ) -> prompts.TokenizedPrompt:
        """A prompt of at most `length` tokens, for training: a longer instruction loses its end.

        grids, present: as in `prompts.encode_prompt`. cut: called, where it does, with the tokens of the whole prompt
        and the most that the model reads. Raises `RefineError` where the pictures alone are too long.
        """
        merge = self.vl.vision.spatial_merge_size
        most = self.prompt.drop_tokens + self.prompt.max_tokens
        given, length = length, min(length, most)
        without_limit = dataclasses.replace(self.prompt, max_tokens=2**31)
        encode = lambda text: prompts.encode_prompt(tokenizer, without_limit, text, grids, merge, present)
        encoded = encode(text)
        if len(encoded) > length:
            cut(len(encoded), most)
        while len(encoded) > length:
            if not text:
                remedy = "give more" if given < most else f"the model reads {most} at most, take smaller views"
                raise RefineError(
                    f"data.text_length {given}: template and pictures alone take {len(encoded)} tokens; {remedy}"
                )
            text = text[: -max(1, (len(encoded) - length) // 4)]
            encoded = encode(text)
        return encoded

    @staticmethod
    def byte_tokenizer(folder: str | Path | None = None, texts: Iterable[str] = (), merges: int = 0) -> Any:
        """`prompts.byte_tokenizer`, that of the tiny models, written to `folder` (default: nowhere that stays)."""
        if folder is not None:
            return prompts.byte_tokenizer(folder, texts, merges)
        with tempfile.TemporaryDirectory() as temporary:
            return prompts.byte_tokenizer(temporary, texts, merges)


# The released models, by their names: what a configuration can be compiled for without their weights.
PUBLISHED: dict[str, "ModelConfig | BagelModel"] = {
    "qwen-image-edit-2509": ModelConfig(mmdit=MMDiTConfig()),
    "qwen-image-edit-2511": ModelConfig(),
    "bagel-7b-mot": BagelModel(),
}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------------------------- composition


def encode_images(model: ModelConfig, variables: Mapping[str, Any], images: Sequence[jax.Array]) -> list[jax.Array]:
    """Normalised latents `[B, h, w, C] float32` of images `[B, H, W, 3]` in 0…255: the mean, not a sample.

    Images of one size run as one batch.
    """
    latents: dict[int, jax.Array] = {}
    for size in dict.fromkeys(image.shape[1:3] for image in images):
        slots = [k for k, image in enumerate(images) if image.shape[1:3] == size]
        x = conditioning.to_signed(jnp.concatenate([images[k] for k in slots]))
        vae = lambda x: QwenVAE(model.vae).apply({"params": variables["vae"]}, x, method="encode")
        mean, _ = each_row(vae, x)
        latents.update(zip(slots, jnp.split(normalize(mean, model.vae), len(slots))))
    return [latents[k] for k in range(len(images))]


def encoded_context(
    model: ModelConfig, encoded: Mapping[str, Any], target: tuple[int, int, int, int]
) -> conditioning.ImageTokens:
    """The condition images of what `objectives.encode` made, for a target of latents (B, h, w, C)."""
    seen = model.pictures.seen
    present = [encoded.get(f"has_{name}") for name in seen]
    latents = [encoded[name].astype(jnp.float32) for name in seen]
    return conditioning.image_tokens(target, latents, present, model.mmdit.patch_size)


def decode_latents(model: ModelConfig, variables: Mapping[str, Any], latents: jax.Array) -> jax.Array:
    """Normalised latents `[B, h, w, C]` -> whole pixels 0…255 `[B, H, W, 3] float32`."""
    vae = lambda z: QwenVAE(model.vae).apply({"params": variables["vae"]}, z, method="decode")
    return conditioning.to_pixels(each_row(vae, denormalize(latents, model.vae)))


def look(
    model: ModelConfig, variables: Mapping[str, Any], lora: Mapping[str, Any], views: Sequence[jax.Array]
) -> list[jax.Array]:
    """What the encoder's tower makes of views `[B, H, W, 3]` in 0…255: tokens `[B, M, D]` of each."""
    if not views:
        return []
    grids = [patch_grid(*view.shape[1:3], model.vl.vision) for view in views]
    patches = [pixels_to_patches(view, model.vl.vision) for view in views]
    collections = {"params": variables["vl"], "lora": lora.get("vl", {})}
    tokens = QwenVL(model.vl).apply(collections, patches, grids, method="image_tokens")
    sizes = [merged_tokens(grid, model.vl.vision.spatial_merge_size) for grid in grids]
    return jnp.split(tokens, np.cumsum(sizes)[:-1], axis=1)


def encode_prompts(
    model: ModelConfig,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    prompts: Sequence[Mapping[str, jax.Array]],
    images: Sequence[jax.Array],
) -> list[tuple[jax.Array, jax.Array]]:
    """Conditioning tokens c = E(X, y) of several prompts about the same images.

    prompts: dicts of ids, mask `[B, L]`, positions `[B, L, 3]`, image_index `[B, L]` (`prompts.PromptBatch`); images:
    the encoder's views `[B, H, W, 3]` in 0…255 (`conditioning.view`), or what `look` made of one, `[B, M, D]`; none
    where no prompt shows any. Returns (tokens `[B, L - dropped, D]`, mask) for each; the pictures are encoded once.
    """
    encoder = QwenVL(model.vl)
    collections = {"params": variables["vl"], "lora": lora.get("vl", {})}
    views = [image for image in images if image.ndim == 4]
    seen = iter(look(model, variables, lora, views))
    pictures = [next(seen) if image.ndim == 4 else image for image in images]
    pictures = jnp.concatenate(pictures, axis=1) if images else None
    dropped = model.prompt.drop_tokens
    encoded = []
    for p in prompts:
        shown = (pictures, p["image_index"]) if images else ()
        hidden = encoder.apply(collections, p["ids"], p["mask"], p["positions"], *shown, method="text")
        encoded.append((hidden[:, dropped:], p["mask"][:, dropped:]))
    return encoded


def velocity(
    model: ModelConfig,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    target: jax.Array,
    sigma: jax.Array,
    context: conditioning.ImageTokens,
    text: jax.Array,
    text_mask: jax.Array,
    block: int | None = None,
) -> Any:
    """The MMDiT's velocity of the packed noisy target `[B, N_t, 4C]` at `sigma [B]`: `[B, N_t, 4C] float32`.

    block: a number of a block that is not scanned; then (velocity, what it makes of the target's tokens `[B, N_t, D]`).
    """
    made = MMDiT(model.mmdit).apply(
        {"params": variables["mmdit"], "lora": lora.get("mmdit", {})},
        jnp.concatenate([target, context.tokens], axis=1),
        text,
        sigma,
        context.positions,
        conditioning.text_positions(context.text_start, text.shape[1]),
        target_length=target.shape[1],
        image_mask=context.mask,
        text_mask=text_mask,
        capture_intermediates=False if block is None else lambda module, _: module.name == f"blocks_{block}",
        mutable=False if block is None else ["intermediates"],
    )
    if block is None:
        return made
    (((_, image), _),) = made[1]["intermediates"][f"blocks_{block}"]["__call__"]
    return made[0], image[:, : target.shape[1]]
