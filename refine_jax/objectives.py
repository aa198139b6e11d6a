"""What can be trained: the VAE, and the refinement flow with its boundary-weighted loss.

An objective is a value that the trainer (`refine_jax.train`) drives; `make` builds the one that a configuration names.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from refine_jax import checkpoint, conditioning, flow, losses, prompts
from refine_jax.data import loader
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig, encode_images, encode_prompts, velocity
from refine_jax.models.layers import rotary_frequencies
from refine_jax.models.mmdit import MMDiTConfig, stack_blocks
from refine_jax.models.qwen_vae import QwenVAE, VAEConfig


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained.

    init(key) -> trainable variables in their logical boxes; frozen: arrays that the loss only reads;
    loss(params, frozen, batch, key) -> (scalar float32, dict of scalars float32); batches() -> an iterator, with
    get_state, set_state and close, of dicts of numpy arrays whose leading axis is this host's part of the batch;
    export(params, frozen, folder) writes the model folder.
    """

    init: Callable[[jax.Array], Any]
    frozen: Any
    loss: Callable[[Any, Any, dict, jax.Array], tuple[jax.Array, dict]]
    batches: Callable[[], Iterator]
    export: Callable[[Any, Any, Path], None]


def make(config: ml_collections.ConfigDict) -> Objective:
    """The objective that `config.objective` names. Raises `RefineError` for an unknown one."""
    known = {"vae": vae_objective, "refine": refine_objective}
    if config.objective not in known:
        raise RefineError(f"objective {config.objective!r}: choose one of {', '.join(known)}")
    try:
        return known[config.objective](config)
    except (TypeError, AttributeError, KeyError) as error:  # a field too many or too few
        raise RefineError(
            f"configuration of the objective {config.objective!r}: {' '.join(str(error).split())}"
        ) from error


# ------------------------------------------------------------------------------------------------------------- VAE


def vae_objective(config: ml_collections.ConfigDict) -> Objective:
    """Reconstruction (squared and edge error) with a small KL term.

    loss = mse + edge·|∇x − ∇x̂| + kl·KL(q(z|x) ‖ N(0, 1)), means over elements, x in −1…1, ∇ forward differences. The
    export measures the latents' mean and standard deviation, a channel each, over `config.statistics_batches` batches.
    """
    vae_config = VAEConfig(**config.vae.to_dict())
    vae = QwenVAE(vae_config)
    data = config.data

    def batches(seed: int) -> Iterator:
        hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
        return loader.vae_batches(seed, config.batch_size, data.size, "train", workers=data.workers, **hosts)

    def init(key: jax.Array) -> Any:
        return vae.init(key, jnp.zeros((1, data.size, data.size, 3), jnp.float32))["params"]

    def loss(params: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        x = conditioning.to_signed(batch["image"])
        mean, log_variance = vae.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
        y = vae.apply({"params": params}, z, clip=False, method="decode")
        error = x - y
        mse = jnp.mean(jnp.square(error))
        edge = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        return mse + config.edge * edge + config.kl * kl, {"mse": mse, "edge": edge, "kl": kl}

    def export(params: Any, frozen: Any, folder: Path) -> None:
        @jax.jit
        def sample(x: jax.Array, key: jax.Array) -> jax.Array:
            mean, log_variance = vae.apply({"params": params}, x, method="encode")
            return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)

        # Of samples, not of means: a channel that carries nothing keeps its small mean, instead of being blown up to
        # the scale of the others.
        with contextlib.closing(batches(config.seed + 1)) as iterator:
            keys = jax.random.split(jax.random.key(config.seed + 1), config.statistics_batches)
            z = [sample(conditioning.to_signed(next(iterator)["image"]), key) for key in keys]
        z = np.concatenate([np.asarray(v, np.float64).reshape(-1, vae_config.z_dim) for v in z])
        measured = dataclasses.replace(
            vae_config,
            latents_mean=tuple(round(float(v), 5) for v in z.mean(0)),
            latents_std=tuple(round(float(v), 5) for v in z.std(0)),
        )
        checkpoint.save_model(folder, {"vae": dataclasses.asdict(measured)}, {"vae": params})

    return Objective(init, {}, loss, lambda: batches(config.seed), export)


# ----------------------------------------------------------------------------------------------- boundary-weighted flow


def refine_objective(config: ml_collections.ConfigDict) -> Objective:
    """RefineAnything's objective: rectified flow, its velocity error weighted up at the mask's border.

    x_σ = (1−σ)·z0 + σ·ε, v = ε − z0, L = mean over locations of ‖v̂ − v‖²·(1 + α·B_c) / channels (`losses`). The VAE is
    frozen (`config.vae_from`, a model folder); the vision-language encoder is trained along where
    `config.train_encoder` is set, otherwise it is frozen and comes from that folder too.
    """
    manifest = checkpoint.read_manifest(config.vae_from)
    if "vae" not in manifest:
        raise RefineError(f"vae_from {config.vae_from!r}: holds no VAE; train one with configs/tiny_vae.py")
    model = ModelConfig.from_manifest({**config.model.to_dict(), "vae": manifest["vae"]})
    parts = ("vae",) if config.train_encoder else ("vae", "vl")
    frozen = checkpoint.load_weights(config.vae_from, model.abstract(parts))
    data = config.data

    def batches() -> Iterator:
        pairs = loader.refine_batches(
            seed=config.seed,
            batch_size=config.batch_size,
            buckets=[tuple(bucket) for bucket in data.buckets],
            weights=tuple(data.weights),
            split="train",
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=data.workers,
        )
        return _Prompted(pairs, model, data.text_length, config.instruction_dropout, config.seed)

    def init(key: jax.Array) -> Any:
        names = ("mmdit", "vl") if config.train_encoder else ("mmdit",)
        params = model.init(key, names)
        if config.aligned_heads:
            params["mmdit"] = aligned_heads(params["mmdit"], model.mmdit, config.aligned_heads)
        return params

    def loss(params: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        variables = {**frozen, **params}
        k_sigma, k_noise = jax.random.split(key)
        mask_image = jnp.repeat(batch["mask"][..., None], 3, axis=-1)
        images, present = [batch["image"], batch["reference"], mask_image], [None, batch["has_reference"], None]
        z0, *latents = encode_images(model, variables, [batch["target"], *images])
        grid = z0.shape[1:3]
        context = conditioning.image_tokens(grid, latents, present)
        look = jax.vmap(lambda image: conditioning.view(image, None, model.vl_sizes(image.shape[1] / image.shape[0])))
        [(text, text_mask)] = encode_prompts(model, variables, {}, [batch["prompt"]], [look(image) for image in images])
        sigma = flow.sample_sigma(k_sigma, (z0.shape[0],), config.sigma.distribution, shift=config.sigma.shift)
        noise = jax.random.normal(k_noise, z0.shape, jnp.float32)
        x = flow.pack_latents(flow.noise_latents(z0, noise, sigma))
        prediction = velocity(model, variables, {}, x, sigma, context, text, text_mask)
        target = flow.pack_latents(flow.velocity_target(z0, noise))
        b = config.boundary
        band = losses.to_latent_grid(losses.boundary_band(batch["mask"], b.r_out, b.r_in), grid)
        region = losses.to_latent_grid(batch["mask"] > 0, grid)
        total, parts = losses.boundary_weighted_loss(prediction, target, band, region, alpha=b.alpha)
        channels = z0.shape[-1]
        return total / channels, {name: part / channels for name, part in parts.items()}

    def export(params: Any, frozen: Any, folder: Path) -> None:
        trees = {**frozen, **params}
        scanned = dataclasses.replace(model, mmdit=dataclasses.replace(model.mmdit, scan=True, remat=None))
        if not model.mmdit.scan:
            trees["mmdit"] = stack_blocks(trees["mmdit"])
        model.byte_tokenizer(folder / "tokenizer")
        checkpoint.save_model(folder, scanned.to_manifest(), trees)

    return Objective(init, frozen, loss, batches, export)


def aligned_heads(params: Any, config: MMDiTConfig, frames: Sequence[int]) -> Any:
    """An initialisation for training from scratch: head k of every block looks at the same place `frames[k]` frames on.

    The biases of queries and keys outweigh their content, so that after the norm and the rotary embedding a score falls
    with the distance alone: where to copy from need not be found. Values only: the architecture is untouched. `params`:
    the MMDiT's, in their logical boxes, blocks not scanned.
    """
    if config.scan:
        raise RefineError("aligned_heads: needs model.mmdit.scan=False")
    if min(config.axes_dims_rope[1:]) < 6:
        raise RefineError(f"aligned_heads: axes_dims_rope {config.axes_dims_rope} has too few pairs; give 6 or more")
    if len(frames) > config.num_attention_heads:
        raise RefineError(f"aligned_heads: {len(frames)} frames for {config.num_attention_heads} heads")
    depth = config.attention_head_dim
    weight, angle, first = np.zeros(depth // 2), np.zeros(depth // 2), 0
    for axis, (dim, pairs) in enumerate(zip(config.axes_dims_rope, (1, 3, 3))):
        weight[first : first + pairs] = (0.25, 0.375, 0.375)[axis] / pairs  # the fastest turning pairs of the axis
        angle[first : first + dim // 2] = rotary_frequencies(dim) if axis == 0 else 0.0
        first += dim // 2
    size = 3.0 * np.sqrt(weight * depth)
    sharp = np.where(np.repeat(weight, 2) > 0, 2.0, 1.0).astype(np.float32)
    pattern = lambda turn: np.stack([size * np.cos(turn), size * np.sin(turn)], axis=-1).reshape(-1)
    heads = len(frames) * depth
    query = np.concatenate([pattern(frame * angle) for frame in frames]).astype(np.float32)
    key = np.tile(pattern(0.0 * angle), len(frames)).astype(np.float32)
    params = jax.tree.map(lambda x: x, params)
    for name in [name for name in params if name.startswith("blocks_")]:
        attention = params[name]["attn"]
        for kind, bias in (("q", query), ("k", key)):
            dense, norm = attention[f"to_{kind}"], attention[f"norm_{kind}"]
            dense["bias"] = dense["bias"].replace_boxed(dense["bias"].unbox().at[:heads].set(bias))
            dense["kernel"] = dense["kernel"].replace_boxed(dense["kernel"].unbox().at[:, :heads].multiply(0.3))
            norm["scale"] = norm["scale"].replace_boxed(norm["scale"].unbox() * sharp)
    return params


class _Prompted:
    """The pairs of `loader.refine_batches` with tokenised instructions under "prompt" in place of their bytes.

    An instruction is replaced by the model's negative prompt with probability `dropout`, by a draw that depends on the
    seed, the position and the row alone.
    """

    def __init__(self, pairs: Any, model: ModelConfig, length: int, dropout: float, seed: int):
        self._pairs, self._model, self._length, self._dropout, self._seed = pairs, model, length, dropout, seed
        self._tokenizer = model.byte_tokenizer()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> dict[str, Any]:
        step = self._pairs.get_state()["step"]
        batch = dict(next(self._pairs))
        model = self._model
        grid = model.vl_grid(batch["image"].shape[2] / batch["image"].shape[1])
        draws = np.random.default_rng([self._seed, step, jax.process_index()]).random(len(batch["instruction"]))
        texts = [loader.decode_instruction(row) for row in batch.pop("instruction")]
        texts = [model.negative_prompt if draw < self._dropout else text for draw, text in zip(draws, texts)]
        encoded = [self._encode(text, grid, here) for text, here in zip(texts, batch["has_reference"].tolist())]
        batch["prompt"] = vars(prompts.pad_prompts(encoded, self._length))
        del batch["is_logo"]
        return batch

    def _encode(self, text: str, grid: tuple[int, int], has_reference: bool) -> prompts.TokenizedPrompt:
        """A prompt of at most the batch's length: a longer instruction (a logo of many words) loses its end."""
        merge, present = self._model.vl.vision.spatial_merge_size, [True, has_reference, True]
        while True:
            encoded = prompts.encode_prompt(self._tokenizer, self._model.prompt, text, [grid] * 3, merge, present)
            if len(encoded) <= self._length or not text:
                return encoded
            text = text[: -max(1, (len(encoded) - self._length) // 4)]

    def get_state(self) -> dict[str, Any]:
        """The pairs' position."""
        return self._pairs.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a position that `get_state` gave."""
        self._pairs.set_state(state)

    def close(self) -> None:
        """End the pairs' worker processes."""
        self._pairs.close()
